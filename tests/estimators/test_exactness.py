"""The exactness matrix: every estimator on the zoo, against dense formulas and oracles.

Float64. An exact method is tested at 1e-12, and every claim has a negative control: a
formula with a wrong sign, index or factor must be far from what the estimator returns.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_formulas import at, every_step, flat_state, started, whole_window, written_out
from jax.flatten_util import ravel_pytree

from gradhpo import (
    Window,
    drmad,
    finite_difference,
    first_order,
    forward,
    greedy,
    hyperdistill,
    linearize,
    one_step,
    outer_gradients,
    reverse,
)
from gradhpo.core.dynamics import InnerState, zero_cotangent
from gradhpo.core.start import begin_episode
from gradhpo.testing import (
    assert_trees_close,
    central_difference,
    relative_error,
    richardson,
    unrolled_loss,
)
from gradhpo.testing.problems import (
    ZOO,
    batch_norm,
    initial_scale,
    initial_weights,
    mlp_adam,
    mlp_chain,
    mlp_momentum,
    mlp_update_fn,
    nested,
    opaque,
    outer_lam,
    ridge,
)

pytestmark = pytest.mark.usefixtures("x64")
T = 3
GAMMA = 0.7
QUADRATIC = ("contraction", "contraction_nonlinear", "learning_rates", "ridge")
HAS_PARTS = (*QUADRATIC, "outer_lam", "mlp_adam")
TUNES_OPTIMIZER = (mlp_adam, mlp_chain)


@pytest.mark.parametrize("name", ZOO)
def test_every_estimator_is_its_formula(name):
    case, dense = written_out(ZOO[name], T)
    problem, inner, lam, window = case

    def check(got, flat, rtol=1e-12):
        # Floor: a gradient that is zero up to rounding has no relative error.
        scale = float(jnp.linalg.norm(flat))
        assert_trees_close(got, dense.tree(flat), rtol if scale > 1e-6 else 1e-6)

    got = whole_window(reverse(T), *case)
    check(got.hypergrad, dense.reverse())
    assert_trees_close(flat_state(got.inner), flat_state(dense.states[-1]), 1e-14)
    if name in ("nested", "ridge_adam", "mlp_momentum"):
        oracle = jax.jit(jax.grad(lambda x: unrolled_loss(problem, inner, x, window)))(lam)
        assert_trees_close(got.hypergrad, oracle, 1e-12)

    for t, got in enumerate(every_step(hyperdistill(GAMMA, theta=1.0), *case), start=1):
        check(got.hypergrad, dense.hyperdistill(GAMMA, 1.0, t, got.memory.data))
    if name in ("mlp_chain", "mlp_update_fn"):  # minutes of compilation, nothing new to see
        return
    check(whole_window(greedy(GAMMA, T), *case).hypergrad, dense.greedy(GAMMA))
    for t, (fo, one, mean) in enumerate(
        zip(
            every_step(first_order(), *case),
            every_step(one_step(), *case),
            every_step(one_step(GAMMA), *case),
            strict=True,
        ),
        start=1,
    ):
        check(fo.hypergrad, dense.direct[t - 1])
        check(one.hypergrad, dense.one_step(t))
        check(mean.hypergrad, dense.averaged_one_step(GAMMA, t))
        norms = dense.direct[t - 1], dense.alpha[t - 1] @ dense.B[t - 1]
        got = one.info["direct_norm"], one.info["indirect_norm"]
        want = [jnp.linalg.norm(x) for x in norms]
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("name", HAS_PARTS)
def test_differences_approach_the_exact_product(name):
    """DARTS: 1e-7 of the product at the default radius of float64, at every step."""
    case, dense = written_out(ZOO[name], T)
    for t, got in enumerate(every_step(finite_difference(), *case), start=1):
        want = dense.one_step(t)
        rtol = 1e-9 if name in QUADRATIC else 1e-7
        assert_trees_close(got.hypergrad, dense.tree(want), rtol)


@pytest.mark.parametrize("problem_at", [nested, mlp_momentum, ridge])
def test_reverse_against_differences_of_the_run(problem_at):
    """The whole training run, re-run at displaced hyperparameters."""
    problem, inner, lam, window = case = started(problem_at, T)
    got = whole_window(reverse(T), *case).hypergrad
    run = jax.jit(partial(unrolled_loss, problem, inner, window=window))
    assert_trees_close(got, central_difference(run, lam), 1e-7)
    assert_trees_close(got, richardson(run, lam), 1e-9)


def test_one_step_against_differences_of_one_step():
    """From a state in the middle of training with Adam's slots filled."""
    (problem, _, lam, window), dense = written_out(mlp_adam, T)
    last = Window(*jax.tree.map(lambda x: x[T - 1 :], tuple(window)))
    run = jax.jit(lambda x: unrolled_loss(problem, dense.states[T - 1], x, last))
    oracle = central_difference(run, lam)
    got = whole_window(one_step(), problem, dense.states[T - 1], lam, last)
    assert_trees_close(got.hypergrad, oracle, 1e-7)


