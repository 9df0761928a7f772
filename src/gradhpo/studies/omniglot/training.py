"""Meta-training by one method, and the test of what it has learned."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gradhpo.core.delay import update_last
from gradhpo.core.dynamics import from_optax
from gradhpo.core.estimator import Estimator
from gradhpo.core.loop import run_episodes
from gradhpo.core.problem import BilevelProblem, Window
from gradhpo.core.source import gather
from gradhpo.core.state import BilevelState
from gradhpo.core.step import init_state
from gradhpo.estimators.first_order import first_order
from gradhpo.estimators.greedy import greedy
from gradhpo.estimators.implicit import implicit
from gradhpo.estimators.one_step import one_step
from gradhpo.estimators.reverse import reverse
from gradhpo.meta import adapt, carried
from gradhpo.meta.images import FewShot
from gradhpo.meta.networks import cross_entropy
from gradhpo.solvers import neumann
from gradhpo.studies.omniglot.model import Alternating

__all__ = ["METHODS", "STEPS", "Learner", "Score", "draw"]

STEPS, RATE, MOMENTUM = 5, 0.1, 0.9
OUTER = optax.adam(1e-3)

METHODS: dict[str, Estimator] = {
    "fo": update_last(first_order(), 1, STEPS),
    "one_step": update_last(one_step(), 1, STEPS),
    "implicit_neumann": implicit(STEPS, neumann(2, step_size=RATE)),
    "greedy": greedy(0.9, STEPS),
    "reverse": reverse(STEPS),
}


class Score(NamedTuple):
    """On the query sets of test tasks, an entry per task."""

    loss: np.ndarray
    accuracy: np.ndarray


def draw(sample: FewShot, seed: int, count: int) -> Window:
    """So many tasks: the arrays of rows and labels are (count, STEPS, images)."""
    keys = jax.random.split(jax.random.key(seed), count)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(sample))(keys))


def _as_drawn(task: Any) -> Window:
    return task


def _entry(tree: Any, i: Any) -> Any:
    return jax.tree.map(lambda x: x[i], tree)


class Learner:
    """The network for so many ways, with the programs that train and test it.

    A draw is a task itself, so that programs depend neither on the method's data nor on the seed.

    Args:
        images: uint8 (n, side, side, 1), the set that all tasks are made of.
        ways: Classes of a task.
    """

    def __init__(self, images: np.ndarray, ways: int):
        self.model = Alternating(images.shape[1], ways)
        self.images = jnp.asarray(images)
        dynamics = from_optax(self.model.train_loss, optax.sgd(RATE, momentum=MOMENTUM))
        self.problem = BilevelProblem(dynamics, self.model.val_loss, begin=carried(_as_drawn))

    def start(self, seed: int) -> tuple[Any, Any]:
        """Random weights of a task and random shared layers."""
        return self.model.init(jax.random.key(seed))

    def train(
        self, name: str, seed: int, tasks: Window, points: int, carry: float = 0.0
    ) -> list[BilevelState]:
        """An update for each of the tasks, from scratch: the states at so many points on the way.

        Args:
            name: Of the method.
            seed: Of the weights and shared layers to start from.
            points: The last is the end; a divisor of the number of tasks.
            carry: Where the next task starts: 0 where this one did, 1 where it ended.
        """
        states = [init_state(self.problem, METHODS[name], OUTER, *self.start(seed))]
        for part in np.split(np.arange(len(jax.tree.leaves(tasks)[0])), points):
            some = _entry(tasks, part)
            states.append(_advance(self.problem, name, carry, states[-1], self.images, some))
        return states[1:]

    def test(self, params: Any, lam: Any, tasks: Window) -> Score:
        """Learn new tasks from `params` with the shared layers as they are; see how well."""
        got = _tested(self.problem, self.model, params, lam, self.images, tasks)
        return Score(*(np.asarray(x, np.float64) for x in got))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _advance(
    problem: BilevelProblem,
    name: str,
    carry: float,
    state: BilevelState,
    images: jax.Array,
    tasks: Window,
) -> BilevelState:
    return run_episodes(
        METHODS[name],
        OUTER,
        problem,
        state,
        None,
        draws=tasks,
        lr_reptile=carry,
        resident=Window(images, images),
    )[0]


@partial(jax.jit, static_argnums=(0, 1))
def _tested(
    problem: BilevelProblem,
    model: Alternating,
    params: Any,
    lam: Any,
    images: jax.Array,
    tasks: Window,
) -> tuple[jax.Array, jax.Array]:
    def one(task: Window) -> tuple[jax.Array, jax.Array]:
        inner, _ = adapt(problem, params, lam, task, data=images)
        inputs, labels = gather(images, _entry(task.val, -1))
        scores = model.logits(inner.params, lam, inputs)
        right = scores.argmax(-1) == labels
        return jnp.mean(cross_entropy(scores, labels)), jnp.mean(right)

    return lax.map(one, tasks)
