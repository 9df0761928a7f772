"""A run in parts is the run in one piece, bit for bit."""

import jax
import numpy as np
import optax
import pytest
from facade_cases import METHODS, Source, T, method, run, sgd, start, train_loss, val_loss

from gradhpo import BilevelProblem, InOrder, Resident, StopRun, Task, from_optax, tune
from gradhpo.solvers import cg

DATA = np.random.default_rng(0).standard_normal((50, 2)).astype(np.float32)
STACKED = np.random.default_rng(1).standard_normal((4 * T, 3, 2)).astype(np.float32)
SIDES = Resident(DATA, 3, seed=1), Resident(DATA, 3, seed=2)
RESIDENT = {"get_train_batch": SIDES[0], "get_val_batch": SIDES[1]}


def same(a, b):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        assert x.dtype == y.dtype
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = map(jax.random.key_data, (x, y))
        np.testing.assert_array_equal(x, y)


def in_parts(opt, state, sources, parts=(2, 2), **settings):
    for part in parts:
        state = run(opt, state, M=part, **sources, **settings)
    return state


@pytest.mark.parametrize(
    "loop", [pytest.param("scan", marks=pytest.mark.optimised), "host"], ids=["scan", "host"]
)
@pytest.mark.parametrize("name", METHODS)
def test_two_runs_are_one(name, loop):
    """With a decaying outer rate, resident data, and HyperDistill's fit before episodes 1 and 3.
    On the host every update is one and the same program, whatever compiles it."""
    short = {"solver": cg(max_iterations=4)} if name == "implicit_cg" else {}  # written out on host
    opt = method(name, loop=loop, **short)
    state = opt.init(*start(name=name))
    for lr_reptile in (0.0, 0.5, 1.0):
        settings = {"of": 4, "lr_reptile": lr_reptile}
        whole = run(opt, state, M=4, **RESIDENT, **settings)
        same(in_parts(opt, state, RESIDENT, (2, 2), **settings), whole)
        same(in_parts(opt, state, RESIDENT, (1, 3), callback=lambda m, s: None, **settings), whole)
        assert int(whole.episode) == 4 and int(whole.drawn) == 4 * T


def test_the_decay_and_the_fit_go_on():
    """What the bits compare, seen by the unoptimised compiler of the ordinary tests as well."""
    opt = method("hyperdistill", estimation_period=3)
    state = opt.init(*start())
    whole, episodes = run(opt, state, M=5, of=5, **RESIDENT), []
    parts = in_parts(opt, state, RESIDENT, (2, 3), of=5, callback=lambda m, s: episodes.append(m))
    same(parts, whole)
    assert episodes == [1, 2, 3, 4, 5]
    anew = in_parts(opt, state, RESIDENT, (2, 3))  # every run decays over its own episodes
    assert float(anew.hyperparams["scale"]) != float(whole.hyperparams["scale"])
    same(run(opt, state, M=5, **RESIDENT), whole)
    with pytest.raises(ValueError, match="after episode 6, beyond of=5"):
        run(opt, whole, M=1, of=5, **RESIDENT)


@pytest.mark.parametrize("source", ["functions", "in order"])
def test_other_sources_go_on_as_well(source):
    opt = method("one_step")
    state = opt.init(*start())

    def sources():
        if source == "in order":
            return {"get_train_batch": InOrder(STACKED), "get_val_batch": InOrder(STACKED)}
        return {"get_train_batch": Source(1), "get_val_batch": Source(2)}

    whole = run(opt, state, M=4, of=4, **sources())
    same(in_parts(opt, state, sources(), of=4), whole)


