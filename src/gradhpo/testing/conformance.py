"""The contract of an `Estimator`, as a suite that any implementation can be put through.

The contract: pure functions of fixed structure and dtypes; the same numbers under `jit`,
`vmap` and `scan`; the inner state advanced as plain training advances it; no compilation
after the first; NaN never gets into the hyperparameters; exact where the method says so, and
not exact on a control, without which the test would prove nothing.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradhpo.core.episode import in_windows
from gradhpo.core.estimator import Estimator, roll
from gradhpo.core.problem import Window
from gradhpo.core.status import Status
from gradhpo.core.step import bilevel_step, init_state
from gradhpo.core.types import Hyper
from gradhpo.driver.caches import cached
from gradhpo.testing._build import ProblemAt
from gradhpo.testing.compare import assert_trees_close, relative_error, unrolled_loss
from gradhpo.testing.problems import batch_norm, integer_leaves, mlp_momentum
from gradhpo.utils._partition import split
from gradhpo.utils.gradients import tree_is_finite

__all__ = ["check_estimator"]

REPORTED = {"val_loss", "direct_norm", "indirect_norm"}
Case = ProblemAt | tuple[ProblemAt, int]


def check_estimator(
    estimator: Estimator | Callable[[], Estimator],
    *,
    exact_on: Iterable[Case] = (),
    not_exact_on: Iterable[Case] = (),
    problems: Iterable[ProblemAt] = (mlp_momentum, integer_leaves, batch_norm),
    rtol: float = 1e-9,
    differs_by: float = 1e-2,
) -> None:
    """Put an estimator through the contract; the first breach is an AssertionError.

    Args:
        estimator: An estimator, or a factory of one.
        exact_on: Problems (see `gradhpo.testing.problems`) on which the hypergradient is the
            exact one at every update, from the first, its start included; a problem, or
            `(problem, steps)` for more steps than one window. Float64 must be switched on.
        not_exact_on: Controls, where it must be off by `differs_by` at the last update. An
            estimator that is always exact has none.
        problems: Where the rest of the contract is checked.
        rtol: Relative error allowed on `exact_on`.
    """
    if not isinstance(estimator, Estimator):
        estimator = estimator()
    for problem_at in problems:
        _Contract(estimator, problem_at).check()
    for case in exact_on:
        errors = _errors(estimator, case)
        assert max(errors) <= rtol, f"claimed exact on {_name(case)}, but is off by {errors}"
    for case in not_exact_on:
        errors = _errors(estimator, case)
        assert errors[-1] >= differs_by, f"the control {_name(case)} shows nothing: {errors}"


def _avals(tree: Any) -> Any:
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


def _first(windows: Window, i: int = 0) -> Window:
    return jax.tree.map(lambda x: x[i], windows)


class _Contract:
    """One estimator on one problem; three windows of data, one compiled program."""

    def __init__(self, estimator: Estimator, problem_at: ProblemAt):
        self.estimator = estimator
        task = problem_at(3 * estimator.unroll_steps)
        self.problem, self.lam = task.problem, task.hyperparams
        self.inner, self.window = task.begin(3 * estimator.unroll_steps)
        self.windows = in_windows(self.window, estimator.unroll_steps)
        self.memory = estimator.init(self.inner, self.lam, _first(self.windows))
        narrow = jnp.result_type(*jax.tree.leaves(self.lam)) != jnp.float64
        self.rtol = 1e-4 if narrow else 1e-10  # rounding: the programs compared are not the same
        self.traces = 0
        self.compiled = jax.jit(partial(estimator.estimate, self._counting_problem()))

    def _counting_problem(self):
        def counted(*arguments):
            self.traces += 1
            return self.problem.outer_loss(*arguments)

        return self.problem._replace(outer_loss=counted)

    def check(self) -> None:
        self._check_structure()
        self._check_transformations()
        self._check_finite_guard()

    def _check_structure(self) -> None:
        estimator, memory, inner, lam = self.estimator, self.memory, self.inner, self.lam
        before = jax.tree.map(jnp.copy, (memory, inner, lam))
        got = self.compiled(memory, inner, lam, _first(self.windows))
        again = self.compiled(memory, inner, lam, _first(self.windows))
        _assert_same_bits(before, (memory, inner, lam), "estimate changed its arguments")
        _assert_same_bits(got, again, "estimate is not pure: two equal calls differ")
        for what, old, new in (
            ("hypergrad", lam, got.hypergrad),
            ("inner state", inner, got.inner),
            ("memory", memory, got.memory),
        ):
            assert _avals(new) == _avals(old), f"{what} changed: {_avals(old)} to {_avals(new)}"
        missing, extra = REPORTED - set(got.info), set(got.info) - REPORTED - {"status"}
        assert not missing, f"info lacks {missing}"
        assert extra == set(estimator.metrics), f"info has {extra}, metrics: {estimator.metrics}"
        for name, value in got.info.items():
            assert jnp.shape(value) == (), f"info[{name!r}] is not a scalar"
        if estimator.reset is not None:
            fresh = estimator.reset(got.memory, inner, lam)
            assert _avals(fresh) == _avals(memory), "reset changed the structure of the memory"
        if estimator.start is not None:
            start = partial(estimator.start, self.problem)
            started = jax.eval_shape(start, memory, inner, lam, self.window)
            assert _avals(started) == _avals(memory), "start changed the structure of the memory"
        plain = jax.jit(partial(roll, self.problem.dynamics))
        trained = plain(inner, lam, _first(self.windows).train)
        assert_trees_close(_floating(got.inner), _floating(trained), self.rtol)

    def _check_transformations(self) -> None:
        memory, inner, lam, windows = self.memory, self.inner, self.lam, self.windows
        estimate = partial(self.estimator.estimate, self.problem)
        carry, seen = (memory, inner), []
        traces = self.traces
        for i in range(3):
            got = self.compiled(*carry, lam, _first(windows, i))
            carry = got.memory, got.inner
            seen.append(_results(got))
        tasks = [jax.tree.map(lambda x: x + 0.1 * k, lam) for k in range(3)]  # noqa: B023
        loop = [_results(self.compiled(memory, inner, task, _first(windows))) for task in tasks]
        assert self.traces == traces, "estimate was traced again for equal shapes and dtypes"

        with jax.disable_jit():
            eager = estimate(memory, inner, lam, _first(windows))
        assert_trees_close(_results(eager), seen[0], self.rtol)

        mapped = jax.jit(jax.vmap(estimate, in_axes=(None, None, 0, None)))(
            memory, inner, _stack(tasks), _first(windows)
        )
        assert_trees_close(_results(mapped), _stack(loop), self.rtol)

        def body(carry, window):
            memory, inner = carry
            got = estimate(memory, inner, lam, window)
            return (got.memory, got.inner), _results(got)

        scanned = jax.jit(partial(jax.lax.scan, body))((memory, inner), windows)[1]
        assert_trees_close(scanned, _stack(seen), self.rtol)

    def _check_finite_guard(self) -> None:
        state = init_state(
            self.problem,
            self.estimator,
            None,
            self.inner.params,
            self.lam,
            _first(self.windows),
            model_state=self.inner.model_state,
        )
        step = jax.jit(partial(bilevel_step(self.estimator), self.problem))
        for side in ("train", "val"):
            bad = _first(self.windows)
            bad = bad._replace(**{side: _nan(getattr(bad, side))})
            after = step(state, bad, 1e-2)
            _assert_same_bits(state.hyperparams, after.hyperparams, f"a NaN {side} batch moved lam")
            assert after.metadata["status"] != Status.OK, f"a NaN {side} batch went unreported"
            for i in (1, 2):
                after = step(after, _first(self.windows, i), 1e-2)
            assert after.metadata["n_rejected"] == 1, f"a NaN {side} batch had a lasting effect"
            assert tree_is_finite((after.params, after.hyperparams)), f"NaN left by a {side} batch"


def _errors(estimator: Estimator, case: Case) -> list[float]:
    """Relative error of every update of one episode, lam held fixed."""
    if not jax.config.read("jax_enable_x64"):
        raise RuntimeError("exactness is judged in float64: set jax_enable_x64 first.")
    problem_at, steps = case if isinstance(case, tuple) else (case, estimator.unroll_steps)
    task = problem_at(steps)
    problem, lam, origin = task.problem, task.hyperparams, task.origin()
    inner, window = task.begin(steps)
    windows = in_windows(window, estimator.unroll_steps)
    memory = estimator.init(inner, lam, _first(windows))
    if estimator.start is not None:
        memory = estimator.start(problem, memory, inner, lam, window)
    errors: list[float] = []
    estimate = jax.jit(partial(estimator.estimate, problem))
    for i in range(steps // estimator.unroll_steps):
        first = (origin,) if i == 0 else ()
        got = estimate(memory, inner, lam, _first(windows, i), *first)
        inner, memory = got.inner, got.memory
        exact = _exact(problem_at, steps, (i + 1) * estimator.unroll_steps)
        errors.append(relative_error(got.hypergrad, exact))
    return errors


@cached
def _exact(problem_at: ProblemAt, steps: int, seen: int) -> Hyper:
    """The hypergradient after the first steps of an episode, which many estimators share: a case
    makes the same task each time it is called."""
    task = problem_at(steps)
    inner, window = task.begin(steps)
    past = jax.tree.map(lambda x: x[:seen], window)
    loss = partial(unrolled_loss, task.problem, inner, window=past, origin=task.origin())
    return jax.jit(jax.grad(loss))(task.hyperparams)


def _name(case: Case) -> str:
    return case[0].__name__ if isinstance(case, tuple) else case.__name__


def _nan(batch: Any) -> Any:
    floating, rest = split(batch)
    floating = optax.tree.full_like(floating, jnp.nan)
    return jax.tree.map(
        lambda x, y: y if x is None else x, floating, rest, is_leaf=lambda x: x is None
    )


def _results(got: Any) -> Any:
    """Hypergradient, state and loss; the draws in a memory need not agree."""
    return got.hypergrad, _floating(got.inner), got.info["val_loss"]


def _floating(inner: Any) -> Any:
    return split(tuple(inner))[0]


def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def _assert_same_bits(a: Any, b: Any, message: str) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.array_equal(x, y, equal_nan=bool(jnp.issubdtype(x.dtype, jnp.inexact))), message
