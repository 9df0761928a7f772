"""The recipes run and learn; a module that was not taken apart is refused, and a recipe named."""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradhpo
from gradhpo.examples import recipes

LIBRARIES = {"plain": "jax", "flax_linen": "flax", "flax_nnx": "flax", "equinox_modules": "equinox"}


def recipe(name):
    pytest.importorskip(LIBRARIES[name])
    pytest.importorskip("sklearn")  # digits
    return importlib.import_module(f"{recipes.__name__}.{name}")


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_recipe_learns(name, capsys):
    state = recipe(name).main(M=4)
    assert re.fullmatch(r"validation accuracy 0\.\d\d, then 0\.\d\d\n", capsys.readouterr().out)
    assert state.metadata["val_accuracy"] > 0.4  # by chance 0.1
    assert state.metadata["n_rejected"] == 0
    moved = jax.tree.map(
        lambda new, old: float(abs(new - old)), state.hyperparams, recipe(name).HYPERPARAMS
    )
    assert min(jax.tree.leaves(moved)) > 0


def refused(params):
    opt = gradhpo.OneStepOptimizer(inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.1))
    with pytest.raises(TypeError) as caught:
        opt.init(params, 0.0)
    return str(caught.value)


def test_linen_variables_are_not_params():
    net = recipe("flax_linen")
    assert "examples.recipes.flax_linen" in refused(dict(net.VARIABLES))


def test_an_nnx_module_with_statistics_is_not_params():
    nnx, net = pytest.importorskip("flax.nnx"), recipe("flax_nnx")
    module = net.Net(nnx.Rngs(0))
    for given in (module, nnx.state(module), {"net": module}):
        assert "examples.recipes.flax_nnx" in refused(given)


def test_an_equinox_module_with_other_leaves_is_not_params():
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        kernel: jax.Array
        activation: object

    for leaf in (jax.nn.relu, 0.2):  # the probability of eqx.nn.Dropout is such a number
        text = refused({"net": Net(jnp.ones(2), leaf)})
        assert ".activation" in text and "examples.recipes.equinox_modules" in text
    opt = gradhpo.OneStepOptimizer(inner_optimizer=optax.sgd(0.1), outer_optimizer=optax.sgd(0.1))
    params, _ = eqx.partition(Net(jnp.ones(2), jax.nn.relu), eqx.is_inexact_array)
    np.testing.assert_array_equal(opt.init(params, 0.0).params.kernel, np.ones(2))
