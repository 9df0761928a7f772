"""A convolutional network whose training examples are weighted by MetaWeightNet."""

from dataclasses import dataclass

import jax

from gradhpo.core.types import Hyper, Params
from gradhpo.meta.networks import Classifier, ConvNet, cross_entropy
from gradhpo.meta.weights import MetaWeightNet

__all__ = ["Weighted"]


@dataclass(frozen=True)
class Weighted(Classifier):
    """A meta-model, see `gradhpo.meta.networks.MetaModel`: w is the network, lam the weight net.

    Attributes:
        net: The network.
        weight: Of an example by its loss. Lee et al. (2022) bound it below by 0.1.

    >>> model = Weighted(ConvNet((8, 8, 1), ways=3, channels=2, count=2))
    >>> _, lam = model.init(jax.random.key(0))
    >>> sum(x.size for x in jax.tree.leaves(lam))
    601
    """

    net: ConvNet
    weight: MetaWeightNet = MetaWeightNet(lowest=0.1)

    def init(self, key: jax.Array) -> tuple[Params, Hyper]:
        for_net, for_weight = jax.random.split(key)
        return self.net.init(for_net), self.weight.init(for_weight)

    def logits(self, params: Params, hyperparams: Hyper, images: jax.Array) -> jax.Array:
        del hyperparams
        return self.net(params, images)

    def train_loss(self, params: Params, hyperparams: Hyper, batch: tuple) -> jax.Array:
        images, labels = batch
        losses = cross_entropy(self.logits(params, hyperparams, images), labels)
        return self.weight.loss(hyperparams, losses)
