"""The network of the study `omniglot`: layers of the task and shared ones by turns."""

from dataclasses import dataclass
from functools import cached_property

import jax
from flax import nnx

from gradhpo.core.types import Hyper, Params
from gradhpo.meta.networks import Block, Classifier, Module, linear, pixels

__all__ = ["STRIDES", "Alternating"]

STRIDES = (2, 2, 1, 1, 2, 1)  # 28 pixels become 14, 7, 7, 7, 4, 4


@dataclass(frozen=True)
class Alternating(Classifier):
    """A meta-model, see `gradhpo.meta.networks.MetaModel`: w are the layers 1, 3, 5 and a linear
    one, lam the layers 2, 4, 6.

    Attributes:
        side: Of the images, which are grey.
        ways: Classes of a task.
        channels: Of every layer.

    >>> model = Alternating(28, ways=5, channels=8)
    >>> w, lam = model.init(jax.random.key(0))
    >>> [sum(x.size for x in jax.tree.leaves(tree)) for tree in (w, lam)]
    [1917, 1776]
    """

    side: int
    ways: int
    channels: int = 32

    def _layers(self, rngs: nnx.Rngs) -> list[Block]:
        shape, made = (self.side, self.side, 1), []
        for stride in STRIDES:
            made.append(Block(shape, self.channels, pool=False, stride=stride, rngs=rngs))
            shape = made[-1].shape
        return made

    @cached_property
    def _task(self) -> Module:
        return Module(lambda rngs: _Task(self._layers(rngs), self.ways, rngs))

    @cached_property
    def _shared(self) -> Module:
        return Module(lambda rngs: _Shared(self._layers(rngs)))

    def init(self, key: jax.Array) -> tuple[Params, Hyper]:
        for_task, for_shared = jax.random.split(key)
        return self._task.init(for_task), self._shared.init(for_shared)

    def logits(self, params: Params, hyperparams: Hyper, images: jax.Array) -> jax.Array:
        task, shared = self._task.with_weights(params), self._shared.with_weights(hyperparams)
        x = pixels(images)
        for own, common in zip(task.layers, shared.layers, strict=True):
            x = common(own(x))
        return task.linear(x.reshape(len(x), -1))


class _Task(nnx.Module):
    def __init__(self, layers: list[Block], ways: int, rngs: nnx.Rngs):
        self.layers = nnx.data(layers[::2])
        height, width, channels = layers[-1].shape
        self.linear = linear(height * width * channels, ways, rngs)


class _Shared(nnx.Module):
    def __init__(self, layers: list[Block]):
        self.layers = nnx.data(layers[1::2])
