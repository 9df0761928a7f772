"""ANIL: the features are shared by all tasks, the top of the network is learned by each.

Raghu et al. (2020), "Rapid Learning or Feature Reuse?". Of a network of convolutional blocks and a
linear layer,

    lam = the lowest blocks,    w = all above them

Both losses see lam, so the first-order methods have a hypergradient too. Needs Flax.
"""

from dataclasses import dataclass
from functools import cached_property

import jax
from flax import nnx

from gradhpo.core.types import Hyper, Params
from gradhpo.meta.networks import Classifier, Head, Module, Shape, blocks, pixels
from gradhpo.utils.settings import check_count

__all__ = ["Anil"]


@dataclass(frozen=True)
class Anil(Classifier):
    """A meta-model, see `gradhpo.meta.networks.MetaModel`.

    Attributes:
        shape: Of an image: height, width, channels.
        ways: Classes of a task.
        channels: Of every block.
        count: Blocks.
        shared: The lowest so many of them are hyperparameters. Lee et al. (2022) share the three
            bottom layers of four; with `shared=count` a task learns the linear layer alone, as in
            Raghu et al.

    >>> model = Anil((28, 28, 1), ways=5, channels=8)
    >>> head, body = model.init(jax.random.key(0))
    >>> [sum(x.size for x in jax.tree.leaves(tree)) for tree in (head, body)]
    [637, 1272]
    """

    shape: Shape
    ways: int
    channels: int = 32
    count: int = 4
    shared: int = 3

    def __post_init__(self) -> None:
        for name in ("ways", "channels", "count", "shared"):
            check_count(name, getattr(self, name))
        if self.shared > self.count:
            raise ValueError(f"shared={self.shared} is more than the {self.count} blocks.")

    @cached_property
    def _body(self) -> Module:
        made = lambda rngs: blocks(self.shape, self.channels, self.shared, rngs)  # noqa: E731
        return Module(lambda rngs: nnx.Sequential(*made(rngs)))

    @cached_property
    def _head(self) -> Module:
        body = nnx.eval_shape(lambda: blocks(self.shape, self.channels, self.shared, nnx.Rngs(0)))
        above = self.count - self.shared
        return Module(lambda rngs: Head(body[-1].shape, self.channels, above, self.ways, rngs))

    def init(self, key: jax.Array) -> tuple[Params, Hyper]:
        for_head, for_body = jax.random.split(key)
        return self._head.init(for_head), self._body.init(for_body)

    def logits(self, params: Params, hyperparams: Hyper, images: jax.Array) -> jax.Array:
        return self._head(params, self._body(hyperparams, pixels(images)))
