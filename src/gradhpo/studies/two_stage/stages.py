"""The two stages: learning the weights of examples, and training with them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gradhpo.core.delay import update_every
from gradhpo.core.estimator import Estimator, roll
from gradhpo.core.problem import Start, Window
from gradhpo.core.source import Picked, Pool
from gradhpo.core.task import Task
from gradhpo.core.types import DataBatch, Hyper
from gradhpo.estimators.distill import hyperdistill
from gradhpo.estimators.implicit import implicit
from gradhpo.estimators.one_step import one_step
from gradhpo.meta.augment import draw_moves
from gradhpo.meta.images import shuffled
from gradhpo.meta.networks import ConvNet
from gradhpo.meta.weighted import Weighted
from gradhpo.solvers import neumann
from gradhpo.studies.shared.meta_learning import MOMENTUM, problem_of, remark, tuned

__all__ = ["METHODS", "Halves", "Stages"]

RATE = 0.01  # of training, of the hyperparameters, and of the Neumann series
TERMS = PERIOD = 5  # of the Neumann series, and training steps per hypergradient of it

METHODS: dict[str, Callable[[float], Estimator]] = {
    "one_step": lambda gamma: one_step(),
    "implicit_neumann": lambda gamma: update_every(implicit(1, neumann(TERMS, RATE)), PERIOD),
    # theta is 1 in the paper too where the direct term vanishes
    "hyperdistill": lambda gamma: hyperdistill(gamma, theta=1.0),
}


class Halves(NamedTuple):
    """Rows of the images, and their labels as they are given, `Picked` each."""

    train: Picked
    val: Picked

    @property
    def whole(self) -> Picked:
        """Both, one after the other."""
        return jax.tree.map(lambda *parts: np.concatenate(parts), *self)


class Stages:
    """Programs for images of one shape.

    Args:
        net: The network that is trained in either stage.
        steps, batch_size: Of either stage.
    """

    def __init__(self, net: ConvNet, steps: int, batch_size: int) -> None:
        self.model, self.steps, self.batch_size = Weighted(net), steps, batch_size
        self.pad = net.shape[0] // 8
        self.problem = problem_of(self.model, self.pad, RATE, self._begin)
        self.outer = optax.sgd(RATE, momentum=MOMENTUM)
        self.estimators: dict[tuple[str, float], Estimator] = {}

    def first(
        self, method: str, gamma: float, seed: int, images: Any, halves: Halves
    ) -> tuple[Hyper, str]:
        """The weight net after one training of `steps` steps, as it begins for another method than
        those of `METHODS`; and a remark."""
        for_start, for_batches, _ = jax.random.split(jax.random.key(seed), 3)
        params, lam = self.model.init(for_start)
        if method not in METHODS:
            return lam, ""
        estimator = self.estimators.setdefault((method, gamma), METHODS[method](gamma))
        pool = Pool(images)
        state = tuned(
            Task(self.problem, params, lam, train=pool, val=pool),
            estimator,
            self.outer,
            episodes=1,
            T=self.steps,
            get_task=lambda: (for_batches, *halves),
        )
        return state.hyperparams, remark(state)

    def second(
        self, lam: Hyper, seed: int, images: Any, examples: Picked, test: DataBatch, points: int
    ) -> np.ndarray:
        """Train a fresh network on these examples; its test accuracy at so many points."""
        for_start, for_batches, _ = jax.random.split(jax.random.key(seed + 1_000_000), 3)
        params, _ = self.model.init(for_start)
        inner = self.problem.dynamics.init(params, lam)
        window = self._batches(for_batches, examples)
        each, seen = self.steps // points, []
        for i in range(points):
            part = jax.tree.map(lambda x: x[i * each : (i + 1) * each], window)  # noqa: B023
            inner = _advanced(self.problem.dynamics, inner, lam, part, data=jnp.asarray(images))
            seen.append(float(_accuracy(self.model, inner.params, lam, *test, self.batch_size)))
        return np.array(seen)

    def _batches(self, key: jax.Array, examples: Picked) -> Picked:
        """The batches of a training, with moves for their images."""
        for_rows, for_moves = jax.random.split(key)
        rows, labels = shuffled(for_rows, examples, self.steps, self.batch_size)
        shape = self.steps, self.batch_size
        return Picked(rows, (labels, draw_moves(for_moves, shape, self.pad) if self.pad else ()))

    def _begin(self, params: Any, lam: Any, draw: Any) -> Start:
        del lam
        key, train, val = draw
        for_train, for_val = jax.random.split(key)
        judged = shuffled(for_val, val, self.steps, self.batch_size)
        return Start(params, Window(self._batches(for_train, train), judged))


_advanced = partial(jax.jit, static_argnums=0)(roll)


@partial(jax.jit, static_argnums=(0, 5))
def _accuracy(model: Weighted, params: Any, lam: Any, images: Any, labels: Any, size: int) -> Any:
    """By batches of so many, in their order, as batch norm takes the statistics of each."""
    count = len(labels) // size

    def right(batch):
        return jnp.mean(model.logits(params, lam, batch[0]).argmax(-1) == batch[1])

    def parts(x):
        return x[: count * size].reshape(count, size, *x.shape[1:])

    return jnp.mean(lax.map(right, (parts(images), parts(labels))))
