"""MetaWeightNet: the weight of a training example, learned as a function of its loss.

Shu et al. (2019), "Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting". With the
losses l_i of a batch and V a network 1 - 200 (ReLU) - 1 with a sigmoid at its end,

    L_train(w, lam) = mean_i V(l_i; lam) l_i,    lam the weights of V

where the input of V is a constant with respect to w. Needs Flax.
"""

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from gradhpo.core.types import Hyper
from gradhpo.utils.settings import check_count, check_number

__all__ = ["MetaWeightNet"]


@dataclass(frozen=True)
class MetaWeightNet:
    """V as a pair of functions: `init(key) -> lam` and `net(lam, losses) -> weights`.

    The weights of V are hyperparameters, which reach the training loss alone: FO has no
    hypergradient for them.

    Attributes:
        hidden: Units of the hidden layer.
        lowest: Least weight; the output is `lowest + (1 - lowest) sigmoid(...)`. Lee et al. (2022)
            take 0.1, Shu et al. 0.

    That the input of V is a constant makes `jax.grad` of the training loss the step that the
    authors take, V(l) dl/dw. It also hides from A = dPhi/dw how V moves with the loss of its
    example: all methods here differentiate without it, as the authors' programs do, and a finite
    difference of whole training runs does not.

    >>> net = MetaWeightNet()
    >>> lam = net.init(jax.random.key(0))
    >>> sum(x.size for x in jax.tree.leaves(lam)), net(lam, jnp.ones(5)).shape
    (601, (5,))
    """

    hidden: int = 200
    lowest: float = 0.0

    def __post_init__(self) -> None:
        check_count("hidden", self.hidden)
        if not 0 <= check_number("lowest", self.lowest) < 1:
            raise ValueError(f"lowest must be in [0, 1), got {self.lowest}.")

    def init(self, key: jax.Array) -> Hyper:
        """The weights of V as nested dictionaries, by PyTorch's default initialisation, which the
        authors' program has: uniform within 1 / sqrt(inputs), biases too. With biases of zero every
        unit would bend at a loss of 0, and V begin as a function of one slope."""
        return nnx.to_pure_dict(nnx.split(_Net(self.hidden, nnx.Rngs(key)))[1])

    def __call__(self, lam: Hyper, losses: jax.Array) -> jax.Array:
        """The weight of every loss, of the same shape as `losses`; not differentiated by them."""
        net = nnx.merge(self._graph, lam)
        weights = nnx.sigmoid(net(lax.stop_gradient(losses)[..., None])[..., 0])
        return self.lowest + (1 - self.lowest) * weights

    def loss(self, lam: Hyper, losses: jax.Array) -> jax.Array:
        """The training loss of a batch, `mean_i V(l_i) l_i`."""
        return jnp.mean(self(lam, losses) * losses)

    @cached_property
    def _graph(self) -> nnx.GraphDef:
        abstract = nnx.eval_shape(lambda: _Net(self.hidden, nnx.Rngs(0)))
        return nnx.split(abstract)[0]


class _Net(nnx.Module):
    def __init__(self, hidden: int, rngs: nnx.Rngs) -> None:
        self.hidden = _linear(1, hidden, rngs)
        self.out = _linear(hidden, 1, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(nnx.relu(self.hidden(x)))


def _linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    bound = 1 / np.sqrt(inputs)

    def uniform(key, shape, dtype=jnp.float32, out_sharding=None):
        del out_sharding
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nnx.Linear(inputs, outputs, kernel_init=uniform, bias_init=uniform, rngs=rngs)
