"""Random settings, trees, dtypes, shapes and data: a call works, or refuses with an explanation.

*Works*: the hyperparameters keep their tree, shapes and dtypes, no NaN is written into them, and
the status tells what was not finite. *Explains*: a TypeError or ValueError from a `raise` of
gradhpo itself; what arises in the depth of JAX, NumPy or Optax is a fault. What was found is kept
in its own words in test_found_by_fuzz.py.
"""

import dataclasses
import decimal
import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from gradhpo import GradhpoWarning, Start, Status, cg, neumann, nystrom, outer
from gradhpo.algorithms import METHODS
from gradhpo.cli import _is_for_the_user

pytestmark = pytest.mark.slow


def fuzz(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


def works_or_explains(function, *arguments):
    """What the function returns, or None where it refuses as it should."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GradhpoWarning)
            return function(*arguments)
    except Exception as error:
        if not isinstance(error, TypeError | ValueError) or not _is_for_the_user(error):
            raise
        event(f"refused: {type(error).__name__}")
        return None


# -- constructors ---------------------------------------------------------------------------------


NUMBERS = [0, 1, 2, 3, 10, -1, 0.0, 0.5, 0.9, 1.0, 1e-30, 1e300, -0.1, 2**31, 2**70]
ODD_NUMBERS = [
    float("nan"), float("inf"), -float("inf"), True, False, 1j, decimal.Decimal("0.5"),
    np.float32(0.5), np.float64("nan"), np.int64(3), np.uint8(2), np.bool_(True), np.float16(1),
    np.array(0.5), np.array(2), np.array([1, 2]), np.ones((0,)), np.array("x"),
]  # fmt: skip
WORDS = [
    "auto", "scan", "unroll", "host", "estimate", "fixed", "line", "trajectory", "segments", "x",
    "differentiated", "ignored", "bernoulli", "round", "training_loss", "optimizer", "", "1",
]  # fmt: skip
THINGS = [None, [], [1], (), (1, 2), {}, {"a": 1}, b"x", object(), int, float, print, len, range(3)]
OPTIMIZERS = [optax.sgd(0.1), optax.adam(0.1), optax.sgd, lambda lam: optax.sgd(0.1), cg()]


def jax_things():
    return [jnp.float32(0.5), jnp.int32(3), jnp.ones(2), jax.random.key(0), jnp.bfloat16(1)]


ANYTHING = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(ODD_NUMBERS),
    st.sampled_from(WORDS),
    st.sampled_from(THINGS),
    st.sampled_from(OPTIMIZERS),
    st.builds(lambda i: jax_things()[i], st.integers(0, 4)),
    st.integers(-5, 40),
    st.floats(),
)


FINE: dict[str, list] = {  # values of the right type, also at their limits and beyond
    "outer_optimizer": [None, optax.adam(0.1), outer.followed_by(optax.sgd(0.1), jnp.abs)],
    "inner_optimizer": OPTIMIZERS[:2] + [lambda lam: optax.sgd(0.1)],
    "begin": [None, lambda w, lam, draw: Start(w)],
    "loop": WORDS[:4],
    "theta": ["estimate", "fixed", 0.0, 1.0, 0.5, np.float32(0.5), -1.0],
    "points": ["line", "trajectory"],
    "slots": ["differentiated", "ignored"],
    "sampling": ["bernoulli", "round"],
    "memory": ["trajectory", "segments"],
    "condition": ["training_loss", "optimizer", lambda w, lam, batch: w],
    "solver": [None, cg(), neumann(3), nystrom(2, damping=0.1)],
    "virtual": [None, optax.sgd(0.1), lambda lam: optax.sgd(0.1)],
    "gamma": [0, 1, 0.5, np.float32(0.9), 1.0000001],
    "eps": ["auto", 1e-3, 0.0],
    "step_size": [0.1, 0, 1, lambda k: 0.1, -0.1],
    "penalty": [1.0, 0.0, lambda k: 1.0 + k],
    "sigma": [0.1, 1e-30, 0.0],
    "index": [lambda batch: 0],
    "budget": [None, 1, 2**40, 0],
}
WHOLE = [None, 0, 1, 2, 3, 4, 8, np.int64(2), 10**9]


@st.composite
def constructions(draw):
    name = draw(st.sampled_from(sorted(METHODS)))
    method = METHODS[name]
    given = {"T": 4, **method.example.of_class}
    given |= {"inner_optimizer": optax.sgd(0.1)}
    fields = {field.name: field for field in dataclasses.fields(method.optimizer)}
    for name in draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=4)):
        switch = isinstance(fields[name].default, bool)
        fine = [True, False, np.bool_(True)] if switch else FINE.get(name, WHOLE)
        given[name] = draw(st.sampled_from(fine) if draw(st.integers(0, 3)) else ANYTHING)
    return method, given


@fuzz(5000)
@given(constructions())
def test_constructors(made):
    method, given = made
    opt = works_or_explains(lambda: method.make(**given))
    if opt is not None:
        event("works")
        hash(opt), repr(opt)
        assert opt == dataclasses.replace(opt)
        works_or_explains(lambda: opt.estimator())


# -- trees ----------------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: Any
    second: Any


OTHERS = ["int32", "int32", "int8", "uint8", "int64", "bool", "complex64", "float64"]
SHAPES = [(), (3,), (1,), (2, 3), (1, 3), (3, 1)] * 4 + [(0,), (2, 0)]
SPECIAL = [np.nan, np.inf, -np.inf, 1e38, 0.0]


@st.composite
def arrays(draw, dtypes, special=True):
    dtype = jnp.dtype(draw(st.sampled_from(dtypes)))
    shape = draw(st.sampled_from(SHAPES))
    values = np.asarray(np.random.default_rng(draw(st.integers(0, 3))).standard_normal(shape))
    if special and values.size and draw(st.integers(0, 9)) == 7:
        values.flat[0] = draw(st.sampled_from(SPECIAL))
    with np.errstate(all="ignore"):
        made = np.asarray(values).astype(dtype)
    return jnp.asarray(made) if draw(st.booleans()) and dtype != np.float64 else made


def leaves(strange):
    """Mostly floating-point arrays; the others as often as asked for, of forty."""
    fine = arrays(["float32"] * 5 + ["bfloat16", "float16"])
    odd = st.one_of(
        arrays(OTHERS),
        arrays(OTHERS),
        st.sampled_from([None, 0.5, 1, True, 2**40, np.float64(0.5), np.int64(7), "x", "float32"]),
        st.builds(lambda: jax.random.key(1)),
        st.builds(lambda: jax.random.PRNGKey(1)),
        st.builds(lambda: jax.random.split(jax.random.key(1), 3)),
    )
    return st.integers(0, 39).flatmap(lambda i: odd if 5 <= i < 5 + strange else fine)


def trees(leaf):
    def grown(children):
        return st.one_of(
            st.dictionaries(st.sampled_from(["a", "b", "c"]), children, max_size=3),
            st.lists(children, max_size=2).map(tuple),
            st.lists(children, max_size=2),
            st.builds(Pair, children, children),
        )

    usual = st.fixed_dictionaries({"w": leaf, "more": grown(leaf)})
    return st.one_of(leaf, usual, usual, usual, grown(grown(leaf)))


PARAMS = trees(leaves(strange=4))
HYPERPARAMS = trees(leaves(strange=1))
BATCHES = trees(leaves(strange=4))
MODEL_STATES = st.one_of(st.just(()), st.just(()), trees(leaves(strange=10)))


def is_float(x):
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def floats(tree):
    return [jnp.asarray(x, jnp.float32) for x in jax.tree.leaves(tree) if is_float(x)]


def total(tree):
    """One number of all floating leaves; an empty mean is 0."""
    return sum((jnp.sum(jnp.tanh(x)) / max(x.size, 1) for x in floats(tree)), jnp.float32(0.0))


def distance(w, lam, batch):
    return sum((jnp.sum((x - total(batch)) ** 2) for x in floats(w)), jnp.float32(0.0))


def train_loss(w, lam, batch, *model_state):
    pull = sum((jnp.sum(x**2) for x in floats(w)), jnp.float32(0.0))
    loss = distance(w, lam, batch) + jnp.exp(total(lam)) * pull
    return (loss, (model_state[0], {})) if model_state else loss


def val_loss(w, lam, batch, *model_state):
    return distance(w, lam, batch) + 0.1 * jnp.sin(total(lam))


ODD_LOSSES = [
    lambda *a: None,
    lambda *a: 1.0,
    lambda *a: jnp.ones(3),
    lambda *a: (jnp.float32(1), {"a": jnp.ones(2)}),
    lambda *a: [jnp.float32(1)],
    lambda *a: jnp.int32(2),
    lambda *a: "x",
    lambda *a: jnp.nan * total(a[0]),
    lambda *a: total(a[0]).astype(jnp.bfloat16),
    lambda *a: {"loss": total(a[0])},
    lambda *a: (total(a[0]), {"loss": 1.0}),
    lambda *a: (total(a[0]), {"n": 3, "t": True}),
]


def losses(default):
    return st.integers(0, 19).flatmap(
        lambda i: st.sampled_from(ODD_LOSSES) if i == 13 else st.just(default)
    )


def rate(lam):
    return 0.01 * jnp.exp(total(lam))


def by_hand(w, lam, batch, *model_state):
    """A training step of the user's own; a model state is handed on."""
    floating = jax.tree.map(lambda x: x if is_float(x) else None, w)

    def loss(floating):
        return distance(floating, lam, batch)

    def move(x, g):
        return x - (rate(lam) * g).astype(jnp.result_type(x))

    moved = jax.tree.map(move, floating, jax.grad(loss)(floating))
    new = jax.tree.map(lambda x, y: y if x is None else x, moved, w, is_leaf=lambda x: x is None)
    return (new, *model_state) if model_state else new


WAYS = [
    {"inner_optimizer": lambda lam: optax.sgd(rate(lam))},
    {"inner_optimizer": lambda lam: optax.sgd(rate(lam), momentum=0.9)},
    {"inner_optimizer": lambda lam: optax.adam(rate(lam), eps_root=1e-8)},
    {"inner_optimizer": optax.sgd(0.05)},
    {"update_fn": by_hand},
]


@st.composite
def methods(draw):
    method = METHODS[draw(st.sampled_from(sorted(METHODS)))]
    given = {"T": 4, **method.example.of_class, **draw(st.sampled_from(WAYS))}
    if "update_fn" in given:
        given.pop("inner_optimizer", None)
    if draw(st.integers(0, 4)) == 0:
        given["loop"] = draw(st.sampled_from(["unroll", "host", "scan"]))
    if draw(st.integers(0, 9)) == 0:
        given |= draw(st.sampled_from([{"update_every": 2}, {"virtual": optax.sgd(0.1)}]))
    return works_or_explains(lambda: method.make(**given))


@st.composite
def problems(draw):
    return {
        "opt": draw(methods()),
        "params": draw(PARAMS),
        "lam": draw(HYPERPARAMS),
        "train": draw(BATCHES),
        "val": draw(BATCHES),
        "model_state": draw(MODEL_STATES),
        "losses": (draw(losses(train_loss)), draw(losses(val_loss))),
        "lr": draw(st.sampled_from([0.1, 0.1, 0.1, 1, 1e30, 0, np.float64(0.1), jnp.float32(0.1)])),
    }


def shapes(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


def began(problem):
    """The state to begin with, or None."""
    if problem["opt"] is None:
        return None
    return works_or_explains(
        functools.partial(
            problem["opt"].init,
            problem["params"],
            problem["lam"],
            problem["train"],
            model_state=problem["model_state"],
        )
    )


@fuzz(2000)
@given(problems())
def test_traced(problem):
    state, opt = began(problem), problem["opt"]
    if state is None:
        return
    data = problem["train"], problem["val"], *problem["losses"]
    after = works_or_explains(
        lambda: jax.eval_shape(lambda s: opt.step(s, *data, lr_hyper=problem["lr"]), state)
    )
    h = works_or_explains(
        lambda: jax.eval_shape(lambda s: opt.compute_hypergradient(s, *data), state)
    )
    assert (after is None) == (h is None)
    if after is not None:
        event("works")
        assert shapes(after.hyperparams) == shapes(state.hyperparams) == shapes(h)
        assert shapes(after.params) == shapes(state.params)


# -- runs -----------------------------------------------------------------------------------------


def finite(tree):
    return all(bool(jnp.isfinite(x).all()) for x in floats(tree))


@fuzz(300)
@given(problems(), st.integers(1, 2))
def test_runs(problem, episodes):
    state, opt = began(problem), problem["opt"]
    if state is None:
        return
    data = problem["train"], problem["val"], *problem["losses"]
    after = works_or_explains(
        lambda: opt.run(
            state,
            episodes,
            get_train_batch=lambda: data[0],
            get_val_batch=lambda: data[1],
            train_loss_fn=data[2],
            val_loss_fn=data[3],
            lr_hyper=problem["lr"],
        )
    )
    stepped = works_or_explains(lambda: opt.step(state, *data, lr_hyper=problem["lr"]))
    for new in (after, stepped):
        if new is None:
            continue
        event("works")
        assert shapes(new.hyperparams) == shapes(state.hyperparams)
        assert finite(new.hyperparams) or not finite(state.hyperparams)
        assert finite(new.params) or not finite(state.params)
        rejected = sum(n for code, n in new.status_counts.items() if code.rejects)
        assert rejected == int(new.metadata["n_rejected"])
        if not all(np.isfinite(new.metadata[name]) for name in ("val_loss", "hypergrad_norm")):
            assert Status(int(new.metadata["status"])) is not Status.OK
