"""Meta-SGD: a learning rate for every weight, and where to start, learned over tasks.

Li et al. (2017), "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning":

    w <- w - alpha * grad L(w),    w_0 and alpha hyperparameters, alpha shaped like w

Entries of alpha may become negative: it is the direction of the step that is learned, not only its
length. No validation loss sees them, and no second derivative is needed for one step. Needs Flax.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from gradhpo.core.types import Hyper, Params
from gradhpo.meta.networks import Classifier, ConvNet
from gradhpo.transforms import scale_by_tree
from gradhpo.utils.settings import check_rate

__all__ = ["MetaSgd"]


@dataclass(frozen=True)
class MetaSgd(Classifier):
    """A meta-model, see `gradhpo.meta.networks.MetaModel`, with an optimizer of its own.

        dynamics = from_optax(model.train_loss, model.optimizer)
        problem = BilevelProblem(dynamics, model.val_loss, begin=learned(sample, model.initial))

    The hyperparameters are `{"rates": ..., "initial": ...}`; with `begin=carried(sample)` the
    initial weights are Reptile's and "initial" is left out.

    Attributes:
        net: The network.
        rate: What all rates start from. Li et al. draw them from [0.005, 0.1].
        start: Whether the initial weights are hyperparameters.

    >>> model = MetaSgd(ConvNet((8, 8, 1), ways=3, channels=2, count=2), rate=0.1)
    >>> params, lam = model.init(jax.random.key(0))
    >>> print(lam["rates"]["linear"]["bias"], model.initial(lam)["linear"]["bias"])
    [0.1 0.1 0.1] [0. 0. 0.]
    """

    net: ConvNet
    rate: float = 0.01
    start: bool = True

    def __post_init__(self) -> None:
        check_rate("rate", self.rate)

    def init(self, key: jax.Array) -> tuple[Params, Hyper]:
        params = self.net.init(key)
        rates = jax.tree.map(lambda w: jnp.full_like(w, self.rate), params)
        return params, {"rates": rates} | ({"initial": params} if self.start else {})

    def logits(self, params: Params, hyperparams: Hyper, images: jax.Array) -> jax.Array:
        del hyperparams
        return self.net(params, images)

    def optimizer(self, hyperparams: Hyper) -> optax.GradientTransformation:
        """`w - rates * gradient`."""
        return optax.chain(scale_by_tree(hyperparams["rates"]), optax.scale(-1.0))

    def initial(self, hyperparams: Hyper) -> Params:
        """The initial weights among the hyperparameters, for `gradhpo.meta.learned`."""
        return hyperparams["initial"]
