"""Loaders as sources: endless, of one size, exact when filled up, and resumed bit for bit."""

import itertools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import (
    BilevelProblem,
    DataBatch,
    Resident,
    Status,
    Task,
    from_optax,
    hyperdistill,
    one_step,
    reverse,
    tune,
)
from gradhpo.datasets import Masked, Position, batches, from_loader

X = np.random.default_rng(0).standard_normal((11, 3))
Y = np.arange(11.0)
DATA = DataBatch(X, Y)


class Loader:
    """What PyTorch's DataLoader is to us: batches of an epoch in a `for` loop, and a shuffle drawn
    anew for every epoch by a generator of its own."""

    def __init__(self, size=4, seed=None):
        self.size, self.rng = size, None if seed is None else np.random.default_rng(seed)

    def __iter__(self):
        order = np.arange(11) if self.rng is None else self.rng.permutation(11)
        for rows in np.split(order, range(self.size, 11, self.size)):
            yield [X[rows], Y[rows]]


def of_epoch(number):
    return Loader(seed=number)


KINDS = {
    "list": lambda: list(Loader()),
    "loader": lambda: Loader(seed=3),
    "function": lambda: lambda: iter(Loader()),
    "built-in function": lambda: partial(iter, list(Loader())),
    "function of the epoch": lambda: of_epoch,
    "endless iterator": lambda: itertools.cycle(list(Loader())[:2]),
}


def rows(batch):
    mask = slice(None)
    if isinstance(batch, Masked):
        batch, mask = batch
    return batch[1][mask].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_again_and_leaves_the_small_batch_out(kind):
    source = from_loader(KINDS[kind]())
    seen = [source() for _ in range(6)]
    assert {x.shape for x, _ in seen} == {(4, 3)}
    epochs = [rows(seen[2 * i]) + rows(seen[2 * i + 1]) for i in range(3)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert ("epoch" in kind or kind == "loader") == (epochs[0] != epochs[1])


@pytest.mark.parametrize(
    "source",
    [lambda: from_loader(Loader(seed=0), pad=True), lambda: batches(DATA, 4, seed=0, pad=True)],
)
def test_filled_up_every_example_counts_once_per_epoch(source):
    source = source()
    for _ in range(3):
        epoch = [source() for _ in range(3)]
        assert sorted(sum(map(rows, epoch), [])) == list(range(11))
        assert all(isinstance(each, Masked) and each.mask.dtype == bool for each in epoch)
        assert {x.shape for x, _ in (each.batch for each in epoch)} == {(4, 3)}
        np.testing.assert_array_equal(epoch[2].mask, [True, True, True, False])
        np.testing.assert_array_equal(epoch[2].batch[0][3], epoch[2].batch[0][0])


def test_a_set_that_divides_is_not_padded():
    source = batches((X[:8], Y[:8]), 4, seed=0, pad=True)
    assert all(source().mask.all() for _ in range(4)) and source.position == (1, 2)


# -- the hypergradient of padded batches ----------------------------------------------------------


def example_losses(w, batch):
    x, y = batch
    return (x @ w - y) ** 2


def decayed(loss):
    return lambda w, lam, batch: loss(w, lam, batch) + jnp.exp(lam["decay"]) * jnp.sum(w**2)


def masked(w, lam, batch):
    return jnp.mean(example_losses(w, batch.batch), where=batch.mask)


def rate(lam):
    return optax.sgd(jnp.exp(lam["rate"]))


def test_a_masked_mean_is_the_mean_of_the_uneven_batch(x64):
    """Over two epochs of batches of 4, 4 and 3 examples, in float64."""
    lam = {"decay": jnp.array(-2.0), "rate": jnp.array(-3.0)}
    order = [np.random.default_rng([5, epoch]).permutation(11) for epoch in (0, 1)]
    uneven = [each[k : k + 4] for each in order for k in (0, 4, 8)]

    def by_hand(lam):
        def loss(w, i):
            return jnp.mean(example_losses(w, (X[i], Y[i]))) + jnp.exp(lam["decay"]) * w @ w

        w = jnp.zeros(3)
        for i in uneven:
            w = w - jnp.exp(lam["rate"]) * jax.grad(loss)(w, i)
        return jnp.mean(example_losses(w, (X[uneven[-1]], Y[uneven[-1]])))

    problem = BilevelProblem(from_optax(decayed(masked), rate), masked)
    sources = [batches(DATA, 4, seed=5, pad=True) for _ in range(2)]
    inner, window = Task(problem, jnp.zeros(3), lam, *sources).begin(6)
    estimate = jax.jit(partial(reverse(6).estimate, problem))
    got, want = estimate((), inner, lam, window).hypergrad, jax.jit(jax.grad(by_hand))(lam)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), got, want)
    copies_too = jax.tree.map(lambda x: x | True if x.dtype == bool else x, window)
    wrong = estimate((), inner, lam, copies_too).hypergrad
    assert abs(wrong["decay"] / want["decay"] - 1) > 1e-2


