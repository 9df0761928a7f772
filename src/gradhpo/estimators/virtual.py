"""The virtual step: a lookahead by another optimizer than the one that trains.

A method with a short horizon sees what the last step does to the weights, and momentum does a small
part of its work in that step: of SGD with momentum mu a share 1 - mu. What an example or a penalty
will do later is not seen, and may have the other sign. So the lookahead is taken by an optimizer
without slots, from the weights as they are, and the weights are trained by their own:

    w'_t = Phi'(w_{t-1}, lam; D_t),    h = dL_val(w'_t)/dlam + dL_val/dw (w'_t) dPhi'/dlam
    s_t = Phi(s_{t-1}, lam; D_t)

`optax.sgd(rate / (1 - mu))` moves the weights as far in one step as momentum does in the end. The
virtual step is that of DARTS (Liu et al. 2019, eq. 6) and of Meta-Weight-Net (Shu et al. 2019,
eq. 3), who take it by plain gradient descent too.
"""

import functools

import optax

from gradhpo.core.dynamics import InnerState, as_factory, from_optax
from gradhpo.core.estimator import Cost, Estimator, Loop, check_loop, roll
from gradhpo.core.problem import BilevelProblem
from gradhpo.core.types import MakeOptimizer
from gradhpo.utils._partition import split

__all__ = ["virtual_step"]


def virtual_step(
    estimator: Estimator,
    optimizer: optax.GradientTransformation | MakeOptimizer,
    *,
    loop: Loop = "scan",
) -> Estimator:
    """`estimator`, looking ahead by `optimizer` from the weights as they are.

    Args:
        estimator: A method with a short window: the hypergradient of a window of several steps is
            that of as many virtual ones.
        optimizer: Of Optax, or `hyperparams -> optimizer`; its slots begin anew in every window.
        loop: How the true steps of a window are looped over.

    The validation loss and its metrics are those of the virtual weights. The weights train with the
    hyperparameters as they are before the update, and move on as without this.

    Cost: one step's gradient is that of both optimizers, so a window of one step costs nothing
    more; a longer one a gradient for each step but the first.

    Raises:
        ValueError: at the first call, for an opaque `update_fn`, whose optimizer is not known.

    >>> import optax, jax.numpy as jnp
    >>> from gradhpo import BilevelProblem, Window, one_step
    >>> loss = lambda w, lam, batch: lam * w * batch
    >>> problem = BilevelProblem(from_optax(loss, optax.sgd(0.1, 0.9)), lambda w, lam, batch: w)
    >>> method = virtual_step(one_step(), optax.sgd(1.0))
    >>> state, data = problem.dynamics.init(jnp.array(1.0), 0.5), Window(jnp.ones(1), jnp.ones(1))
    >>> got = method.estimate(problem, (), state, 0.5, data)
    >>> print(got.hypergrad, got.inner.params)
    -1.0 0.95
    """
    make, loop = as_factory(optimizer), check_loop(loop)

    @functools.lru_cache(maxsize=16)  # programs of host loops are known by their problem
    def looking(problem: BilevelProblem) -> BilevelProblem:
        parts = problem.dynamics.parts
        if parts is None:
            raise ValueError(
                "a virtual step trains by another optimizer on the same loss, but these dynamics "
                "come from an opaque update_fn: give inner_optimizer= instead."
            )
        return problem._replace(dynamics=from_optax(parts.train_loss, make), begin=None)

    def fresh(inner, lam):
        return inner._replace(opt_state=make(lam).init(split(inner.params)[0]))

    def init(inner, lam, window):
        return estimator.init(fresh(inner, lam), lam, window)

    def estimate(problem, memory, inner, lam, window):
        looked = estimator.estimate(looking(problem), memory, fresh(inner, lam), lam, window)
        trained = roll(problem.dynamics, inner, lam, window.train, loop=loop)
        return looked._replace(inner=InnerState(*trained))

    made = estimator._replace(init=init, estimate=estimate, starts=False)
    if (advance := estimator.advance) is not None:

        def trained(problem, memory, inner, lam, batch):
            memory, _ = advance(looking(problem), memory, fresh(inner, lam), lam, batch)
            return memory, problem.dynamics.step(inner, lam, batch)

        made = made._replace(advance=trained)
    if (prepare := estimator.start) is not None:

        def start(problem, memory, inner, lam, window, *pooled):
            return prepare(looking(problem), memory, fresh(inner, lam), lam, window, *pooled)

        made = made._replace(start=start)
    if (renew := estimator.reset) is not None:
        made = made._replace(reset=lambda memory, inner, lam: renew(memory, fresh(inner, lam), lam))
    if (price := estimator.price) is not None:
        more = estimator.unroll_steps - 1

        def with_steps(size):
            gradients, products = price(size)
            return Cost(gradients + more, products)

        made = made._replace(price=with_steps)
    return made
