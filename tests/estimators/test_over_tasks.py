"""Methods over several tasks: the mean of what they do on each, through every transformation."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import (
    BilevelProblem,
    OneStepOptimizer,
    Outer,
    ReverseOptimizer,
    Start,
    Status,
    Window,
    bilevel_step,
    es,
    forward,
    from_optax,
    greedy,
    hyperdistill,
    implicit,
    init_state,
    one_step,
    over_tasks,
    pes,
    reverse,
    reversible,
    run_episode,
    run_episodes,
)
from gradhpo.core.episode import start_episode
from gradhpo.core.loop import prepare_episode
from gradhpo.examples import maml
from gradhpo.testing import assert_trees_close, relative_error
from gradhpo.transforms import reversible_sgd

N, T = 3, 2
READ = Outer(lambda lam: jax.tree.map(jnp.zeros_like, lam), lambda h, slots, lam: (lam, h))
PARAMS = {"w": np.array([0.5, -1.0]), "count": np.array(3)}
LAM = {"decay": np.array([0.1, -0.3]), "scale": np.array(0.2)}
ESTIMATORS = {
    "reverse": reverse(T),
    "forward": forward(T),
    "one_step": one_step(),
    "averaged": one_step(0.9),
    "greedy": greedy(0.9, T),
    "hyperdistill": hyperdistill(0.9, theta=0.7),  # a fit is one for all tasks: test_theta.py
    "implicit": implicit(),
    "reversible": reversible(T),
}


def start():
    """Weights and hyperparameters as wide as JAX's types are."""
    return jax.tree.map(jnp.asarray, (PARAMS, LAM))


def train_loss(w, lam, batch):
    x, y = batch
    fit = jnp.mean((jnp.tanh(x @ w["w"]) - y) ** 2) * jnp.exp(lam["scale"])
    return fit + jnp.sum(jnp.exp(lam["decay"]) * w["w"] ** 2)


def val_loss(w, lam, batch):
    x, y = batch
    return jnp.mean((x @ w["w"] - y) ** 2) + 0.1 * jnp.sum(lam["decay"] ** 2)


PROBLEM = BilevelProblem(from_optax(train_loss, reversible_sgd(0.1, 0.5)), val_loss, train_loss)


def data(*leading):
    noise = np.random.default_rng(len(leading))
    side = lambda: (noise.standard_normal((*leading, 4, 2)), noise.standard_normal((*leading, 4)))  # noqa: E731
    return Window(side(), side())


def of_task(tree, i, axis):
    return jax.tree.map(lambda x: jnp.take(x, i, axis), tree)


def begun(params, lam, draw):
    """From lam, and the numbers of a task."""
    return Start({"w": params["w"] * draw + lam["decay"], "count": params["count"]})


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_hypergradient_is_the_mean(name, x64):
    """Over two windows, so that memories count, with a start of their own."""
    estimator = ESTIMATORS[name]
    method, problem = over_tasks(estimator, N), PROBLEM._replace(begin=begun)
    draws, window = jnp.array([0.5, 1.0, 2.0]), data(2 * T, N)

    def run(method, draw, window):
        first = jax.tree.map(lambda x: x[: method.unroll_steps], window)
        state = init_state(problem, method, READ, *start(), first)
        if method.start is not None:
            state = prepare_episode(method, problem, state, window, draw)
        return run_episode(method, READ, problem, state, window, draw=draw)

    got = jax.jit(partial(run, method))(draws, window)
    one = jax.jit(partial(run, estimator))
    each = [one(draws[i], of_task(window, i, 1)) for i in range(N)]
    mean = jax.tree.map(lambda *xs: sum(xs) / N, *[s.outer_opt_state for s in each])
    assert_trees_close(got.outer_opt_state, mean, 1e-12)
    for i, state in enumerate(each):
        assert_trees_close(of_task(got.params, i, 0), state.params, 1e-12)
    for metric in ("val_loss", "train_loss"):
        want = np.mean([s.get_metric(metric) for s in each])
        np.testing.assert_allclose(got.get_metric(metric), want, rtol=1e-12)
    told = [int(s.metadata["status"]) for s in each]
    assert int(got.metadata["status"]) == next((x for x in told if x != Status.OK), Status.OK)