@pytest.mark.parametrize("name", ["one_step", "reverse", "implicit_cg", "hyperdistill", "saba"])
@pytest.mark.parametrize("outer", [None, optax.adam(0.1)], ids=["rate", "adam"])
def test_a_class_is_tune_and_tune_goes_on(name, outer):
    """The functional form: the same bits as the class, and in two parts."""
    made = {} if name in ("saba",) else {"inner_optimizer": sgd}
    opt = method(name, outer_optimizer=outer, **made)
    task, estimator = task_of(from_optax(train_loss, sgd)), opt.estimator()
    rate = None if outer is not None else 0.1
    more = {"T": T, "lr_hyper": rate, "estimation_period": opt.estimation_interval, "of": 4}
    whole = tune(task, estimator, outer, episodes=4, **more)
    half = tune(task, estimator, outer, episodes=2, **more)
    same(tune(task, estimator, outer, episodes=2, state=half, **more), whole)
    got = run(opt, opt.init(*start()), M=4, of=4, **RESIDENT)
    same((got.params, got.hyperparams), (whole.params, whole.hyperparams))


def task_of(dynamics):
    return Task(BilevelProblem(dynamics, val_loss, train_loss), *start(), *SIDES)


# -- ending early ---------------------------------------------------------------------------------


class Trouble(Exception):
    pass


def after(count, error=Trouble):
    """A function that raises at its call number `count`, once."""
    calls = iter(range(1, 1000))

    def call(*_):
        if next(calls) == count:
            raise error

    return call


class Recording:
    def __init__(self, trouble=lambda *_: None):
        self.records, self.trouble = [], trouble

    def log(self, metrics, step):
        self.trouble()
        self.records.append((step, dict(metrics)))

    def close(self):
        raise AssertionError("closing a logger is up to the caller")


POINTS = ("draw", "fit", "advance", "callback", "logger", "end")


@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt])
@pytest.mark.parametrize("lr_reptile", [0.5, 1.0])
@pytest.mark.parametrize("point", POINTS)
def test_a_run_that_was_cut_anywhere_goes_on(point, lr_reptile, error, monkeypatch):
    """The exception brings the last good state, and the run that goes on from there is the run."""
    from gradhpo.driver import run as driver

    opt = method("hyperdistill")
    state = opt.init(*start())
    settings = {**RESIDENT, "of": 4, "lr_reptile": lr_reptile}
    whole = run(opt, state, M=4, **settings)
    trouble, hooks = after(2 if point == "fit" else 3, error), {"callback": lambda m, s: None}

    def troubled(function):
        return lambda *args, **kwargs: (trouble(), function(*args, **kwargs))[1]

    with monkeypatch.context() as patch:
        if point == "draw":
            patch.setattr(Resident, "indices", troubled(Resident.indices))
        elif point in ("callback", "logger"):
            hooks = {point: trouble if point == "callback" else Recording(trouble)}
        elif point == "end":
            patch.setattr(driver.Kept, "put", troubled(driver.Kept.put))
        else:
            made = driver.programs

            def programs(*args):
                found = made(*args)
                fields = ("fit",) if point == "fit" else ("episode", "episodes")
                return found._replace(**{f: troubled(getattr(found, f)) for f in fields})

            patch.setattr(driver, "programs", programs)
        with pytest.raises(error) as raised:
            run(opt, state, M=4, **settings, **hooks)
    left = raised.value.state
    done = int(left.episode)
    assert done == {"draw": 1, "fit": 2, "callback": 3, "logger": 3}.get(point, 2)
    assert f"the state after episode {done} is in error.state" in raised.value.__notes__[-1]
    same(run(opt, left, M=4 - done, **settings), whole)


def test_a_program_that_fails_hands_back_the_state_before_it():
    """JAX raises when the numbers are asked for, which is after the call."""
    fail = iter([False, False, True])

    def check(x):
        if next(fail, False):
            raise Trouble("in the program")
        return x

    def loss(w, lam, batch):
        batch = jax.pure_callback(check, jax.ShapeDtypeStruct(batch.shape, batch.dtype), batch)
        return val_loss(w, lam, jax.lax.stop_gradient(batch))

    opt = method("fo", T=1)
    state = opt.init(*start())
    with pytest.raises(Exception, match="in the program") as raised:
        run(opt, state, M=4, losses=(train_loss, loss), get_val_batch=RESIDENT["get_val_batch"])
    left = raised.value.state
    assert 0 <= int(left.episode) < 4 and np.isfinite(left.params["w"]).all()


