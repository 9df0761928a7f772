"""The two families of tasks of the study `cosine`, and meta-training on them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradhpo import datasets
from gradhpo.core.dynamics import from_optax
from gradhpo.core.problem import BilevelProblem, Window
from gradhpo.core.source import Pool, resident
from gradhpo.core.task import Task
from gradhpo.core.types import Hyper, Params
from gradhpo.driver.tune import tune
from gradhpo.estimators.distill import hyperdistill
from gradhpo.estimators.over_tasks import over_tasks
from gradhpo.meta import Sinusoids
from gradhpo.meta.images import ManyShot
from gradhpo.meta.warpgrad import WarpGrad
from gradhpo.studies.sinusoid import problem as sinusoid

__all__ = ["Family", "characters", "sinusoids"]

MOMENTUM = 0.9


@dataclass(frozen=True, eq=False)
class Family:
    """Tasks and how they are learned; known by its identity, so that it is static under jit."""

    name: str
    problem: BilevelProblem  # a draw is a task's window
    steps: int  # T
    rate: float  # of training
    batch: int  # tasks of a meta-batch
    outer_rate: float  # of Adam
    start: Callable[[int], tuple[Params, Hyper]]  # of a seed
    sample: Callable[[jax.Array], Window]
    pool: Pool | None = None  # where windows hold rows of it

    @cached_property
    def resident(self) -> Window:
        return resident(self.pool, self.pool)

    @cached_property
    def _method(self) -> Any:
        return over_tasks(hyperdistill(0.99, slots="ignored"), self.batch)

    def draw(self, key: jax.Array, number: int) -> Window:
        """So many tasks, on the leading axis of every leaf."""
        return jax.jit(jax.vmap(self.sample))(jax.random.split(key, number))

    def meta_train(self, seed: int, checkpoints: Sequence[int]) -> list[tuple[int, Params, Hyper]]:
        """`(m, weights, hyperparameters)` after so many meta-batches, learned with HyperDistill;
        the first checkpoint is 0."""
        params, lam = self.start(seed)
        drawn = self.draw(jax.random.key(seed), checkpoints[-1] * self.batch)
        leaves, structure = jax.tree.flatten(drawn)
        windows = (structure.unflatten(x) for x in zip(*leaves, strict=True))
        found = [(0, params, lam)]

        def watch(m, state):
            if m in checkpoints:
                phi = jax.tree.map(lambda w: jnp.mean(w, axis=0), state.params)
                found.append((m, phi, state.hyperparams))

        tune(
            Task(self.problem, params, lam, self.pool, self.pool),
            self._method,
            optax.adam(self.outer_rate),
            episodes=checkpoints[-1],
            T=self.steps,
            estimation_period=50,
            get_task=lambda: next(windows),
            callback=watch,
            progress=False,
            loop="scan",
        )
        return found


def sinusoids() -> Family:
    """Those of the study `sinusoid`: lam are the layers under the head."""
    return Family(
        "sinusoid",
        sinusoid.problem(MOMENTUM),
        steps=30,
        rate=sinusoid.RATE,
        batch=sinusoid.TASKS,
        outer_rate=1e-3,
        start=sinusoid.initial,
        sample=Sinusoids(30, sinusoid.SHOTS, sinusoid.QUERIES),
    )


def characters(channels: int, directory: Any = None) -> tuple[Family, dict[str, str]]:
    """Five characters of Omniglot, ten drawings of each to train on and ten that validate, in
    batches of 25: a WarpGrad network of three blocks, lam are the warp layers after each.

    Returns:
        `(family, files)`, with the digests of the files that were read.
    """
    steps, rate, data = 30, 0.01, datasets.load("omniglot", directory)
    drawings = data.train.inputs
    images = np.round(255 * drawings.reshape(-1, 28, 28, 1)).astype(np.uint8)
    labels = np.repeat(np.arange(len(drawings)), drawings.shape[1])
    model = WarpGrad((28, 28, 1), ways=5, channels=channels, layers=1)

    def train_loss(params, lam, batch):
        rows, (labels, _) = batch  # no moves are drawn
        return model.train_loss(params, lam, (rows, labels))

    dynamics = from_optax(train_loss, optax.sgd(rate, momentum=MOMENTUM))
    family = Family(
        "characters",
        BilevelProblem(dynamics, model.val_loss, begin=sinusoid.given),
        steps=steps,
        rate=rate,
        batch=4,
        outer_rate=1e-3,
        start=lambda seed: model.init(jax.random.key(seed)),
        sample=ManyShot(labels, ways=5, shots=10, queries=10, batch_size=25, steps=steps),
        pool=Pool(images),
    )
    return family, dict(data.files)
