"""Top-k outer updates: which coordinates move, and what the others keep."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gradhpo import GreedyOptimizer, spaces
from gradhpo.outer import descent, followed_by
from gradhpo.spaces import simplex_rows
from gradhpo.transforms import (
    group_lasso,
    l1,
    on_simplex,
    proximal_adam,
    proximal_sgd,
    within_budget,
)
from gradhpo.transforms.largest import largest
from gradhpo.transforms.top_k import top_k

LAM = {"a": jnp.array([3.0, -1.0]), "b": jnp.array([[0.5, 2.0, 0.1], [1.0, -4.0, 0.2]])}
OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.1),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
}


def slopes(lam, t):
    return jax.tree.map(lambda x: x * (1 + 0.1 * t) + jnp.sin(7 * x + t), lam)


def walk(outer, lam, steps):
    @jax.jit
    def step(carry, t):
        lam, slots = carry
        carry = outer.apply(slopes(lam, t), slots, lam)
        return carry, carry[0]

    return jax.lax.scan(step, (lam, outer.init(lam)), jnp.arange(float(steps)))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("settings", [{}, {"groups": "row"}, {"error_feedback": True}])
def test_all_coordinates_are_the_dense_update_bit_for_bit(name, settings):
    k = 4 if settings.get("groups") == "row" else 8
    dense = walk(followed_by(OPTIMIZERS[name], lambda lam: lam), LAM, 5)
    taken = walk(top_k(OPTIMIZERS[name], k, **settings), LAM, 5)
    jax.tree.map(np.testing.assert_array_equal, taken[1], dense[1])


@pytest.mark.parametrize("scaled, order", [(False, [2, 0, 3, 1]), (True, [3, 0, 2, 1])])
def test_the_trace_of_gauss_southwell_on_a_separable_quadratic(scaled, order):
    """f = sum a_i x_i^2 / 2 with steps of 1 / a_i: a coordinate is at 0 after one step. First goes
    the largest |a_i x_i| = 5, 4, 6, 5, of equal ones the first; with the scale a the largest
    a_i x_i^2 = 25, 4, 18, 50."""
    a, lam = jnp.array([1.0, 4.0, 2.0, 0.5]), jnp.array([5.0, 1.0, -3.0, 10.0])
    newton = optax.stateless(lambda h, params: -h / a)
    outer = top_k(newton, 1, scale=a if scaled else None)
    slots = outer.init(lam)
    for i in order:
        want = lam.at[i].set(0.0)
        lam, slots = outer.apply(a * lam, slots, lam)
        np.testing.assert_array_equal(lam, want)


def test_the_others_keep_value_and_slots():
    adam = optax.adam(0.1)
    outer = top_k(adam, 2)
    h = {"a": jnp.array([0.0, 9.0]), "b": jnp.array([[1.0, 2.0, 3.0], [-8.0, 0.0, 1.0]])}
    new, slots = jax.jit(outer.apply)(h, outer.init(LAM), LAM)
    dense, full = adam.update(h, adam.init(LAM), LAM)
    chosen = {"a": [False, True], "b": [[False] * 3, [True, False, False]]}
    for name, mask in chosen.items():
        mask = np.array(mask)
        np.testing.assert_array_equal(
            new[name], jnp.where(mask, LAM[name] + dense[name], LAM[name])
        )
        for slot in ("mu", "nu"):
            got, want = (getattr(each[0], slot)[name] for each in (slots.outer, full))
            np.testing.assert_array_equal(got, jnp.where(mask, want, 0))
    assert int(slots.outer[0].count) == 1


def test_groups_are_taken_whole():
    h = {"a": jnp.array([3.0, 3.0]), "b": jnp.array([[2.0, 2.0, 2.0], [4.0, 0.0, 0.0]])}

    def moved(**settings):
        outer = top_k(descent(1.0), 1, **settings)
        new, _ = outer.apply(h, outer.init(LAM), LAM)
        return jax.tree.map(lambda x, y: (x != y).astype(int).tolist(), new, LAM)

    assert moved() == {"a": [0, 0], "b": [[0, 0, 0], [1, 0, 0]]}
    assert moved(groups="row") == {"a": [0, 0], "b": [[0, 0, 0], [1, 0, 0]]}
    assert moved(groups="leaf") == {"a": [0, 0], "b": [[1, 1, 1], [1, 0, 0]]}
    assert moved(scale={"a": 0.1, "b": 1.0}) == {"a": [1, 0], "b": [[0, 0, 0], [0, 0, 0]]}


def test_a_fraction_is_rounded_and_at_least_one():
    lam, h = jnp.zeros(10), jnp.arange(1.0, 11.0)
    for k, n in ((0.25, 3), (0.24, 2), (0.001, 1), (0.9999, 10), (7, 7)):
        outer = top_k(descent(1.0), k)
        assert int((outer.apply(h, outer.init(lam), lam)[0] != 0).sum()) == n


def test_progress_knows_the_bounds():
    """The largest hypergradient pushes a coordinate out that is at its bound already."""
    inside = followed_by(descent(0.1), lambda lam: jnp.clip(lam, 0.0, 1.0))
    lam, h = jnp.array([0.0, 0.5, 0.97]), jnp.array([9.0, 1.0, -2.0])
    by = {
        s: top_k(inside, 1, score=s).apply(h, top_k(inside, 1).init(lam), lam)[0]
        for s in ("magnitude", "progress")
    }
    np.testing.assert_array_equal(by["magnitude"], lam)
    np.testing.assert_allclose(by["progress"], [0.0, 0.4, 0.97], rtol=1e-6)  # 1 x 0.1 > 2 x 0.03


def test_what_is_held_back_comes_later():
    """With error feedback the plain steps of all hypergradients are taken in the end."""
    outer, lam = top_k(descent(1.0), 1, error_feedback=True), jnp.zeros(3)
    slots = outer.init(lam)
    for _ in range(4):
        lam, slots = outer.apply(jnp.array([3.0, 2.0, 1.0]), slots, lam)
    np.testing.assert_allclose(lam - slots.held_back, -4 * jnp.array([3.0, 2.0, 1.0]))
    assert float(lam[1]) != 0


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(np.float32, 12, elements=st.sampled_from([0.0, 1e-30, 0.5, 1.0, 2.0, 3e38])),
    st.integers(1, 12),
)
def test_the_largest_as_by_a_stable_sort(values, k):
    want = np.zeros(12, bool)
    want[np.argsort(-values, kind="stable")[:k]] = True
    got = largest({"a": values[:5], "b": jnp.asarray(values[5:]).reshape(7, 1)}, k)
    np.testing.assert_array_equal(np.concatenate([got["a"], got["b"].ravel()]), want)


def test_the_rate_of_the_run():
    rated = top_k(None, 1)
    lam, h = jnp.array([1.0, 1.0]), jnp.array([1.0, 2.0])
    outer = rated.at(0.25)
    np.testing.assert_allclose(outer.apply(h, outer.init(lam), lam)[0], [1.0, 0.5])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"k": 0}, "k must"),
        ({"k": 1.0}, "fraction"),
        ({"k": True}, "k must"),
        ({"k": 1, "score": "size"}, "score"),
        ({"k": 1, "groups": "column"}, "groups"),
        ({"k": 1, "score": "progress", "scale": 1.0}, "scale"),
    ],
)
def test_wrong_settings_are_refused(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        top_k(optax.sgd(0.1), **arguments)


def test_what_cannot_be_chosen_from_is_refused():
    outer = top_k(optax.sgd(0.1), 9)
    with pytest.raises(ValueError, match="k=9 are more than the 8"):
        outer.apply(LAM, outer.init(LAM), LAM)
    with pytest.raises(ValueError, match="one slot for each number"):
        outer = top_k(optax.adafactor(0.1, min_dim_size_to_factor=1), 2)
        outer.apply(LAM, outer.init(LAM), LAM)
    with pytest.raises(ValueError, match="scale of leaf"):
        top_k(optax.sgd(0.1), 2, scale=0.0).init(LAM)
    with pytest.raises(TypeError, match="outer must be"):
        top_k(optax.adam, 2)


@pytest.mark.parametrize("by_rate", [True, False])
def test_greedy_in_one_word(by_rate):
    """`GreedyOptimizer(top_k=1)` moves one number, as without top_k; with the rate of the run."""

    def update(w, lam, batch):
        return w - 0.1 * (w - lam["a"] - lam["b"].sum() * batch)

    def judge(w, lam, batch):
        return jnp.sum((w - 1) ** 2) + jnp.sum(lam["b"] ** 2)

    outer = None if by_rate else optax.sgd(0.1)
    lam = {"a": 0.3, "b": np.array([0.5, -0.1], np.float32)}
    states = []
    for k in (None, 1):
        opt = GreedyOptimizer(update_fn=update, unroll_steps=2, top_k=k, outer_optimizer=outer)
        state = opt.init(np.zeros(2, np.float32), lam)
        states.append(opt.step(state, 0.5, 0.5, judge, judge, *([0.1] if by_rate else [])))
    dense, few = (np.hstack(jax.tree.leaves(state.hyperparams)) for state in states)
    start = np.hstack(jax.tree.leaves(lam))
    i = np.argmax(abs(dense - start))
    assert (few != start).sum() == 1 and few[i] == dense[i]
    with pytest.raises(ValueError, match="neither" if by_rate else "both"):
        opt.step(state, 0.5, 0.5, judge, judge, None if by_rate else 0.1)


CONSTRAINED = {  # and whether a number added to all of h is tried
    "sgd": (proximal_sgd(0.05, on_simplex()), True),
    "adam": (proximal_adam(0.01, on_simplex(), b1=0.0), True),
    "projected": (followed_by(optax.sgd(0.05), simplex_rows), True),
    "budget": (proximal_adam(0.01, within_budget(1.0), b1=0.0), False),
}


@pytest.mark.parametrize("score", ["magnitude", "progress"])
def test_what_ties_coordinates_is_kept(score):
    """A part of a projected step is outside of a simplex and of a budget."""
    for project in (spaces.simplex_rows, lambda x: spaces.budget(x, 1.0)):
        outer = top_k(followed_by(descent(0.5), project), 1, score=score)
        lam, slots = jnp.array([0.5, 0.3, 0.2]), outer.init(jnp.ones(3))
        for h in np.random.default_rng(0).standard_normal((20, 3)) - 0.5:
            lam, slots = outer.apply(h, slots, lam)
            assert float(lam.sum()) <= 1 + 1e-6 and float(lam.min()) >= 0


@pytest.mark.parametrize("shift", [0.0, 5.0])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("name", CONSTRAINED)
def test_a_part_of_a_proximal_step_stays_in_the_set(name, k, shift):
    """And ends at the minimum of `sum A (lam - c)^2 / 2`, where a number added to all of h, which
    changes nothing on a simplex, does not choose."""
    A, c = jnp.array([4.0, 1.0, 1.0, 0.25]), jnp.array([0.6, 0.6, 0.1, 0.3])
    outer, tied = CONSTRAINED[name]
    outer, shift = top_k(outer, k), shift * tied

    def step(carry, _):
        lam, slots = carry
        lam, slots = outer.apply(A * (lam - c) + shift, slots, lam)
        return (lam, slots), jnp.sum(lam)

    lam = jnp.full(4, 0.25)
    (lam, _), sums = jax.lax.scan(step, (lam, outer.init(lam)), None, length=6000)
    if name == "budget":
        assert sums.max() <= 1 + 1e-6
    else:
        np.testing.assert_allclose(sums, 1, atol=1e-6)
    np.testing.assert_allclose(lam, [0.56, 0.44, 0, 0], atol=1e-3)


MOVED = {
    "bounds": lambda step, b: followed_by(step(b), optax.projections.projection_non_negative),
    "penalty": lambda step, b: proximal_sgd(0.1, l1(1e-3), momentum=b),
    "nothing": lambda step, b: step(b),
}


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("name", MOVED)
@pytest.mark.parametrize("step", [lambda b: optax.sgd(0.1, b), lambda b: optax.adam(0.01, b)])
def test_old_momentum_holds_nothing_back(name, k, step):
    """Thrown far beyond its minimum, a coordinate comes back, though its slots are kept and the
    first one always has something to do."""
    A, c = jnp.array([4.0, 1.0, 1.0, 0.25]), jnp.array([0.6, 0.6, 0.1, 0.3])
    outer = top_k(MOVED[name](step, 0.9), k)

    def update(carry, noise):
        lam, slots = carry
        return outer.apply((A * (lam - c)).at[0].add(noise), slots, lam), None

    lam, noise = jnp.full(4, 2.0), 0.01 * (-1.0) ** jnp.arange(6000)
    (lam, _), _ = jax.lax.scan(update, (lam, outer.init(lam)), noise)
    np.testing.assert_allclose(lam, c - (name == "penalty") * 1e-3 / A, atol=0.05)


PENALISED = {
    "momentum": proximal_sgd(0.05, l1(0.1), momentum=0.9),
    "adam": proximal_adam(0.01, l1(0.1)),
    "bounded": followed_by(
        proximal_sgd(0.05, l1(0.1), momentum=0.9), optax.projections.projection_non_negative
    ),
}


@pytest.mark.parametrize("start", [(0.0, 0.0, 0.0), (0.2, -0.3, 0.0)])
@pytest.mark.parametrize("name", PENALISED)
def test_a_small_slope_leaves_the_kink_in_its_turn(name, start):
    """Slopes of 1, 0.5 and 0.3 against a penalty of 0.1: with momentum the first step alone would
    not leave 0."""
    outer, c = top_k(PENALISED[name], 1), jnp.array([1.0, 0.5, 0.3])

    def update(carry, _):
        lam, slots = carry
        return outer.apply(lam - c, slots, lam), None

    lam = jnp.array(start)
    (lam, _), _ = jax.lax.scan(update, (lam, outer.init(lam)), None, length=5000)
    np.testing.assert_allclose(lam, c - 0.1, atol=1e-3)


@pytest.mark.parametrize("score", [None, "progress"])
def test_an_optimizer_of_some_leaves(score):
    masked = optax.chain(
        optax.masked(optax.scale_by_adam(), {"a": True, "b": False}), optax.sgd(0.5)
    )
    outer, lam = top_k(masked, 1, score=score), {"a": jnp.ones(2), "b": jnp.ones(2)}
    new, slots = outer.apply({"a": jnp.zeros(2), "b": jnp.array([0.0, 3.0])}, outer.init(lam), lam)
    np.testing.assert_array_equal(new["b"], [1, -0.5])
    new, slots = outer.apply({"a": jnp.array([9.0, 0.0]), "b": jnp.zeros(2)}, slots, new)
    assert new["a"][0] < 1 and new["a"][1] == 1
    np.testing.assert_array_equal(slots.outer[0].inner_state.mu["a"] > 0, [True, False])


def test_steps_that_are_gathered_go_to_the_largest():
    outer = top_k(optax.chain(optax.sgd(0.1), optax.apply_every(2)), 1, score="progress")
    lam, h = jnp.zeros(3), jnp.array([1.0, 3.0, 2.0])
    slots = outer.init(lam)
    for _ in range(2):
        lam, slots = outer.apply(h, slots, lam)
    np.testing.assert_allclose(lam, [0, -0.6, 0], rtol=1e-6)


def test_progress_knows_penalties():
    """|lam - a|^2 / 2 + |lam|_1 with |a_i| < 1: its minimum is 0; by h alone nothing is gained."""
    a = jnp.array([0.5, 0.5])
    outer = top_k(proximal_sgd(0.1, l1(1.0)), 1, score="progress")
    lam, slots = a, outer.init(a)
    for _ in range(200):
        lam, slots = outer.apply(lam - a, slots, lam)
    np.testing.assert_array_equal(lam, 0)
    rows = top_k(proximal_sgd(0.1, group_lasso(1.0)), 1, score="progress")
    with pytest.raises(ValueError, match="group_lasso is no sum.*score='magnitude'"):
        rows.apply(jnp.ones((2, 2)), rows.init(jnp.ones((2, 2))), jnp.ones((2, 2)))


def test_small_hypergradients_are_compared():
    outer = top_k(descent(1.0), 2)
    new, _ = outer.apply(jnp.array([1.0, 1e-24, 1e-23]), (outer.init(jnp.zeros(3))), jnp.zeros(3))
    assert new[2] != 0 and new[1] == 0


@pytest.mark.parametrize(
    "scale, text", [({"b": 1.0}, "prefix of it"), ({"a": np.ones(2)}, r"shape \(2,\)")]
)
def test_a_scale_that_does_not_fit_is_refused(scale, text):
    outer, lam = top_k(descent(1.0), 1, scale=scale), {"a": jnp.ones(3)}
    with pytest.raises(ValueError, match=text):
        outer.apply(lam, outer.init(lam), lam)
