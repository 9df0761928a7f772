"""Inner dynamics: `s_t = Phi(s_{t-1}, lam; D_t)`, its step and its pullback.

Where the step is an Optax update `w + U(g, z, lam)` with `g = grad_w L_train`, the
pullback of a cotangent `alpha` on `s_t` uses

    (a_w, a_z, q, c) = pullback of alpha through U alone, with g an independent input
    (q H, q M)       = d/deps grad_{w,lam} L_train(w + eps q) at eps = 0
    alpha A = (a_w + q H, a_z),    alpha B = c + q M

one forward-over-reverse product in place of reverse over reverse (`H` is the Hessian,
`M` the mixed derivative of the training loss). The identity holds because second
derivatives commute; the idea of running it this way is MixFlow-MG (Kemaev et al. 2025).
In a loss with custom gradients they need not commute: there the product is reverse over
reverse, see `gradient_and_products`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gradhpo.core import losses
from gradhpo.core.custom_rules import custom_rules
from gradhpo.core.types import (
    Batch,
    Hyper,
    LossFn,
    MakeOptimizer,
    MetricDict,
    OptState,
    Params,
    PyTree,
    UpdateFn,
)
from gradhpo.utils._calls import explain_call, explain_update
from gradhpo.utils._partition import merge, split
from gradhpo.utils.settings import check_callable

__all__ = [
    "Dynamics",
    "InnerState",
    "Parts",
    "Taken",
    "from_optax",
    "from_update",
    "gradient_and_products",
    "is_optimizer",
    "join",
    "linearize",
    "pull_through_update",
    "take",
    "without_slots",
    "zero_cotangent",
]


class InnerState(NamedTuple):
    """`s_t = (w_t, z_t)`: all that Phi reads and writes.

    A cotangent on a state is an `InnerState` too, with None at the leaves that are not
    differentiated and `()` for `model_state`.
    """

    params: Params
    opt_state: OptState
    model_state: PyTree = ()  # batch statistics, PRNG keys: carried, never differentiated


class Parts(NamedTuple):
    """A step that is an Optax update of the gradient of a loss, as its two parts."""

    train_loss: LossFn
    make_optimizer: MakeOptimizer  # lam -> optimizer


class Dynamics(NamedTuple):
    """Phi: how training moves. Make one with `from_optax` or `from_update`.

    `init(params, lam)` makes the slots of the optimizer, and may make a model state; where it
    makes none, the model state is the one that training has brought along.
    """

    init: Callable[[Params, Hyper], InnerState]
    step: Callable[[InnerState, Hyper, Batch], InnerState]
    parts: Parts | None = None  # None: an opaque step


Pullback = Callable[[InnerState], tuple[InnerState, Hyper]]


class Taken(NamedTuple):
    """An inner step that was taken."""

    state: InnerState  # s_t
    pullback: Callable[[InnerState], Any]  # of a cotangent on s_t
    reported: MetricDict  # what the training loss said at s_{t-1}; {}: an opaque step does not tell


def from_update(update_fn: UpdateFn) -> Dynamics:
    """Dynamics of a user's own step `update_fn(params, hyperparams, batch) -> params`.

    Optimizer slots, if the step has any, are part of `params`. With a model state it is
    `update_fn(params, hyperparams, batch, model_state) -> (params, model_state)`.

    >>> dynamics = from_update(lambda w, lam, batch: w - lam * (w - batch))
    >>> print(dynamics.step(InnerState(1.0, ()), 0.5, 3.0).params)
    2.0
    """
    check_callable("update_fn", update_fn, "(params, hyperparams, batch) -> params")

    def init(params, hyperparams):
        del hyperparams
        return InnerState(params, ())

    def step(inner, hyperparams, batch):
        stateful = losses.has_model_state(inner.model_state)
        arguments = (batch, inner.model_state) if stateful else (batch,)
        with explain_call("update_fn", update_fn, inner.params, hyperparams, *arguments):
            new = update_fn(inner.params, hyperparams, *arguments)
        if not stateful:
            return inner._replace(params=new)
        if not (isinstance(new, tuple) and len(new) == 2):
            raise TypeError(
                "with a model state update_fn must return (params, model_state), but returned "
                f"{type(new).__name__}."
            )
        return inner._replace(params=new[0], model_state=new[1])

    return Dynamics(init, step)


def from_optax(
    train_loss: LossFn, optimizer: optax.GradientTransformation | MakeOptimizer
) -> Dynamics:
    """Dynamics of an Optax optimizer on `train_loss`.

    Args:
        train_loss: `loss(params, hyperparams, batch) -> scalar`, or `(scalar, metrics)`. With a
            model state, `loss(params, hyperparams, batch, model_state) -> (scalar, (model_state,
            metrics))`, see `gradhpo.core.losses`.
        optimizer: A `GradientTransformation` (hyperparameters enter through the loss), or
            a factory `hyperparams -> GradientTransformation`, called inside the traced
            step, so that learning rates, momenta … can be hyperparameters. The factory's
            `init` must give the same structure for every value.

    The optimizer sees the floating-point leaves of the parameters only. With Adam give
    `eps_root > 0`: its square root has no derivative at zero, and one feature that is
    always zero would make the hypergradient NaN.

    Custom gradients (`jax.custom_vjp`) in the loss may be anything: second-order products then
    are reverse over reverse, at a higher price (see `gradient_and_products`).

    >>> dynamics = from_optax(lambda w, lam, batch: (w - batch) ** 2, lambda lam: optax.sgd(lam))
    >>> inner = dynamics.init(jax.numpy.array(1.0), 0.25)
    >>> print(dynamics.step(inner, 0.25, 3.0).params)
    2.0
    """
    if not is_optimizer(optimizer):
        check_callable("the inner optimizer", optimizer, "hyperparams -> optimizer, or one itself")
    parts = Parts(train_loss, _explained(as_factory(optimizer)))

    def init(params, hyperparams):
        return InnerState(params, parts.make_optimizer(hyperparams).init(split(params)[0]))

    def step(inner, hyperparams, batch):
        w, loss = _loss_at(parts, inner, batch)
        g, said = jax.grad(loss, has_aux=True)(w, hyperparams)
        return _updated(parts, inner, hyperparams, g, said.model_state)[0]

    return Dynamics(init, step, parts)


def is_optimizer(value: Any) -> bool:
    """An Optax optimizer by what it has, `init` and `update` (`MultiSteps` too), not its class."""
    return hasattr(value, "init") and hasattr(value, "update") and not isinstance(value, type)


def as_factory(optimizer: optax.GradientTransformation | MakeOptimizer) -> MakeOptimizer:
    """A factory from either form."""
    return _Constant(optimizer) if is_optimizer(optimizer) else optimizer  # type: ignore[return-value]


def _explained(make_optimizer: MakeOptimizer) -> MakeOptimizer:
    """A factory that names the remedy where it makes no optimizer of these hyperparameters."""

    def make(hyperparams):
        _check_not_optax_itself(make_optimizer, hyperparams)
        try:
            made = make_optimizer(hyperparams)
        except TypeError as error:
            error.add_note(
                "gradhpo: while making the inner optimizer. Optax's learning rates are numbers; "
                "for a tree of them use optax.chain(..., gradhpo.transforms.scale_by_tree(tree))."
            )
            raise
        if not is_optimizer(made):
            raise TypeError(
                "the inner optimizer's factory must return an Optax optimizer, but returned "
                f"{made!r}. Is a call missing, optax.sgd(0.1) for optax.sgd?"
            )
        return made

    return make


def _check_not_optax_itself(make_optimizer: Any, hyperparams: Hyper) -> None:
    """`optax.sgd` in place of `optax.sgd(0.1)` is a factory too: the hyperparameters would be its
    learning rate, which is meant at most where they are one number."""
    function = getattr(make_optimizer, "func", make_optimizer)  # functools.partial
    if (getattr(function, "__module__", None) or "").partition(".")[0] != "optax":
        return
    if jax.tree.structure(hyperparams) != jax.tree.structure(0.0) or jnp.ndim(hyperparams):
        raise TypeError(
            f"inner_optimizer is optax.{function.__name__} itself, which would be called with all "
            "hyperparameters as its first argument. Give an optimizer with settings of its own, "
            "optax.sgd(0.1), or a function of the hyperparameters that makes one, "
            'lambda lam: optax.sgd(jnp.exp(lam["log_lr"])).'
        )


class _Constant(NamedTuple):
    """`lam -> optimizer`, ignoring lam; a tuple so that equal optimizers make equal factories."""

    optimizer: Any

    def __call__(self, hyperparams: Hyper) -> Any:
        del hyperparams
        return self.optimizer


def _loss_at(parts: Parts, inner: InnerState, batch: Batch) -> tuple[Params, Callable]:
    """The floating leaves `w` and `(w, lam) -> (L_train, all that the loss says)`."""
    w, rest = split(inner.params)

    def loss(w, lam):
        got = losses.train(parts.train_loss, merge(w, rest), lam, batch, inner.model_state)
        return got.value, got

    return w, loss


def _updated(
    parts: Parts, inner: InnerState, lam: Hyper, g: Params, model_state: PyTree
) -> tuple[InnerState, Callable]:
    """`s_t` of a gradient `g`, and `alpha -> (q, a_w, a_z, c)`: the pullback of the update alone,
    with `g` an independent input."""
    w, w_rest = split(inner.params)
    z, z_rest = split(inner.opt_state)

    def update(g, w, z, lam):
        with explain_update():
            updates, z = parts.make_optimizer(lam).update(g, merge(z, z_rest), w)
        z, z_rest_new = split(z)
        return (optax.apply_updates(w, updates), z), z_rest_new

    (w, z), pull, z_rest = jax.vjp(update, g, w, z, lam, has_aux=True)
    return InnerState(merge(w, w_rest), merge(z, z_rest), model_state), pull


def gradient_and_products(
    loss: Callable[[Params, Hyper], tuple[Any, Any]], w: Params, lam: Hyper
) -> tuple[Params, Any, Callable[[Params], tuple[Params, Hyper]]]:
    """`(g, aux, q -> (q H, q M))` of `loss(w, lam) -> (value, aux)`, by one linearization of `g`.

    `(q H, q M)` is q pulled back through `g = grad_w loss`. It is taken as the derivative of the
    full gradient along q, because second derivatives commute. A custom rule may be no derivative
    (see `gradhpo.core.custom_rules`), and then they need not: such a loss takes reverse over
    reverse, right for any rule, at a higher price.

    >>> loss = lambda w, lam: (lam * w**3, w)
    >>> g, aux, products = gradient_and_products(loss, jnp.array(2.0), 0.5)
    >>> print(g, *products(1.0))
    6.0 6.0 12.0
    """
    if custom_rules(loss, w, lam):
        g, products, aux = jax.vjp(jax.grad(loss, has_aux=True), w, lam, has_aux=True)
        return g, aux, products
    gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
    (g, _), products, aux = jax.linearize(lambda w: gradient(w, lam), w, has_aux=True)
    return g, aux, products


def linearize(
    dynamics: Dynamics, inner: InnerState, lam: Hyper, batch: Batch, gradient: Params | None = None
) -> tuple[InnerState, Pullback]:
    """Take one inner step and return it with its pullback.

    Args:
        dynamics: The map Phi.
        inner: `s_{t-1}`. Integer and key leaves (step counts, PRNG keys) are carried
            through and never differentiated.
        lam: Hyperparameters as the user stores them; every leaf floating point.
        batch: One batch, without a window axis. Not differentiated.
        gradient: The training gradient at this point, where it is known and the dynamics
            are an Optax optimizer's; else it is computed.

    Returns:
        `(s_t, pullback)`. For a cotangent `alpha` on `s_t` (see `zero_cotangent`),
        `pullback(alpha)` is `(alpha A_t, alpha B_t)`, shaped like a cotangent and like
        `lam`, in units of loss per unit of the leaf. Costs one further gradient and one
        Hessian-vector product; under `jit` what is not used is not computed.

    Source:
        `A_t` and `B_t` of Lee et al. (2022), eq. (3), with `w_t` replaced by
        `s_t = (w_t, z_t)` so that momentum is part of the state.
    """
    taken = take(dynamics, inner, lam, batch, gradient)
    return taken.state, taken.pullback


def take(
    dynamics: Dynamics, inner: InnerState, lam: Hyper, batch: Batch, gradient: Params | None = None
) -> Taken:
    """`linearize`, with what the training loss said on the way."""
    if dynamics.parts is not None:
        return _take_parts(dynamics.parts, inner, lam, batch, gradient)

    floating, rest = split((inner.params, inner.opt_state))

    def phi(floating, lam):
        new = dynamics.step(join(floating, rest, inner.model_state), lam, batch)
        new_floating, new_rest = split((new.params, new.opt_state))
        return new_floating, (new_rest, new.model_state)

    new_floating, pull, (new_rest, model_state) = jax.vjp(phi, floating, lam, has_aux=True)

    def pullback(alpha: InnerState) -> tuple[InnerState, Hyper]:
        (a_w, a_z), alpha_b = pull((alpha.params, alpha.opt_state))
        return InnerState(a_w, a_z), alpha_b

    return Taken(join(new_floating, new_rest, model_state), pullback, {})


def _take_parts(
    parts: Parts, inner: InnerState, lam: Hyper, batch: Batch, gradient: Params | None
) -> Taken:
    w, loss = _loss_at(parts, inner, batch)
    g, said, products = gradient_and_products(loss, w, lam)
    new, pull_update = _updated(
        parts, inner, lam, g if gradient is None else gradient, said.model_state
    )

    def pullback(alpha: InnerState) -> tuple[InnerState, Hyper]:
        q, a_w, a_z, c = pull_update((alpha.params, alpha.opt_state))
        q_hessian, q_mixed = products(q)
        return InnerState(optax.tree.add(a_w, q_hessian), a_z), optax.tree.add(c, q_mixed)

    return Taken(new, pullback, losses.reported("train", said.value, said.metrics))


def pull_through_update(dynamics: Dynamics, inner: InnerState, lam: Hyper, batch: Batch) -> Taken:
    """A step whose pullback is `alpha -> (q, c)`: through the optimizer update alone, to the
    gradient and to `lam`.

    `alpha B = c + q M`, and `c` is exact and cheap: learning rates live there.

    Raises:
        ValueError: the dynamics have no `parts` (an opaque `update_fn`).
    """
    if dynamics.parts is None:
        raise ValueError(
            "finite differences need to know the training loss and the optimizer apart, but these "
            "dynamics come from an opaque update_fn; give inner_optimizer= instead, or use the "
            "exact product (one_step)."
        )
    w, loss = _loss_at(dynamics.parts, inner, batch)
    g, said = jax.grad(loss, has_aux=True)(w, lam)
    new, pull_update = _updated(dynamics.parts, inner, lam, g, said.model_state)

    def pullback(alpha: InnerState) -> tuple[Params, Hyper]:
        q, _, _, c = pull_update((alpha.params, alpha.opt_state))
        return q, c

    return Taken(new, pullback, losses.reported("train", said.value, said.metrics))


def join(floating: tuple[Any, Any], rest: tuple[Any, Any], model_state: PyTree) -> InnerState:
    """The state from the two halves that `split((params, opt_state))` made."""
    params, opt_state = merge(floating, rest)
    return InnerState(params, opt_state, model_state)


def without_slots(alpha: InnerState) -> InnerState:
    """The cotangent with zeros for the optimizer's slots: carried back so from step to step, the
    slots are constants, and of SGD with momentum `A = I - eta H` remains."""
    return alpha._replace(opt_state=optax.tree.zeros_like(alpha.opt_state))


def zero_cotangent(inner: InnerState) -> InnerState:
    """Zeros on the differentiable leaves of a state, None on the others."""
    w, _ = split(inner.params)
    z, _ = split(inner.opt_state)
    return InnerState(optax.tree.zeros_like(w), optax.tree.zeros_like(z))
