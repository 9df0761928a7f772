"""Factories refuse settings that mean nothing, estimators windows that are not theirs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import (
    BilevelProblem,
    Window,
    amigo,
    bilevel_step,
    drmad,
    es,
    f2sa,
    finite_difference,
    first_order,
    forward,
    forward_sharing,
    from_optax,
    greedy,
    hyperdistill,
    implicit,
    init_state,
    one_step,
    pes,
    reverse,
    reversible,
    run_episode,
    saba,
    soba,
    stocbio,
)
from gradhpo.algorithms.registry import METHODS
from gradhpo.core.episode import in_windows

# A factory with settings that are right, and wrong ones for one argument each: what is not a
# number of the right kind is a TypeError, what is out of its range a ValueError.
COUNT = {TypeError: (2.5, "3", True, None), ValueError: (0, -1)}
SEED = {TypeError: (0.5, "0"), ValueError: (-1,)}
FRACTION = {TypeError: ("0.9", None, [0.5], jnp.ones(2)), ValueError: (5.0, -1.0, np.nan)}
POSITIVE = {TypeError: ("0.1", [0.1]), ValueError: (0.0, -1.0, np.nan, np.inf)}
WORD = {ValueError: ("while", 3, None)}
FUNCTION = {TypeError: (3, "index")}

FACTORIES = {
    "one_step": (one_step, {}, {"gamma": FRACTION}),
    "finite_difference": (finite_difference, {}, {"gamma": FRACTION, "radius": POSITIVE}),
    "greedy": (
        greedy,
        {"unroll_steps": 3},
        {"gamma": FRACTION, "unroll_steps": COUNT, "loop": WORD},
    ),
    "hyperdistill": (
        hyperdistill,
        {},
        {
            "gamma": FRACTION,
            "theta": {TypeError: ("0.1", [0.1]), ValueError: (-1.0, np.nan, np.inf)},
            "points": WORD,
            "sampling": WORD,
            "seed": SEED,
            "loop": WORD,
        },
    ),
    "reverse": (
        reverse,
        {"unroll_steps": 3},
        {
            "unroll_steps": COUNT,
            "truncate": {TypeError: (1.5,), ValueError: (-1, 4)},
            "memory": WORD,
            "budget": {TypeError: (2.5, "3"), ValueError: (0, -1, 100)},
            "loop": WORD,
        },
    ),
    "reversible": (
        reversible,
        {"unroll_steps": 3},
        {
            "unroll_steps": COUNT,
            "least_momentum": {**POSITIVE, ValueError: (0, 1, 2.0)},
            "loop": WORD,
        },
    ),
    "forward": (
        forward,
        {"unroll_steps": 3},
        {"unroll_steps": COUNT, "budget": COUNT, "loop": WORD},
    ),
    "fds": (
        forward_sharing,
        {"unroll_steps": 3, "pieces": 3},
        {"unroll_steps": COUNT, "pieces": COUNT, "budget": COUNT, "loop": WORD},
    ),
    "drmad": (drmad, {"unroll_steps": 3}, {"unroll_steps": COUNT, "loop": WORD}),
    "es": (
        es,
        {"unroll_steps": 3},
        {"unroll_steps": COUNT, "sigma": POSITIVE, "pairs": COUNT, "seed": SEED, "loop": WORD},
    ),
    "pes": (
        pes,
        {"unroll_steps": 3},
        {"unroll_steps": COUNT, "sigma": POSITIVE, "pairs": COUNT, "seed": SEED, "loop": WORD},
    ),
    "implicit": (
        implicit,
        {"unroll_steps": 3},
        {"unroll_steps": COUNT, "solver": FUNCTION, "condition": WORD, "seed": SEED, "loop": WORD},
    ),
    "soba": (soba, {}, {"step_size": POSITIVE}),
    "saba": (
        saba,
        {"train_batches": 3, "val_batches": 2},
        {
            "train_batches": COUNT,
            "val_batches": COUNT,
            "step_size": POSITIVE,
            "index": FUNCTION,
        },
    ),
    "amigo": (
        amigo,
        {"unroll_steps": 3},
        {"unroll_steps": COUNT, "u_steps": COUNT, "step_size": POSITIVE, "loop": WORD},
    ),
    "stocbio": (
        stocbio,
        {"unroll_steps": 3},
        {
            "unroll_steps": COUNT,
            "terms": {**COUNT, ValueError: (-1,)},
            "step_size": POSITIVE,
            "loop": WORD,
        },
    ),
    "f2sa": (f2sa, {"unroll_steps": 3}, {"unroll_steps": COUNT, "penalty": POSITIVE, "loop": WORD}),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_nonsense_is_refused_by_its_name(name):
    factory, right, arguments = FACTORIES[name]
    factory(**right)
    for argument, errors in arguments.items():
        for error, values in errors.items():
            for value in values:
                with pytest.raises(error) as caught:
                    factory(**{**right, argument: value})
                assert str(caught.value).startswith(argument), (argument, value, caught.value)


# The arguments of a class whose estimator knows them by another name.
RENAMED = {"radius": "eps"}
ARGUMENTS = {factory: arguments for factory, _, arguments in FACTORIES.values()}


@pytest.mark.parametrize("name", METHODS)
def test_the_class_names_its_own_argument(name):
    """Its constructor refuses what the factory refuses, in the words of its own signature."""
    method = METHODS[name]
    fields = {field.name for field in dataclasses.fields(method.optimizer)}
    common = {"inner_optimizer": optax.sgd(0.1), **method.example.settings}
    method.make(**common)  # right as it is
    for argument, errors in ARGUMENTS.get(method.factory, {}).items():
        known = RENAMED.get(argument, argument)
        if known not in fields:
            continue  # a horizon T; the class has no such setting
        for value in errors.get(ValueError, ()):
            if value is None or (argument, name) == ("unroll_steps", "forward"):
                continue  # the class's own default, or used online only
            with pytest.raises((TypeError, ValueError), match=rf"\b{known}\b"):
                method.make(**{**common, known: value})


def test_rates_and_weights_may_be_traced():
    """Discounts, steps, penalties, seeds: under `vmap` or `jit` their values are not known."""
    problem = BilevelProblem(from_optax(loss, optax.sgd(0.1)), judge)
    window = Window(jnp.ones((2, 3)), jnp.ones((2, 3)))
    inner, lam = problem.dynamics.init(jnp.ones(3), 0.5), jnp.array(0.5)

    def hypergrads(x, seed):
        estimators = (
            greedy(x, 2),
            hyperdistill(x, theta=x, seed=seed),
            finite_difference(x),
            soba(x),
            amigo(2, 2, x),
            stocbio(2, 1, x),
            f2sa(2, x),
            pes(2, seed=seed),
        )
        for estimator in estimators:
            part = jax.tree.map(lambda x, n=estimator.unroll_steps: x[:n], window)
            memory = estimator.init(inner, lam, part)
            yield estimator.estimate(problem, memory, inner, lam, part).hypergrad

    traced = jax.jit(lambda x, seed: list(hypergrads(x, seed)))(0.5, 1)
    np.testing.assert_allclose(traced, list(hypergrads(0.5, 1)), rtol=2e-4, atol=1e-6)


def loss(w, lam, batch):
    return jnp.mean((w - batch) ** 2) / 2 + lam * jnp.sum(w**2)


def judge(w, lam, batch):
    return jnp.mean((w - batch) ** 2)


# -- windows ---------------------------------------------------------------------------------

ESTIMATORS = {
    "first_order": first_order(),
    **{name: factory(**right) for name, (factory, right, _) in FACTORIES.items()},
}


def of_length(*shape):
    return {"x": np.ones(shape, np.float32), "index": np.zeros(shape[:1], np.int32)}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_window_of_another_length_is_refused(name):
    """Too long, too short, a side or a leaf alone, and 64 examples without a step axis."""
    estimator = ESTIMATORS[name]
    n = estimator.unroll_steps
    right = of_length(n, 64, 5)
    problem = BilevelProblem(from_optax(loss, optax.sgd(0.1)), judge, loss)
    state = init_state(problem, one_step(), None, jnp.ones(3), jnp.full(3, 0.1))
    for window, leaf in (
        (Window(of_length(2 * n, 5), of_length(2 * n, 5)), r"window\.train"),
        (Window(of_length(0, 5), of_length(0, 5)), r"window\.train"),
        (Window(right, of_length(2 * n, 5)), r"window\.val"),
        (Window({**right, "x": np.ones((64, 5))}, right), r"window\.train\['x'\] .*\(64, 5\)"),
        (Window(right, {**right, "x": 1.0}), r"window\.val\['x'\] .*\(\)"),
    ):
        for call in (
            lambda window: estimator.estimate(problem, (), state.inner, 0.1, window),
            lambda window: bilevel_step(estimator)(problem, state, window, 0.1),
        ):
            with pytest.raises(ValueError, match=rf"of length {n}: .*{leaf}.*x\[None\]"):
                call(window)


def test_an_episode_is_whole_windows():
    problem = BilevelProblem(from_optax(loss, optax.sgd(0.1)), judge)
    estimator = greedy(0.9, 2)
    state = init_state(problem, estimator, None, jnp.ones(3), jnp.array(0.1))
    for window, message in (
        (Window(jnp.ones((5, 3)), jnp.ones((5, 3))), r"T=5 .*windows of 2.*a multiple"),
        (
            Window(jnp.ones((4, 3)), jnp.ones((2, 3))),
            r"4 in window\.train.*window\.val .*\(2, 3\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run_episode(estimator, None, problem, state, window, 0.1)
    assert in_windows(Window(np.ones((4, 3)), np.ones(4)), 2).train.shape == (2, 2, 3)


def test_a_changed_estimator_is_checked_as_well():
    """`_replace` gives the parts their checks again, and one check only."""
    calls = []
    mine = one_step()._replace(estimate=lambda *args: calls.append(args), unroll_steps=2)
    mine.estimate(None, (), None, None, Window(np.ones(2), np.ones((2, 7))))
    with pytest.raises(ValueError, match="of length 2"):
        mine.estimate(None, (), None, None, Window(np.ones(1), np.ones(1)))
    assert len(calls) == 1
