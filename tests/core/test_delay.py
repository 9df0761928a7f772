"""Updates after some windows only: the same numbers as by hand, in every kind of loop."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import (
    BilevelProblem,
    FOOptimizer,
    InOrder,
    OneStepOptimizer,
    OnlineHypergradientOptimizer,
    Start,
    Task,
    Window,
    forward,
    from_optax,
    greedy,
    hyperdistill,
    implicit,
    init_state,
    neumann,
    one_step,
    over_tasks,
    reverse,
    run_episode,
    tune,
    update_every,
    update_last,
)
from gradhpo.core.episode import in_windows
from gradhpo.testing import assert_trees_close, check_estimator

pytestmark = pytest.mark.usefixtures("x64")
T = 6
OUTER = optax.sgd(0.1)


def train_loss(w, lam, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ w) - y) ** 2) + jnp.exp(lam) * jnp.sum(w**2)


def val_loss(w, lam, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ w) - y) ** 2)


PROBLEM = BilevelProblem(from_optax(train_loss, optax.sgd(0.2, momentum=0.5)), val_loss)
x = np.random.default_rng(0).standard_normal((2, T, 5, 3))
WINDOW = Window(*((side, np.sin(side.sum(-1))) for side in x))
PARAMS, LAM = np.array([0.4, -0.2, 0.1]), np.array(-2.0)


def upto(t):
    return Window(*jax.tree.map(lambda x: x[:t], tuple(WINDOW)))


def one_episode(method, window=WINDOW, problem=PROBLEM, outer=OUTER):
    state = init_state(
        problem, method, outer, PARAMS, LAM, Window(*jax.tree.map(lambda x: x[:1], tuple(window)))
    )
    return jax.jit(partial(run_episode, method, outer, problem))(state, window)


def by_hand(method, updates_after):
    """Plain training, and after these steps an update by the method's estimate of the last one."""
    inner = PROBLEM.dynamics.init(jnp.asarray(PARAMS), jnp.asarray(LAM))
    lam, memory, history = jnp.asarray(LAM), method.init(inner, jnp.asarray(LAM), WINDOW), []
    for t in range(T):
        window = Window(*jax.tree.map(lambda x, t=t: jnp.asarray(x[t : t + 1]), tuple(WINDOW)))
        got = method.estimate(PROBLEM, memory, inner, lam, window)
        inner, memory = got.inner, got.memory
        if t + 1 in updates_after:
            lam = lam - 0.1 * got.hypergrad
            history.append(lam)
    return inner, lam


@pytest.mark.parametrize("method", [one_step(), one_step(0.9), hyperdistill(0.8, theta=0.7)])
@pytest.mark.parametrize("kind", ["every second", "last two"])
def test_between_updates_weights_and_memory_move_on(method, kind):
    """A method that updates at every step, with the hyperparameters held between, is the same."""
    if kind == "every second":
        delayed, after = update_every(method, 2), {2, 4, 6}
    else:
        delayed, after = update_last(method, 2, T), {5, 6}
    state = one_episode(delayed)
    inner, lam = by_hand(method, after)
    assert_trees_close(state.hyperparams, lam, 1e-12)
    assert_trees_close(state.params, inner.params, 1e-12)
    assert int(state.step) == len(after) and int(state.drawn) == T
    _, always = by_hand(method, set(range(1, T + 1)))
    assert abs(float(always - lam)) > 1e-4


def test_a_window_of_several_steps_is_one_of_so_many():
    state = one_episode(update_every(greedy(0.9, 2), 3))
    inner = PROBLEM.dynamics.init(jnp.asarray(PARAMS), jnp.asarray(LAM))
    for t in range(4):
        inner = PROBLEM.dynamics.step(inner, LAM, jax.tree.map(lambda x, t=t: x[t], WINDOW.train))
    last = Window(*jax.tree.map(lambda x: jnp.asarray(x[4:]), tuple(WINDOW)))
    got = greedy(0.9, 2).estimate(PROBLEM, (), inner, jnp.asarray(LAM), last)
    assert_trees_close(state.hyperparams, LAM - 0.1 * got.hypergrad, 1e-12)