def test_hyperdistill_mixes_masked_batches():
    problem = BilevelProblem(from_optax(decayed(masked), optax.sgd(0.01)), masked)
    sources = [batches(single(DATA), 4, seed=5, pad=True) for _ in range(2)]
    task = Task(problem, np.zeros(3, np.float32), {"decay": jnp.array(-2.0)}, *sources)
    state = tune(task, hyperdistill(), episodes=2, T=5, lr_hyper=0.1)
    assert float(state.hyperparams["decay"]) != -2 and state.status_counts == {Status.OK: 10}


# -- positions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "endless iterator"])
def test_a_position_gives_the_same_batches_again(kind, pad):
    source = from_loader(KINDS[kind](), pad=pad)
    positions, seen = [source.position], []
    for _ in range(8):
        seen.append(source())
        positions.append(source.position)
    per_epoch = 3 if pad else 2
    assert positions[-1] == (3, 2) if not pad else positions[-1] == (2, 2)
    for k in (1, per_epoch, per_epoch + 1, 7):
        saved = json.loads(json.dumps(positions[k]))
        for start in (saved, tuple(saved), k):
            resumed = from_loader(KINDS[kind](), pad=pad, start=start)
            assert resumed.position == positions[k]
            jax.tree.map(np.testing.assert_array_equal, resumed(), seen[k])
    at_begin = from_loader(KINDS[kind](), pad=pad, start=(1, 0))
    jax.tree.map(np.testing.assert_array_equal, at_begin(), seen[per_epoch])


def test_a_function_of_the_epoch_skips_whole_epochs_and_can_go_back():
    made = []

    def epoch(number):
        made.append(number)
        return of_epoch(number)

    source = from_loader(epoch, start=(1000, 1))
    first = source()
    assert made == [1000] and source.position == Position(1000, 2)
    source()
    source.go_to((1000, 1))
    jax.tree.map(np.testing.assert_array_equal, source(), first)


def test_batches_go_on_from_a_number_or_a_position():
    source = batches(DATA, 4, seed=3, pad=True)
    seen = [source() for _ in range(10)]
    assert source.position == (3, 1)
    for start in (7, (2, 1), [2, 1], np.int64(7)):
        jax.tree.map(np.testing.assert_array_equal, batches(DATA, 4, 3, start, pad=True)(), seen[7])


def test_a_shuffle_of_nobody_is_not_resumed():
    """The negative control: a generator that goes on from loader to loader."""
    rng = np.random.default_rng(0)

    class Shared(Loader):
        def __init__(self):
            super().__init__()
            self.rng = rng

    source = from_loader(Shared())
    seen = [source() for _ in range(4)]
    assert rows(from_loader(Shared(), start=(1, 1))()) != rows(seen[3])


def single(batch):
    return [x.astype(np.float32) for x in batch]