@pytest.mark.parametrize("problem_at", TUNES_OPTIMIZER, ids=lambda p: p.__name__)
def test_mixed_mode_products_are_reverse_over_reverse(problem_at):
    """alpha A and alpha B, for a full cotangent on weights and slots."""
    problem, inner, lam, window = started(problem_at, 2)
    inner = problem.dynamics.step(inner, lam, at(window.train, 0))
    noise = np.random.default_rng(0)
    alpha = jax.tree.map(
        lambda x: jnp.asarray(noise.standard_normal(x.shape)), zero_cotangent(inner)
    )
    plain = opaque(problem_at)(2).problem.dynamics
    new, pullback = linearize(problem.dynamics, inner, lam, at(window.train, 1))
    other, reference = linearize(plain, inner, lam, at(window.train, 1))
    assert_trees_close(flat_state(new), flat_state(other), 1e-14)
    assert_trees_close(pullback(alpha), reference(alpha), 1e-12)


def test_velocity_inside_the_weights_changes_nothing():
    """The same momentum as Optax slots and as an update_fn: one hypergradient."""
    slots = whole_window(reverse(T), *started(mlp_momentum, T))
    own = whole_window(reverse(T), *started(mlp_update_fn, T))
    assert_trees_close(own.hypergrad, slots.hypergrad, 1e-12)
    assert_trees_close(own.inner.params["w"], slots.inner.params, 1e-13)


def test_dropping_the_slots_is_wrong():
    """A_t and B_t of the weights alone are not enough for momentum."""
    case, dense = written_out(mlp_momentum, T)
    n = ravel_pytree(case[1].params)[0].size
    weights_only = dense._replace(
        A=[a[:n, :n] for a in dense.A],
        B=[b[:n] for b in dense.B],
        alpha=[a[:n] for a in dense.alpha],
    )
    got = whole_window(reverse(T), *case).hypergrad
    assert relative_error(got, dense.tree(dense.reverse())) < 1e-12
    assert relative_error(got, dense.tree(weights_only.reverse())) > 1e-2


def test_mistakes_would_be_seen():
    """Deliberately wrong sums are more than 1e-3 from what the estimators return."""
    case, dense = written_out(outer_lam, T)
    steps, alpha, B, direct = dense.steps(), dense.alpha, dense.B, dense.direct[-1]
    mistakes = {
        "sign": direct - (dense.greedy(GAMMA) - direct),
        "late alpha": dense.discounted_sum(GAMMA),
        "old index": direct + sum(GAMMA ** (T - t + 1) * alpha[t - 1] @ B[t - 1] for t in steps),
        "factor": direct + sum(GAMMA ** (t - 1) * alpha[t - 1] @ B[t - 1] for t in steps),
        "no direct": dense.greedy(GAMMA) - direct,
    }
    got = whole_window(greedy(GAMMA, T), *case).hypergrad
    assert relative_error(got, dense.tree(dense.greedy(GAMMA))) < 1e-12
    errors = {name: relative_error(got, dense.tree(wrong)) for name, wrong in mistakes.items()}
    assert all(error > 1e-3 for error in errors.values()), errors


def test_short_sighted_methods_are_not_exact_off_their_assumption():
    """The negative control of the matrix: no estimator but reverse is right on this."""
    case = problem, inner, lam, window = started(outer_lam, T)
    exact = jax.jit(jax.grad(lambda x: unrolled_loss(problem, inner, x, window)))(lam)
    for estimator in (one_step(), one_step(0.9), hyperdistill(0.9, theta=1.0)):
        assert relative_error(every_step(estimator, *case)[-1].hypergrad, exact) > 1e-2
    assert relative_error(whole_window(greedy(0.9, T), *case).hypergrad, exact) > 1e-2


