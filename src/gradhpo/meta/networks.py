"""The convolutional networks of the meta-models, in Flax NNX, as pure functions of their weights.

Batch norm takes the statistics of the batch at hand, in training and in testing, as the authors of
the papers do. So it has no running averages and these networks no model state; the price is that
a score depends on the other images of its batch. Convolutions are products of matrices, see
`gradhpo.meta.convolution`. Initial weights are PyTorch's: uniform within 1 / sqrt(inputs).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from gradhpo.core.types import Hyper, Params, PyTree
from gradhpo.meta.convolution import convolution
from gradhpo.utils.settings import check_count

__all__ = [
    "BatchNorm",
    "Block",
    "Classifier",
    "ConvNet",
    "MetaModel",
    "Module",
    "blocks",
    "cross_entropy",
    "linear",
    "max_pool",
    "pixels",
]

EPSILON = 1e-5  # of batch norm
Shape = tuple[int, int, int]  # height, width, channels
_UNIFORM = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class MetaModel(Protocol):
    """What the meta-models have in common, so that one can stand in the place of another.

    A batch is `(images, labels)`: (n, height, width, channels), see `pixels`, and integers (n,).
    """

    def init(self, key: jax.Array) -> tuple[Params, Hyper]:
        """Weights of a task and hyperparameters, both to start from."""
        ...

    def logits(self, params: Params, hyperparams: Hyper, images: jax.Array) -> jax.Array:
        """Scores (n, ways)."""
        ...

    def train_loss(self, params: Params, hyperparams: Hyper, batch: Any) -> jax.Array:
        """Mean over the batch."""
        ...

    def val_loss(self, params: Params, hyperparams: Hyper, batch: Any) -> jax.Array:
        """Mean over the batch."""
        ...


class Classifier:
    """Cross-entropy of `logits` as the loss that trains, and as the one that validates."""

    def logits(self, params: Params, hyperparams: Hyper, images: jax.Array) -> jax.Array:
        raise NotImplementedError

    def train_loss(self, params: Params, hyperparams: Hyper, batch: Any) -> jax.Array:
        return self.val_loss(params, hyperparams, batch)

    def val_loss(self, params: Params, hyperparams: Hyper, batch: Any) -> jax.Array:
        images, labels = batch
        return jnp.mean(cross_entropy(self.logits(params, hyperparams, images), labels))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Of every example, (n,).

    >>> print(cross_entropy(jnp.zeros((1, 2)), jnp.array([0])))
    [0.6931472]
    """
    # No gather: inside of compiled loops its derivative, a scatter, is slow on CPU.
    return -jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(labels, logits.shape[-1]), axis=-1)


def pixels(images: jax.Array) -> jax.Array:
    """uint8 from 0 to 255 as floats from -1 to 1; floats as they are.

    >>> print(pixels(jnp.array([0, 255], jnp.uint8)))
    [-1.  1.]
    """
    return images / 127.5 - 1 if images.dtype == jnp.uint8 else images


class Module:
    """A Flax module without state: `init(key) -> params`, `module(params, x)`.

    Args:
        make: `rngs -> nnx.Module`; called once abstractly, and at every `init`.

    >>> module = Module(lambda rngs: nnx.Linear(3, 2, rngs=rngs))
    >>> params = module.init(jax.random.key(0))
    >>> params["kernel"].shape, module(params, jnp.ones((5, 3))).shape
    ((3, 2), (5, 2))
    """

    def __init__(self, make: Callable[[nnx.Rngs], Any]):
        self.make = make
        self.graph = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))[0]

    def init(self, key: jax.Array) -> PyTree:
        """The weights, as nested dictionaries."""
        return nnx.to_pure_dict(nnx.split(self.make(nnx.Rngs(key)))[1])

    def with_weights(self, params: PyTree) -> Any:
        """The module itself."""
        return nnx.merge(self.graph, params)

    def __call__(self, params: PyTree, *inputs: Any) -> Any:
        return self.with_weights(params)(*inputs)


