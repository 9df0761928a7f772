"""The estimator: one hypergradient method as a pair of pure functions.

`estimate` consumes a window of inner steps and returns the hypergradient, the advanced
inner state, the method's memory and diagnostics. The horizon of a method is the window it
sees plus what its memory carries.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gradhpo.core.dynamics import Dynamics, InnerState
from gradhpo.core.problem import BilevelProblem, Window, check_window
from gradhpo.core.source import gather
from gradhpo.core.start import Origin
from gradhpo.core.types import Batch, Hyper, Loop, Memory, PyTree, Scalar
from gradhpo.utils._partition import scalar_dtype
from gradhpo.utils.gradients import tree_l2_norm
from gradhpo.utils.settings import check_choice

__all__ = [
    "Cost",
    "Estimate",
    "Estimator",
    "Loop",
    "Room",
    "Unrolled",
    "check_estimator",
    "check_loop",
    "compiled",
    "count_steps",
    "fold",
    "report",
    "roll",
    "whole",
]


def check_loop(loop: Any) -> Loop:
    """For the factories, so that another word does not quietly mean "scan".

    >>> check_loop("unroll")
    'unroll'
    """
    return check_choice("loop", loop, ("scan", "unroll", "host"))


class Estimate(NamedTuple):
    """What one outer update learns from one window."""

    hypergrad: Hyper  # dL_val/dlam, or the method's approximation of it
    inner: InnerState  # the state after the window
    memory: Memory
    info: Mapping[str, jax.Array]  # scalars worth looking at; see `report`
    # What the losses said on the way, under the names of the state's metrics (train_loss at the
    # window's first gradient). What is missing is evaluated for the report.
    reported: Mapping[str, jax.Array] = {}


class Cost(NamedTuple):
    """What a method takes beside its bookkeeping."""

    gradients: float  # of losses, training and validation alike
    products: float  # of second order, with a Hessian or a mixed derivative


class Room(NamedTuple):
    """For a memory that keeps batches: room for them, made when their shape is known."""

    missing: Callable[[Memory], bool]
    make: Callable[[Memory, Window], Memory]  # zeros shaped like the batches of a window of shapes;
    # the same memory where it has that room already
    field: str  # of the memory, where they are


class _Method(NamedTuple):
    """The functions of an `Estimator` as its factory wrote them."""

    init: Callable[[InnerState, Hyper, Window | None], Memory]  # reads shapes only
    estimate: Callable[..., Estimate]  # (problem, memory, inner, lam, window[, origin])
    unroll_steps: int = 1  # inner steps per outer update
    start: Callable[[BilevelProblem, Memory, InnerState, Hyper, Window], Memory] | None = None
    # before every estimation_period-th episode, with the data of that whole episode
    pools: bool = False  # `start` takes a function too, the mean over the tasks of a meta-batch
    reset: Callable[[Memory, InnerState, Hyper], Memory] | None = None
    # at every episode start: what belongs to one episode restarts, the rest survives
    advance: Callable[..., tuple[Memory, InnerState]] | None = None
    # (problem, memory, inner, lam, batch): a step without an update; None: the memory sees nothing
    lead: int = 0  # steps of an episode before its first window, see `gradhpo.core.delay`
    metrics: tuple[str, ...] = ()  # names in `info` beyond the ones every method reports
    indirect: bool = True  # False: only the direct term dL_val/dlam is used (first-order)
    follows: bool = False  # the memory belongs to s_t: it moves on even if L_val is not finite
    differentiates: bool = True  # False: values of L_val are enough (evolution strategies)
    starts: bool = False  # derivatives reach s_0: `estimate` takes the `origin` of an episode too
    room: Room | None = None  # the memory keeps batches, whose shape `init` may not know yet
    tasks: int | None = None  # every leaf of state and memory has that many, see `over_tasks`
    price: Callable[[int], Cost] | None = None  # of one outer update of H hyperparameters
    start_price: Callable[[int], Cost] | None = None  # of `start` on an episode of T steps
    hosted: bool = False  # the problem's functions are called within `fold` and `whole` alone, with
    # loop="host": outside of `jit`, `estimate` is a Python loop over programs of its own
    iterations: float = 0  # of a linear solver per update, at most: a product each, not in `price`


class Estimator(_Method):
    """One method; its settings are closed over by the factory that makes it."""

    __slots__ = ()

    def estimate(  # type: ignore[override]  # the field, behind a check that all methods need
        self,
        problem: BilevelProblem,
        memory: Memory,
        inner: InnerState,
        lam: Hyper,
        window: Window,
        origin: Origin | None = None,
    ) -> Estimate:
        """The hypergradient after a window of training from `inner`.

        Args:
            problem: Dynamics and validation loss.
            memory: From `init`, or of the last estimate.
            inner: s_0 of the window; lam: hyperparameters.
            window: `self.unroll_steps` train and validation batches, along a leading axis.
            origin: Of an episode that begins at `inner`, where `inner` depends on lam. Its
                derivative `alpha_0 ds_0/dlam` is added by methods that carry alpha to s_0
                (`self.starts`); for the others s_0 is a constant.

        Raises:
            ValueError: a leaf of the window has another length, or no step axis.
        """
        check_window(window, self.unroll_steps)
        extra = (origin,) if self.starts and origin is not None else ()
        return super().estimate(problem, memory, inner, lam, window, *extra)

    def cost(
        self,
        T: int,
        size: int,
        *,
        episodes: int = 1,
        period: int = 1,
        iterations: float | None = None,
    ) -> Cost:
        """What training and the hypergradients of whole episodes take.

        Args:
            T: Inner steps per episode: `self.lead` and a multiple of `self.unroll_steps`.
            size: H, how many numbers the hyperparameters are.
            episodes, period: So many episodes; `start` is called before every period-th.
            iterations: Of the linear solver in one update, as a run counted them (metric
                `linear_iterations`); None: the most that it may take.

        Raises:
            ValueError: the factory of the estimator states no price.

        >>> from gradhpo import reverse
        >>> reverse(5).cost(T=10, size=3)
        Cost(gradients=22, products=10)
        """
        if self.price is None:
            raise ValueError(
                "this estimator has no price: state it in its factory, as "
                "Estimator(..., price=lambda size: Cost(gradients, products)), for one outer "
                "update of `size` hyperparameters."
            )
        updates = episodes * ((T - self.lead) // self.unroll_steps)
        gradients, products = self.price(size)
        products += self.iterations if iterations is None else iterations
        fits = -(-episodes // period)
        fit = Cost(0, 0) if self.start_price is None else self.start_price(T)
        return Cost(
            updates * gradients + episodes * self.lead + fits * fit.gradients,
            updates * products + fits * fit.products,
        )


def check_estimator(who: str, estimator: Any) -> None:
    """An estimator, and not the factory that makes one.

    Raises:
        TypeError: something else.
    """
    if not isinstance(estimator, Estimator):
        raise TypeError(
            f"{who} takes a gradhpo.Estimator, such as gradhpo.one_step() or gradhpo.reverse(20), "
            f"got {estimator!r}. Are the brackets of a call missing?"
        )


class Unrolled(NamedTuple):
    """Derivatives of the validation loss after a window of training."""

    val_loss: Scalar  # L_val(w_T, lam; V_T)
    direct: Hyper  # dL_val/dlam at fixed w_T
    indirect: Hyper  # through training; the hypergradient is direct + indirect
    initial: InnerState  # alpha_0 = dL_val/ds_0, a cotangent: None at integer leaves
    inner: InnerState  # s_T
    growth: Scalar  # max_t ||alpha_t|| / ||alpha_T||; large when training is chaotic


def report(
    val_loss: Scalar, direct: Hyper, indirect: Hyper | None = None, **extra: jax.Array
) -> dict[str, jax.Array]:
    """The `info` of an estimate: validation loss and the norms of the two terms, and extras."""
    dtype = scalar_dtype(direct)
    norm = jnp.zeros((), dtype) if indirect is None else tree_l2_norm(indirect)
    return {
        "val_loss": val_loss,
        "direct_norm": tree_l2_norm(direct),
        "indirect_norm": norm,
        **extra,
    }


Body = Callable[[BilevelProblem, Any, Any, Any], tuple[Any, Any]]


def fold(
    body: Body,
    problem: BilevelProblem,
    consts: PyTree,
    carry: PyTree,
    xs: PyTree,
    *,
    loop: Loop = "scan",
    reverse: bool = False,
) -> tuple[PyTree, PyTree]:
    """Run `carry, y = body(problem, consts, carry, x)` over the leading axis of `xs`.

    On CPU a convolution inside a compiled loop runs 15-20 times slower than outside
    (jax issue 12868), so every loop over steps of the user's model goes through here.

    Args:
        body: A function with a lasting identity (module level, or made once by the
            estimator's factory): the host loop compiles it once per identity.
        problem: Static; consts: constants of the loop; carry, xs: as in `jax.lax.scan`.
        loop: "scan", "unroll" or "host".
        reverse: Run from the last entry to the first.

    Returns:
        `(carry, ys)`, with the `ys` stacked in the order of `xs`.

    Raises:
        ValueError: `xs` holds no arrays, so that nothing says how many steps there are.
    """
    steps = count_steps(xs)
    if loop != "host":
        return lax.scan(
            lambda carry, x: body(problem, consts, carry, x),
            carry,
            xs,
            reverse=reverse,
            unroll=loop == "unroll",
        )
    step = compiled(body, problem)
    ys = []
    for t in reversed(range(steps)) if reverse else range(steps):
        carry, y = step(consts, carry, _entry(xs, t))
        ys.append(y)
    return carry, _stacked(ys[::-1] if reverse else ys) if ys else None


def count_steps(xs: PyTree) -> int:
    """The length of the leading axis.

    Raises:
        ValueError: there are no arrays.
    """
    if not (leaves := jax.tree.leaves(xs)):
        raise ValueError(
            "a batch needs at least one array, by which this method counts its steps; give a "
            "dummy, such as 0.0, where nothing is read from it."
        )
    return leaves[0].shape[0]


@functools.lru_cache(maxsize=64)  # some MB each, and a problem has about four
def compiled(function: Callable, problem: BilevelProblem) -> Callable:
    """A program of the host loop, by the identity of `function`. Not a static argument of `jit`,
    which would keep the problem, and the data that its losses close over, for good."""
    return jax.jit(functools.partial(function, problem))


@jax.jit
def _entry(xs, t):
    return jax.tree.map(lambda x: x[t], xs)


@jax.jit
def _stacked(ys):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys)


def whole(function: Callable, loop: Loop) -> Callable:
    """A part `function(problem, …)` of an estimate between two loops, with a lasting identity: of
    the host loop it is a program of its own."""
    if loop != "host":
        return function
    return lambda problem, *args: compiled(function, problem)(*args)


def roll(
    dynamics: Dynamics,
    inner: InnerState,
    lam: Hyper,
    batches: Batch,
    *,
    data: PyTree = None,
    loop: Loop = "scan",
) -> InnerState:
    """Advance the state over a stack of batches, keeping only the end.

    Args:
        data: What the batches are rows of, see `gradhpo.Pool`; None: they are the examples.
    """
    problem = BilevelProblem(dynamics, _no_loss)
    return fold(_advance, problem, (lam, data), inner, batches, loop=loop)[0]


def _advance(problem, consts, inner, batch):
    lam, data = consts
    batch = batch if data is None else gather(data, batch)
    return problem.dynamics.step(inner, lam, batch), None


def _no_loss(params, hyperparams, batch):
    raise NotImplementedError("this problem only rolls its dynamics")