@pytest.mark.parametrize("name", ["mlp_momentum", "integer_leaves"])
def test_float32_points_the_same_way(name):
    """Cosine > 0.999 between float32 and float64, for every estimator."""
    makers = {
        "reverse": lambda: reverse(T),
        "greedy": lambda: greedy(0.9, T),
        "hyperdistill": lambda: hyperdistill(0.9, theta=1.0),
    }
    if name == "mlp_momentum":
        makers["finite_difference"] = finite_difference

    def gradient(estimator):
        got = whole_window(estimator, *started(ZOO[name], estimator.unroll_steps))
        return np.asarray(ravel_pytree(got.hypergrad)[0], np.float64)

    def gradients():
        return {k: gradient(make()) for k, make in makers.items()}

    wide = gradients()
    jax.config.update("jax_enable_x64", False)
    narrow = gradients()
    assert jnp.zeros(()).dtype == jnp.float32
    for k, a in wide.items():
        b = narrow[k]
        cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
        assert cosine > 0.999, (k, cosine)
        rtol = 3e-2 if k == "finite_difference" else 1e-4
        np.testing.assert_allclose(np.linalg.norm(b), np.linalg.norm(a), rtol=rtol, err_msg=k)


@pytest.mark.parametrize("problem_at", [batch_norm, initial_scale, initial_weights])
def test_a_start_and_a_model_state_are_in_the_formula(problem_at):
    """alpha_0 ds_0/dlam beside the sum of equation (1); the sum alone is the control."""
    for steps, makers in {
        T: (reverse, partial(reverse, memory="segments"), forward),
        1: (drmad,),
    }.items():
        task = problem_at(steps)
        case, dense = written_out(problem_at, steps)
        lam, unravel = ravel_pytree(case.lam)
        alpha = dense.alpha[-1]
        for a in reversed(dense.A):
            alpha = alpha @ a

        def start(lam):
            return flat_state(begin_episode(task.problem, task.origin(), unravel(lam))[0])  # noqa: B023

        of_start = alpha @ jax.jacobian(start)(lam)
        want = dense.tree(dense.reverse() + of_start)
        for make in makers:
            estimate = jax.jit(partial(make(steps).estimate, task.problem))
            memory = make(steps).init(case.inner, case.lam, case.window)
            got = estimate(memory, *case[1:], task.origin()).hypergrad
            assert_trees_close(got, want, 1e-12)
        alone = relative_error(dense.tree(dense.reverse()), want)
        assert alone > 1e-2 or (problem_at is batch_norm and not jnp.any(of_start))


def test_statistics_are_not_differentiated():
    """The rule of `gradhpo.core.losses`: to differentiate through them is another number."""
    task = batch_norm(T)
    problem, lam, (inner, window) = task.problem, task.hyperparams, task.begin(T)

    def through_all(lam):
        s = inner
        for t in range(T):
            s = problem.dynamics.step(s, lam, at(window.train, t))
        batch = at(window.val, T - 1)
        return problem.outer_loss(s.params, lam, batch, s.model_state)[0]

    got = whole_window(reverse(T), problem, inner, lam, window).hypergrad
    exact = jax.jit(jax.grad(lambda x: unrolled_loss(problem, inner, x, window)))(lam)
    assert_trees_close(got, exact, 1e-12)
    assert relative_error(jax.jit(jax.grad(through_all))(lam), exact) > 1e-2


def test_outer_gradients_pad_the_slots_with_zeros():
    problem, inner, lam, window = started(mlp_adam, 1)
    loss, alpha, _ = outer_gradients(problem, inner, lam, at(window.val, 0))
    np.testing.assert_allclose(loss, problem.outer_loss(inner.params, lam, at(window.val, 0)))
    assert all(not np.any(x) for x in jax.tree.leaves(alpha.opt_state))
    want = jax.grad(problem.outer_loss)(inner.params, lam, at(window.val, 0))
    assert_trees_close(alpha.params, want, 1e-14)
    assert isinstance(alpha, InnerState)