@pytest.mark.parametrize(
    "stop", [lambda m: False, lambda m: np.bool_(False), lambda m: jax.numpy.array(False)]
)
def test_a_callback_ends_the_run(stop):
    opt, seen = method("one_step"), []

    def callback(episode, state):
        seen.append(episode)
        return stop(episode) if episode == 2 else None

    state = opt.init(*start())
    got = run(opt, state, M=4, of=4, callback=callback, **RESIDENT)
    assert seen == [1, 2]
    same(got, run(opt, state, M=2, of=4, **RESIDENT))


@pytest.mark.parametrize("lr_reptile", [0.5, 1.0])
def test_stop_run_ends_the_run(lr_reptile):
    """The state returned is the one to go on from, phi and not w_T."""
    opt = method("one_step")
    state, settings = opt.init(*start()), {**RESIDENT, "of": 4, "lr_reptile": lr_reptile}
    got = run(opt, state, M=4, callback=after(2, StopRun), **settings)
    assert int(got.episode) == 2
    same(run(opt, got, M=2, **settings), run(opt, state, M=4, **settings))


def test_what_a_callback_returns_otherwise_does_not_end_it():
    opt = method("one_step")
    for answer in (0, 0.0, "", [], None, True, np.zeros(2, bool)):
        got = run(opt, opt.init(*start()), M=2, callback=lambda m, s, a=answer: a, **RESIDENT)
        assert int(got.episode) == 2


def test_the_first_interrupt_waits_for_the_episode_and_the_second_does_not(capfd, ctrl_c):
    """By real signals, from inside the callback and from inside a source."""
    import os
    import signal

    opt = method("one_step")
    state, settings = opt.init(*start()), {**RESIDENT, "of": 4}
    whole = run(opt, state, M=4, **settings)
    seen = []

    def once(episode, state):
        seen.append(episode)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as raised:
        run(opt, state, M=4, callback=once, **settings)
    assert seen == [1] and int(raised.value.state.episode) == 1
    same(run(opt, raised.value.state, M=3, **settings), whole)

    class Twice(Source):
        def __call__(self):
            if self.calls == T + 1:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                raise AssertionError("not interrupted")
            return super().__call__()

    with pytest.raises(KeyboardInterrupt) as raised:
        run(opt, state, M=4, get_train_batch=Twice(1))
    assert int(raised.value.state.episode) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert capfd.readouterr().err == ""


def test_checks_fail_before_anything_is_attached():
    opt = method("one_step")
    with pytest.raises(ValueError) as raised:
        run(opt, opt.init(*start()), M=0)
    assert not hasattr(raised.value, "state")


# -- loggers --------------------------------------------------------------------------------------


def test_a_logger_gets_metrics_and_hyperparameters_at_the_step_of_the_state():
    opt, logger = method("fds"), Recording()
    state = opt.init(*start(name="fds"))
    natural = lambda lam: {"rate": jax.numpy.exp(lam["rate"])}  # noqa: E731
    state = run(opt, state, M=2, of=3, logger=logger, **RESIDENT)
    state = run(opt, state, M=1, of=3, logger=logger, natural=natural, **RESIDENT)
    assert [step for step, _ in logger.records] == [1, 2, 3]  # a window of T steps
    first, _, last = (record for _, record in logger.records)
    assert set(first) >= {"val_loss", "train_loss", "hyperparams/rate", "hyperparams/scale"}
    assert last["hyperparams/rate"] == pytest.approx(float(np.exp(state.hyperparams["rate"][0])))
    assert "hyperparams/scale" not in last
    assert last["val_loss"] == float(state.metadata["val_loss"])


def test_leaves_of_several_numbers_are_summarised():
    from gradhpo.driver.hooks import scalars

    got = scalars("lam", {"a": np.array([1.0, 3.0]), "b": [np.float32(2)], "c": np.zeros(0)})
    assert got == {"lam/a/mean": 2.0, "lam/a/min": 1.0, "lam/a/max": 3.0, "lam/b/0": 2.0}
    assert scalars("lam", np.float32(2)) == {"lam": 2.0}
