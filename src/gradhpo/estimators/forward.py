"""Forward mode (FMD, real-time recurrent learning): the exact hypergradient, going forwards.

Franceschi et al. (2017). Beside s_t runs its derivative Z_t = ds_t/dlam, one column per
number in lam:

    Z_0 = ds_0/dlam,    Z_t = A_t Z_{t-1} + B_t,    h_t = dL_val/dlam + alpha_t Z_t

Z_0 is zero where the start of the episode does not depend on lam, and for every later window.

Exact at every t, with memory that does not depend on T. `online` is their RTHO: lam moves
while Z goes on, so Z mixes the derivatives at older lam; with a zero outer rate it is FMD.

FDS (Micaelli & Storkey 2021) shares one number over a piece of the run: where lam has n
entries and entry j acts in piece j alone, the columns of later entries are still zero and
are not computed.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from gradhpo.core.dynamics import InnerState, join
from gradhpo.core.estimator import Cost, Estimate, Estimator, Loop, check_loop, fold, report, roll
from gradhpo.core.problem import outer_gradients
from gradhpo.core.start import Origin, push_start
from gradhpo.core.types import Hyper
from gradhpo.utils._partition import split
from gradhpo.utils.gradients import tree_bytes, tree_last, tree_scale
from gradhpo.utils.settings import check_count

__all__ = ["ForwardMemory", "forward", "forward_sharing"]

BUDGET = 2**30
"""Bytes that Z may take unless the user says otherwise."""


class ForwardMemory(NamedTuple):
    """What the online form carries: Z_t, the floating leaves of a state behind a column axis."""

    Z: Any


def forward(
    unroll_steps: int = 1, *, online: bool = False, budget: int = BUDGET, loop: Loop = "scan"
) -> Estimator:
    """The derivative of the validation loss after `unroll_steps` inner steps, by forward mode.

    Args:
        unroll_steps: Inner steps per outer update. The hypergradient is exact for the window, or,
            `online`, for the whole episode as far as lam has not moved since.
        online: Keep Z from window to window (RTHO); an episode starts with Z = 0.
        budget: Bytes that Z may take. Columns that do not fit at once are made in further
            passes over the window, each of which trains again.
        loop: How the window is looped over, see `gradhpo.core.estimator.fold`.

    Cost per outer update of T steps with H hyperparameters: T training gradients per pass,
    T H products, one validation gradient. Memory: H states, whatever T is. For more than
    some ten hyperparameters reverse mode is cheaper.

    Raises:
        ValueError: `online`, and Z does not fit into the budget; or one column does not.
    """
    unroll_steps = check_count("unroll_steps", unroll_steps)
    budget = check_count("budget", budget)
    loop = check_loop(loop)

    def init(inner, lam, window):
        del window
        if not online:
            return ()
        _columns_in(budget, inner, lam, all_at_once=True)
        return ForwardMemory(_zeros(inner, _size(lam)))

    def reset(memory, inner, lam):
        return init(inner, lam, None)

    def estimate(problem, memory, inner, lam, window, origin=None):
        size = _size(lam)
        columns = _columns_in(budget, inner, lam, all_at_once=online)
        index = jnp.arange(size)
        if columns >= size:
            Z = (
                memory.Z
                if online and origin is None
                else _first(problem, origin, lam, inner, index)
            )
            inner, Z = _sweep(problem, lam, index, inner, Z, window.train, loop)
            loss, alpha, direct = outer_gradients(problem, inner, lam, tree_last(window.val))
            flat = _contract(alpha, Z)
            memory = ForwardMemory(Z) if online else memory
        else:
            end = roll(problem.dynamics, inner, lam, window.train, loop=loop)
            loss, alpha, direct = outer_gradients(problem, end, lam, tree_last(window.val))
            passes = -(-size // columns)
            padded = jnp.arange(passes * columns).reshape(passes, columns)  # those >= H are zero
            consts = (lam, inner, alpha, window.train, origin)
            _, parts = fold(_pass(loop), problem, consts, (), padded, loop=loop)
            inner, flat = end, parts.ravel()[:size]
        indirect = _like(lam, flat)
        hypergrad = optax.tree.add(direct, indirect)
        return Estimate(hypergrad, inner, memory, report(loss, direct, indirect))

    reset_online = reset if online else None
    return Estimator(
        init,
        estimate,
        unroll_steps=unroll_steps,
        reset=reset_online,
        follows=online,
        starts=True,
        price=lambda size: Cost(unroll_steps + 1, unroll_steps * size),  # in one pass
    )


def forward_sharing(
    unroll_steps: int,
    pieces: int,
    *,
    average: bool = True,
    budget: int = BUDGET,
    loop: Loop = "scan",
) -> Estimator:
    """FDS: hypergradients of a schedule with one value per piece of the run.

    Args:
        unroll_steps: Inner steps T of the run, a multiple of `pieces`.
        pieces: n. Every leaf of lam has n entries along its leading axis, of which entry j
            acts in steps j T/n .. (j + 1) T/n - 1 alone: read them off a step count, as
            in `optax.sgd(lambda count: lam[count // 100])`.
        average: Divide by T/n, the mean over the shared steps, whose scale does not depend
            on the horizon; False: their sum, the derivative itself.
        budget, loop: As in `forward`.

    Cost per run: T training gradients and H T (n + 1) / (2 n) products. Memory: H states.
    """
    unroll_steps = check_count("unroll_steps", unroll_steps)
    pieces = check_count("pieces", pieces)
    budget = check_count("budget", budget)
    loop = check_loop(loop)
    if unroll_steps % pieces:
        raise ValueError(f"T must be a multiple of the {pieces} pieces, got {unroll_steps}.")

    def init(inner, lam, window):
        del window
        for leaf in jax.tree.leaves(lam):
            if jnp.shape(leaf)[:1] != (pieces,):
                raise ValueError(
                    f"every leaf of the hyperparameters needs {pieces} entries along its leading "
                    f"axis, one per piece of the run; one has the shape {jnp.shape(leaf)}."
                )
        _columns_in(budget, inner, lam, all_at_once=True)
        return ()

    def estimate(problem, memory, inner, lam, window):
        # Columns in the order of their pieces, so that the active ones come first.
        piece = np.concatenate(
            [np.repeat(np.arange(pieces), np.size(x) // pieces) for x in jax.tree.leaves(lam)]
        )
        order = np.argsort(piece, kind="stable")
        per_piece, per_run = len(order) // pieces, unroll_steps // pieces
        Z = _zeros(inner, 0)
        for j in range(pieces):
            fresh = _zeros(inner, per_piece)
            Z = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), Z, fresh)
            part = slice(j * per_run, (j + 1) * per_run)
            batches = jax.tree.map(lambda x: x[part], window.train)  # noqa: B023
            index = jnp.asarray(order[: (j + 1) * per_piece])
            inner, Z = _sweep(problem, lam, index, inner, Z, batches, loop)
        loss, alpha, direct = outer_gradients(problem, inner, lam, tree_last(window.val))
        flat = _contract(alpha, Z)[np.argsort(order)]
        indirect = _like(lam, flat)
        if average:
            direct, indirect = (tree_scale(pieces / unroll_steps, x) for x in (direct, indirect))
        hypergrad = optax.tree.add(direct, indirect)
        return Estimate(hypergrad, inner, memory, report(loss, direct, indirect))

    return Estimator(
        init,
        estimate,
        unroll_steps=unroll_steps,
        # the columns of piece j take part from there on: (n + 1) / 2 n of them on average
        price=lambda size: Cost(
            unroll_steps + 1, unroll_steps * size * (pieces + 1) // (2 * pieces)
        ),
    )


def _like(lam: Hyper, flat: jax.Array) -> Hyper:
    """`ravel_pytree` undone, in the dtypes of lam."""
    ravelled, unravel = ravel_pytree(lam)
    return unravel(flat.astype(ravelled.dtype))


# -- Z ---------------------------------------------------------------------------------------


def _sweep(problem, lam, index, inner, Z, batches, loop):
    """Run s and the columns of Z named by `index` over a stack of batches."""
    return fold(_push_step, problem, (lam, index), (inner, Z), batches, loop=loop)[0]


def _push_step(problem, consts, carry, batch):
    """`Z_t = A_t Z_{t-1} + B_t`: one forward-mode product per column, all at once."""
    lam, index = consts
    inner, Z = carry
    floating, rest = split((inner.params, inner.opt_state))

    def phi(floating, lam):
        new = problem.dynamics.step(join(floating, rest, inner.model_state), lam, batch)
        new_floating, new_rest = split((new.params, new.opt_state))
        return new_floating, (new_rest, new.model_state)

    def column(z, j):  # d phi along z and along the j-th number of lam
        return jax.jvp(phi, (floating, lam), (z, _unit(lam, j)), has_aux=True)[1]

    new_floating, (new_rest, model_state) = phi(floating, lam)
    try:
        Z = jax.vmap(column)(Z, index)
    except TypeError as error:
        if "custom_vjp" in str(error):
            error.add_note("gradhpo: this operation has no forward mode; use reverse mode.")
        raise
    return (join(new_floating, new_rest, model_state), Z), None


@functools.cache  # one identity per setting, as `fold` asks
def _pass(loop):
    def body(problem, consts, carry, index):
        lam, inner, alpha, batches, origin = consts
        Z = _first(problem, origin, lam, inner, index)
        _, Z = _sweep(problem, lam, index, inner, Z, batches, loop)
        return carry, _contract(alpha, Z)

    return body


def _contract(alpha: InnerState, Z: Any) -> jax.Array:
    """`alpha Z`, one number per column; the loss does not read the slots."""
    products = jax.tree.map(lambda a, z: z.reshape(z.shape[0], -1) @ a.ravel(), alpha.params, Z[0])
    return jnp.sum(jnp.stack(jax.tree.leaves(products)), axis=0)


def _unit(lam: Hyper, j: jax.Array) -> Hyper:
    """The direction of the j-th number of lam."""
    flat, to_hyper = ravel_pytree(lam)
    return to_hyper(jax.nn.one_hot(j, flat.size, dtype=flat.dtype))


def _first(problem, origin: Origin | None, lam: Hyper, inner: InnerState, index: jax.Array) -> Any:
    """The columns of `Z_0` named by `index`."""
    if origin is None:
        return _zeros(inner, len(index))
    return jax.vmap(lambda j: push_start(problem, origin, lam, _unit(lam, j)))(index)


def _zeros(inner: InnerState, columns: int) -> Any:
    floating, _ = split((inner.params, inner.opt_state))
    return jax.tree.map(lambda x: jnp.zeros((columns, *jnp.shape(x)), jnp.result_type(x)), floating)


def _size(lam: Hyper) -> int:
    return sum(np.size(x) for x in jax.tree.leaves(lam))


def _columns_in(budget: int, inner: InnerState, lam: Hyper, *, all_at_once: bool) -> int:
    """How many columns of Z fit into the budget."""
    size, column = _size(lam), tree_bytes(jax.eval_shape(lambda: _zeros(inner, 1)))
    fitting = budget // max(column, 1)
    needed = size if all_at_once else 1
    if fitting < needed:
        raise ValueError(
            f"forward mode keeps the derivative of a state of {column} bytes with respect to "
            f"{needed} hyperparameters, {needed * column} bytes, more than the budget of {budget}. "
            "Raise budget=, tune fewer hyperparameters, or use reverse mode, whose cost does not "
            "grow with their number."
        )
    return fitting
