"""Meta-training and meta-testing of one model on tasks of many shots."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradhpo.core.problem import BilevelProblem
from gradhpo.core.source import Pool, gather
from gradhpo.core.state import BilevelState
from gradhpo.core.task import Task
from gradhpo.estimators.over_tasks import over_tasks
from gradhpo.meta.episodes import adapt, carried
from gradhpo.meta.images import ManyShot
from gradhpo.meta.networks import MetaModel, cross_entropy
from gradhpo.studies.shared.meta_learning import (
    FIT_PERIOD,
    Schedule,
    decayed_sgd,
    meta_method,
    problem_of,
    tuned,
    updates,
)

__all__ = ["Learner", "Run", "Score"]


class Run(NamedTuple):
    """How a method is meta-trained."""

    episodes: int
    meta_batch: int
    outer_rate: float
    points: int  # of the curve, a divisor of `episodes`


class Score(NamedTuple):
    """On query sets, an entry per task."""

    loss: np.ndarray
    accuracy: np.ndarray


class Learner:
    """A model and tasks for it, with the programs that train and test.

    Args:
        model: What is trained.
        images: uint8 (n, height, width, channels), the set that all tasks are made of.
        sample: Tasks to train on; its `pad` and `noise` hold for all others.
        schedule: Of the inner-optimizations.
    """

    def __init__(
        self, model: MetaModel, images: np.ndarray, sample: ManyShot, schedule: Schedule
    ) -> None:
        self.model, self.sample, self.schedule = model, sample, schedule
        self.pool = Pool(images)
        self.problem = problem_of(model, sample.pad, schedule.rate, carried(sample))

    def train(
        self,
        method: str,
        seed: int,
        run: Run,
        watch: Callable[[BilevelState], object],
    ) -> BilevelState:
        """Meta-train from scratch; `watch` sees the state at every point of the curve.

        The tasks depend on the seed alone, so that all methods learn the same ones.
        """
        steps, tasks = self.schedule.steps, run.meta_batch
        estimator = over_tasks(meta_method(method, self.schedule), tasks)
        outer = decayed_sgd(run.outer_rate, run.episodes * updates(estimator, steps))
        for_start, for_tasks = jax.random.split(jax.random.key(seed))
        keys = iter(jax.random.split(for_tasks, run.episodes * tasks))
        task = Task(self.problem, *self.model.init(for_start), train=self.pool, val=self.pool)
        state = None
        for _ in range(run.points):
            state = tuned(
                task,
                estimator,
                outer,
                episodes=run.episodes // run.points,
                T=steps,
                state=state,
                get_task=partial(next, keys),
                estimation_period=FIT_PERIOD,
            )
            watch(state)
        assert state is not None
        return state

    def test(self, state: BilevelState, sample: ManyShot, tasks: int) -> Score:
        """Learn new tasks from phi, with the hyperparameters as they are; see how well.

        Args:
            sample: Where they come from; the same at every call.
            tasks: How many.
        """
        keys = jax.random.split(jax.random.key(2022), tasks)
        phi = jax.tree.map(lambda x: x[0], state.params)  # the same for all of the meta-batch
        got = _tested(
            self.problem, self.model, sample, phi, state.hyperparams, self.pool.data, keys
        )
        return Score(*(np.asarray(x, np.float64) for x in got))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _tested(
    problem: BilevelProblem,
    model: MetaModel,
    sample: ManyShot,
    phi: Any,
    lam: Any,
    images: jax.Array,
    keys: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    problem = problem._replace(begin=carried(sample))

    def one(key):
        inner, window = adapt(problem, phi, lam, key, data=images)
        # The first so many validation batches are one pass through the query set.
        passes = sample.ways * sample.queries // sample.batch_size
        query = jax.tree.map(lambda x: x[: min(passes, sample.steps)], window.val)

        def score(batch):
            inputs, labels = gather(images, batch)
            scores = model.logits(inner.params, lam, inputs)
            right = scores.argmax(-1) == labels
            return jnp.mean(cross_entropy(scores, labels)), jnp.mean(right)

        return jax.tree.map(jnp.mean, lax.map(score, query))

    # On CPU one task after the other is as quick as all at once; a GPU takes several.
    return lax.map(one, keys, batch_size=None if jax.default_backend() == "cpu" else 10)
