"""What the studies on images share: data and its parts, tuning runs, their costs, scores."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax

from gradhpo import datasets
from gradhpo.algorithms.registry import METHODS
from gradhpo.core.state import BilevelState
from gradhpo.core.task import Task
from gradhpo.core.types import DataBatch
from gradhpo.report.config import DataStudyConfig

__all__ = ["ImageConfig", "Parts", "cost", "parts", "scorer", "tuned"]

FIT_PERIOD = 50  # episodes between two fits of HyperDistill's theta


@dataclass(frozen=True)
class ImageConfig(DataStudyConfig):
    """Settings of a study on images of ten classes, trained with the labels of few of them.

    Raises:
        ValueError: a number is out of range.
    """

    baselines = ("fixed",)

    dataset: Literal["digits", "mnist", "fashion_mnist"] = "digits"
    """Data set; digits come with scikit-learn, the others are found or downloaded."""
    train_size: int = 400
    """Training examples."""
    val_size: int = 400
    """Validation examples, which only the hyperparameters see; from the training data."""
    label_noise: float = 0.0
    """Part of the training labels replaced by random classes, which may be the right ones."""
    episodes: int = 100
    """Episodes of the tuning run."""
    steps: int = 20
    """Training steps of an episode."""
    unroll: int = 5
    """Steps the greedy method looks ahead, a divisor of `steps`."""
    gamma: float = 0.9
    """Discount of the greedy method and of HyperDistill."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(train_size=1, val_size=1, episodes=1, steps=1, unroll=1)


class Parts(NamedTuple):
    """Disjoint examples; `wrong` marks the training labels that noise has changed."""

    train: DataBatch
    val: DataBatch
    test: DataBatch
    wrong: np.ndarray


def parts(data: datasets.Dataset, config: ImageConfig, seed: int) -> Parts:
    """Training and validation examples from the training data, test examples from elsewhere.

    The test examples are the data set's own, or, where it has none, all that is left.

    Raises:
        ValueError: the data set has fewer examples than are asked for.

    >>> split = parts(datasets.digits(), ImageConfig(label_noise=0.5), seed=0)
    >>> [len(part.targets) for part in split[:3]], int(split.wrong.sum())
    ([400, 400, 997], 176)
    """
    sizes = [config.train_size, config.val_size]
    left = len(data.train.targets) - sum(sizes)
    if left < (data.test is None):
        raise ValueError(
            f"{data.name} has {len(data.train.targets)} examples to choose from: train_size "
            f"{sizes[0]} and val_size {sizes[1]} are too many"
            + (", as the rest is what is tested on." if data.test is None else ".")
        )
    if data.test is None:
        train, val, test = datasets.split(data.train, [*sizes, left], seed)
    else:
        (train, val), test = datasets.split(data.train, sizes, seed), data.test
    noisy, _ = datasets.corrupt_labels(seed, train.targets, config.label_noise, data.num_classes)
    return Parts(DataBatch(train.inputs, noisy), val, test, noisy != train.targets)


def tuned(
    task: Task,
    name: str,
    config: ImageConfig,
    outer: optax.GradientTransformation,
    callback: Callable[[int, BilevelState], object],
    lr_reptile: float = 1.0,
) -> BilevelState:
    """A tuning run by a registered method, with the settings of the study that concern it.

    Args:
        task: Its dynamics are those of an Optax optimizer.
        name: Of the method.
        outer: Moves the hyperparameters.
        callback, lr_reptile: As of `run` of the classes.
    """
    dynamics = task.problem.dynamics
    assert dynamics.parts is not None and task.train is not None and task.val is not None
    inner = dynamics.parts.make_optimizer
    optimizer = make_optimizer(name, config, inner_optimizer=inner, outer_optimizer=outer)
    return optimizer.run(
        optimizer.init(task.params, task.hyperparams),
        M=config.episodes,
        get_train_batch=task.train,
        get_val_batch=task.val,
        train_loss_fn=dynamics.parts.train_loss,
        val_loss_fn=task.problem.outer_loss,
        callback=callback,
        lr_reptile=lr_reptile,
    )


def make_optimizer(name: str, config: ImageConfig, **common: Any) -> Any:
    """A registered method by name, with the settings of the study that concern it."""
    own: dict[str, dict[str, Any]] = {
        "greedy": {"unroll_steps": config.unroll, "gamma": config.gamma},
        "hyperdistill": {"gamma": config.gamma, "estimation_period": FIT_PERIOD},
    }
    return METHODS[name].make(**{"T": config.steps, **own.get(name, {}), **common})


def cost(name: str, config: ImageConfig, size: int = 1) -> tuple[float, float]:
    """Gradient evaluations and second-order products of one seed's run of `size` numbers.

    >>> cost("fixed", ImageConfig()), cost("one_step", ImageConfig())
    ((2000, 0), Cost(gradients=4000, products=2000))
    """
    if name not in METHODS:  # the baseline: training alone
        return config.episodes * config.steps, 0
    estimator = make_optimizer(name, config, inner_optimizer=optax.identity()).estimator()
    return estimator.cost(config.steps, size, episodes=config.episodes, period=FIT_PERIOD)


def scorer(logits: Callable[[Any, Any], jax.Array]) -> Callable[[Any, DataBatch], np.ndarray]:
    """`(params, data) -> [mean cross-entropy, accuracy]`, compiled."""

    @jax.jit
    def score(params, data):
        scores = logits(params, data.inputs)
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, data.targets)
        return losses.mean(), (scores.argmax(-1) == data.targets).mean()

    return lambda params, data: np.array(score(params, data), np.float64)