@pytest.mark.parametrize("kind", ["loader", "function of the epoch"])
def test_a_run_goes_on_from_the_position_that_a_callback_saw(kind):
    problem = BilevelProblem(from_optax(decayed(masked), rate), masked)
    lam = {"decay": jnp.array(-2.0), "rate": jnp.array(-4.0)}
    val = Resident(Masked(tuple(single(DATA)), np.ones(11, bool)))
    kept = []

    def source(start=(0, 0)):
        loader = KINDS[kind]()
        if kind == "loader":
            return from_loader(lambda: map(single, loader), pad=True, start=start)
        return from_loader(lambda e: map(single, loader(e)), pad=True, start=start)

    task = Task(problem, np.zeros(3, np.float32), lam, source(), val)
    see = lambda episode, state: kept.append((state, task.train.position))  # noqa: E731
    more = {"T": 4, "of": 3, "lr_hyper": 0.1}
    method = one_step()
    whole = tune(task, method, episodes=3, callback=see, **more)
    assert kept[-1][1] == task.train.position == (3, 3)
    state, position = kept[0]
    again = tune(task.replace(train=source(position)), method, episodes=2, state=state, **more)
    same = lambda a, b: np.testing.assert_array_equal(a, b)  # noqa: E731
    jax.tree.map(same, (again.params, again.hyperparams), (whole.params, whole.hyperparams))


def test_an_episode_that_failed_is_drawn_again():
    """Both sources are turned back to where the state that came with the error stands."""
    problem = BilevelProblem(from_optax(decayed(masked), optax.sgd(0.01)), masked)
    method, calls = one_step(), itertools.count(1)

    def sources():
        return {
            "train": batches(single(DATA), 4, 0, pad=True),
            "val": batches(single(DATA), 4, 1, pad=True),
        }

    def train(**sources):
        task = Task(problem, np.zeros(3, np.float32), {"decay": jnp.array(-2.0)}, **sources)
        return partial(tune, task, method, T=4, of=3, lr_hyper=0.1)

    whole, broken = train(**sources())(episodes=3), sources()

    def val():
        if next(calls) == 10:
            raise OSError("the disk is gone for a moment")
        return broken["val"]()

    with pytest.raises(OSError) as caught:
        train(train=broken["train"], val=val)(episodes=3)
    state = caught.value.state
    assert int(state.drawn) < 9 and broken["train"].position == (3, 1)  # ahead of the state
    for source in broken.values():
        source.go_to(int(state.drawn))
    got = train(**broken)(episodes=3 - int(state.episode), state=state)
    jax.tree.map(
        np.testing.assert_array_equal,
        (got.params, got.hyperparams),
        (whole.params, whole.hyperparams),
    )


# -- what is refused ------------------------------------------------------------------------------


def drawn(source, count):
    for _ in range(count):
        source()


ITERATOR = iter(Loader())
UNEVEN = [np.ones(4), np.ones(3), np.ones(4)]


@pytest.mark.parametrize(
    "loader, pad, message",
    [
        (lambda: iter(Loader()), False, "iterator that ended after 2 batches.*from_loader.make."),
        (lambda: iter(Loader()), True, "iterator that ended after 3 batches.*from_loader.make."),
        (lambda: [], False, "no batch in epoch 0: it is empty"),
        (lambda: lambda: ITERATOR, False, "no batch in epoch 1.*the same iterator again"),
        (lambda: [np.ones(3), np.ones(4)], True, "batch 1 of epoch 0 has 4 examples.*had 3"),
        (lambda: UNEVEN, False, "batch 1 of epoch 0 has 3 examples.*not the last.*pad=True"),
        (lambda: [(np.ones(3), np.ones(2))], True, r"share no leading axis: \[\(3,\), \(2,\)\]"),
        (lambda: [1.0], True, r"share no leading axis: \[\(\)\]"),
    ],
)
def test_loaders_that_cannot_go_on_say_why(loader, pad, message):
    with pytest.raises(ValueError, match=message):
        drawn(from_loader(loader(), pad=pad), 9)


def test_an_epoch_that_broke_off_is_not_taken_for_a_whole_one():
    """A generator that has raised is over; another loader may give the next batch."""
    broken = {1}

    def epoch():
        for i, batch in enumerate(Loader(size=3)):
            if i in broken:
                raise OSError("a worker is gone")
            yield batch

    source = from_loader(epoch)
    first = source()
    with pytest.raises(OSError, match="a worker is gone"):
        source()
    with pytest.raises(ValueError, match=r"at batch 1 of epoch 0, .* go_to\(\(0, 1\)\)"):
        source()
    broken.clear()
    source.go_to((0, 1))
    np.testing.assert_array_equal(source()[0], X[3:6])
    source.go_to(0)
    np.testing.assert_array_equal(source()[0], first[0])


