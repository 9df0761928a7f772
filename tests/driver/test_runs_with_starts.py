"""Episodes that begin from hyperparameters, from a key or from a task, through the driver."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import (
    BilevelProblem,
    GradhpoWarning,
    OneStepOptimizer,
    Resident,
    ReverseOptimizer,
    Start,
    Task,
    Window,
    clear_caches,
    drmad,
    from_optax,
    greedy,
    implicit,
    over_tasks,
    reverse,
    tune,
)
from gradhpo.core.estimator import compiled
from gradhpo.solvers import minres

T = 3
DATA = np.random.default_rng(0).standard_normal((20, 2)).astype(np.float32)
SOURCES = {"get_train_batch": Resident(DATA, 4), "get_val_batch": Resident(DATA, 4, seed=1)}
KEYS = jax.random.key(7)


def loss(w, lam, batch):
    return jnp.mean((w["w"] - batch) ** 2) / 2


def judge(w, lam, batch):
    return jnp.mean((w["w"] - batch) ** 2)


def from_lam(params, lam, draw):
    """Initial weights are hyperparameters."""
    return Start({"w": lam["w"] + 0 * params["w"]})


def of_a_task(params, lam, draw):
    """A task of a key: its own centre, its own batches."""
    centre, noise = jax.random.normal(draw, (2,)), jnp.arange(T * 4 * 2.0).reshape(T, 4, 2) / 10
    return Start({"w": lam["w"]}, Window(centre + noise, centre - noise))


def lam(dtype=jnp.float64):
    return {"w": jnp.array([1.0, -2.0], dtype)}


def params(dtype=jnp.float64):
    return {"w": jnp.zeros(2, dtype)}


def classy(cls, begin, **settings):
    settings = {"T": T, "inner_optimizer": optax.sgd(0.3), "begin": begin, **settings}
    return cls(outer_optimizer=optax.sgd(0.1), **settings)


def written_out(lam, episodes=2):
    """The same runs by hand: `jax.grad` of an episode, its batches from the sources."""
    for m in range(episodes):
        rows = [source.indices(m * T, T) for source in SOURCES.values()]

        def after(lam, rows=rows):
            w = lam
            for t in range(T):
                batch = jnp.asarray(DATA)[rows[0][t]]
                w = jax.tree.map(lambda w, g: w - 0.3 * g, w, jax.grad(loss)(w, None, batch))
            return judge(w, None, jnp.asarray(DATA)[rows[1][-1]])

        lam = jax.tree.map(lambda x, g: x - 0.1 * g, lam, jax.grad(after)(lam))
    return lam


@pytest.mark.parametrize("loop", ["scan", "unroll", "host"])
def test_every_loop_sees_the_start(loop, x64):
    opt = classy(ReverseOptimizer, from_lam, loop=loop)
    losses = {"train_loss_fn": loss, "val_loss_fn": judge}
    got = opt.run(opt.init(params(), lam()), 2, **SOURCES, **losses)
    np.testing.assert_allclose(got.hyperparams["w"], written_out(lam())["w"], rtol=1e-12)
    reptile = opt.run(opt.init(params(), lam()), 2, **SOURCES, **losses, lr_reptile=0.5)
    np.testing.assert_allclose(reptile.hyperparams["w"], got.hyperparams["w"], rtol=1e-12)


def test_a_method_that_does_not_see_the_start_says_so(x64):
    opt = classy(OneStepOptimizer, from_lam)
    losses = {"train_loss_fn": loss, "val_loss_fn": judge}
    message = r"leaf \['w'\] is identically zero, because it enters the start.*reverse, reversible"
    with pytest.warns(GradhpoWarning, match=message) as caught:
        opt.run(opt.init(params(), lam()), 1, **SOURCES, **losses)
    assert len(caught) == 1
    strict = classy(OneStepOptimizer, from_lam, strict=True)
    with pytest.raises(ValueError, match=message):
        strict.run(strict.init(params(), lam()), 1, **SOURCES, **losses)


@pytest.mark.parametrize("tasks", [None, 3])
@pytest.mark.parametrize("loop", ["scan", "host"])
def test_tasks_are_drawn_once_an_episode(tasks, loop, x64):
    """Their windows say how long an episode is; stacked for several tasks."""
    opt = classy(ReverseOptimizer, of_a_task, tasks=tasks, loop=loop)
    calls = iter(jax.random.split(KEYS, 100))
    drawn = []

    def get_task():
        drawn.append(next(calls))
        return drawn[-1]

    def meta_loss(lam, key):
        w, window = of_a_task(None, lam, key)[:2]
        for t in range(T):
            gradient = jax.grad(loss)(w, None, window.train[t])
            w = jax.tree.map(lambda w, g: w - 0.3 * g, w, gradient)
        return judge(w, None, window.val[-1])

    got = opt.run(
        opt.init(params(), lam()), 2, get_task=get_task, train_loss_fn=loss, val_loss_fn=judge
    )
    assert len(drawn) == 2 * (tasks or 1) and int(got.drawn) == 2 * T
    want = lam()
    for m in range(2):
        keys = drawn[m * (tasks or 1) : (m + 1) * (tasks or 1)]
        gradients = [jax.grad(meta_loss)(want, key) for key in keys]
        mean = jax.tree.map(lambda *g: sum(g) / len(g), *gradients)
        want = jax.tree.map(lambda x, g: x - 0.1 * g, want, mean)
    np.testing.assert_allclose(got.hyperparams["w"], want["w"], rtol=1e-12)


@pytest.mark.parametrize("lr_reptile", [0.5, 1.0])
def test_the_functional_form_draws_a_key_for_every_episode(lr_reptile, x64):
    """Without get_task; in one call or in two, with somebody looking or not."""
    problem = BilevelProblem(from_optax(loss, optax.sgd(0.3)), judge, begin=of_a_task)
    task, estimator = Task(problem, params(), lam()), reverse(T)
    more = {"lr_hyper": 0.1, "of": 4, "lr_reptile": lr_reptile}
    whole = tune(task, estimator, episodes=4, **more)
    half = tune(task, estimator, episodes=2, callback=lambda m, s: None, **more)
    whole_again = tune(task, estimator, episodes=2, state=half, **more)
    for a, b in zip(*map(jax.tree.leaves, (whole, whole_again)), strict=True):
        np.testing.assert_array_equal(a, b)
    seen, several = [], over_tasks(estimator, 2)
    looked = tune(task, several, episodes=3, callback=lambda m, s: seen.append(s), **more)
    for a, b in zip(
        *map(jax.tree.leaves, (tune(task, several, episodes=3, **more), looked)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    w_T = seen[-1].params["w"]  # of each task; the run goes on from a mean of them
    assert not np.array_equal(w_T[0], w_T[1]) and np.array_equal(*looked.params["w"])


def test_data_that_do_not_fit_the_start_are_refused(x64):
    losses = {"train_loss_fn": loss, "val_loss_fn": judge}
    opt = classy(ReverseOptimizer, of_a_task)
    state = opt.init(params(), lam())
    with pytest.raises(ValueError, match="both do"):
        opt.run(state, 1, **SOURCES, **losses)
    with pytest.raises(ValueError, match="T=6, but the windows that begin returns hold 3"):
        opt.run(state, 1, T=6, **losses)
    own = classy(ReverseOptimizer, from_lam)
    with pytest.raises(ValueError, match="neither does"):
        own.run(state, 1, **losses)
    with pytest.raises(TypeError, match="get_val_batch must be a function"):
        own.run(state, 1, get_train_batch=SOURCES["get_train_batch"], **losses)
    none = classy(ReverseOptimizer, None)
    with pytest.raises(ValueError, match="get_task= is the draw for begin="):
        none.run(state, 1, get_task=lambda: 0.0, **SOURCES, **losses)
    wide = classy(ReverseOptimizer, lambda w, lam, draw: Start({"w": jnp.zeros(3)}))
    with pytest.raises(ValueError, match=r"begin must return a Start of the structure, shapes"):
        wide.run(state, 1, **SOURCES, **losses)


def test_tune_wants_a_task():
    problem = BilevelProblem(from_optax(loss, optax.sgd(0.1)), judge)
    with pytest.raises(TypeError, match=r"task must be a gradhpo\.Task, got BilevelProblem"):
        tune(problem, reverse(T), episodes=1, T=T, lr_hyper=0.1)  # type: ignore[arg-type]


def test_messages_of_tune_name_its_own_arguments():
    problem = BilevelProblem(from_optax(loss, optax.sgd(0.1)), judge)
    source = Resident(DATA, 4)
    zeros = {"w": np.zeros(2, np.float32)}
    task = Task(problem, zeros, zeros, source, source)
    with pytest.raises(ValueError, match=r"tune moves the hyperparameters by outer= or by"):
        tune(task, reverse(T), episodes=1, T=T)
    with pytest.raises(ValueError, match=r"give T= to it"):
        tune(task, reverse(T), episodes=1, lr_hyper=0.1)


def test_start_episode_says_what_step_does_not_see(x64):
    """`step` is not told the origin, and would drop alpha_0 ds_0/dlam without a word."""
    opt = classy(ReverseOptimizer, from_lam)
    state = opt.init(params(), lam())
    message = r"leaf \['w'\], but step does not know.*Use run.*bilevel_step.*docs/starts.md"
    with pytest.warns(GradhpoWarning, match=message):
        begun = opt.start_episode(state)
    np.testing.assert_array_equal(begun.params["w"], lam()["w"])
    strict = classy(ReverseOptimizer, from_lam, strict=True)
    with pytest.raises(ValueError, match=message):
        strict.start_episode(state)
    several = classy(ReverseOptimizer, from_lam, tasks=2)
    with pytest.warns(GradhpoWarning, match=message):
        several.start_episode(several.init(params(), lam()))
    for silent in (classy(ReverseOptimizer, None), classy(OneStepOptimizer, from_lam, strict=True)):
        silent.start_episode(silent.init(params(), lam()))


# -- estimates that are host loops of their own -----------------------------------------------


def pulled(w, lam, batch):
    """A training loss whose minimum depends on lam, for implicit differentiation."""
    return loss(w, lam, batch) + jnp.mean((w["w"] - lam["w"]) ** 2)


@pytest.mark.parametrize(
    "make",
    [
        reverse,
        drmad,
        # 40 iterations written out, its default here, compile for half a minute
        functools.partial(implicit, solver=minres(max_iterations=4)),
        functools.partial(greedy, 0.9),
    ],
    ids=["reverse", "drmad", "implicit", "greedy"],
)
@pytest.mark.parametrize("outer", [None, optax.sgd(0.1)], ids=["rate", "sgd"])
def test_a_host_loop_compiles_one_step_whatever_the_window(make, outer, compilations, x64):
    """No program holds the steps of a window, and what the second episode runs, the first has
    compiled; the numbers are those of a scan."""
    clear_caches()
    problem = BilevelProblem(from_optax(pulled, optax.sgd(0.3)), judge, begin=from_lam)
    task = Task(problem, params(), lam(), *SOURCES.values())
    more = {"T": 6, "lr_hyper": 0.1 if outer is None else None, "of": 4}

    def run(loop, window, **settings):
        method = make(window, loop="host" if loop == "host" else "scan")
        return tune(task, method, outer, loop=loop, **more, **settings)

    found = {loop: run(loop, 3, episodes=3) for loop in ("scan", "host")}
    for a, b in zip(*(jax.tree.leaves(x.hyperparams) for x in found.values()), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    assert compiled.cache_info().currsize  # by the steps of a window, not by a window
    method, counts = make(3, loop="host"), []
    for episodes in (1, 4):
        before = compilations()
        tune(task, method, outer, loop="host", episodes=episodes, **more)
        counts.append(compilations() - before)
    assert counts[1] == 0, counts


def test_several_tasks_are_one_program_on_the_host_too(x64):
    """`vmap` goes around the steps."""
    opt = classy(ReverseOptimizer, of_a_task, tasks=2, loop="host")
    clear_caches()
    opt.run(opt.init(params(), lam()), 2, train_loss_fn=loss, val_loss_fn=judge)
    assert not compiled.cache_info().currsize