@pytest.mark.parametrize("name", [*ESTIMATORS, "es", "pes"])
@pytest.mark.parametrize("shown", [True, False], ids=["window", "no window"])
def test_structure_is_final_from_init_on(name, shown, x64):
    """Every leaf of weights, slots and memory has the tasks in front; an update keeps it."""
    estimator = {"es": es(T), "pes": pes(T)}.get(name) or ESTIMATORS[name]
    method = over_tasks(estimator, N)
    window = data(method.unroll_steps, N)
    state = init_state(PROBLEM, method, None, *start(), window if shown else None)
    for leaf in jax.tree.leaves((state.inner, state.memory)):
        assert np.shape(leaf)[:1] == (N,)
    step = partial(bilevel_step(method), PROBLEM)
    after = jax.eval_shape(step, state, window, jnp.asarray(0.1))
    if method.room is not None and not shown:
        state = state.update(memory=method.room.make(state.memory, window))
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, after)
    assert jax.tree.all(same)


@pytest.mark.parametrize("rate", [1.0, 0.25, 0.0])
def test_reptile_moves_towards_the_mean_of_the_tasks(rate, x64):
    method, windows = over_tasks(one_step(), N), data(2, T, N)
    state = init_state(PROBLEM, method, READ, *start())
    run = partial(run_episodes, method, READ, PROBLEM, lr_reptile=rate)
    state, _ = jax.jit(run)(state, windows)
    phi = PARAMS["w"]
    for m in range(2):
        ends = []
        for i in range(N):
            inner = PROBLEM.dynamics.init({**PARAMS, "w": phi}, LAM)
            for t in range(T):
                batch = jax.tree.map(lambda x: x[m, t, i], windows.train)  # noqa: B023
                inner = PROBLEM.dynamics.step(inner, LAM, batch)
            ends.append(inner.params["w"])
        phi = (1 - rate) * phi + rate * sum(ends) / N
    np.testing.assert_allclose(state.params["w"], np.stack([phi] * N), rtol=1e-12)
    assert (state.params["count"] == 3).all()  # what is no floating-point number stays


@pytest.mark.parametrize("where", ["train", "val"])
def test_a_task_that_breaks_undoes_the_step_for_all(where):
    method, window = over_tasks(reverse(T), N), data(T, N)
    state = init_state(PROBLEM, method, None, *start())
    x, y = getattr(window, where)
    bad = window._replace(**{where: (x, np.where(np.arange(N)[:, None] == 1, np.nan, y))})
    step = jax.jit(partial(bilevel_step(method), PROBLEM))
    after = step(state, bad, 0.1)
    assert_trees_close(after.hyperparams, state.hyperparams, 0.0)
    status = {"train": Status.NONFINITE_TRAIN_STATE, "val": Status.NONFINITE_VAL_LOSS}[where]
    assert after.status_counts == {status: 1}
    if where == "train":
        assert_trees_close(after.params, state.params, 0.0)
    assert step(after, window, 0.1).status_counts == {status: 1, Status.OK: 1}


def test_the_status_of_a_task_is_told():
    """A velocity beyond what reversible arithmetic holds, in the last task alone."""
    method = over_tasks(reversible(T), N)
    state = init_state(PROBLEM, method, None, *start())
    w = jnp.asarray(state.params["w"]).at[-1].set(5000.0)
    step = jax.jit(partial(bilevel_step(method), PROBLEM))
    after = step(state.update(params={**state.params, "w": w}), data(T, N), 0.1)
    assert after.status_counts == {Status.OUT_OF_RANGE: 1}
    assert_trees_close(after.hyperparams, state.hyperparams, 0.0)


@pytest.mark.parametrize(
    "window, message",
    [
        (data(T), r"needs the 3 tasks along its second axis.*train\[0\] has the shape \(2, 4, 2\)"),
        (data(T, N + 1), "needs the 3 tasks along its second axis"),
        (data(N, T), "needs the 3 tasks along its second axis|of length 2"),
        (data(T + 1, N), "of length 2: this estimator takes 2"),
    ],
)
def test_wrong_task_axes_are_refused(window, message):
    method = over_tasks(reverse(T), N)
    state = init_state(PROBLEM, method, None, *start())
    with pytest.raises(ValueError, match=message):
        bilevel_step(method)(PROBLEM, state, window, 0.1)
    with pytest.raises(ValueError, match="tasks"):
        init_state(PROBLEM, over_tasks(hyperdistill(0.9), N), None, *start(), data(T))


