"""A task: what it takes, what it refuses, and the episodes that it begins."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import (
    BilevelProblem,
    InOrder,
    Resident,
    Start,
    Task,
    Window,
    from_optax,
    from_update,
)
from gradhpo.core.start import begin_episode


def train_loss(w, lam, batch):
    return jnp.mean((batch @ w["w"]) ** 2) + jnp.exp(lam["l2"]) * jnp.sum(w["w"] ** 2)


def val_loss(w, lam, batch):
    return jnp.mean((batch @ w["w"] - 1) ** 2)


PROBLEM = BilevelProblem(from_optax(train_loss, optax.sgd(0.1, momentum=0.9)), val_loss)
ROWS = np.arange(24, dtype=np.float32).reshape(8, 3)
BATCHES = InOrder(ROWS.reshape(4, 2, 3))
PARAMS, LAM = (
    {"w": np.ones(3, np.float32)},
    {"l2": np.float32(-1), "scale": np.zeros(2, np.float32)},
)


def task(**fields):
    given = {"problem": PROBLEM, "params": PARAMS, "hyperparams": LAM}
    return Task(**{**given, "train": BATCHES, "val": BATCHES, **fields})


def starting(begin):
    return PROBLEM._replace(begin=begin)


# -- what it takes -------------------------------------------------------------------------------


@pytest.fixture(params=["x32", "x64"])
def types(request):
    """Both widths of JAX's types."""
    request.getfixturevalue(request.param)
    return jnp.result_type(float)


def test_an_episode_begins(types):
    """Numbers of Python become arrays of a strong type; slots are made; batches come in order."""
    inner, window = task(params={"w": [1.0, 2.0, 3.0]}).begin(steps=3)
    assert jax.tree.structure(inner.opt_state) == jax.tree.structure(
        optax.sgd(0.1, momentum=0.9).init({"w": [1.0, 2.0, 3.0]})
    )
    assert inner.model_state == ()
    for x in jax.tree.leaves(inner):
        assert isinstance(x, jax.Array) and x.dtype == types and not x.weak_type
    np.testing.assert_array_equal(window.train, BATCHES.batches[:3])
    assert window.train.dtype == jnp.float32


def test_sources_of_every_kind(types):
    """A function is called alternately with the other; indices and batches start at the first."""
    calls = []

    def count(name):
        def source():
            calls.append(name)
            return np.full((2, 3), len(calls), np.float32)

        return source

    _, window = task(train=count("train"), val=count("val")).begin(2)
    assert calls == ["train", "val"] * 2
    np.testing.assert_array_equal(window.train[:, 0, 0], [1, 3])
    source = Resident(ROWS, batch_size=5, seed=3)
    _, window = task(train=source, val=lambda: ROWS).begin(2)
    np.testing.assert_array_equal(window.train, ROWS[source.indices(0, 2)])
    np.testing.assert_array_equal(window.val, [ROWS, ROWS])
    _, again = task(train=source, val=lambda: ROWS).begin(2)
    np.testing.assert_array_equal(window.train, again.train)


def test_a_start_depends_on_lam_and_key(types):
    def begin(params, lam, key):
        noise = jax.random.uniform(key, (3,), jnp.float32)
        return Start({"w": params["w"] * jnp.exp(lam["l2"]) + noise})

    mine = task(problem=starting(begin))
    inner, window = mine.begin(2)
    noise = jax.random.uniform(jax.random.key(0), (3,), jnp.float32)
    np.testing.assert_allclose(inner.params["w"], np.exp(-1.0) + noise, rtol=1e-6)
    assert window.train.shape == (2, 2, 3)
    other, _ = mine.begin(2, jax.random.key(1))
    assert np.all(other.params["w"] != inner.params["w"])
    made, _ = begin_episode(mine.problem, mine.origin(jax.random.key(1)), mine.hyperparams)
    np.testing.assert_array_equal(made.params["w"], other.params["w"])


def test_a_start_brings_the_batches():
    def begin(params, lam, key):
        rows = jax.random.normal(key, (4, 2, 3))
        return Start(params, Window(rows, rows + 1))

    mine = task(problem=starting(begin), train=None, val=None)
    _, window = mine.begin(4)
    np.testing.assert_allclose(window.val - window.train, 1, atol=1e-6)
    with pytest.raises(ValueError, match="batches of 4 steps, but 3 are asked for: ask for 4"):
        mine.begin(3)
    with pytest.raises(ValueError, match=r"no sources: its batches come with begin\(steps, key\)"):
        mine.window(4)
    with pytest.raises(ValueError, match="but both do"):
        mine.replace(train=BATCHES, val=BATCHES).begin(4)
    without = mine.replace(problem=starting(lambda params, lam, key: Start(params)))
    with pytest.raises(ValueError, match="but neither does"):
        without.begin(4)


