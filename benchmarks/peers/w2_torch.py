"""W2 in PyTorch: `python w2_torch.py training|torchopt|higher params|acts ROUNDS [--small]`."""

import json
import os
import sys
import time
from pathlib import Path

import _problems
import numpy as np
import torch

if hasattr(os, "sched_getaffinity"):
    torch.set_num_threads(len(os.sched_getaffinity(0)))

MOMENTUM = 0.9


def loss(w, batch):
    x, y = batch
    for a, b in zip(w[:-2:2], w[1:-2:2], strict=True):
        x = torch.relu(x @ a + b)
    return torch.nn.functional.cross_entropy(x @ w[-2] + w[-1], y)


def tensors(net, small):
    w, train, val = _problems.w2(net, small)
    w = [torch.from_numpy(x) for pair in w for x in pair]
    train, val = ((torch.from_numpy(x), torch.from_numpy(y).long()) for x, y in (train, val))
    rate = [torch.full_like(x, float(np.log(0.01))).requires_grad_() for x in w]
    decay = torch.tensor(float(np.log(1e-3)), requires_grad=True)
    return w, train, val, rate, decay


def training(w, train, val, rate, decay):
    """Plain training, as cheap as it gets: no graph over the steps."""
    w = [x.clone().requires_grad_() for x in w]
    m = [torch.zeros_like(x) for x in w]
    with torch.no_grad():
        rate, decay = [x.exp() for x in rate], decay.exp()
    for x, y in zip(*train, strict=True):
        g = torch.autograd.grad(loss(w, (x, y)), w)
        with torch.no_grad():
            m = [MOMENTUM * a + b + decay * c for a, b, c in zip(m, g, w, strict=True)]
            w = [a - r * b for a, r, b in zip(w, rate, m, strict=True)]
        w = [x.requires_grad_() for x in w]
    return loss(w, val).item()


def with_torchopt(w, train, val, rate, decay):
    import torchopt

    w = tuple(x.clone().requires_grad_() for x in w)
    rates, factor = [x.exp() for x in rate], decay.exp()
    optimizer = torchopt.sgd(lr=1.0, momentum=MOMENTUM, moment_requires_grad=True)
    state = optimizer.init(w)
    for x, y in zip(*train, strict=True):
        objective = loss(w, (x, y)) + 0.5 * factor * sum((a * a).sum() for a in w)
        g = torch.autograd.grad(objective, w, create_graph=True)
        updates, state = optimizer.update(g, state, params=w, inplace=False)
        scaled = tuple(r * u for r, u in zip(rates, updates, strict=True))
        w = torchopt.apply_updates(w, scaled, inplace=False)
    return torch.autograd.grad(loss(w, val), [*rate, decay])


class Net(torch.nn.Module):
    def __init__(self, w):
        super().__init__()
        self.w = torch.nn.ParameterList([torch.nn.Parameter(x.clone()) for x in w])

    def forward(self, batch):
        return loss(list(self.w), batch)


def with_higher(w, train, val, rate, decay):
    import higher

    net = Net(w)
    groups = [{"params": [p]} for p in net.w]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=MOMENTUM, weight_decay=1e-3)
    traced = {"lr": [x.exp() for x in rate], "weight_decay": [decay.exp()] * len(rate)}
    with higher.innerloop_ctx(net, optimizer, override=traced) as (functional, steps):
        for batch in zip(*train, strict=True):
            steps.step(functional(batch))
        return torch.autograd.grad(functional(val), [*rate, decay])


def peak_growth(run):
    """MiB by which a call raises the resident memory at its peak; NaN where Linux is not."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        run()
        return float("nan")

    def read(field):
        line = next(x for x in status.read_text().splitlines() if x.startswith(field))
        return int(line.split()[1]) / 1024

    reset.write_text("5")  # the peak is now what is resident
    before = read("VmRSS")
    run()
    return read("VmHWM") - before


def main(method, net, rounds, *flags):
    problem = tensors(net, "--small" in flags)
    run = {"training": training, "torchopt": with_torchopt, "higher": with_higher}[method]
    mib = peak_growth(lambda: run(*problem))
    seconds = []
    for _ in range(int(rounds)):
        start = time.process_time()
        got = run(*problem)
        seconds.append(time.process_time() - start)
    size = None if method == "training" else float(sum((x**2).sum() for x in got)) ** 0.5
    print(json.dumps({"seconds": seconds, "norm": size, "mib": mib, "torch": torch.__version__}))


if __name__ == "__main__":
    main(*sys.argv[1:])
