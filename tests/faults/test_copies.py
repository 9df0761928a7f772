"""Copies, pickles and other processes: what goes through them, and what says how it is kept."""

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from interface_cases import LOSSES, METHODS, batch, method, rated, run, start, step

from gradhpo import GradhpoWarning, InOrder, Pool, Resident, Status, datasets, spaces


def pickled(x):
    return pickle.loads(pickle.dumps(x))  # noqa: S301


COPIES = pytest.mark.parametrize("copied", [pickled, copy.deepcopy])


def numbers(tree):
    """The leaves, keys as the numbers that they are."""
    typed = jax.dtypes.prng_key
    return [
        np.asarray(jax.random.key_data(x) if jax.numpy.issubdtype(x.dtype, typed) else x)
        for x in jax.tree.leaves(tree)
    ]


KINDS = ("hyperdistill", "reversible", "rtho", "saba", "pes")  # of memory
OTHERS = sorted(METHODS.keys() - KINDS)


@pytest.mark.parametrize(
    "name", [*KINDS, *(pytest.param(x, marks=pytest.mark.slow) for x in OTHERS)]
)
def test_a_state_goes_on_bit_for_bit_from_a_copy(name, compilations):
    """Also the keys that methods draw from, and those of the user, of either kind and any
    implementation."""
    opt = method(name)
    params, lam = start(name)
    keys = {"key": jax.random.key(1, impl="rbg"), "legacy": jax.random.PRNGKey(2)}
    state = opt.init({**params, **keys}, lam, batch(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradhpoWarning)  # of the settings that names stand for
        state = step(opt, state)
        want = step(opt, state)
        for copied in (pickled, copy.deepcopy):
            again = copied(state)
            assert jax.tree.structure(again) == jax.tree.structure(state)
            assert again.params["key"].dtype == keys["key"].dtype
            before = compilations()
            got = step(opt, again)
            assert compilations() == before
            for a, b in zip(*map(numbers, (got, want)), strict=True):
                np.testing.assert_array_equal(a, b)


@COPIES
def test_a_run_goes_on_from_copies_of_its_state_and_its_sources(copied):
    opt = method("hyperdistill")

    def sources():
        data = batch(5, 20), np.arange(20)
        return datasets.batches(data, 4, seed=0), Resident(batch(6, 20), 4, seed=1)

    def go(state, train, val, M):
        return opt.run(
            state, M, of=4, lr_hyper=0.1,
            get_train_batch=lambda: train().inputs, get_val_batch=val,
            train_loss_fn=LOSSES[0], val_loss_fn=LOSSES[1],
        )  # fmt: skip

    want = go(opt.init(*start()), *sources(), M=4)
    train, val = sources()
    half = go(opt.init(*start()), train, val, M=2)
    got = go(*map(copied, (half, train, val)), M=2)
    for a, b in zip(*map(numbers, (got, want)), strict=True):
        np.testing.assert_array_equal(a, b)


@COPIES
def test_declarations_sources_and_statuses_are_themselves(copied):
    for space in (
        spaces.unconstrained(), spaces.positive(), spaces.log(), spaces.interval(0, 1),
        spaces.interval(0, 1, by="projection"), spaces.probability(), spaces.simplex(),
        spaces.simplex(by="projection"), spaces.integer(1, 5), spaces.categorical(3, hard=True),
    ):  # fmt: skip
        assert copied(space) is space  # programs are kept by it
    assert copied(Status.NOT_REVERSED) is Status.NOT_REVERSED
    data = batch(0, 8)
    for source in (Resident(data, 4), InOrder(data)):
        np.testing.assert_array_equal(copied(source).steps(2, 3), source.steps(2, 3))
    np.testing.assert_array_equal(copied(Pool(data)).data, data)


@COPIES
def test_a_source_stands_where_it_stood(copied):
    data = batch(0, 10), np.arange(10)
    for make in (
        lambda: datasets.batches(data, 3, seed=0, pad=True),
        lambda: datasets.from_loader([data, data, data]),
    ):
        source, want = make(), make()
        for _ in range(5):
            source(), want()
        again = copied(source)
        assert again.position == source.position
        for _ in range(4):
            for a, b in zip(*map(jax.tree.leaves, (again(), want())), strict=True):
                np.testing.assert_array_equal(a, b)


class Loader:
    """As PyTorch's: its next shuffle is in a generator, not in the number of the epoch."""

    def __init__(self):
        self.generator = np.random.default_rng(0)

    def __iter__(self):
        return iter(self.generator.permutation(8).reshape(4, 2))


@COPIES
def test_a_loader_that_cannot_be_told_where_it_stands_says_how_to_go_on(copied):
    source = datasets.from_loader(Loader())
    copied(source)
    source()
    with pytest.raises(TypeError, match=r"Loader that has begun.*\(0, 1\).*start=position"):
        copied(source)


def test_optimizers_are_copied_and_pickled_by_what_they_are_made_of():
    """Optax's are closures, which pickle takes from nobody: docs/your_data.md says what to do."""
    by_name = method(update_fn=trained, outer_optimizer=None)
    assert pickled(by_name) == by_name and hash(pickled(by_name)) == hash(by_name)
    with_closures = method(inner_optimizer=rated, outer_optimizer=optax.adam(0.1))
    assert copy.deepcopy(with_closures) == with_closures == copy.copy(with_closures)
    with pytest.raises((AttributeError, pickle.PicklingError), match="local object"):
        pickle.dumps(with_closures)


def trained(w, lam, batch):
    return w


# -- other processes ------------------------------------------------------------------------------


def drawn(seed):
    """What a worker makes; it needs NumPy alone."""
    return np.random.default_rng(seed).standard_normal((4, 2)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.faults
def test_26_workers_that_are_spawned_give_the_batches_of_the_process_itself():
    opt = method()
    state = run(opt, opt.init(*start()))  # JAX has started
    ours = iter(map(drawn, range(100)))
    want = run(opt, state, M=2, train=lambda: next(ours))
    with multiprocessing.get_context("spawn").Pool(2) as workers:
        theirs = workers.imap(drawn, range(100))
        got = run(opt, state, M=2, train=lambda: next(theirs))
    for a, b in zip(*map(numbers, (got, want)), strict=True):
        np.testing.assert_array_equal(a, b)


FORKED = """
import os
from interface_cases import method, run, start
opt = method()
state = run(opt, opt.init(*start()))
if not (child := os.fork()):
    os._exit(0)
os.waitpid(child, 0)
state = run(opt, state)
print(int(state.episode), "episodes")
"""


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_26_a_fork_after_the_start_of_jax_is_warned_of_and_the_run_goes_on():
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", FORKED],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "JAX is multithreaded" in done.stderr
    assert done.stdout.strip() == "2 episodes", done.stderr[-3000:]
