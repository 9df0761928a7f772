"""What used to pass in silence: nothing tuned, all rejected, compiled again and again."""

import contextlib
import functools
import warnings
import weakref

import facade_cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from facade_cases import batch, method, run, sgd, start, step, train_loss, val_loss

from gradhpo import BilevelProblem, GradhpoWarning, Resident, Status, clear_caches, from_optax
from gradhpo.core.estimator import compiled

# -- a validation loss that training cannot change ------------------------------------------------


def accuracy(w, lam, batch):
    return jnp.mean(batch @ w["w"] > 0)


def stopped(w, lam, batch):
    return val_loss(jax.lax.stop_gradient(w), {"rate": 0.0, "scale": 0.0}, batch)


def constant(w, lam, batch):
    return jnp.float32(1.0)


def penalty(w, lam, batch):
    return lam["scale"] ** 2


def one_of_two(w, lam, batch):
    return jnp.mean((w["w"] - batch) ** 2)  # another leaf, "frozen", is not judged


@jax.custom_vjp
def reversal(x):
    return x


reversal.defvjp(lambda x: (x, None), lambda _, g: (-g,))


def reversed_loss(w, lam, batch):
    return jnp.mean((reversal(w["w"]) - batch) ** 2)


NOTHING = r"val_loss_fn has no gradient path to the weights.*none of them will ever move.*ESOpt"
DIRECT = r"val_loss_fn has no gradient path.*only leaf \['scale'\] moves.*FOOptimizer"


def traced_step(opt, losses, params=None, lr_hyper=0.1):
    """`step`, traced and not compiled: all that a first look finds is said here."""
    weights, lam = start()
    state = opt.init(weights if params is None else params, lam, batch(0))
    return jax.eval_shape(functools.partial(step, opt, losses=losses, lr_hyper=lr_hyper), state)