@pytest.mark.filterwarnings("ignore:tune. 0 of the 2 updates:gradhpo.GradhpoWarning")
@pytest.mark.parametrize("loop", ["scan", "unroll", "host"])
@pytest.mark.parametrize(
    "make",
    [
        lambda loop: update_last(implicit(1, neumann(3, step_size=0.2), loop=loop), 2, T),
        lambda loop: update_every(reverse(2, loop=loop), 3, loop=loop),
        lambda loop: update_last(reverse(2, loop=loop), 2, T),
    ],
    ids=["N.IFT(3, 2)", "reverse, every third", "reverse, last two"],
)
def test_every_loop_gives_the_same(make, loop):
    task = Task(PROBLEM, PARAMS, LAM, InOrder(WINDOW.train), InOrder(WINDOW.val))
    state = tune(task, make, OUTER, episodes=1, T=T, loop=loop)
    assert_trees_close(state.hyperparams, one_episode(make("scan")).hyperparams, 1e-12)
    assert_trees_close(state.params, one_episode(make("scan")).params, 1e-12)


def test_over_tasks_and_back():
    """The lead of a method over tasks is trained on every task."""

    def begin(params, lam, draw):
        return Start(params, Window(*jax.tree.map(lambda x: jnp.asarray(x) + draw, tuple(WINDOW))))

    problem = PROBLEM._replace(begin=begin)
    for make in (lambda m: update_last(m, 2, T), lambda m: update_every(m, 2)):
        states = []
        for method in (make(over_tasks(one_step(), 2)), over_tasks(make(one_step()), 2)):
            state = init_state(problem, method, OUTER, PARAMS, LAM)
            draws = jnp.array([0.0, 0.3])
            states.append(run_episode(method, OUTER, problem, state, None, draw=draws))
        assert_trees_close(states[0].hyperparams, states[1].hyperparams, 1e-14)
        assert_trees_close(states[0].params, states[1].params, 1e-14)


def test_products_are_those_of_table_2():
    """Lee et al. (2022), table 2, T = 100: 0, 50, 199, 55 to 75 and about 58 products."""
    every = partial(update_every, n=2)
    assert every(one_step()).cost(100, 1).products == 50
    for (n, last), products in {(2, 25): 75, (5, 10): 60, (10, 5): 55}.items():
        method = update_last(implicit(1, neumann(n)), last, 100)
        assert method.cost(100, 1).products == products + last  # one to judge the system, ours
    fits = every(hyperdistill()).cost(100, 1, episodes=50, period=50)
    assert fits.products / 50 == 50 + 200 / 50  # theirs adds the gradients of the line, 199 / 50


def test_classes_take_both():
    settings = {"inner_optimizer": optax.sgd(0.2, momentum=0.5), "outer_optimizer": OUTER, "T": T}
    data = {"get_train_batch": InOrder(WINDOW.train), "get_val_batch": InOrder(WINDOW.val)}
    losses = {"train_loss_fn": train_loss, "val_loss_fn": val_loss}
    for fields, method in (
        ({"update_every": 2}, update_every(one_step(), 2)),
        ({"update_last": 2}, update_last(one_step(), 2, T)),
    ):
        tuner = OneStepOptimizer(**settings, **fields)
        state = tuner.run(tuner.init(PARAMS, LAM), 1, **data, **losses)
        assert_trees_close(state.hyperparams, one_episode(method).hyperparams, 1e-12)
    tuner = OnlineHypergradientOptimizer(**settings, update_every=3)
    assert tuner.method().unroll_steps == 3
    assert "update_every" in {field.name for field in dataclasses.fields(FOOptimizer)}


def test_the_contract_holds():
    check_estimator(update_every(one_step(), 2))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="carries a derivative along the episode"):
        update_every(forward(1, online=True), 2)
    with pytest.raises(ValueError, match="update_every comes first"):
        update_every(update_last(one_step(), 2, 6), 2)
    with pytest.raises(ValueError, match="more than the T=6 steps"):
        update_last(one_step(), 7, 6)
    with pytest.raises(ValueError, match="has no room for a window of 1 after 4 steps"):
        one_episode(
            update_last(one_step(), 2, 6), Window(*jax.tree.map(lambda x: x[:3], tuple(WINDOW)))
        )
    with pytest.raises(ValueError, match="T must be 4 steps and a multiple of the 1 steps"):
        task = Task(PROBLEM, PARAMS, LAM, InOrder(WINDOW.train), InOrder(WINDOW.val))
        tune(task, update_last(one_step(), 2, 6), OUTER, episodes=1, T=4)
    assert in_windows(WINDOW, 3).train[0].shape == (2, 3, 5, 3)