class BatchNorm(nnx.Module):
    """`scale (x - mean) / sqrt(variance + epsilon) + bias` over all axes but the last."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: jax.Array) -> jax.Array:
        axes = tuple(range(x.ndim - 1))
        x = x - jnp.mean(x, axes)
        return x * (self.scale * lax.rsqrt(jnp.mean(x**2, axes) + EPSILON)) + self.bias


class Block(nnx.Module):
    """3 x 3 convolution, batch norm, ReLU and 2 x 2 max-pooling.

    The convolution has no bias, which batch norm would take away again.

    Args:
        shape: Of an image that comes in; `self.shape` is that of what goes out.
        channels: Of what goes out.
        pool: False: the size stays. It stays as well where it is one pixel.
        stride: Of the convolution; 2 in the place of pooling costs a quarter.
    """

    def __init__(
        self, shape: Shape, channels: int, *, pool: bool = True, stride: int = 1, rngs: nnx.Rngs
    ):
        *sides, inputs = shape
        height, width = (-(-side // stride) for side in sides)
        self.conv = nnx.Conv(
            inputs,
            channels,
            (3, 3),
            strides=(stride, stride),
            use_bias=False,
            kernel_init=_UNIFORM,
            conv_general_dilated=convolution,  # type: ignore[arg-type]
            rngs=rngs,
        )
        self.norm = BatchNorm(channels)
        self.pool = pool and min(height, width) > 1
        self.shape = (height // 2, width // 2, channels) if self.pool else (height, width, channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.conv(x)))
        return max_pool(x) if self.pool else x


def max_pool(x: jax.Array) -> jax.Array:
    """2 x 2, of images (n, height, width, channels); an odd last row or column is left out.

    >>> print(max_pool(jnp.arange(9.0).reshape(1, 3, 3, 1))[0, :, :, 0])
    [[4.]]
    """
    n, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    x = x.reshape(n, height // 2, 2, width // 2, 2, channels)
    x = _larger(x[:, :, 0], x[:, :, 1])
    return _larger(x[:, :, :, 0], x[:, :, :, 1])


def _larger(x: jax.Array, y: jax.Array) -> jax.Array:
    # The derivative of `jnp.max` is divided by how many entries equal the maximum: by none, where
    # the compiler has computed them twice and rounded differently. This one is a choice.
    return jnp.where(x >= y, x, y)


def blocks(shape: Shape, channels: int, count: int, rngs: nnx.Rngs) -> list[Block]:
    """So many blocks, one upon the other.

    >>> [block.shape for block in blocks((8, 8, 3), 4, 2, nnx.Rngs(0))]
    [(4, 4, 4), (2, 2, 4)]
    """
    made: list[Block] = []
    for _ in range(count):
        made.append(Block(made[-1].shape if made else shape, channels, rngs=rngs))
    return made


def linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    """With PyTorch's initial weights; the biases begin at zero."""
    return nnx.Linear(inputs, outputs, kernel_init=_UNIFORM, rngs=rngs)


class Head(nnx.Module):
    """Blocks, then a linear layer on all that they leave of an image."""

    def __init__(self, shape: Shape, channels: int, count: int, ways: int, rngs: nnx.Rngs):
        self.blocks = nnx.data(blocks(shape, channels, count, rngs))
        height, width, features = self.blocks[-1].shape if count else shape
        self.linear = linear(height * width * features, ways, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return self.linear(x.reshape(len(x), -1))


@dataclass(frozen=True)
class ConvNet:
    """Blocks and a linear layer: `init(key) -> params`, `net(params, images) -> logits`.

    Attributes:
        shape: Of an image: height, width, channels.
        ways: Classes.
        channels: Of every block.
        count: Blocks.

    >>> net = ConvNet((28, 28, 1), ways=5, channels=8)
    >>> params = net.init(jax.random.key(0))
    >>> net(params, jnp.zeros((2, 28, 28, 1))).shape, sum(x.size for x in jax.tree.leaves(params))
    ((2, 5), 1909)
    """

    shape: Shape
    ways: int
    channels: int = 32
    count: int = 4

    def __post_init__(self) -> None:
        for name in ("ways", "channels", "count"):
            check_count(name, getattr(self, name))

    @cached_property
    def _module(self) -> Module:
        return Module(lambda rngs: Head(self.shape, self.channels, self.count, self.ways, rngs))

    def init(self, key: jax.Array) -> Params:
        return self._module.init(key)

    def __call__(self, params: Params, images: jax.Array) -> jax.Array:
        return self._module(params, pixels(images))
