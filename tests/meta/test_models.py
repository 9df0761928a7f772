"""The meta-models: what is a weight of theirs, what a hyperparameter, and the formulas of both."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")

from gradhpo.core.dynamics import InnerState, from_optax  # noqa: E402
from gradhpo.meta.anil import Anil  # noqa: E402
from gradhpo.meta.meta_sgd import MetaSgd  # noqa: E402
from gradhpo.meta.networks import (  # noqa: E402
    EPSILON,
    BatchNorm,
    ConvNet,
    max_pool,
    pixels,
)
from gradhpo.meta.warpgrad import WarpGrad  # noqa: E402
from gradhpo.meta.weighted import Weighted  # noqa: E402

SHAPE, WAYS = (8, 8, 2), 3
NET = ConvNet(SHAPE, WAYS, channels=4, count=2)
MODELS = {
    "anil": Anil(SHAPE, WAYS, channels=4, count=2, shared=1),
    "warpgrad": WarpGrad(SHAPE, WAYS, channels=4, count=2, layers=1),
    "meta_sgd": MetaSgd(NET, rate=0.1),
    "weighted": Weighted(NET),
}


def batch(seed=0, size=6):
    draw = np.random.default_rng(seed)
    images = draw.integers(0, 256, (size, *SHAPE), np.uint8)
    return jnp.asarray(images), jnp.asarray(draw.integers(0, WAYS, size))


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def conv_block(params, x):
    """A block by XLA's convolution and pooling."""
    x = jax.lax.conv_general_dilated(
        x, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    x = (x - mean) / jnp.sqrt(variance + EPSILON) * params["norm"]["scale"] + params["norm"]["bias"]
    x = jnp.maximum(x, 0)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def moved(tree, seed):
    draw = np.random.default_rng(seed).standard_normal
    return jax.tree.map(lambda x: x + 0.3 * draw(x.shape).astype(x.dtype), tree)


def test_a_conv_net_is_its_formula():
    params = moved(NET.init(jax.random.key(0)), 1)
    images, _ = batch()
    x = images / 127.5 - 1
    for i in range(2):
        x = conv_block(params["blocks"][i], x)
    want = x.reshape(6, -1) @ params["linear"]["kernel"] + params["linear"]["bias"]
    np.testing.assert_allclose(jax.jit(NET)(params, images), want, rtol=1e-4, atol=1e-5)


def test_initial_weights_are_those_of_pytorch():
    params = ConvNet((8, 8, 3), WAYS, channels=40, count=1).init(jax.random.key(0))
    kernel = params["blocks"][0]["conv"]["kernel"]
    bound = 1 / np.sqrt(9 * 3)
    assert float(jnp.abs(kernel).max()) <= bound
    assert float(kernel.std()) == pytest.approx(bound / np.sqrt(3), rel=0.05)


def test_anil_is_the_same_network_cut_in_two():
    head, body = (moved(tree, i) for i, tree in enumerate(MODELS["anil"].init(jax.random.key(0))))
    blocks = {0: body["layers"][0], 1: head["blocks"][0]}
    whole = {"blocks": blocks, "linear": head["linear"]}
    assert count(whole) == count(NET.init(jax.random.key(0)))
    images, _ = batch()
    got = MODELS["anil"].logits(head, body, images)
    np.testing.assert_allclose(got, NET(whole, images), rtol=1e-5, atol=1e-6)
    linear_alone = Anil(SHAPE, WAYS, channels=4, count=2, shared=2).init(jax.random.key(0))[0]
    assert count(linear_alone) == (2 * 2 * 4 + 1) * WAYS
    with pytest.raises(ValueError, match="shared=3 is more than the 2 blocks"):
        Anil(SHAPE, WAYS, count=2, shared=3)


def test_warp_layers_stand_after_every_block_and_keep_the_size():
    model = MODELS["warpgrad"]
    task, warp = (moved(tree, i) for i, tree in enumerate(model.init(jax.random.key(0))))
    assert count(task) == count(NET.init(jax.random.key(0)))
    assert count(warp) == 2 * (9 * 4 * 4 + 2 * 4)
    images, _ = batch()
    x = pixels(images)
    for i in range(2):
        x = conv_block(task["blocks"][i], x)
        layer = warp["layers"][i]["layers"][0]
        x = jax.lax.conv_general_dilated(
            x, layer["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + EPSILON)
        x = jnp.maximum(x * layer["norm"]["scale"] + layer["norm"]["bias"], 0)
    want = x.reshape(6, -1) @ task["linear"]["kernel"] + task["linear"]["bias"]
    np.testing.assert_allclose(model.logits(task, warp, images), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_what_reaches_them(name):
    model = MODELS[name]
    params, lam = model.init(jax.random.key(1))

    @jax.jit
    def told(params, lam, batch):
        slopes = [
            jax.value_and_grad(loss, argnums=1)(params, lam, batch)
            for loss in (model.train_loss, model.val_loss)
        ]
        logits = model.logits(params, lam, batch[0])
        return slopes, optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])

    ((train, by_train), (val, by_val)), losses = told(params, lam, batch())
    assert float(val) == pytest.approx(float(losses.mean()), rel=1e-5)
    assert (float(train) == pytest.approx(float(val), rel=1e-6)) == (name != "weighted")

    def reached(slope):
        return any(bool(np.any(x)) for x in jax.tree.leaves(slope))

    assert reached(by_val) == (name in ("anil", "warpgrad"))
    assert reached(by_train) == (name != "meta_sgd")


def test_weights_of_examples_are_bounded_below():
    model = MODELS["weighted"]
    params, lam = model.init(jax.random.key(0))
    lam["out"]["bias"] = jnp.full(1, -50.0)  # the sigmoid vanishes
    data = batch()
    got = model.train_loss(params, lam, data)
    assert float(got) == pytest.approx(0.1 * float(model.val_loss(params, lam, data)), rel=1e-5)


def test_meta_sgd_steps_by_its_rates_of_either_sign():
    model = MODELS["meta_sgd"]
    params, lam = model.init(jax.random.key(0))
    lam["rates"] = moved(lam["rates"], 3)
    assert any(bool((x < 0).any()) for x in jax.tree.leaves(lam["rates"]))
    dynamics = from_optax(model.train_loss, model.optimizer)
    slope = jax.grad(model.train_loss)(params, lam, batch())
    want = jax.tree.map(lambda w, a, g: w - a * g, params, lam["rates"], slope)
    got = dynamics.step(InnerState(params, dynamics.init(params, lam).opt_state), lam, batch())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got[0], want)
    assert model.initial(lam) is lam["initial"]
    assert "initial" not in MetaSgd(NET, start=False).init(jax.random.key(0))[1]


def test_batch_norm_takes_the_statistics_of_the_batch():
    norm = BatchNorm(3)
    x = 5 + 2 * jax.random.normal(jax.random.key(0), (10, 4, 4, 3))
    got = norm(x)
    np.testing.assert_allclose(got.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(got.std((0, 1, 2)), 1, rtol=1e-4)


def test_a_pixel_is_not_pooled_away():
    assert max_pool(jnp.zeros((1, 5, 2, 1))).shape == (1, 2, 1, 1)
    deep = ConvNet((4, 4, 1), WAYS, channels=2, count=4)
    params = deep.init(jax.random.key(0))
    assert deep(params, jnp.ones((3, 4, 4, 1))).shape == (3, WAYS)