def test_a_batch_that_nobody_got_is_not_passed_over():
    """Neither where the look whether it was the last one fails, nor where its size is refused."""

    def short_then_broken():
        yield np.zeros(3)
        yield np.ones(2)
        raise OSError("disk")

    sources = [
        (from_loader(short_then_broken), OSError),
        (from_loader([np.full(n, n) for n in (3, 2, 3, 3)]), ValueError),
        (from_loader([np.full(n, n) for n in (3, 4, 3)]), ValueError),
        (from_loader([np.zeros((3, 1)), np.zeros((0, 1))], pad=True), ValueError),
    ]
    for source, error in sources:
        source()
        with pytest.raises(error):
            source()
        with pytest.raises(ValueError, match=r"go_to\(\(0, 1\)\)"):
            source()
        assert source.position == (0, 1)


@pytest.mark.parametrize("data", [(X, Y), DATA, {"x": X}, X, jnp.asarray(X), "train"])
def test_data_are_no_loader(data):
    with pytest.raises(TypeError, match="holds data: datasets.batches"):
        from_loader(data)


def test_a_parameter_called_epoch_gets_its_number():
    seen = []
    source = from_loader(lambda epoch=0: seen.append(epoch) or [np.zeros(2)])
    for _ in range(3):
        source()
    assert seen == [0, 1, 2]


def test_padding_takes_what_leaving_out_refuses():
    source = from_loader(UNEVEN, pad=True)
    assert [int(source().mask.sum()) for _ in range(6)] == [4, 3, 4] * 2


def test_arrays_that_share_no_axis_are_handed_on():
    source = from_loader([(np.ones(3), np.ones((2, 2)))])
    assert [x.shape for x in source()] == [(3,), (2, 2)]


@pytest.mark.parametrize(
    "start, error, message",
    [
        ((0, 7), ValueError, "no batch 7 in epoch 0"),
        ((0, -1), ValueError, "position must be at least 0, got -1"),
        (-1, ValueError, "start must be at least 0"),
        ("2", TypeError, "start must be a whole number"),
    ],
)
def test_positions_that_there_are_not(start, error, message):
    with pytest.raises(error, match=message):
        from_loader(Loader(), start=start)


def test_an_iterator_begins_later_but_never_again():
    source = from_loader(iter(Loader()), start=(0, 1))
    assert rows(source()) == [4, 5, 6, 7]
    with pytest.raises(ValueError, match="cannot begin again"):
        source.go_to((0, 0))


@pytest.mark.parametrize("loader", [3, object()])
def test_what_is_no_loader(loader):
    with pytest.raises(TypeError, match="has no __iter__.*DataLoader"):
        from_loader(loader)


# -- arrays of others -----------------------------------------------------------------------------


class Half:
    """PyTorch's tensor of bfloat16, which NumPy has no type for: DLPack alone tells it."""

    def __init__(self, values):
        self.values = jnp.asarray(values, jnp.bfloat16)
        self.shape = self.values.shape

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Got unsupported ScalarType BFloat16")

    def __dlpack__(self, **kwargs):
        return self.values.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()


def test_half_precision_of_others_stays():
    batch = from_loader([[Half(X[:4]), Y[:4]], [Half(X[:2]), Y[:2]]], pad=True)().batch
    assert isinstance(batch[0], np.ndarray) and batch[0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(batch[0], X[:4].astype(jnp.bfloat16))


def test_a_loader_of_pytorch():
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(torch.from_numpy(X).bfloat16(), torch.from_numpy(Y))

    def source(start=(0, 0)):
        order = torch.Generator().manual_seed(0)
        loader = torch.utils.data.DataLoader(data, 4, shuffle=True, generator=order)
        return from_loader(loader, pad=True, start=start)

    first = source()
    seen = [first() for _ in range(7)]
    assert seen[0].batch[0].dtype == jnp.bfloat16 and seen[2].mask.sum() == 3
    assert sorted(sum(map(rows, seen[:3]), [])) == list(range(11))
    jax.tree.map(np.testing.assert_array_equal, source((1, 2))(), seen[5])