def test_draws_and_states_need_the_tasks_in_front():
    method, problem = over_tasks(reverse(T), N), PROBLEM._replace(begin=begun)
    state = init_state(problem, method, None, *start())
    with pytest.raises(ValueError, match=r"draw.*3 tasks.*shape \(2,\)"):
        start_episode(method, problem, state, jnp.ones(2))
    alone = init_state(problem, reverse(T), None, *start())
    with pytest.raises(ValueError, match=r"state's weights.*3 tasks.*\['count'\].*shape \(\)"):
        start_episode(method, problem, alone, jnp.ones(N))


@pytest.mark.parametrize("tasks", [0, -1, 2.5, "3"])
def test_a_number_of_tasks_that_is_none(tasks):
    with pytest.raises((ValueError, TypeError), match="tasks"):
        over_tasks(one_step(), tasks)
    with pytest.raises((ValueError, TypeError), match="tasks"):
        OneStepOptimizer(inner_optimizer=optax.sgd(0.1), tasks=tasks)


def test_a_class_over_tasks(x64):
    """A source brings one batch for each task, stacked."""
    window = data(T, N)
    sides = [iter([jax.tree.map(lambda x: x[t], side) for t in range(T)]) for side in window]  # noqa: B023
    opt = ReverseOptimizer(
        inner_optimizer=optax.sgd(0.1), outer_optimizer=READ, tasks=N, T=T, loop="scan"
    )
    state = opt.run(
        opt.init(PARAMS, LAM),
        1,
        get_train_batch=partial(next, sides[0]),
        get_val_batch=partial(next, sides[1]),
        train_loss_fn=train_loss,
        val_loss_fn=val_loss,
    )
    problem = BilevelProblem(from_optax(train_loss, optax.sgd(0.1)), val_loss)
    each = [
        reverse(T)
        .estimate(problem, (), problem.dynamics.init(PARAMS, LAM), LAM, of_task(window, i, 1))
        .hypergrad
        for i in range(N)
    ]
    mean = jax.tree.map(lambda *xs: sum(xs) / N, *each)
    assert_trees_close(state.outer_opt_state, mean, 1e-12)
    assert np.ptp(state.params["w"], axis=0).max() == 0  # an episode ends in the mean


# -- MAML ----------------------------------------------------------------------------------------


def test_maml_by_a_class_is_the_gradient_written_by_hand(x32):
    """One meta-step of the example on its own tasks, in float32."""
    weights = maml.init(0)
    opt = dataclasses.replace(maml.OPTIMIZER, outer_optimizer=READ)
    losses = {"train_loss_fn": maml.loss, "val_loss_fn": maml.loss}
    state = opt.run(opt.init(weights, weights), 1, **losses)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), maml.TASKS)

    def after_a_step(weights, key):
        x, y = maml.sample(key, (2, 1, maml.POINTS))
        step = jax.grad(maml.loss)(weights, None, (x[0, 0], y[0, 0]))
        adapted = jax.tree.map(lambda w, g: w - maml.RATE * g, weights, step)
        return maml.loss(adapted, None, (x[1, 0], y[1, 0]))

    by_hand = jax.jit(
        jax.value_and_grad(lambda w: jnp.mean(jax.vmap(after_a_step, (None, 0))(w, keys)))
    )
    loss, want = by_hand(weights)
    assert relative_error(state.outer_opt_state, want) < 1e-6
    np.testing.assert_allclose(state.get_metric("val_loss"), loss, rtol=1e-6)


def test_episodes_of_several_tasks_in_one_call():
    """Without a callback several episodes go into one call; with one, each has its own."""
    weights = maml.init(0)
    run = partial(
        maml.OPTIMIZER.run,
        maml.OPTIMIZER.init(weights, weights),
        5,
        train_loss_fn=maml.loss,
        val_loss_fn=maml.loss,
    )
    seen = []
    apart = run(callback=lambda m, state: seen.append(m))
    together = run()
    assert seen == [1, 2, 3, 4, 5] and int(together.episode) == 5
    assert_trees_close(together.hyperparams, apart.hyperparams, 1e-5)
    assert_trees_close(together.params, apart.params, 1e-5)
