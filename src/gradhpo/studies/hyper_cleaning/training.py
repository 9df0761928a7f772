"""One run: updates of the weights of the examples, and what is seen of them on the way."""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gradhpo.core.episode import in_windows
from gradhpo.core.loop import run_episodes
from gradhpo.core.problem import Window
from gradhpo.core.state import BilevelState
from gradhpo.core.step import OuterOptimizer, bilevel_step, init_state
from gradhpo.studies.hyper_cleaning.model import Examples, estimator, problem, score
from gradhpo.transforms import on_simplex, proximal_adam
from gradhpo.tuning.searches import search

__all__ = ["FIT_PERIOD", "Data", "Momentum", "Run", "Setting", "train", "train_by_search"]

RATE = 0.1  # of Adam, on the logits of the weights
BUDGET_RATE = 0.05  # on the weights themselves
FIT_PERIOD = 50  # updates between two fits of HyperDistill's theta

Momentum = Literal["carried", "fresh"]


class Setting(NamedTuple):
    """What the program of a run depends on, beside the shapes of the data."""

    method: str
    momentum: Momentum
    steps: int
    gamma: float
    budget: float | None = None  # the mean of all weights; None: each is the sigmoid of a number

    def start(self, n: int) -> jax.Array:
        """Hyperparameters of n examples: all weigh the same, 1/2 or the budget."""
        return jnp.full(n, 0.0 if self.budget is None else self.budget)

    def weights(self, lam: jax.Array) -> jax.Array:
        """The weights of the examples."""
        return jax.nn.sigmoid(lam) if self.budget is None else lam

    def drawn(self, weights: np.ndarray) -> jax.Array:
        """Hyperparameters of weights drawn from [0, 1]; with a budget their mean is made that."""
        if self.budget is None:
            return jax.scipy.special.logit(jnp.clip(weights, 1e-6, 1 - 1e-6))
        return jnp.asarray(weights * (self.budget / np.mean(weights)))

    def outer(self, n: int) -> OuterOptimizer:
        """The update of the hyperparameters; with a budget they stay on a simplex."""
        if self.budget is None:
            return optax.adam(RATE)
        return proximal_adam(BUDGET_RATE, on_simplex(self.budget * n))


class Data(NamedTuple):
    """Examples of a trial; the training labels are noisy."""

    train: Examples
    val: Examples
    test: Examples


class Run(NamedTuple):
    """A run as seen at some updates, evenly spaced, the last of them the last of all."""

    test: np.ndarray  # (points, 2): mean cross-entropy, accuracy
    val: np.ndarray  # the same
    weights: np.ndarray  # of the training examples, at the end

    @property
    def last(self) -> tuple[float, float, float, float]:
        """Losses and accuracies at the end, the mean over the last eighth of the points: training
        at this rate has spikes, and a run may end in one. `(test, test, val, val)`."""
        n = max(1, len(self.test) // 8)
        return tuple(np.concatenate([self.test, self.val], axis=1)[-n:].mean(0).tolist())

    @property
    def stopped(self) -> float:
        """Test accuracy where the validation accuracy is highest: early stopping."""
        return float(self.test[np.argmax(self.val[:, 1]), 1])


def train(
    setting: Setting,
    params: Any,
    data: Data,
    updates: int,
    points: int,
    lam: jax.Array | None = None,
) -> Run:
    """Train for `updates` times T steps, the weights of the network carried over throughout.

    `lam` is where the hyperparameters start, by default at equal weights.
    """
    method = estimator(setting.method, setting.steps, setting.gamma)
    n = len(data.train.labels)
    posed, outer = problem(data.train, data.val, setting.weights), setting.outer(n)
    lam = setting.start(n) if lam is None else lam
    state = init_state(posed, method, outer, params, lam, _window(method.unroll_steps))
    ends = np.linspace(0, updates, min(points, updates) + 1).round().astype(int)
    test, val = [], []
    for each in np.diff(ends):
        state = _updates(setting, int(each), state, data.train, data.val)
        test.append(score(state.params, data.test))
        val.append(score(state.params, data.val))
    return Run(np.array(test), np.array(val), np.asarray(setting.weights(state.hyperparams)))


def train_by_search(
    setting: Setting, params: Any, data: Data, updates: int, points: int, trials: int, seed: int
) -> Run:
    """The run of lowest validation loss among `trials` trainings with weights drawn and held, the
    first of them with equal weights."""
    names, runs = [f"{i}" for i in range(len(data.train.labels))], []

    def suggest(trial: Any) -> dict[str, float]:
        return {name: trial.suggest_float(name, 0.0, 1.0) for name in names}

    def judge(drawn: dict[str, float]) -> float:
        lam = setting.drawn(np.array([drawn[name] for name in names], np.float32))
        held = setting._replace(method="fixed")
        runs.append(train(held, params, data, updates, points, lam))
        return runs[-1].last[2]

    first = dict.fromkeys(names, 0.5)
    return runs[int(np.argmin(search(setting.method, suggest, judge, trials, seed, first).values))]


@partial(jax.jit, static_argnums=(0, 1))
def _updates(
    setting: Setting, updates: int, state: BilevelState, train: Examples, val: Examples
) -> BilevelState:
    """Some updates. The data are arguments, so that one program serves all seeds and data sets."""
    method = estimator(setting.method, setting.steps, setting.gamma)
    posed, outer = problem(train, val, setting.weights), setting.outer(len(train.labels))
    if setting.momentum == "fresh":
        windows = _window(updates, setting.steps)
        return run_episodes(method, outer, posed, state, windows, estimation_period=FIT_PERIOD)[0]
    step = bilevel_step(method, outer)
    windows = in_windows(_window(updates * setting.steps), method.unroll_steps)
    return lax.scan(lambda state, x: (step(posed, state, x), None), state, windows)[0]


def _window(*shape: int) -> Window:
    """Batches that the losses ignore."""
    return Window(np.zeros(shape, np.float32), np.zeros(shape, np.float32))
