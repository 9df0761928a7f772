"""The methods of the study: scales by hypergradients, and searches for an elastic net."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradhpo.core.declared import bind, declared
from gradhpo.core.estimator import Cost, Estimator
from gradhpo.core.loop import run_episodes
from gradhpo.core.outer import followed_by
from gradhpo.core.problem import Window
from gradhpo.core.step import OuterOptimizer, init_state
from gradhpo.estimators.implicit import implicit
from gradhpo.estimators.reverse import reverse
from gradhpo.solvers import cg
from gradhpo.studies.feature_selection.problem import (
    RETRAINING,
    SPACE,
    Data,
    init,
    judged,
    problem,
    start,
    trained,
)
from gradhpo.transforms import l1, proximal_adam
from gradhpo.tuning.searches import STUDIED, as_gradients, search

__all__ = ["METHODS", "Budget", "Found", "by", "cost"]

METHODS = ("ridge", "implicit", "reverse", *STUDIED)
SOLVER = cg(max_iterations=20)
RATES = {"ridge": 0.1, "scale": 0.02}  # of Adam
BOX = (1e-5, 1.0)  # of both numbers of an elastic net


class Budget(NamedTuple):
    """How long the methods run."""

    steps: int  # T, from one update of the hyperparameters to the next
    updates: int
    price: float  # c, of the scales


class Found(NamedTuple):
    """What a method found on one seed."""

    used: np.ndarray  # (features,): whether a feature has any influence
    val: tuple[float, float]  # loss and accuracy after training from zero with what was found
    test: tuple[float, float]
    path: np.ndarray | None = None  # (updates, features): `used` along the way
    stationarity: float = np.nan


def by(method: str, budget: Budget, data: Data, seed: int) -> Found:
    """Run a method on the data of a seed."""
    if method in STUDIED:
        return _by_search(method, budget, data, seed)
    return _by_hypergradients(method, budget, data)


def cost(method: str, budget: Budget, features: int) -> Cost:
    """Gradient evaluations and second-order products of one run."""
    if method in STUDIED:
        return Cost(_trials(budget, features) * RETRAINING, 0)
    made = _estimator(method, budget.steps)
    return made.cost(budget.steps, features + 1, episodes=budget.updates)


def _trials(budget: Budget, features: int) -> int:
    """As many trainings as have the gradients of `implicit`; a product is two."""
    return max(1, round(as_gradients(cost("implicit", budget, features)) / RETRAINING))


def _estimator(method: str, T: int) -> Estimator:
    return reverse(T) if method == "reverse" else implicit(T, SOLVER)


def _outer(method: str, price: Any) -> OuterOptimizer:
    if method == "ridge":  # the scales stay where they are
        return optax.chain(
            optax.adam(RATES["ridge"]),
            optax.masked(optax.set_to_zero(), {"ridge": False, "scale": True}),
        )
    both = proximal_adam(RATES["scale"], {"scale": l1(price), "ridge": None})
    return followed_by(both, lambda lam: lam | {"scale": jnp.maximum(lam["scale"], 0)})


def _by_hypergradients(method: str, budget: Budget, data: Data) -> Found:
    lam, path, stationarity = _updated(
        method, budget.steps, budget.updates, budget.price, data.train, data.val
    )
    w = trained(data.train, lam["scale"], 0.0, lam["ridge"])
    return _found(w, lam["scale"], data)._replace(
        path=np.asarray(path), stationarity=float(stationarity)
    )


@partial(jax.jit, static_argnums=(0, 1, 2))
def _updated(
    method: str, T: int, updates: int, price: Any, train: Any, val: Any
) -> tuple[Any, jax.Array, jax.Array]:
    """Hyperparameters at the end, which scales were above 0 on the way, outer stationarity."""
    features = train.inputs.shape[1]
    spaces = declared(SPACE, start(features))
    posed, estimator, outer = (
        bind(problem(train, val), spaces),
        _estimator(method, T),
        _outer(method, price),
    )
    lam = spaces.store(start(features))
    state = init_state(posed, estimator, outer, init(features), lam)
    unseen = np.zeros((updates, T), np.float32)
    state, path = run_episodes(
        estimator,
        outer,
        posed,
        state,
        Window(unseen, unseen),
        observe=lambda state: state.hyperparams["scale"] > 0,
    )
    none = jnp.full((), jnp.nan)
    return spaces.value(state.hyperparams), path, state.metadata.get("outer_stationarity", none)


def _by_search(method: str, budget: Budget, data: Data, seed: int) -> Found:
    features = data.train.inputs.shape[1]  # type: ignore[union-attr]
    ones = jnp.ones(features)

    def suggest(trial: Any) -> dict[str, float]:
        return {name: trial.suggest_float(name, *BOX, log=True) for name in ("lasso", "ridge")}

    def judge(setting: dict[str, float]) -> float:
        return float(judged(trained(data.train, ones, **setting), ones, data.val)[0])

    first = {"lasso": budget.price, "ridge": float(start(features)["ridge"])}
    got = search(method, suggest, judge, _trials(budget, features), seed, first)
    return _found(trained(data.train, ones, **got.best), ones, data)


def _found(w: Any, scale: jax.Array, data: Data) -> Found:
    val, test = (judged(w, scale, part) for part in (data.val, data.test))
    used = np.asarray(scale * w["w"] != 0)
    return Found(used, (float(val[0]), float(val[1])), (float(test[0]), float(test[1])))
