"""The shipped suite passes every estimator of the package, and fails broken ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import (
    BilevelProblem,
    InOrder,
    Task,
    amigo,
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
    one_step,
    pes,
    reverse,
    reversible,
    saba,
    soba,
    stocbio,
)
from gradhpo.algorithms.registry import METHODS
from gradhpo.solvers import cg, identity, neumann, nystrom
from gradhpo.testing import assert_trees_close, check_estimator, relative_error, unrolled_loss
from gradhpo.testing.problems import (
    CONTRACTION_GAMMA,
    ZOO,
    at_minimum,
    batch_norm,
    contraction,
    contraction_nonlinear,
    initial_scale,
    initial_weights,
    integer_leaves,
    learning_rates,
    outer_lam,
    ridge,
    straight_line,
)
from gradhpo.transforms import reversible_sgd

pytestmark = pytest.mark.usefixtures("x64")
GAMMA = CONTRACTION_GAMMA


def small(make_optimizer, lam, steps):
    """A quadratic and another one, for optimizers with settings of their own."""
    x, v = jnp.asarray(np.random.default_rng(5).normal(size=(2, steps, 3)))
    dynamics = from_optax(lambda w, lam, x: jnp.sum((w - x) ** 2) / 2, make_optimizer)
    problem = BilevelProblem(dynamics, lambda w, lam, v: jnp.sum((w - v) ** 2))
    lam = jnp.asarray(lam)
    return Task(problem, jnp.array([1.0, -2.0, 0.5]), lam, InOrder(x), InOrder(v))


def run_backwards(steps):
    return small(lambda lam: reversible_sgd(jnp.exp(lam), momentum=0.5), -1.5, steps)


def three_pieces(steps):
    """A learning rate for each of the first steps."""
    rates = [0.3, 0.2, 0.1]
    return small(lambda lam: optax.sgd(lambda count: lam[jnp.minimum(count, 2)]), rates, steps)


def only_part(batch):
    return 0


NETWORKS = (batch_norm, initial_scale)
DOORS = (*NETWORKS, initial_weights)  # a model state; starts that depend on lam

# Every method of the registry: an estimator, where it is exact, a control where it must not be,
# and where the rest of the contract is checked: one problem each, for every one is ten programs.
ROWS = {
    "fo": (first_order, [], [outer_lam, *DOORS], [contraction]),
    # A start that depends on lam is a constant for it.
    "one_step": (
        one_step(),
        [ridge, integer_leaves, batch_norm],
        [(outer_lam, 3), (batch_norm, 3), initial_scale, initial_weights],
        [integer_leaves, batch_norm],
    ),
    "averaged": (one_step(0.5), [ridge], [(outer_lam, 3)], [outer_lam]),
    "t1t2": (finite_difference(), [ridge, learning_rates], [(outer_lam, 3)], [outer_lam]),
    "greedy": (greedy(GAMMA, 3), [contraction], [contraction_nonlinear], [outer_lam]),
    "hyperdistill": (
        lambda: hyperdistill(GAMMA),
        [(contraction_nonlinear, 4)],
        [(outer_lam, 3), (batch_norm, 3), initial_scale],
        [integer_leaves, batch_norm],
    ),
    "reverse": (reverse(3), [integer_leaves, *DOORS], [], [integer_leaves, batch_norm]),
    "segments": (reverse(3, memory="segments"), [integer_leaves, *DOORS], [], [contraction]),
    "reversible": (reversible(3), [run_backwards], [], [run_backwards]),
    "forward": (forward(3), [integer_leaves, *DOORS], [], [outer_lam, batch_norm]),
    "rtho": (forward(online=True), [(p, 3) for p in (integer_leaves, *DOORS)], [], [contraction]),
    "fds": (forward_sharing(3, 3, average=False), [three_pieces], [], [three_pieces]),
    "drmad": (drmad(3), [straight_line, initial_weights], [outer_lam, *NETWORKS], [contraction]),
    "drmad: T = 1": (drmad(1), [integer_leaves, *DOORS], [], []),
    "implicit_cg": (implicit(2, cg(1e-12)), [at_minimum], [outer_lam], [at_minimum]),
    "implicit_neumann": (implicit(1, neumann(60, 1.0)), [at_minimum], [], [at_minimum]),
    "implicit_nystrom": (implicit(1, nystrom()), [], [at_minimum], [at_minimum]),
    "implicit_identity": (implicit(1, identity()), [], [at_minimum], [at_minimum]),
    "es": (es(2, pairs=2), [], [outer_lam], [contraction]),
    "pes": (pes(2, pairs=2), [], [outer_lam], [contraction]),
    # u lags behind: exact in the limit, see tests/estimators/test_single_loop.py.
    "soba": (soba(0.5), [], [at_minimum], [at_minimum]),
    "saba": (saba(1, 1, 0.5, index=only_part), [], [at_minimum], [at_minimum]),
    # Sixty steps on u reach u H = alpha at every update.
    "amigo": (amigo(2, 60, 1.0), [at_minimum], [outer_lam], [at_minimum]),
    "stocbio": (stocbio(2, 60, 1.0), [at_minimum], [outer_lam], [at_minimum]),
    "f2sa": (f2sa(2), [], [outer_lam], [outer_lam]),
}


def test_no_method_is_forgotten():
    missing = set(METHODS) - set(ROWS)
    assert not missing, f"{missing} of the registry need a row in ROWS"


@pytest.mark.parametrize("name", ROWS)
def test_the_packages_own_estimators_conform(name):
    estimator, exact_on, not_exact_on, problems = ROWS[name]
    check_estimator(
        estimator, exact_on=exact_on, not_exact_on=not_exact_on, problems=problems, rtol=1e-8
    )


def broken(change):
    """`one_step` with its estimate changed after the fact."""
    good = one_step()

    def estimate(problem, memory, inner, lam, window):
        return change(good.estimate(problem, memory, inner, lam, window), inner, lam)

    return good._replace(estimate=estimate)


def halve(tree):
    return jax.tree.map(lambda x: x / 2, tree)


BROKEN = {
    "inexact": (lambda got, s, lam: got._replace(hypergrad=halve(got.hypergrad)), "claimed exact"),
    "lazy": (lambda got, s, lam: got._replace(inner=s), "not within rtol"),
    "float32": (
        lambda got, s, lam: got._replace(
            hypergrad=jax.tree.map(lambda x: x.astype(jnp.float32), got.hypergrad)
        ),
        "hypergrad changed",
    ),
    "memory": (lambda got, s, lam: got._replace(memory=(jnp.zeros(()),)), "memory changed"),
    "info": (lambda got, s, lam: got._replace(info={}), "info lacks"),
    "extra": (lambda got, s, lam: got._replace(info={**got.info, "x": 1.0}), "info has"),
    "hides NaN": (
        lambda got, s, lam: got._replace(
            hypergrad=jax.tree.map(jnp.nan_to_num, got.hypergrad),
            inner=jax.tree.map(jnp.nan_to_num, got.inner),
            info={**got.info, "val_loss": jnp.zeros(())},
        ),
        "NaN train batch",
    ),
    "wrong inside jit": (
        lambda got, s, lam: (
            got
            if not isinstance(lam["bias"], jax.core.Tracer)
            else got._replace(hypergrad=halve(got.hypergrad))
        ),
        "not within rtol",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_suite_notices(name):
    change, message = BROKEN[name]
    with pytest.raises(AssertionError, match=message):
        check_estimator(broken(change), exact_on=[outer_lam], problems=[outer_lam])


def test_a_control_on_which_the_method_is_exact_proves_nothing():
    with pytest.raises(AssertionError, match="the control ridge shows nothing"):
        check_estimator(reverse(2), not_exact_on=[ridge], problems=[])


def test_exactness_needs_float64():
    jax.config.update("jax_enable_x64", False)  # the fixture puts it back
    with pytest.raises(RuntimeError, match="jax_enable_x64"):
        check_estimator(one_step(), exact_on=[ridge], problems=[])


def test_assert_trees_close_sees_small_leaves_and_nan():
    want = {"big": jnp.array([1e3]), "small": jnp.array(1.0)}
    assert_trees_close(want, want, 1e-15)
    off = {"big": jnp.array([1e3]), "small": jnp.array(1.1)}
    assert relative_error(off, want) < 2e-4
    with pytest.raises(AssertionError, match=r"leaf \['small'\] is off by 0.01"):
        assert_trees_close(off, want, 1e-3)
    nan = {"big": jnp.array([1e3]), "small": jnp.array(jnp.nan)}
    for got, expected in ((nan, want), (nan, nan)):
        with pytest.raises(AssertionError):
            assert_trees_close(got, expected, 1e9)
    with pytest.raises(AssertionError, match="shape"):
        assert_trees_close({"big": jnp.ones(1), "small": jnp.ones(1)}, want, 1.0)
    with pytest.raises(ValueError, match="structure"):
        assert_trees_close({"big": want["big"]}, want, 1.0)


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_is_the_same_in_float32(name):
    """The same numbers, the default dtype, and windows of the length asked for."""
    wide = numbers_of(ZOO[name])
    assert all(x.dtype in (jnp.float64, jnp.int32, jnp.uint32) for x in jax.tree.leaves(wide))
    jax.config.update("jax_enable_x64", False)
    narrow = numbers_of(ZOO[name])
    for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(narrow), strict=True):
        assert b.dtype in (jnp.float32, jnp.int32, jnp.uint32)
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    assert {x.shape[0] for x in jax.tree.leaves(narrow["window"])} == {3}
    task = ZOO[name](3)
    inner, window = task.begin(3)
    assert np.isfinite(unrolled_loss(task.problem, inner, task.hyperparams, window))


def numbers_of(problem_at):
    """All that an episode of three steps begins with; of keys, their bits."""
    task = problem_at(3)
    inner, window = task.begin(3)

    def bits(x):
        key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if key else x

    return jax.tree.map(bits, {"inner": inner, "lam": task.hyperparams, "window": window})