def test_a_model_state_goes_with_the_weights(types):
    state = {"seen": 0, "mean": 0.5, "key": jax.random.key(1)}
    inner, _ = task(model_state=state).begin(1)
    assert inner.model_state["mean"].dtype == types
    assert jnp.issubdtype(inner.model_state["seen"].dtype, jnp.integer)
    assert jnp.issubdtype(inner.model_state["key"].dtype, jax.dtypes.prng_key)
    fresh = starting(lambda params, lam, key: Start(params, model_state={"mean": 2.0}))
    inner, _ = task(problem=fresh, model_state=state).begin(1)
    assert set(inner.model_state) == {"mean"} and float(inner.model_state["mean"]) == 2


def test_what_a_run_reads_beside(x32):
    mine = task(natural=lambda lam: {"l2": np.exp(lam["l2"])}, test=ROWS)
    assert mine.natural(mine.hyperparams) == {"l2": pytest.approx(np.exp(-1))}
    assert mine.test is ROWS
    moved = mine.replace(hyperparams={**LAM, "l2": np.float32(-2)})
    assert moved.hyperparams["l2"] == -2 and mine.hyperparams is LAM


def test_wide_numbers_wait_for_wide_types(x32):
    """float64 is kept, for a check in float64, and nothing truncates it silently."""
    wide = task(params={"w": np.ones(3)})
    with pytest.raises(TypeError, match=r"leaf \['w'\] of params is float64, but JAX has 64-bit"):
        wide.begin(1)
    wide = task(hyperparams={"l2": np.zeros(1), "scale": np.zeros(2, np.float32)})
    with pytest.raises(TypeError, match=r"leaf \['l2'\] of hyperparams is float64"):
        wide.begin(1)
    jax.config.update("jax_enable_x64", True)  # the fixture puts it back
    assert wide.begin(1)[0].params["w"].dtype == jnp.float32


# -- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"problem": PROBLEM.dynamics}, TypeError, "a gradhpo.BilevelProblem.*got Dynamics"),
        ({"params": {"w": np.arange(3)}}, TypeError, r"no floating-point leaf.*\['w'\]: int"),
        (
            {"params": {"w": "ones"}},
            TypeError,
            r"leaf \['w'\] of params is not an array but 'ones'",
        ),
        ({"hyperparams": {"l2": 1, "scale": 0.0}}, TypeError, r"leaf \['l2'\] is int"),
        ({"hyperparams": {}}, ValueError, "hyperparams has no leaves"),
        ({"train": None}, ValueError, "the task has no train data: give train=, sources"),
        ({"val": None}, ValueError, "the task has no val data: give val=, sources"),
        (
            {"train": None, "val": None},
            ValueError,
            "no train and no val data: give train= and val=",
        ),
        (
            {"problem": starting(lambda params, lam, key: Start(params)), "val": None},
            ValueError,
            "the task has no val data",
        ),
        (
            {"train": ROWS},
            TypeError,
            r"train must be a function \(\) -> batch, a gradhpo.Resident or",
        ),
        ({"val": "rows"}, TypeError, "val must be a function"),
        ({"natural": {"l2": 1.0}}, TypeError, "natural must be a function hyperparams -> dict"),
        ({"test": ROWS[:0]}, ValueError, "the test data of a task: empty batch"),
        ({"test": {"x": "rows"}}, TypeError, r"leaf \['x'\] of the test data"),
    ],
)
def test_refused_at_once(fields, error, message):
    with pytest.raises(error, match=message):
        task(**fields)


@pytest.mark.parametrize(
    "batches, message",
    [
        ((), "has no arrays; give a dummy"),
        (1.0, r"leaf the value itself has the shape \(\)"),
        ({"x": np.ones((3, 2)), "y": 1.0}, r"leaf \['x'\] has the shape \(3, 2\) and leaf \['y'\]"),
        (
            (np.ones(3), np.ones(4)),
            r"leaf \[0\] has the shape \(3,\) and leaf \[1\] the shape \(4,",
        ),
        (np.ones((0, 2)), "a source InOrder: empty batch"),
    ],
)
def test_batches_in_order_share_the_step(batches, message):
    with pytest.raises(ValueError, match=message):
        InOrder(batches)


def test_batches_in_order_end():
    with pytest.raises(ValueError, match="the batches of 4 steps, and step 5 is asked for"):
        task().begin(5)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        task().begin(0)


def test_batches_in_order_are_the_task_s_own():
    rows = np.ones((2, 3))
    source = InOrder(rows)
    rows[:] = 7
    np.testing.assert_array_equal(source.steps(0, 2), np.ones((2, 3)))


def test_a_function_that_ends_is_named():
    some = iter([ROWS])
    with pytest.raises(ValueError, match="get_train_batch ran out of data at batch 2 of 3"):
        task(train=lambda: next(some)).begin(3)


def test_tasks_are_known_by_identity():
    """They hold arrays, whose equality is no truth value."""
    one, other = task(), task()
    assert one == one and one != other and len({one, other}) == 2


def test_a_step_of_the_user():
    problem = BilevelProblem(
        from_update(lambda w, lam, batch: w - lam * (w - batch)), lambda w, lam, batch: w**2
    )
    inner, window = Task(problem, 2.0, 0.5, InOrder([1.0, 1.0]), InOrder([0.0, 0.0])).begin(2)
    assert float(inner.params) == 2 and window.val.shape == (2,)
