"""WarpGrad: layers between those of the task, which bend its gradients and are shared by all tasks.

Flennerhag et al. (2020), "Meta-Learning with Warped Gradient Descent". After every block of the
task's network stand warp layers of the same width and size,

    w = the blocks and the linear layer,    lam = the warp layers

They are part of the network, of both losses, and never moved by the training of a task. Needs Flax.
"""

from dataclasses import dataclass
from functools import cached_property

import jax
from flax import nnx

from gradhpo.core.types import Hyper, Params
from gradhpo.meta.networks import Block, Classifier, Head, Module, Shape, pixels
from gradhpo.utils.settings import check_count

__all__ = ["WarpGrad"]


@dataclass(frozen=True)
class WarpGrad(Classifier):
    """A meta-model, see `gradhpo.meta.networks.MetaModel`.

    Attributes:
        shape: Of an image: height, width, channels.
        ways: Classes of a task.
        channels: Of every block and warp layer.
        count: Blocks of the task's network.
        layers: Warp layers after each, here convolution, batch norm and ReLU. Lee et al. (2022)
            have two; in Flennerhag et al. it is one, batch norm and convolution.

    >>> model = WarpGrad((28, 28, 1), ways=5, channels=8)
    >>> task, warp = model.init(jax.random.key(0))
    >>> [sum(x.size for x in jax.tree.leaves(tree)) for tree in (task, warp)]
    [1637, 3552]
    """

    shape: Shape
    ways: int
    channels: int = 32
    count: int = 3
    layers: int = 2

    def __post_init__(self) -> None:
        for name in ("ways", "channels", "count", "layers"):
            check_count(name, getattr(self, name))

    @cached_property
    def _task(self) -> Module:
        return Module(lambda rngs: Head(self.shape, self.channels, self.count, self.ways, rngs))

    @cached_property
    def _warp(self) -> Module:
        task = nnx.eval_shape(lambda: self._task.make(nnx.Rngs(0)))
        shapes = [block.shape for block in task.blocks]
        return Module(lambda rngs: _Warp(shapes, self.layers, rngs))

    def init(self, key: jax.Array) -> tuple[Params, Hyper]:
        for_task, for_warp = jax.random.split(key)
        return self._task.init(for_task), self._warp.init(for_warp)

    def logits(self, params: Params, hyperparams: Hyper, images: jax.Array) -> jax.Array:
        task, warp = self._task.with_weights(params), self._warp.with_weights(hyperparams)
        x = pixels(images)
        for block, layers in zip(task.blocks, warp.layers, strict=True):
            x = layers(block(x))
        return task.linear(x.reshape(len(x), -1))


class _Warp(nnx.Module):
    def __init__(self, shapes: list[Shape], layers: int, rngs: nnx.Rngs):
        self.layers = nnx.data(
            [
                nnx.Sequential(
                    *(Block(shape, shape[-1], pool=False, rngs=rngs) for _ in range(layers))
                )
                for shape in shapes
            ]
        )
