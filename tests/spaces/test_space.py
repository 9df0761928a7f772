"""Spaces of hyperparameters: what is stored, what the losses see, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import BilevelProblem, Task, from_optax, from_update, one_step, reverse, spaces, tune
from gradhpo.core.declared import declared
from gradhpo.core.outer import Rated
from gradhpo.driver.spaces import within_spaces
from gradhpo.outer import followed_by, from_optimizer
from gradhpo.transforms import l1, on_simplex, proximal_adam, proximal_sgd, top_k

VALUES = {
    "unconstrained": (spaces.unconstrained(), -3.0),
    "positive": (spaces.positive(), 0.3),
    "positive large": (spaces.positive(), 300.0),
    "log": (spaces.log(), 1e-4),
    "interval": (spaces.interval(-1, 3), 2.9),
    "clipped": (spaces.interval(-1, 3, by="projection"), 3.0),
    "probability": (spaces.probability(), 0.01),
    "simplex": (spaces.simplex(), np.array([0.2, 0.3, 0.5])),
    "projected simplex": (spaces.simplex(by="projection"), np.array([[0.0, 0.0, 1.0]])),
    "integer": (spaces.integer(1, 8), 3.0),
    "categorical": (spaces.categorical(3), np.full((2, 3), 1 / 3)),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_comes_back(name, x64):
    space, value = VALUES[name]
    assert space.refuses(np.asarray(value)) is None
    stored = space.store(jnp.asarray(value))
    np.testing.assert_allclose(space.value(stored), value, rtol=1e-12)
    if space.project is not None:
        np.testing.assert_allclose(space.project(stored), stored, rtol=1e-12)


def test_equal_declarations_are_one():
    assert spaces.interval(0, 1) is spaces.interval(0.0, high=1, by="bijector")
    assert spaces.interval(0, 1) is spaces.interval(0, 1)
    assert spaces.interval(0, 1) is not spaces.interval(0, 2)
    assert repr(spaces.integer(1, 3)) == "integer(1, 3)"


def test_discrete_values():
    space = spaces.integer(0, 5)
    value, slope = jax.value_and_grad(space.value)(2.7)
    assert (float(value), float(slope)) == (3.0, 1.0)
    assert float(space.project(9.0)) == 5.0
    hard, logits = spaces.categorical(3, hard=True), jnp.array([0.1, 2.0, 1.0])
    np.testing.assert_array_equal(hard.value(logits), [0, 1, 0])
    np.testing.assert_array_equal(spaces.categorical(3).settle(logits), [0, 1, 0])
    weights = jnp.array([1.0, 2.0, 3.0])
    slopes = [
        jax.grad(lambda x, s=s: s.value(x) @ weights)(logits) for s in (hard, spaces.categorical(3))
    ]
    np.testing.assert_allclose(*slopes, rtol=1e-6)


def test_draws_are_the_distribution_and_keep_their_noise():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    keys = jax.random.split(jax.random.key(0), 20_000)
    hard = jax.vmap(lambda key: spaces.gumbel_softmax(logits, key, 0.5, hard=True))(keys)
    np.testing.assert_allclose(hard.mean(0), [0.5, 0.3, 0.2], atol=0.015)
    assert set(np.unique(hard)) == {0.0, 1.0}  # to the bit
    cold = spaces.gumbel_softmax(logits, keys[0], 1e-4)
    np.testing.assert_allclose(cold, hard[0], atol=1e-6)
    bits = jax.vmap(lambda key: spaces.binary_concrete(jnp.array(1.0), key, hard=True))(keys)
    assert float(bits.mean()) == pytest.approx(1 / (1 + np.exp(-1)), abs=0.015)
    again = spaces.gumbel_softmax(logits, keys[0], 1e-4)
    np.testing.assert_array_equal(cold, again)


REFUSED = [
    (spaces.log(), 0.0, "not above 0"),
    (spaces.positive(), -1.0, "not above 0"),
    (spaces.interval(0, 1), 1.0, "at a bound"),
    (spaces.interval(0, 1), 1.5, "not between 0 and 1"),
    (spaces.interval(0, 1), np.nan, "not finite"),
    (spaces.simplex(), [0.5, 0.6], "do not sum to 1"),
    (spaces.simplex(), [0.0, 1.0], "weight of 0"),
    (spaces.simplex(by="projection"), [-0.5, 1.5], "below 0"),
    (spaces.categorical(3), [0.5, 0.5], r"shape \(2,\)"),
    (spaces.integer(0, 3), 1.5, "no whole number"),
    (spaces.integer(0, 3), 4.0, "not between"),
]


@pytest.mark.parametrize("space, value, message", REFUSED)
def test_a_start_outside_is_refused_by_name(space, value, message):
    with pytest.raises(ValueError, match=rf"leaf \['x'\].*{message}"):
        task(space={"x": space}, lam={"x": np.asarray(value, float)})


@pytest.mark.parametrize(
    "space, value",
    [
        (spaces.log(), 1e-50),
        (spaces.interval(0, 1), 1 - 1e-9),
        (spaces.interval(1, 2), 1 + 1e-9),
    ],
)
def test_a_start_that_would_be_stored_as_infinite_is_refused(space, value, x32):
    with pytest.raises(ValueError, match=r"leaf \['x'\].*too close to a bound for float32"):
        task(space={"x": space}, lam={"x": value})


@pytest.mark.parametrize("space", [None, spaces.unconstrained(), spaces.positive()])
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_start_that_is_not_finite_is_refused(space, value):
    with pytest.raises(ValueError, match=r"leaf \['x'\].*is not"):
        task(space={"x": space, "y": None}, lam={"x": value, "y": 1.0})


def test_a_whole_number_is_told_to_be_a_float():
    with pytest.raises(TypeError, match=r"leaf \['x'\] is int.*write 8.0 for 8"):
        task(space={"x": spaces.integer(1, 16)}, lam={"x": 8})


def test_spaces_that_are_none():
    with pytest.raises(ValueError, match="nothing to choose"):
        spaces.integer(2, 2)
    with pytest.raises(ValueError, match="nothing to choose"):
        spaces.categorical(1)
    with pytest.raises(ValueError, match="empty"):
        spaces.interval(1, 0)
    with pytest.raises(TypeError, match="whole number"):
        spaces.integer(0, 1.5)
    with pytest.raises(TypeError, match="low must be one number"):
        spaces.interval(np.zeros(2), 1.0)
    with pytest.raises(TypeError, match=r"space leaf \['x'\]"):
        task(space={"x": "positive"}, lam={"x": 1.0})
    with pytest.raises(ValueError, match="prefix"):
        task(space={"y": spaces.log()}, lam={"x": 1.0})


def task(space, lam):
    def step(w, lam, batch):
        return w - 0.1 * (w - sum(jnp.sum(x) for x in jax.tree.leaves(lam)))

    problem = BilevelProblem(from_update(step), lambda w, lam, batch: jnp.sum((w - 2.5) ** 2))
    return Task(problem, 0.0, lam, lambda: 0.0, lambda: 0.0, space=space)


def test_a_run_sees_values_and_keeps_within():
    """The same run with the maps written into the losses by hand."""
    lam = {"rate": np.float32(0.2), "share": np.float32(0.9)}
    given = task({"rate": spaces.log(), "share": spaces.interval(0, 1, by="projection")}, lam)
    state = tune(given, reverse(5), optax.adam(0.2), episodes=20, T=5)
    value = given.values(state.hyperparams)
    assert 0 < float(value["share"]) <= 1 < float(value["rate"])
    assert float(state.metadata["outer_stationarity"]) > 0

    def step(w, lam, batch):
        return w - 0.1 * (w - (jnp.exp(lam["rate"]) + lam["share"]))

    plain = BilevelProblem(from_update(step), given.problem.outer_loss)
    stored = {"rate": jnp.log(lam["rate"]), "share": lam["share"]}
    clip = followed_by(optax.adam(0.2), lambda lam: lam | {"share": jnp.clip(lam["share"], 0, 1)})
    want = tune(
        Task(plain, 0.0, stored, lambda: 0.0, lambda: 0.0), reverse(5), clip, episodes=20, T=5
    )
    for name in lam:
        np.testing.assert_allclose(state.hyperparams[name], want.hyperparams[name], rtol=1e-6)


def test_the_inner_optimizer_sees_values_too():
    def loss(w, lam, batch):
        return (w - batch) ** 2

    dynamics = from_optax(loss, lambda lam: optax.sgd(lam))
    posed = Task(
        BilevelProblem(dynamics, lambda w, lam, batch: (w - batch) ** 2),
        3.0, 0.01, lambda: 1.0, lambda: 1.0, space=spaces.log(),
    )  # fmt: skip
    logged = []

    class Logger:
        def log(self, metrics, step):
            logged.append(metrics["hyperparams"])

    state = tune(posed, one_step(), optax.adam(0.1), episodes=3, T=4, logger=Logger())
    rate = float(posed.values(state.hyperparams))
    assert rate > 0.01 and logged[-1] == pytest.approx(rate)


def test_problems_are_bound_once():
    first = task({"x": spaces.log()}, {"x": np.float32(0.5)})
    second = first.replace(hyperparams={"x": np.float32(0.7)}, space=spaces.log())
    assert first.stored.problem is second.stored.problem
    assert float(second.stored.hyperparams["x"]) == pytest.approx(np.log(0.7))
    assert first.stored.stored.problem is first.stored.problem


def pulled(space, start=(0.25, 0.25, 0.25, 0.25)):
    """lam itself is trained, judged by its distance from GOAL, each number by a weight."""

    def val_loss(w, lam, batch):
        return jnp.sum(np.float32([1, 2, 3, 4]) * (w - GOAL) ** 2)

    problem = BilevelProblem(from_update(lambda w, lam, batch: lam["x"]), val_loss)
    lam = {"x": np.float32(start)}
    return Task(problem, np.zeros(4, np.float32), lam, lambda: 0.0, lambda: 0.0, space={"x": space})


GOAL = np.float32([0.9, 0.6, 0.2, -0.3])


def test_adam_ends_at_the_minimum_on_a_simplex():
    """In closed form: the first three are left, 2 c_i (x_i - a_i) is one number."""
    tau = (0.9 + 0.6 + 0.2 - 1) / (1 / 1 + 1 / 2 + 1 / 3)
    want = [0.9 - tau, 0.6 - tau / 2, 0.2 - tau / 3, 0]
    assert min(want[:3]) > 0
    posed = pulled(spaces.simplex(by="projection"))
    for outer in (optax.sgd(0.05), proximal_adam(0.01, on_simplex())):
        state = tune(posed, one_step(), outer, episodes=400, T=1)
        np.testing.assert_allclose(state.hyperparams["x"], want, atol=1e-4)
        assert state.metadata["outer_stationarity"] < 1e-4


WARM = optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, 50)  # the first rate is 0
UNEVEN = {
    "adam": optax.adam(0.01),
    "adam, warmed up": optax.adam(WARM),
    "adam, every third": optax.chain(optax.adam(0.1), optax.apply_every(3)),
    "adam, of many": optax.MultiSteps(optax.adam(0.1), 20).gradient_transformation(),
    "radam": optax.radam(0.1),
    "rprop": optax.rprop(0.1),
    "sign_sgd": optax.sign_sgd(0.1),
    "an Outer": from_optimizer(optax.adam(0.1)),
    "top_k": top_k(optax.adam(0.1), 2),
    "followed_by": followed_by(optax.adam(0.1), lambda lam: lam),
    "a penalty elsewhere": proximal_adam(0.1, {"x": None}),
}
DECAY, CLIP = optax.add_decayed_weights(0.1), optax.clip_by_global_norm(1.0)
EVEN = {
    "sgd": optax.sgd(0.1, 0.9),
    "warmed up": optax.sgd(WARM),
    "clip, decay": optax.chain(CLIP, DECAY, optax.sgd(0.1)),
    "decay, clip": optax.chain(DECAY, CLIP, optax.sgd(0.1)),
    "noise": optax.noisy_sgd(0.1, key=0),
    "injected": optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
    "lars": optax.lars(0.1),
    "top_k": top_k(optax.sgd(0.1), 2),
    "its own simplex": proximal_adam(0.1, on_simplex()),
    "its own projection": followed_by(
        optax.sgd(0.1), jax.jit(lambda lam: {"x": spaces.simplex_rows(lam["x"])})
    ),
    "followed_by": followed_by(top_k(optax.sgd(0.1), 2, error_feedback=True), lambda lam: lam),
}
OTHERS = {
    "bounds": followed_by(optax.adam(0.1), optax.projections.projection_non_negative),
    "a cap": followed_by(optax.sgd(0.1), lambda lam: {"x": jnp.minimum(lam["x"], 0.5)}),
    "l1": proximal_sgd(0.1, l1(0.1)),
}


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_steps_of_different_lengths_do_not_fit_a_simplex(dtype):
    posed = pulled(spaces.simplex(by="projection")).hyperparams
    stored = jax.tree.map(lambda x: jnp.asarray(x, dtype), posed)
    declaration = declared(spaces.simplex(by="projection"), stored)
    for name, outer in UNEVEN.items():
        with pytest.raises(ValueError, match=r"leaf \['x'\] is kept by simplex.*proximal_adam"):
            within_spaces(outer, declaration, stored)
            pytest.fail(name)
    for outer in EVEN.values():
        within_spaces(outer, declaration, stored)
    for outer in OTHERS.values():
        with pytest.raises(ValueError, match=r"leaf \['x'\].*another penalty or projection"):
            within_spaces(outer, declaration, stored)


def test_top_k_sees_the_projection_of_a_space():
    """By the largest hypergradient the first would win for ever, at its bound."""
    posed = pulled(spaces.interval(0, 0.5, by="projection"))
    for outer in (top_k(optax.sgd(0.05), 1, score="progress"), top_k(None, 1)):
        rate = None if outer is not None and not isinstance(outer, Rated) else 0.05
        state = tune(posed, one_step(), outer, episodes=300, T=1, lr_hyper=rate, of=10**6)
        np.testing.assert_allclose(state.hyperparams["x"], np.clip(GOAL, 0, 0.5), atol=1e-4)


def test_a_penalty_acts_on_values_alone():
    with pytest.raises(ValueError, match=r"leaf \['x'\].*stored as its value but by log\(\)"):
        tune(pulled(spaces.log()), one_step(), proximal_sgd(0.1, l1(0.1)), episodes=1, T=1)
    with pytest.raises(ValueError, match="by positive"):
        tune(
            pulled(spaces.positive()),
            one_step(),
            followed_by(None, optax.projections.projection_non_negative),
            episodes=1,
            T=1,
            lr_hyper=0.1,
        )
    tune(pulled(spaces.log()), one_step(), proximal_sgd(0.1, {"x": None}), episodes=1, T=1)
    apart = followed_by(optax.sgd(0.1), jax.jit(lambda lam: jax.tree.map(jnp.copy, lam)))
    tune(pulled(spaces.log()), one_step(), apart, episodes=1, T=1)
    natural = pulled(spaces.interval(0, 1, by="projection"))
    tune(natural, one_step(), proximal_sgd(0.1, l1(0.1)), episodes=1, T=1)


def test_a_run_without_constraints_goes_on_with_some():
    posed = pulled(None)
    state = tune(posed, one_step(), optax.sgd(0.1), episodes=1, T=1)
    outer = followed_by(optax.sgd(0.1), optax.projections.projection_non_negative)
    state = tune(posed, one_step(), outer, episodes=1, T=1, state=state)
    assert np.isfinite(state.metadata["outer_stationarity"])
    state = tune(posed, one_step(), optax.sgd(0.1), episodes=1, T=1, state=state)


def test_values_are_logged_by_a_function_of_values():
    seen = []

    class Logger:
        def log(self, metrics, step):
            seen.append(metrics["hyperparams/first"])

    posed = pulled(spaces.log())
    tune(
        posed, one_step(), optax.sgd(0.0), episodes=1, T=1, logger=Logger(),
        natural=lambda lam: {"first": lam["x"][0]},
    )  # fmt: skip
    assert seen == [pytest.approx(0.25)]
