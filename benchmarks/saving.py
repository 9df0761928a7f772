"""What a checkpoint of 40 MB costs its run: the time that it stands still, and how much slower its
steps are while the checkpoint is written beside them.

`Saver.after` is what `run(checkpoint=...)` calls after every episode; here a loop calls it, whose
steps are timed one by one, those during a save apart from the others. The state is there before
the call, so that nothing of a step's own time counts.

    python benchmarks/saving.py
"""

import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from _common import Row, arguments, machine, show

import gradhpo as gh
from gradhpo.checkpoint import Checkpoints
from gradhpo.driver.data import Data
from gradhpo.driver.interruption import Signals
from gradhpo.driver.saving import saving

BAR = 50.0  # ms
LEAVES, MEGABYTES = 20, 40


def states(megabytes):
    """`(state, step)`: a state of this size, and a step of some milliseconds on it."""
    n = megabytes * 10**6 // 4 // LEAVES
    w = {f"w{i:02d}": jnp.full(n, float(i)) for i in range(LEAVES)}

    @jax.jit
    def step(state):
        w = jax.tree.map(lambda x: x + 0.01 * jnp.sin(x), state.params)
        return state.update(params=w, step=state.step + 1)

    return gh.BilevelState.create(w, {"rate": jnp.zeros(())}), step


def main():
    args = arguments(__doc__)
    megabytes = 1 if args.small else MEGABYTES
    state, step = states(megabytes)
    data = Data(None, None)
    still, beside, alone, took = [], [], [], []
    with tempfile.TemporaryDirectory() as directory:
        settings = Checkpoints(directory=directory, seconds=1e-9)
        with saving(settings, Signals()) as saver:
            for _ in range(args.rounds + 1):
                for _ in range(20):
                    state = timed(step, state, alone)
                start = time.perf_counter()
                saver.after(state, data)
                still.append(1e3 * (time.perf_counter() - start))
                while saver._writer.busy:
                    state = timed(step, state, beside)
                took.append(time.perf_counter() - start)
                saver._writer.wait()
            state = timed(step, state, [])
            start = time.process_time()
            saver.after(state, data)
            saver._writer.wait()
            processor = time.process_time() - start
    still, took = still[1:], took[1:]  # the first one imports Orbax
    quick, slow = statistics.median(alone), statistics.median(beside)
    lost = sum(max(0.0, x - quick) for x in beside) / (args.rounds + 1)
    show(
        f"A checkpoint of {megabytes} MB ({machine()})",
        [
            Row("run(checkpoint=)", "stands still, ms, worst", max(still), BAR),
            Row("", "stands still, ms, median", statistics.median(still)),
            Row("", "is written in, s, median", statistics.median(took)),
            Row("", "takes of a processor, s", processor),
            Row("a step", "alone, ms", quick),
            Row("", "beside a save, ms, median", slow),
            Row("", "beside a save, ms, 95 %", float(np.quantile(beside, 0.95))),
            Row("all steps beside a save", "longer by, ms a save", lost),
        ],
    )


def timed(step, state, into):
    start = time.perf_counter()
    state = jax.block_until_ready(step(state))
    into.append(1e3 * (time.perf_counter() - start))
    return state


if __name__ == "__main__":
    main()
