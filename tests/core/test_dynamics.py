"""Phi and its pullback: what is differentiated, what is only carried."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import (
    BilevelProblem,
    Dynamics,
    InnerState,
    OneStepOptimizer,
    Window,
    from_optax,
    from_update,
    linearize,
)
from gradhpo.core.dynamics import as_factory, pull_through_update, zero_cotangent
from gradhpo.estimators import finite_difference, greedy, hyperdistill, one_step, reverse
from gradhpo.testing import assert_trees_close, unrolled_loss

pytestmark = pytest.mark.usefixtures("x64")


@jax.custom_vjp
def cube(x):
    return x**3


cube.defvjp(lambda x: (x**3, x), lambda x, g: (3 * x**2 * g,))


def test_a_loss_without_forward_mode_falls_back_to_reverse():
    """custom_vjp alone: the same two products by reverse over reverse."""

    def loss(w, lam, batch, f):
        return jnp.sum(f(w - batch) * jnp.exp(lam)) + jnp.sum(w**2)

    w, lam, batch = jnp.arange(3.0), jnp.array([0.1, -0.2, 0.3]), jnp.ones(3)
    alpha = InnerState(jnp.array([1.0, -2.0, 0.5]), ())
    got, want = (
        linearize(dynamics, dynamics.init(w, lam), lam, batch)
        for dynamics in (
            from_optax(lambda w, lam, b: loss(w, lam, b, cube), optax.sgd(0.1)),
            from_optax(lambda w, lam, b: loss(w, lam, b, lambda x: x**3), optax.sgd(0.1)),
        )
    )
    assert_trees_close(got[0].params, want[0].params, 1e-14)
    (a, b), (c, d) = (pull(alpha._replace(opt_state=s.opt_state)) for s, pull in (got, want))
    assert_trees_close((a.params, b), (c.params, d), 1e-14)
    # By hand: alpha A = alpha (1 - 0.1 (6 (w - 1) e^lam + 2)), alpha B = -0.3 alpha (w-1)^2 e^lam
    x = w - batch
    by_hand = alpha.params * (1 - 0.1 * (6 * x * jnp.exp(lam) + 2))
    assert_trees_close(a.params, by_hand, 1e-14)
    assert_trees_close(b, -0.3 * alpha.params * x**2 * jnp.exp(lam), 1e-14)


def test_another_type_error_is_not_swallowed():
    def loss(w, lam, batch):
        raise TypeError("the user's own mistake")

    dynamics = from_optax(loss, optax.sgd(0.1))
    with pytest.raises(TypeError, match="own mistake"):
        linearize(dynamics, dynamics.init(jnp.ones(2), 1.0), 1.0, None)


def mixed_params():
    return {
        "w": jnp.array([1.0, 2.0]),
        "count": jnp.array(3, jnp.int32),
        "flag": jnp.array(True),
        "key": jax.random.key(7),
        "nothing": None,
    }


def noisy(w, lam, batch):
    noise = jax.random.normal(w["key"], (2,))
    rate = lam / (1 + w["count"])
    new = w["w"] - rate * (w["w"] - batch + noise)
    return {**w, "w": new, "count": w["count"] + 1, "key": jax.random.split(w["key"])[0]}


ESTIMATORS = {
    "reverse": reverse(3),
    "greedy": greedy(0.9, 3),
    "one_step": one_step(),
    "averaged": one_step(0.9),
    "hyperdistill": hyperdistill(0.9),
}


def test_integer_and_key_leaves_are_carried():
    dynamics = from_update(noisy)
    inner = dynamics.init(mixed_params(), jnp.array(0.4))
    lam, batch = jnp.array(0.4), jnp.array([0.5, -1.0])
    new, pullback = linearize(dynamics, inner, lam, batch)
    assert new.params["count"] == 4 and new.params["count"].dtype == jnp.int32
    assert new.params["flag"].dtype == bool and new.params["nothing"] is None
    assert not np.array_equal(*map(jax.random.key_data, (new.params["key"], inner.params["key"])))
    alpha = zero_cotangent(new)
    assert alpha.params["count"] is None and alpha.params["key"] is None
    a, b = pullback(alpha._replace(params={**alpha.params, "w": jnp.array([1.0, -1.0])}))
    assert a.params["count"] is None
    noise = jax.random.normal(inner.params["key"], (2,))
    np.testing.assert_allclose(a.params["w"], [0.9, -0.9], rtol=1e-14)
    np.testing.assert_allclose(
        b, -jnp.dot(jnp.array([1.0, -1.0]), inner.params["w"] - batch + noise) / 4
    )


def test_complex_weights_are_refused():
    """They would be carried like integers: not trained, and left out of the hypergradient."""

    def loss(w, lam, batch):
        return jnp.sum(jnp.abs(w["c"] - batch) ** 2) * jnp.exp(lam) + w["a"] ** 2

    def update_fn(w, lam, batch):
        return jax.tree.map(lambda w, g: w - 0.1 * jnp.conj(g), w, jax.grad(loss)(w, lam, batch))

    w, lam = {"a": jnp.array(1.0), "c": jnp.array([1.0 + 1j, 2.0])}, jnp.array(0.0)
    remedy = r"real.*complex128.*two leaves.*jax\.lax\.complex"
    for given in ({"update_fn": update_fn}, {"inner_optimizer": optax.sgd(0.1)}):
        with pytest.raises(TypeError, match=r"leaf \['c'\] of params: .*" + remedy):
            OneStepOptimizer(**given).init(w, lam)
    with pytest.raises(TypeError, match=remedy):
        from_optax(loss, optax.sgd(0.1)).init(w, lam)
    problem = BilevelProblem(from_update(update_fn), loss)
    window = Window(jnp.zeros(1), jnp.zeros(1))
    with pytest.raises(TypeError, match=remedy):
        one_step().estimate(problem, (), problem.dynamics.init(w, lam), lam, window)

    def train_loss(w, lam, batch):  # the remedy works, and complex batches do
        return loss({"a": w["a"], "c": jax.lax.complex(w["re"], w["im"])}, lam, batch)

    opt = OneStepOptimizer(inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.1))
    state = opt.init({"a": w["a"], "re": w["c"].real, "im": w["c"].imag}, lam)
    batch = jnp.array([1j, 1.0])
    after = opt.step(state, batch, batch, train_loss, train_loss)
    assert after.metadata["status"] == 0
    np.testing.assert_allclose(after.params["re"], [0.8, 1.8])  # w - 0.1 * 2 (w - batch)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_carries_keys_and_counts(name):
    problem = BilevelProblem(from_update(noisy), lambda w, lam, v: jnp.sum((w["w"] - v) ** 2))
    lam = jnp.array(0.4)
    inner = problem.dynamics.init(mixed_params(), lam)
    estimator = ESTIMATORS[name]
    window = Window(jnp.ones((estimator.unroll_steps, 2)), jnp.zeros((estimator.unroll_steps, 2)))
    memory = estimator.init(inner, lam, window)
    got = jax.jit(lambda *a: estimator.estimate(problem, *a))(memory, inner, lam, window)
    assert jax.tree.structure(got.inner) == jax.tree.structure(inner)
    if name == "reverse":
        exact = jax.grad(lambda x: unrolled_loss(problem, inner, x, window))(lam)
        np.testing.assert_allclose(got.hypergrad, exact, rtol=1e-13)
    assert got.inner.params["count"] == 3 + estimator.unroll_steps


def test_optax_sees_floating_leaves_only():
    """Weight decay and moments never meet the integer leaf; it stays as it was."""

    def loss(w, lam, batch):
        return jnp.sum((w["w"] - batch) ** 2) * jnp.exp(lam)

    dynamics = from_optax(loss, optax.adamw(0.1, eps_root=1e-8))
    inner = dynamics.init(mixed_params(), 0.0)
    new = jax.jit(dynamics.step)(inner, 0.0, jnp.zeros(2))
    assert new.params["count"] == 3 and bool(new.params["flag"])
    reference = optax.adamw(0.1, eps_root=1e-8)
    w = {"w": inner.params["w"]}
    updates, _ = reference.update({"w": 2 * w["w"]}, reference.init(w), w)
    np.testing.assert_allclose(new.params["w"], optax.apply_updates(w, updates)["w"], rtol=1e-14)


def test_model_state_is_carried_and_not_differentiated():
    """A running mean beside the weights: exact for Phi with the mean held as data."""

    def step(inner, lam, batch):
        mean = 0.9 * inner.model_state["mean"] + 0.1 * jnp.mean(batch)
        w = inner.params - lam * (inner.params - inner.model_state["mean"])
        return inner._replace(params=w, model_state={"mean": mean})

    dynamics = Dynamics(lambda w, lam: InnerState(w, (), {"mean": jnp.array(2.0)}), step)
    problem = BilevelProblem(dynamics, lambda w, lam, v, statistics: (w - v) ** 2)
    lam, window = jnp.array(0.3), Window(jnp.array([[1.0, 3.0]] * 4), jnp.zeros(4))
    inner = dynamics.init(jnp.array(1.0), lam)
    got = reverse(4).estimate(problem, (), inner, lam, window)
    exact = jax.grad(lambda x: unrolled_loss(problem, inner, x, window))(lam)
    np.testing.assert_allclose(got.hypergrad, exact, rtol=1e-14)
    mean = 2.0
    for _ in range(4):
        mean = 0.9 * mean + 0.1 * 2.0
    np.testing.assert_allclose(got.inner.model_state["mean"], mean, rtol=1e-14)


def test_a_factory_is_told_from_a_transformation():
    sgd = optax.sgd(0.1)
    assert as_factory(sgd)("anything") is sgd
    steps = optax.MultiSteps(sgd, 2)  # no NamedTuple
    assert as_factory(steps)(None) is steps
    assert as_factory(lambda lam: optax.sgd(lam))(0.5).init is not None
    assert hash(as_factory(sgd)) == hash(as_factory(sgd))


def test_multi_steps_trains_and_is_differentiated():
    """Gradients accumulate over two batches: the first step does not move the weights."""

    def loss(w, lam, batch):
        return jnp.sum((w - batch) ** 2) * jnp.exp(lam) / 2

    dynamics = from_optax(loss, optax.MultiSteps(optax.sgd(0.1), 2))
    problem = BilevelProblem(dynamics, lambda w, lam, v: jnp.sum((w - v) ** 2))
    lam, window = jnp.array(0.2), Window(jnp.arange(8.0).reshape(4, 2), jnp.ones((4, 2)))
    inner = dynamics.init(jnp.array([1.0, -1.0]), lam)
    first = dynamics.step(inner, lam, window.train[0])
    np.testing.assert_array_equal(first.params, inner.params)
    got = jax.jit(lambda i, x: reverse(4).estimate(problem, (), i, x, window))(inner, lam)
    exact = jax.grad(lambda x: unrolled_loss(problem, inner, x, window))(lam)
    assert_trees_close(got.hypergrad, exact, 1e-12)


def test_differences_need_parts():
    dynamics = from_update(lambda w, lam, batch: w - lam * w)
    problem = BilevelProblem(dynamics, lambda w, lam, v: w**2)
    inner, lam = dynamics.init(jnp.array(1.0), jnp.array(0.1)), jnp.array(0.1)
    with pytest.raises(ValueError, match="inner_optimizer= instead"):
        finite_difference().estimate(problem, (), inner, lam, Window(jnp.zeros(1), jnp.zeros(1)))


def test_the_pullback_through_the_update_is_exact_for_rates():
    """c holds the learning rate, q the way to the gradient: q = -eta alpha, c = -alpha.g."""

    def loss(w, lam, batch):
        return jnp.sum(w * batch)  # g = batch

    dynamics = from_optax(loss, lambda lam: optax.sgd(jnp.exp(lam)))
    inner = dynamics.init(jnp.ones(2), jnp.array(-1.0))
    alpha = zero_cotangent(inner)._replace(params=jnp.array([2.0, 3.0]))
    taken = pull_through_update(dynamics, inner, jnp.array(-1.0), jnp.array([5.0, 7.0]))
    q, c = taken.pullback(alpha)
    np.testing.assert_allclose(q, -np.exp(-1) * np.array([2.0, 3.0]), rtol=1e-14)
    np.testing.assert_allclose(c, -np.exp(-1) * 31.0, rtol=1e-14)


def test_a_nan_in_the_direction_surfaces():
    """The guard of the difference is norm == 0: NaN is no zero direction (section 3)."""

    def loss(w, lam, batch):
        return jnp.sum(w**2) * jnp.exp(lam)

    problem = BilevelProblem(from_optax(loss, optax.sgd(0.1)), lambda w, lam, v: jnp.sum(w * v))
    lam = jnp.array(0.0)
    inner = problem.dynamics.init(jnp.ones(2), lam)

    def at(v):
        window = Window(jnp.zeros(1), jnp.asarray(v)[None])
        return finite_difference().estimate(problem, (), inner, lam, window).hypergrad

    assert np.isnan(at([jnp.nan, 1.0]))
    assert at([0.0, 0.0]) == 0.0  # zero direction, zero product
    np.testing.assert_allclose(at([1.0, 2.0]), -0.6, rtol=1e-9)
