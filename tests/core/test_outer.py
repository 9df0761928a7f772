"""Outer updates as objects: closed forms, through `bilevel_step` and the classes, and the guard."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import (
    BilevelProblem,
    FOOptimizer,
    Outer,
    Status,
    Window,
    bilevel_step,
    first_order,
    from_update,
    init_state,
    run_episodes,
)
from gradhpo.core.outer import as_outer, descent, followed_by, from_optimizer
from gradhpo.testing import assert_trees_close

TARGET = np.array([3.0, -0.4, 0.2, -2.0])
BOX = (-0.5, 1.0)
RATE, PENALTY = 0.25, 0.8


def distance(w, lam, batch):
    """|lam - target|^2 / 2, whose hypergradient is direct: lam - target."""
    return jnp.sum((lam["x"] - TARGET) ** 2) / 2 + 0 * jnp.sum(w) + batch


PROBLEM = BilevelProblem(from_update(lambda w, lam, batch: w), distance)
LAM = {"x": np.zeros(4)}


def clip(lam):
    return {"x": jnp.clip(lam["x"], *BOX)}


def shrink(lam):
    """The proximal map of `RATE PENALTY |x|_1`: soft thresholding."""
    x, much = lam["x"], RATE * PENALTY
    return {"x": jnp.sign(x) * jnp.maximum(jnp.abs(x) - much, 0)}


def steps(outer, count, rates=None, lam=LAM, batches=None):
    """The hyperparameters after so many outer updates, as one compiled program."""
    state = init_state(PROBLEM, first_order(), outer, jnp.zeros(()), lam)
    window = Window(*(jnp.zeros((count, 1)) if x is None else x for x in (None, batches)))
    run = jax.jit(partial(run_episodes, first_order(), outer, PROBLEM))
    return run(state, window, rates)


def by_hand(move, rates):
    x = np.zeros(4)
    for rate in rates:
        x = move(x - rate * (x - TARGET))
    return {"x": x}


def test_a_plain_rate_that_decays(x64):
    rates = np.array([0.5, 0.3, 0.1])
    state, _ = steps(None, 3, jnp.asarray(rates))
    assert_trees_close(state.hyperparams, by_hand(lambda x: x, rates), 1e-13)
    assert state.outer_opt_state == ()
    state, _ = steps(descent(0.5), 3)
    assert_trees_close(state.hyperparams, by_hand(lambda x: x, [0.5] * 3), 1e-13)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam(0.1),
        optax.adamw(0.1, weight_decay=0.01),  # wants the parameters
        optax.sgd(optax.cosine_decay_schedule(0.3, 3), 0.9),
        optax.chain(optax.clip_by_global_norm(1.0), optax.lion(0.1)),
        optax.MultiSteps(optax.sgd(0.1), 2),
    ],
    ids=["adam", "adamw", "schedule", "chain", "multi_steps"],
)
def test_any_optax_optimizer(optimizer, x64):
    """The optimizer itself and the `Outer` of it take the steps that Optax takes."""
    lam = jax.tree.map(jnp.asarray, LAM)
    slots = optimizer.init(lam)
    for _ in range(3):
        updates, slots = optimizer.update({"x": lam["x"] - TARGET}, slots, lam)
        lam = optax.apply_updates(lam, updates)
    for outer in (optimizer, from_optimizer(optimizer)):
        state, _ = steps(outer, 3)
        assert_trees_close(state.hyperparams, lam, 1e-13)


@pytest.mark.parametrize("outer", [descent(RATE), optax.sgd(RATE)], ids=["descent", "optax"])
def test_projected_gradient_on_a_box(outer, x64):
    state, _ = steps(followed_by(outer, clip), 5)
    assert_trees_close(state.hyperparams, by_hand(lambda x: np.clip(x, *BOX), [RATE] * 5), 1e-13)
    state, _ = steps(followed_by(outer, clip), 200)  # converges to the projection of the target
    assert_trees_close(state.hyperparams, {"x": np.clip(TARGET, *BOX)}, 1e-13)


def test_a_proximal_step_solves_the_lasso(x64):
    """min |x - target|^2 / 2 + penalty |x|_1 is the target, soft-thresholded by the penalty."""
    state, _ = steps(followed_by(descent(RATE), shrink), 1)
    first = np.sign(TARGET) * np.maximum(RATE * np.abs(TARGET) - RATE * PENALTY, 0)
    assert_trees_close(state.hyperparams, {"x": first}, 1e-13)
    state, _ = steps(followed_by(descent(RATE), shrink), 200)
    want = np.sign(TARGET) * np.maximum(np.abs(TARGET) - PENALTY, 0)
    assert_trees_close(state.hyperparams, {"x": want}, 1e-13)
    assert float(state.hyperparams["x"][1]) == 0.0  # exactly, as no Optax update would


def test_moves_follow_one_another(x64):
    """`followed_by` of `followed_by`: first one move, then the other."""
    outer = followed_by(followed_by(descent(1.0), lambda lam: {"x": 2 * lam["x"]}), clip)
    state, _ = steps(outer, 1)
    assert_trees_close(state.hyperparams, {"x": np.clip(2 * TARGET, *BOX)}, 1e-13)


# An update of a user's own: the sign of an average, with a slot that counts.
OWN = Outer(
    init=lambda lam: (jax.tree.map(jnp.zeros_like, lam), jnp.zeros((), jnp.int32)),
    apply=lambda h, slots, lam: (
        jax.tree.map(lambda x, m, g: x - 0.1 * jnp.sign((m + g) / 2), lam, slots[0], h),
        (jax.tree.map(lambda m, g: (m + g) / 2, slots[0], h), slots[1] + 1),
    ),
)


def test_an_outer_of_ones_own_in_functions_and_classes(x64):
    functional, _ = steps(OWN, 3)
    opt = FOOptimizer(update_fn=lambda w, lam, batch: w, outer_optimizer=OWN, T=1)
    run = partial(
        opt.run,
        get_train_batch=lambda: 0.0,
        get_val_batch=lambda: 0.0,
        train_loss_fn=distance,
        val_loss_fn=distance,
    )
    state = run(opt.init(jnp.zeros(()), LAM), 3)
    want = 0.3 * np.sign(TARGET)
    for got in (functional, state):
        assert_trees_close(got.hyperparams, {"x": want}, 1e-13)
        assert int(got.outer_opt_state[1]) == 3


def test_scan_jit_and_vmap_are_the_plain_loop(x64):
    outer = followed_by(optax.adam(0.1), clip)
    step = partial(bilevel_step(first_order(), outer), PROBLEM)
    window = Window(jnp.zeros(1), jnp.zeros(1))
    starts = [
        init_state(PROBLEM, first_order(), outer, jnp.zeros(()), {"x": jnp.full(4, x)})
        for x in (0.0, 0.3)
    ]
    plain = []
    for state in starts:
        for _ in range(3):
            state = step(state, window)  # noqa: PLW2901
        plain.append(state.hyperparams)
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *starts)
    scanned = lambda s: jax.lax.scan(lambda s, _: (step(s, window), None), s, length=3)[0]  # noqa: E731
    got = jax.jit(jax.vmap(scanned))(stacked).hyperparams
    assert_trees_close(got, jax.tree.map(lambda *xs: jnp.stack(xs), *plain), 1e-13)


@pytest.mark.parametrize("where", ["hyperparams", "slots"])
def test_an_apply_that_leaves_nan_behind_is_undone(where):
    """The guard covers what apply makes, whatever the hypergradient was."""

    def apply(h, slots, lam):
        bad = jnp.where(slots == 1, jnp.nan, 0.0)
        lam = jax.tree.map(lambda x, g: x - 0.1 * g + bad * (where == "hyperparams"), lam, h)
        return lam, slots + 1 + bad * (where == "slots")

    outer = Outer(lambda lam: jnp.zeros(()), apply)
    step = jax.jit(partial(bilevel_step(first_order(), outer), PROBLEM))
    state = init_state(PROBLEM, first_order(), outer, jnp.zeros(()), {"x": jnp.zeros(4)})
    window = Window(jnp.zeros(1), jnp.zeros(1))
    first = step(state, window)
    second = step(first, window)
    assert second.status_counts == {Status.OK: 1, Status.NONFINITE_HYPERPARAMS: 1}
    assert_trees_close(second.hyperparams, first.hyperparams, 0.0)
    assert float(second.outer_opt_state) == 1


@pytest.mark.parametrize(
    "move, message",
    [
        (lambda lam: {"x": lam["x"][:2]}, r"\['x'\] went from float32\[4\] to float32\[2\]"),
        (lambda lam: {"x": lam["x"].astype(jnp.float16)}, r"\['x'\] went from float32.* float16"),
        (lambda lam: {"y": lam["x"]}, "outer update"),
        (lambda lam: lam["x"], "outer update"),
    ],
    ids=["shape", "dtype", "key", "structure"],
)
def test_an_apply_that_changes_what_lam_is(move, message, x32):
    outer = followed_by(descent(0.1), move)
    state = init_state(PROBLEM, first_order(), outer, jnp.zeros(()), {"x": jnp.zeros(4)})
    with pytest.raises(ValueError, match=message):
        bilevel_step(first_order(), outer)(PROBLEM, state, Window(jnp.zeros(1), jnp.zeros(1)))


@pytest.mark.parametrize(
    "apply, message",
    [
        (
            lambda h, slots, lam: (lam, jnp.zeros(3)),
            r"of the slots, but .* float32\[2\] to float32",
        ),
        (lambda h, slots, lam: (lam, slots > 0), r"of the slots, but .* float32\[2\] to bool"),
        (lambda h, slots, lam: (lam, (slots, slots)), "outer update.*structure"),
        (lambda h, slots, lam: lam, r"must return \(hyperparams, slots\), but returned dict"),
    ],
    ids=["shape", "dtype", "structure", "no pair"],
)
def test_an_apply_that_changes_what_the_slots_are(apply, message, x32):
    outer = Outer(lambda lam: jnp.zeros(2), apply)
    state = init_state(PROBLEM, first_order(), outer, jnp.zeros(()), {"x": jnp.zeros(4)})
    with pytest.raises((TypeError, ValueError), match=message):
        bilevel_step(first_order(), outer)(PROBLEM, state, Window(jnp.zeros(1), jnp.zeros(1)))


@pytest.mark.parametrize("outer", [optax.adam, 0.1, "adam"])
def test_what_is_no_outer_update(outer):
    with pytest.raises(TypeError, match="outer_optimizer must be an Optax GradientTransformation"):
        FOOptimizer(update_fn=lambda w, lam, batch: w, outer_optimizer=outer)
    with pytest.raises(TypeError, match="must be an Optax GradientTransformation"):
        followed_by(outer, clip)
    with pytest.raises(TypeError, match="move"):
        followed_by(descent(0.1), None)


def test_as_outer_takes_any_of_them():
    assert as_outer(OWN) is OWN
    assert as_outer(None, 0.1).init(LAM) == ()
    assert isinstance(as_outer(optax.sgd(0.1)), Outer)
