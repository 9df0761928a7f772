"""SABA: SOBA with every direction replaced by its SAGA average.

Dagréou et al. (2022), "A framework for bilevel optimization that enables stochastic and
global variance reduction algorithms", algorithm 1 with section 3.2. The data are cut once
into parts; a batch is a part, D_i of training and V_j of validation. Five directions at
(w, u, lam),

    of D_i:  grad_w L_tr,  u H,  u M             of V_j:  alpha = dL_val/dw,  dL_val/dlam

each remembered per part as it was last seen, phi_i. What is used in its place is

    S[phi]_i = phi_i(new) - phi_i(old) + mean_k phi_k(old),        phi_i <- phi_i(new)

    w   <- U(S[grad_w L_tr])        the inner optimizer
    u   <- u - rho (S[u H] - S[alpha])
    h    = S[dL_val/dlam] - S[u M]

unbiased for parts drawn uniformly, and with a variance that vanishes as w, u and lam come
to rest: constant steps converge. The sign of u is ours, see `gradhpo.estimators.soba`. The
paper fills the tables before it starts; ours fill as parts come. The mean is over the parts
seen so far, and takes the place of phi_i(old) for one not seen, whose S is then
phi_i(new): still unbiased, and SOBA at first. The authors' code starts from tables of zeros
and divides by all parts. Drawn uniformly the two start alike; but in a first pass in which no
part comes twice, S is then phi_i(new) plus k/n times the mean of the k seen: steps half as
long again over that pass, which at equal rates looks like a better start and at larger ones
is a worse one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradhpo.core.curvature import check_reached, condition_of, curvature, training_loss
from gradhpo.core.estimator import Cost, Estimate, Estimator, report
from gradhpo.core.losses import train as train_loss
from gradhpo.core.problem import outer_gradients
from gradhpo.core.types import Batch, Params, PyTree
from gradhpo.estimators._apply import apply_gradient, guarded, left, relative_norm
from gradhpo.utils._partition import split
from gradhpo.utils.gradients import tree_l2_norm, tree_last, tree_scale, tree_where
from gradhpo.utils.settings import check_callable, check_count, check_positive, unless_traced

__all__ = ["SabaMemory", "Table", "part_index", "saba"]


class Table(NamedTuple):
    """One SAGA memory: directions of every part."""

    parts: PyTree  # leading axis: the part
    seen: jax.Array  # bool (parts,)
    mean: PyTree  # over the parts seen


class SabaMemory(NamedTuple):
    """What SABA carries; all of it survives an episode (wherever w then starts, the
    average stays unbiased, and what is old in it is replaced within a pass)."""

    u: Params  # tends to alpha H^-1; over the floating leaves of w, None elsewhere
    train: Table  # (grad_w L_tr, u H, u M)
    val: Table  # (alpha, dL_val/dlam)


def part_index(batch: Batch) -> jax.Array:
    """`batch["index"]`: the default answer to which part a batch is."""
    return batch["index"]


def saba(
    train_batches: int,
    val_batches: int,
    step_size: float = 0.1,
    *,
    index: Callable[[Batch], Any] = part_index,
) -> Estimator:
    """SOBA with a noise that dies out, for data that are cut into parts once and for all.

    Args:
        train_batches, val_batches: Numbers of parts.
        step_size: rho of u; a constant, as are the rates of w and lam.
        index: `index(batch)` is the number of the part that the batch is, an integer array
            of one element in [0, parts). One outside fails: of a training part nothing moves,
            of a validation part the weights alone; the status says so.

    Batches that know their part, drawn uniformly, and a loss that looks at the part alone:

        n = len(y) // 64                                # parts; the last few examples go
        data = {"x": x[: n * 64].reshape(n, 64, -1), "y": y[: n * 64].reshape(n, 64),
                "index": np.arange(n)}
        source = gradhpo.Resident(data, batch_size=1)   # one part at a time, shape (1, ...)
        loss = lambda w, lam, batch: mean_loss(w, lam, batch["x"][0], batch["y"][0])

    Cost per update: one training gradient, one validation gradient, one Hessian and mixed
    product, and passes over the tables, which the finite guard copies. Memory:
    `train_batches` (2 P + H) + `val_batches` (P + H) numbers and u, for P weights and H
    hyperparameters: for small models.

    `info`: `stationarity` and `linear_residual` are those of the averaged directions, estimates
    of the whole data's; `val_loss` is the part's, of the weights before the step.

    Raises:
        ValueError: (when traced) an opaque `update_fn`, which takes its gradient itself.
    """
    train_batches = check_count("train_batches", train_batches)
    val_batches = check_count("val_batches", val_batches)
    step_size = unless_traced(check_positive, "step_size", step_size)
    index = check_callable("index", index, "(batch) -> integer")

    def init(inner, lam, window):
        del window
        w, _ = split(inner.params)
        u = optax.tree.zeros_like(w)
        lam = optax.tree.zeros_like(lam)
        return SabaMemory(u, _empty(train_batches, (u, u, lam)), _empty(val_batches, (u, lam)))

    def estimate(problem, memory, inner, lam, window):
        batch = tree_last(window)
        loss = training_loss(problem, "saba")
        check_reached(problem, condition_of(loss, inner), inner, lam, batch, "saba")
        train = curvature(loss, inner, lam, batch.train)
        val_loss, alpha, direct = outer_gradients(problem, inner, lam, batch.val)

        new = train.gradient, *train.products(memory.u)
        averaged, of_train = _saga(memory.train, _part(index, batch.train), new)
        gradient, u_hessian, u_mixed = averaged
        new = alpha.params, direct
        averaged, of_val = _saga(memory.val, _part(index, batch.val), new)
        alpha, direct = averaged

        d_u = optax.tree.sub(u_hessian, alpha)
        indirect = tree_scale(-1, u_mixed)
        u = optax.tree.sub(memory.u, tree_scale(step_size, d_u))
        seen = train_loss(loss, inner.params, lam, batch.train, inner.model_state)
        inner = apply_gradient(problem, inner, lam, gradient, "saba")
        inner = inner._replace(model_state=seen.model_state)
        residual = relative_norm(d_u, alpha)
        info = report(
            val_loss,
            direct,
            indirect,
            status=left(residual, memory.u, u),
            stationarity=tree_l2_norm(gradient),
            linear_residual=residual,
        )
        hypergrad = guarded(optax.tree.add(direct, indirect), u)
        return Estimate(hypergrad, inner, SabaMemory(u, of_train, of_val), info)

    return Estimator(
        init,
        estimate,
        metrics=("stationarity", "linear_residual"),
        price=lambda size: Cost(2, 1),
    )


def _empty(n: int, like: PyTree) -> Table:
    parts = jax.tree.map(lambda x: jnp.zeros((n, *x.shape), x.dtype), like)
    return Table(parts, jnp.zeros((n,), bool), like)


def _part(index: Callable[[Batch], Any], batch: Batch) -> jax.Array:
    """The number of the part, of shape ().

    Raises:
        ValueError: the batch does not say.
    """
    try:
        part = jnp.asarray(index(batch))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            "saba remembers a direction for each part of the data, so a batch must say which part "
            f"it is, but index(batch) failed with {error!r}. Put the number of the part into the "
            'batch, by default as batch["index"]; see the docstring of gradhpo.estimators.saba.'
        ) from error
    if part.size != 1 or not jnp.issubdtype(part.dtype, jnp.integer):
        raise ValueError(
            f"index(batch) must be one integer, the number of the part, got {part.dtype} of shape "
            f"{part.shape}."
        )
    return part.reshape(())


def _saga(table: Table, i: jax.Array, new: PyTree) -> tuple[PyTree, Table]:
    """`(S[phi]_i, table with phi_i renewed)`."""
    parts, seen, mean = table
    i = jnp.where(i < 0, len(seen), i)
    # An index outside reads NaN, so that the finite guard sees it; x[i] would clip or wrap.
    old = jax.tree.map(lambda x: x.at[i].get(mode="fill", fill_value=jnp.nan), parts)
    old = tree_where(seen.at[i].get(mode="fill", fill_value=True), old, mean)
    change = optax.tree.sub(new, old)
    used = optax.tree.add(mean, change)
    seen = seen.at[i].set(True)
    mean = optax.tree.add(mean, tree_scale(1 / jnp.maximum(seen.sum(), 1), change))
    return used, Table(jax.tree.map(lambda x, y: x.at[i].set(y), parts, new), seen, mean)