@pytest.mark.parametrize(
    "name, judge, message",
    [
        ("one_step", accuracy, NOTHING),
        ("one_step", stopped, NOTHING),
        ("one_step", constant, NOTHING),
        ("one_step", penalty, DIRECT),
        ("hyperdistill", accuracy, NOTHING),
        ("reverse", stopped, NOTHING),
        ("t1t2", constant, NOTHING),
        ("pes", constant, "val_loss_fn has no path to the weights.*none of them"),
        ("fo", accuracy, r"\['rate'\], \['scale'\] is identically zero"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_a_loss_that_judges_nothing_is_named(name, judge, message):
    opt = method(name, inner_optimizer=sgd)
    with pytest.warns(GradhpoWarning, match=message) as caught:
        traced_step(opt, (train_loss, judge))
    assert len(caught) == 1
    assert caught[0].filename == facade_cases.__file__  # the user's line, not one of JAX
    with pytest.raises(ValueError, match=message):
        traced_step(method(name, inner_optimizer=sgd, strict=True), (train_loss, judge))


@pytest.mark.parametrize(
    "name, judge",
    [
        ("pes", accuracy),  # values are all it needs
        ("pes", stopped),
        ("fo", penalty),  # the direct term is all it uses
        ("one_step", one_of_two),
        ("one_step", reversed_loss),  # no forward mode: nothing can be said
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_a_loss_that_judges_enough_is_not(name, judge):
    params = {**start()[0], "frozen": jnp.ones(2)}

    def trains_both(w, lam, batch):
        return train_loss(w, lam, batch) + lam["rate"] * jnp.sum(w["frozen"] ** 2)

    opt = method(name, inner_optimizer=sgd)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*leaf \['rate'\] is identically zero")
        traced_step(opt, (trains_both, judge), params)


def test_the_look_at_the_validation_loss_is_one():
    """Checked, looked at, used: a trace each. What it reaches comes from one program."""
    traces = []

    def judge(w, lam, batch):
        traces.append(1)
        return val_loss(w, lam, batch)

    traced_step(method("one_step"), (train_loss, judge))
    assert len(traces) == 3


def test_an_evolution_strategy_sees_through_a_stop_gradient():
    """Its hyperparameters need no derivative either; one that is not used at all is named."""

    def rounded(w, lam, batch):
        scale = jax.lax.stop_gradient(lam["scale"])
        return train_loss(w, {"scale": scale, "rate": 0.0}, batch)

    for used, ignored in ((sgd, None), (optax.sgd(0.1), r"\['rate'\] is identically zero")):
        opt = method("pes", inner_optimizer=used, strict=True)
        if ignored is None:
            traced_step(opt, (rounded, accuracy))
        else:
            with pytest.raises(ValueError, match=ignored):
                traced_step(opt, (rounded, accuracy))


# -- a run whose updates were rejected ------------------------------------------------------------


def with_nan(*which):
    """A source of which these calls, counted from 0, hold a NaN."""
    count = iter(range(1000))
    return lambda: batch(0) * (np.nan if next(count) in which else 1)


@pytest.mark.parametrize("strict", [False, True])
def test_a_run_that_was_rejected_says_so(strict):
    """A warning also if strict: the state of a whole run must not be lost. Every status counts,
    also of updates that good ones have followed, and those of earlier runs do not."""
    opt = method("one_step", strict=strict)
    with pytest.warns(GradhpoWarning, match="1 of the 8 updates.*NONFINITE_TRAIN_STATE 1"):
        state = run(opt, opt.init(*start()), get_train_batch=with_nan(2))
    message = r"8 of the 8 updates of this run were rejected; the first ever at step 2\..*"
    with pytest.warns(GradhpoWarning, match=message + "NONFINITE_TRAIN_STATE.*NaN in the train"):
        after = run(opt, state, get_train_batch=with_nan(*range(8)))
    assert int(after.metadata["n_rejected"]) == 9
    run(opt, after)  # nothing to say


@pytest.mark.parametrize("inaccurate, said", [(4, False), (5, True)])
def test_a_run_that_was_mostly_inaccurate_says_so(inaccurate, said):
    """Updates that were taken, but not as they should be: from one half of them on. Both kinds go
    into one warning, with the remedy for the more frequent."""
    from gradhpo.driver.summary import summarise

    opt = method("one_step")
    before = opt.init(*start())
    code = Status.LINEAR_SOLVE_INACCURATE
    counts = np.zeros_like(before.counts)
    counts[code], counts[Status.OK] = inaccurate, 8 - inaccurate
    message = "0 of the 8 updates.*LINEAR_SOLVE_INACCURATE 5.*Allow more iterations"
    with pytest.warns(GradhpoWarning, match=message) if said else contextlib.nullcontext():
        summarise("name", before, before.update(counts=counts))
    counts[Status.NONFINITE_VAL_LOSS] = 1
    both = f"1 of the 9 updates.*INACCURATE {inaccurate}, NONFINITE_VAL_LOSS 1.*Allow more"
    with pytest.warns(GradhpoWarning, match=both):
        summarise("name", before, before.update(counts=counts))


def test_adam_that_rejects_every_update_names_eps_root():
    """One feature that is always zero, as the border pixels of handwritten digits are."""
    dead = np.array([[1.0, 0.0]], np.float32)

    def loss(w, lam, batch):
        return jnp.sum(batch * (w["w"] - 1) ** 2) * jnp.exp(lam["scale"]) + 0 * lam["rate"]

    opt = method("one_step", inner_optimizer=optax.adam(0.1))
    sources = {"get_train_batch": lambda: dead, "get_val_batch": lambda: dead}
    with pytest.warns(GradhpoWarning, match="8 of the 8.*NONFINITE_HYPERGRAD.*eps_root=1e-8"):
        state = run(opt, opt.init(*start()), losses=(loss, val_loss), **sources)
    assert float(state.hyperparams["scale"]) == np.float32(0.1)


# -- compiled again and again ---------------------------------------------------------------------


def test_runs_with_new_functions_are_named():
    opt = method("one_step")
    state = opt.init(*start())
    with pytest.warns(GradhpoWarning, match="compiled 4 times, because val_loss_fn is a") as caught:
        for _ in range(5):
            state = run(opt, state, M=1, losses=(train_loss, lambda w, lam, b: val_loss(w, lam, b)))
    assert len(caught) == 1
    for _ in range(5):  # one and the same: the count starts anew
        state = run(opt, state, M=1)


def test_a_search_over_settings_is_no_recompilation(recwarn):
    """Every run compiles once, for its own settings and batch size; strict has nothing to say."""
    for i in range(5):
        rate, size = 0.1 / (i + 1), 2 + i
        opt = method("one_step", inner_optimizer=sgd, outer_optimizer=optax.sgd(rate), strict=True)
        run(opt, opt.init(*start()), M=1, get_train_batch=lambda: np.ones((size, 2), np.float32))  # noqa: B023
    assert not recwarn.list


def test_sources_that_change_shape_between_episodes_are_named():
    sizes = iter([n for n in range(2, 7) for _ in range(4)])
    opt = method("one_step", loop="scan", outer_optimizer=optax.sgd(0.1))  # nobody else's programs
    with pytest.warns(GradhpoWarning, match=r"compiled 4 times; the batch shapes.*pad") as caught:
        run(
            opt,
            opt.init(*start()),
            M=5,
            get_train_batch=lambda: np.ones((next(sizes), 2), np.float32),
        )
    assert len(caught) == 1


@pytest.mark.parametrize("loop", ["scan", "host"])
@pytest.mark.parametrize("name", ["hyperdistill", "reverse"])
def test_clear_caches_frees_what_losses_close_over(name, loop, collect):
    """Programs are kept for later calls, and the data with them, until they are cleared."""
    data = np.ones((1000, 2), np.float32)
    kept = weakref.ref(data)

    def closed(w, lam, batch, data=data):
        return train_loss(w, lam, batch) + jnp.mean(data @ w["w"]) ** 2

    opt = method(name, inner_optimizer=sgd, loop=loop)
    state = opt.init(*start())
    state = run(opt, state, M=1, losses=(closed, val_loss))
    opt.compute_hypergradient(state, batch(0), batch(1), closed, val_loss)
    del closed, data
    collect()
    assert kept() is not None
    clear_caches()
    collect()
    assert kept() is None
    run(opt, state, M=1)  # all compiled again


def test_programs_of_the_host_loop_do_not_pile_up(collect):
    """Of hundreds of problems in one process few stay alive, without anybody clearing a cache."""
    seen = []
    for _ in range(200):

        def closed(w, lam, batch):
            return train_loss(w, lam, batch)

        compiled(step, BilevelProblem(from_optax(closed, sgd), val_loss))  # no call: not compiled
        seen.append(weakref.ref(closed))
    del closed
    collect()
    assert 0 < sum(loss() is not None for loss in seen) <= 64


def test_a_resident_source_is_known_by_its_batches():
    """Four data sets of one batch size are no new shapes."""
    opt = method("one_step", strict=True, outer_optimizer=optax.sgd(0.1))
    state = opt.init(*start())
    for length in (5, 6, 7, 8):
        source = Resident(np.ones((length, 2), np.float32), batch_size=3)
        state = run(opt, state, M=1, get_train_batch=source, get_val_batch=source)
