"""Central differences: accuracy, trees, functions that cannot be traced, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradhpo.testing import assert_trees_close, relative_error
from gradhpo.utils.finite_differences import central_difference, richardson


def f(x):
    return jnp.sum(jnp.sin(x["a"]) * jnp.exp(x["b"][0])) + jnp.log(x["b"][1])


def point():
    return {"a": jnp.array([[0.3, -1.0], [2.0, 30.0]]), "b": (jnp.array(0.5), jnp.array(100.0))}


@pytest.mark.parametrize("difference, rtol", [(central_difference, 1e-8), (richardson, 1e-10)])
def test_matches_automatic_differentiation(difference, rtol, x64):
    x = point()
    assert_trees_close(difference(f, x), jax.grad(f)(x), rtol)


def test_orders_in_the_step(x64):
    """Halving h divides the error by 4, with Richardson by 16."""
    x = jnp.array(0.7)
    exact = jnp.cos(x)
    for difference, order in ((central_difference, 2), (richardson, 4)):
        errors = [relative_error(difference(jnp.sin, x, step=h), exact) for h in (0.2, 0.1)]
        assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_a_function_that_looks_at_values(x64):
    def branch(x):
        return x**2 if float(x) > 0 else np.sin(np.asarray(x))

    np.testing.assert_allclose(central_difference(branch, jnp.array(2.0)), 4.0, rtol=1e-9)
    np.testing.assert_allclose(central_difference(branch, -2.0), np.cos(2.0), rtol=1e-9)


@pytest.mark.parametrize(
    "x, leaf", [({"a": np.float32(1)}, r"\['a'\] is float32"), ([1.0, 2], r"\[1\] is int")]
)
def test_only_float64(x, leaf, x64):
    with pytest.raises(TypeError, match=leaf):
        central_difference(lambda x: 0.0, x)


def test_the_remedy_is_named(x32):
    with pytest.raises(TypeError, match="float32.*jax_enable_x64"):
        central_difference(jnp.sin, jnp.array(1.0))


def test_refuses_vectors_and_nothing(x64):
    with pytest.raises(TypeError, match=r"scalar, but returned shape \(2,\)"):
        central_difference(lambda x: x, jnp.ones(2))
    with pytest.raises(TypeError, match="no leaves"):
        central_difference(lambda x: 0.0, {})
