"""The set-up of the studies after Maclaurin et al. (2015): data, networks, batches, the problem.

Every one of them trains a network of tanh units on rows of MNIST with `reversible_sgd` and follows
the exact hypergradient of the loss after that run.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradhpo import datasets
from gradhpo.core.dynamics import InnerState
from gradhpo.core.estimator import roll
from gradhpo.core.loop import run_episodes
from gradhpo.core.problem import BilevelProblem, Start, Window, check_window
from gradhpo.core.start import Origin, begin_episode
from gradhpo.core.state import BilevelState
from gradhpo.core.step import init_state
from gradhpo.core.types import DataBatch
from gradhpo.estimators.reversible import reversible
from gradhpo.report.config import DataStudyConfig

__all__ = [
    "CLASSES",
    "ReversibleConfig",
    "Rows",
    "by_part",
    "cost",
    "cross_entropy",
    "draw",
    "draw_weights",
    "learn",
    "logits",
    "names",
    "note_of",
    "on_all",
    "on_rows",
    "rows",
    "started",
    "trained",
]

CLASSES = 10


@dataclass(frozen=True)
class ReversibleConfig(DataStudyConfig):
    """Settings of these studies.

    Raises:
        ValueError: a number is out of range.
    """

    dataset: Literal["mnist", "fashion_mnist"] = "mnist"
    """Data set, found or downloaded."""
    examples: int = 10_000
    """Training, validation and test examples each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(examples=1)


class Rows(NamedTuple):
    """Examples in file order, images flat."""

    train: DataBatch
    val: DataBatch
    test: DataBatch


def rows(data: datasets.Dataset, *sizes: int, centred: bool = True) -> Rows:
    """The first rows of the training set for training, the next for validation and for tests.

    `centred`: the mean image of the whole training set is subtracted.
    """
    images = data.train.inputs.reshape(len(data.train.inputs), -1)
    mean = images.mean(axis=0) if centred else np.zeros(images.shape[1], np.float32)
    ends = np.cumsum((0, *sizes))
    if ends[-1] > len(images):
        raise ValueError(
            f"{data.name} has {len(images)} training examples, {ends[-1]} are asked for."
        )
    parts = [
        DataBatch(jnp.asarray(images[a:b] - mean), jnp.asarray(data.train.targets[a:b]))
        for a, b in itertools.pairwise(ends)
    ]
    return Rows(*parts)


def names(leaves: int) -> list[str]:
    """Of the leaves of a network, in order: every layer's weights and biases.

    >>> names(4)
    ['weights 1', 'biases 1', 'weights 2', 'biases 2']
    """
    return [f"{'biases' if i % 2 else 'weights'} {1 + i // 2}" for i in range(leaves)]


def draw_weights(key: jax.Array, layers: tuple[int, ...], log_scale: Any) -> list[jax.Array]:
    """Normal weights and biases; `log_scale` is one number, or one of each leaf."""
    shapes = [s for a, b in itertools.pairwise(layers) for s in ((a, b), (b,))]
    keys, scales = jax.random.split(key, len(shapes)), jnp.full(len(shapes), log_scale)
    return [
        jnp.exp(scale) * jax.random.normal(key, shape)
        for scale, key, shape in zip(scales, keys, shapes, strict=True)
    ]


def draw(
    key: jax.Array,
    layers: tuple[int, ...],
    log_scale: Any,
    shape: tuple[int, int],
    examples: int,
) -> tuple[list[jax.Array], jax.Array]:
    """Initial weights, and row numbers (steps, batch), drawn with replacement."""
    for_weights, for_batches = jax.random.split(key)
    weights = draw_weights(for_weights, layers, log_scale)
    return weights, jax.random.randint(for_batches, shape, 0, examples)


def logits(params: list[jax.Array], x: jax.Array) -> jax.Array:
    """A network of tanh units; without a hidden layer, logistic regression."""
    pairs = list(zip(params[::2], params[1::2], strict=True))
    for weights, biases in pairs[:-1]:
        x = jnp.tanh(x @ weights + biases)
    weights, biases = pairs[-1]
    return x @ weights + biases


def cross_entropy(params: list[jax.Array], data: Any) -> jax.Array:
    """Mean over the examples."""
    x, y = data
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


# -- the problem: training runs on rows, each from a start of its own --------------------------


def on_rows(part: DataBatch) -> Callable[[Any, Any, Any], jax.Array]:
    """A training loss whose batches are row numbers of a part."""

    def train_loss(params, lam, index):
        del lam
        return cross_entropy(params, (part.inputs[index], part.targets[index]))

    return train_loss


def on_all(part: DataBatch) -> Callable[[Any, Any, Any], jax.Array]:
    """An outer loss on all examples of a part, whatever the batch."""

    def outer_loss(params, lam, batch):
        del lam, batch
        return cross_entropy(params, part)

    return outer_loss


def started(weights: Any, batches: jax.Array) -> Start:
    """A training run from these weights on these batches; the outer loss needs none."""
    return Start(weights, Window(batches, jnp.zeros(len(batches))))


def learn(
    problem: BilevelProblem,
    lam: Any,
    keys: jax.Array,
    outer: Any,
    observe: Callable[[BilevelState], Any],
    least_momentum: float | None = None,
) -> tuple[BilevelState, Any]:
    """Follow the exact hypergradient of the training runs that begin from these keys.

    Returns:
        `(state, observations)` of `run_episodes`; a hypergradient that is flagged changes nothing.
    """
    assert problem.begin is not None
    first = problem.begin(None, lam, keys[0])
    assert first.window is not None
    method = reversible(check_window(first.window), least_momentum=least_momentum)
    state = init_state(problem, method, outer, first.params, lam, first.window)
    return run_episodes(method, outer, problem, state, None, draws=keys, observe=observe)


def trained(problem: BilevelProblem, lam: Any, key: jax.Array) -> Any:
    """The weights after such a run in floating point."""
    inner, window = begin_episode(problem, Origin(InnerState(None, ()), key), lam)
    assert window is not None
    return roll(problem.dynamics, inner, lam, window.train).params


# -- what is told of it ----------------------------------------------------------------------


def by_part(losses: Any) -> dict[str, Any]:
    """Losses (seeds, parts) by the names that a result knows them by.

    >>> by_part([[1.0, 2.0, 3.0]])["val_loss"]
    array([2.])
    """
    names = ("train_loss", "val_loss", "test_loss")
    return dict(zip(names, np.transpose(losses), strict=True))


def cost(runs: int, steps: int) -> tuple[int, int]:
    """Gradients and second-order products of `runs` hypergradients by reversal."""
    return runs * (3 * steps + 1), runs * steps


def note_of(discarded: Any) -> str:
    """The end of a line of progress.

    >>> note_of(0), note_of(2)
    ('', '; 2 hypergradients discarded')
    """
    return f"; {int(discarded)} hypergradients discarded" if discarded else ""
