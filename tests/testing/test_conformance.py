"""The shipped suite passes every estimator of the package, and fails broken ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradhpo import drmad, one_step, reverse
from gradhpo.algorithms import METHODS
from gradhpo.testing import (
    assert_trees_close,
    check_estimator,
    check_method,
    relative_error,
    unrolled_loss,
)
from gradhpo.testing.problems import (
    ZOO,
    batch_norm,
    contraction,
    initial_scale,
    initial_weights,
    integer_leaves,
    outer_lam,
    ridge,
)

pytestmark = pytest.mark.usefixtures("x64")

DOORS = (batch_norm, initial_scale, initial_weights)  # a model state; starts that depend on lam

# Settings of a method that make a method of its own: estimator, exact, control, the rest.
MORE = {
    "averaged": (one_step(0.5), [ridge], [(outer_lam, 3)], [outer_lam]),
    "drmad: T = 1": (drmad(1), [integer_leaves, *DOORS], [], []),
    "segments": (reverse(3, memory="segments"), [integer_leaves, *DOORS], [], [contraction]),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_packages_own_methods_conform(name):
    check_method(METHODS[name])


@pytest.mark.parametrize("name", MORE)
def test_the_packages_own_estimators_conform(name):
    estimator, exact_on, not_exact_on, problems = MORE[name]
    check_estimator(
        estimator, exact_on=exact_on, not_exact_on=not_exact_on, problems=problems, rtol=1e-8
    )


def broken(change):
    """`one_step` with its estimate changed after the fact."""
    good = one_step()

    def estimate(problem, memory, inner, lam, window):
        return change(good.estimate(problem, memory, inner, lam, window), inner, lam)

    return good._replace(estimate=estimate)


def halve(tree):
    return jax.tree.map(lambda x: x / 2, tree)


BROKEN = {
    "inexact": (lambda got, s, lam: got._replace(hypergrad=halve(got.hypergrad)), "claimed exact"),
    "lazy": (lambda got, s, lam: got._replace(inner=s), "not within rtol"),
    "float32": (
        lambda got, s, lam: got._replace(
            hypergrad=jax.tree.map(lambda x: x.astype(jnp.float32), got.hypergrad)
        ),
        "hypergrad changed",
    ),
    "memory": (lambda got, s, lam: got._replace(memory=(jnp.zeros(()),)), "memory changed"),
    "info": (lambda got, s, lam: got._replace(info={}), "info lacks"),
    "extra": (lambda got, s, lam: got._replace(info={**got.info, "x": 1.0}), "info has"),
    "hides NaN": (
        lambda got, s, lam: got._replace(
            hypergrad=jax.tree.map(jnp.nan_to_num, got.hypergrad),
            inner=jax.tree.map(jnp.nan_to_num, got.inner),
            info={**got.info, "val_loss": jnp.zeros(())},
        ),
        "NaN train batch",
    ),
    "wrong inside jit": (
        lambda got, s, lam: (
            got
            if not isinstance(lam["bias"], jax.core.Tracer)
            else got._replace(hypergrad=halve(got.hypergrad))
        ),
        "not within rtol",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_suite_notices(name):
    change, message = BROKEN[name]
    with pytest.raises(AssertionError, match=message):
        check_estimator(broken(change), exact_on=[outer_lam], problems=[outer_lam])


def test_a_control_on_which_the_method_is_exact_proves_nothing():
    with pytest.raises(AssertionError, match="the control ridge shows nothing"):
        check_estimator(reverse(2), not_exact_on=[ridge], problems=[])


def test_exactness_needs_float64():
    jax.config.update("jax_enable_x64", False)  # the fixture puts it back
    with pytest.raises(RuntimeError, match="jax_enable_x64"):
        check_estimator(one_step(), exact_on=[ridge], problems=[])


def test_assert_trees_close_sees_small_leaves_and_nan():
    want = {"big": jnp.array([1e3]), "small": jnp.array(1.0)}
    assert_trees_close(want, want, 1e-15)
    off = {"big": jnp.array([1e3]), "small": jnp.array(1.1)}
    assert relative_error(off, want) < 2e-4
    with pytest.raises(AssertionError, match=r"leaf \['small'\] is off by 0.01"):
        assert_trees_close(off, want, 1e-3)
    nan = {"big": jnp.array([1e3]), "small": jnp.array(jnp.nan)}
    for got, expected in ((nan, want), (nan, nan)):
        with pytest.raises(AssertionError):
            assert_trees_close(got, expected, 1e9)
    with pytest.raises(AssertionError, match="shape"):
        assert_trees_close({"big": jnp.ones(1), "small": jnp.ones(1)}, want, 1.0)
    with pytest.raises(ValueError, match="structure"):
        assert_trees_close({"big": want["big"]}, want, 1.0)


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_is_the_same_in_float32(name):
    """The same numbers, the default dtype, and windows of the length asked for."""
    wide = numbers_of(ZOO[name])
    assert all(x.dtype in (jnp.float64, jnp.int32, jnp.uint32) for x in jax.tree.leaves(wide))
    jax.config.update("jax_enable_x64", False)
    narrow = numbers_of(ZOO[name])
    for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(narrow), strict=True):
        assert b.dtype in (jnp.float32, jnp.int32, jnp.uint32)
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    assert {x.shape[0] for x in jax.tree.leaves(narrow["window"])} == {3}
    task = ZOO[name](3)
    inner, window = task.begin(3)
    assert np.isfinite(unrolled_loss(task.problem, inner, task.hyperparams, window))


def numbers_of(problem_at):
    """All that an episode of three steps begins with; of keys, their bits."""
    task = problem_at(3)
    inner, window = task.begin(3)

    def bits(x):
        key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if key else x

    return jax.tree.map(bits, {"inner": inner, "lam": task.hyperparams, "window": window})
