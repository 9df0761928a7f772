"""How much of a gradient's effect one step shows, and that the check says when it is little."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import (
    BilevelProblem,
    InOrder,
    Task,
    check_hypergradient,
    from_optax,
    implicit,
    neumann,
    one_step,
    update_last,
    virtual_step,
)
from gradhpo.diagnostics.momentum import at_once

BATCHES = InOrder(np.ones((4, 2), np.float32))


def loss(w, lam, batch):
    return jnp.sum((w - batch) ** 2) / 2 + jnp.exp(lam) * jnp.sum(w**2)


def task(optimizer):
    problem = BilevelProblem(from_optax(loss, optimizer), lambda w, lam, b: jnp.sum((w - b) ** 2))
    return Task(problem, np.zeros(2, np.float32), -1.0, train=BATCHES, val=BATCHES)


@pytest.mark.parametrize(
    "optimizer, share",
    [
        (optax.sgd(0.1), 1.0),
        (optax.sgd(0.1, momentum=0.5), 0.5),
        (optax.sgd(0.1, momentum=0.9), 0.1),
        (optax.sgd(0.1, momentum=0.9, nesterov=True), 0.19),
        (optax.trace(0.0), 1.0),
    ],
    ids=["plain", "0.5", "0.9", "nesterov", "no rate"],
)
def test_the_share_is_that_of_the_momentum(optimizer, share):
    case = task(optimizer)
    inner, window = case.begin(4)
    got = at_once(case.problem, inner, jnp.array(-1.0), window.train[0])
    assert got == pytest.approx(share, rel=1e-2)


def test_the_check_names_the_remedy():
    said = str(check_hypergradient(task(optax.sgd(0.1, momentum=0.9)), 4, ["one_step"]))
    assert "momentum: the inner optimizer does 10% of what" in said and "virtual=" in said
    assert "momentum" not in str(check_hypergradient(task(optax.sgd(0.1)), 4, ["one_step"]))


def test_the_remedy_sees_what_was_hidden():
    """Longer and closer: the norm is ten times that of one step."""
    case = task(optax.sgd(0.1, momentum=0.9))
    methods = {
        "one_step": "one_step",
        "virtual": virtual_step(one_step(), optax.sgd(1.0)),
        "last": update_last(implicit(1, neumann(2, step_size=0.1)), 2, 4),
    }
    rows = check_hypergradient(case, 4, methods).rows
    assert abs(rows["virtual"].norm_ratio) > 2 * rows["one_step"].norm_ratio
    assert rows["last"].refused == "" and rows["last"].products == 2 + 2
