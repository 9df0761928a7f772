"""Losses whose gradient is not the derivative of their value: every product is right for them too.

Straight-through rounding, gradient reversal and clipped gradients, put into the training
losses of the zoo. The truth is `jax.grad` of the training run written out.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import (
    BilevelProblem,
    ImplicitOptimizer,
    InOrder,
    Task,
    Window,
    check_hypergradient,
    drmad,
    f2sa,
    finite_difference,
    forward,
    from_optax,
    greedy,
    hyperdistill,
    one_step,
    reverse,
    reversible,
)
from gradhpo.core.curvature import curvature
from gradhpo.core.custom_rules import custom_rules
from gradhpo.testing import assert_trees_close, relative_error, unrolled_loss
from gradhpo.testing.problems import ZOO, opaque
from gradhpo.transforms import momentum_sgd, reversible_sgd
from gradhpo.utils.validation import GradhpoWarning

pytestmark = pytest.mark.usefixtures("x64")
T = 2


def _round(x):
    return jnp.round(8 * x) / 8


def _vjp(function, backward):
    """`function` with a rule `cotangent -> cotangent` in place of its derivative."""
    ruled = jax.custom_vjp(function)
    ruled.defvjp(lambda x: (function(x), None), lambda _, g: (backward(g),))
    return ruled


_straight = jax.custom_jvp(_round)
_straight.defjvps(lambda dx, y, x: dx)

RULES = {
    "straight_through": _vjp(_round, lambda g: g),
    "straight_through_jvp": _straight,
    "reversal": _vjp(lambda x: x, lambda g: -g),
    "clipped": _vjp(lambda x: x, lambda g: jnp.clip(g, -0.05, 0.05)),
}


def with_rule(problem_at, rule):
    """A problem of the zoo, its training loss at weights of which a part goes through `rule`."""
    task = problem_at(T)
    loss, make_optimizer = task.problem.dynamics.parts

    def ruled(w, *arguments):
        return loss(jax.tree.map(lambda x: 0.3 * x + 0.7 * rule(x), w), *arguments)

    dynamics = from_optax(ruled, make_optimizer)
    return task.replace(problem=task.problem._replace(dynamics=dynamics))


def started(task, steps=T):
    """The start of an episode and its data."""
    inner, window = task.begin(steps)
    return task.problem, inner, task.hyperparams, window


def opaque_step(task):
    """The problem of a task with dynamics that are one unknown step."""
    return opaque(lambda steps: task)(T).problem


UPDATE_FNS = {"nested", "integer_leaves", "mlp_update_fn"}
"""Their steps are opaque: reverse over reverse, as the others' are once more below."""


def every_vjp(x):
    return (RULES["straight_through"](x) + RULES["reversal"](x) + RULES["clipped"](x)) / 3


WITH_JVP = ("quadratic_penalty", "outer_lam", "mlp_momentum")
CASES = [(name, "vjp") for name in ZOO if name not in UPDATE_FNS]
CASES += [(name, "jvp") for name in WITH_JVP]


@pytest.mark.parametrize("name, rule", CASES)
def test_exact_methods_are_the_gradient_of_the_written_out_run(name, rule):
    """With `inner_optimizer` and with `update_fn` (opaque) alike."""
    ruled = {"vjp": every_vjp, "jvp": _straight}[rule]
    task = with_rule(ZOO[name], ruled)
    problem, inner, lam, window = started(task)

    @jax.jit
    def everything(lam, origin):
        exact = jax.grad(lambda x: unrolled_loss(problem, inner, x, window, origin))(lam)
        return exact, [
            reverse(T).estimate(p, (), inner, lam, window, origin).hypergrad
            for p in (problem, opaque_step(task))
        ]

    exact, estimates = everything(lam, task.origin())
    for got in estimates:
        assert_trees_close(got, exact, 1e-9)


def small(steps=T, rule="clipped", make_optimizer=None):
    """Two weights, two hyperparameters, a rule inside a network."""
    x = jnp.asarray(np.random.default_rng(3).standard_normal((6, 2)))

    def loss(w, lam, batch):
        hidden = RULES[rule](jnp.tanh(3 * x * w["a"]))
        return jnp.mean((hidden @ w["b"] - batch) ** 2) + jnp.sum(jnp.exp(lam) * w["b"] ** 2)

    def judge(w, lam, batch):
        return jnp.sum((w["a"] - batch) ** 2) + jnp.sum(w["a"] * w["b"])

    make_optimizer = make_optimizer or (lambda lam: optax.sgd(0.2, momentum=0.5))
    problem = BilevelProblem(from_optax(loss, make_optimizer), judge, loss)
    lam = jnp.array([-1.0, 0.3])
    w = {"a": jnp.array([0.5, -1.0]), "b": jnp.array([1.5, -2.0])}
    train, val = jnp.linspace(-1, 1, steps), jnp.linspace(2, 1, steps)
    return Task(problem, w, lam, InOrder(train), InOrder(val))


@pytest.mark.parametrize("rule", RULES)
def test_every_method_agrees_with_itself_on_an_opaque_step(rule):
    """The same training as `inner_optimizer` and as `update_fn`, exact methods and others."""
    task = small(rule=rule)
    problem, inner, lam, window = started(task)
    unknown = opaque_step(task)
    last = jax.tree.map(lambda x: x[-1:], window)
    methods = {
        "reverse": (reverse(T), window),
        "segments": (reverse(T, memory="segments"), window),
        "forward": (forward(T), window),
        "drmad": (drmad(T), window),
        "greedy": (greedy(0.8, T), window),
        "one_step": (one_step(), last),
        "hyperdistill": (hyperdistill(0.9, theta=1.0), last),
    }

    # The negative control: the rule matters.
    plain = small(rule="reversal" if rule == "clipped" else "clipped").problem

    @jax.jit
    def everything(inner, lam):
        def estimates(problem):
            return {
                name: estimator.estimate(
                    problem, estimator.init(inner, lam, part), inner, lam, part
                ).hypergrad
                for name, (estimator, part) in methods.items()
            }

        exact = jax.grad(lambda x: unrolled_loss(problem, inner, x, window))(lam)
        other = reverse(T).estimate(plain, (), inner, lam, window).hypergrad
        return estimates(problem), estimates(unknown), exact, other

    got, want, exact, other = everything(inner, lam)
    assert_trees_close(got, want, 1e-12)
    assert_trees_close(got["forward"], exact, 1e-12)
    assert relative_error(other, exact) > 0.1


def compiled(estimator, problem, inner, lam, window):
    """The hypergradient as one program."""
    estimate = jax.jit(partial(estimator.estimate, problem))
    return estimate((), inner, lam, window).hypergrad


def test_methods_with_their_own_way_back():
    """Weights and gradients made from the slots, bits run backwards, one value per piece."""
    for make, estimator, tolerance in (
        (lambda lam: momentum_sgd(0.2, 0.5), reverse(T), 1e-12),
        (lambda lam: reversible_sgd(0.2, 0.5), reversible(T), 1e-9),
    ):
        task = small(make_optimizer=make)
        problem, inner, lam, window = started(task)
        unknown = opaque_step(task)
        got = compiled(estimator, problem, inner, lam, window)
        assert_trees_close(got, compiled(reverse(T), unknown, inner, lam, window), tolerance)


def test_single_loop_products_are_the_pullback():
    """q H and q M of a loss whose gradient's derivative is not symmetric."""
    problem, inner, lam, window = started(small(rule="reversal"))
    batch = window.train[0]
    q = {"a": jnp.array([1.0, -0.5]), "b": jnp.array([0.3, 2.0])}
    got = curvature(problem.train_loss, inner, lam, batch).products(q)
    gradient = jax.grad(problem.train_loss)
    want = jax.vjp(lambda w, lam: gradient(w, lam, batch), inner.params, lam)[1](q)
    assert_trees_close(got, want, 1e-12)
    along = jax.jvp(lambda w: gradient(w, lam, batch), (inner.params,), (q,))[1]
    assert relative_error(got[0], along) > 0.1  # the negative control: not symmetric


def test_implicit_differentiation_of_a_game():
    """A reversed gradient makes training end at a saddle: c = K w - b(lam), K not symmetric.

    K = [[2, -1], [1, 1]], b = (0, lam): w = lam (1, 2) / 3, whatever its solver starts from.
    """
    reverse_gradient = RULES["reversal"]

    def loss(w, lam, batch):
        return w[0] ** 2 + reverse_gradient(w[0]) * w[1] + w[1] ** 2 / 2 - lam * w[1]

    def judge(w, lam, batch):
        return w[0] + 3 * w[1]

    opt = ImplicitOptimizer(inner_optimizer=optax.sgd(0.3), T=100)
    h = opt.compute_hypergradient(opt.init(jnp.ones(2), 1.5), 0.0, 0.0, loss, judge)
    np.testing.assert_allclose(h, 7 / 3, rtol=1e-5)


@pytest.mark.parametrize("truth", ["reverse", "forward", "differences"])
def test_the_truth_of_a_check_is_the_truth(truth):
    task = small()
    problem, inner, lam, window = started(task)
    with pytest.warns(GradhpoWarning, match="finite_difference .* custom gradients"):
        got = check_hypergradient(task, T, ["reverse", "t1t2"], truth=truth)
    exact = jax.jit(jax.grad(lambda x: unrolled_loss(problem, inner, x, window)))(lam)
    assert_trees_close(got.hypergrad, np.asarray(exact), 1e-8)
    assert got.rows["reverse"].relative_error < 1e-8


@pytest.mark.parametrize("estimator", [finite_difference(), f2sa(1, 2.0)])
def test_methods_that_need_derivatives_to_commute_warn(estimator):
    problem, inner, lam, window = started(small(1), 1)
    memory = estimator.init(inner, lam, window)
    with pytest.warns(GradhpoWarning, match=r"custom gradients \(<lambda> at .*\.py:\d+\)"):
        jax.eval_shape(lambda: estimator.estimate(problem, memory, inner, lam, window))


# -- which rules are known --------------------------------------------------------------------


def guided_relu():
    guided = jax.custom_jvp(jax.nn.relu)
    guided.defjvps(lambda dx, y, x: dx * (x > 0) * (dx > 0))
    return guided


def custom_jvp_of(function):
    ruled = jax.custom_jvp(function)
    ruled.defjvps(lambda dx, y, x: dx)
    return ruled


def own_rule_for(function):
    ruled = jax.custom_jvp(function)

    @ruled.defjvp
    def rule(primals, tangents):
        return function(*primals), tangents[0]

    return ruled


FOREIGN = {
    **RULES,
    "jnp.sign with a rule by defjvps": custom_jvp_of(jnp.sign),
    "jnp.sign with a rule": own_rule_for(jnp.sign),
    "relu with a rule by defjvps": guided_relu(),
    "relu with a rule": own_rule_for(jax.nn.relu),
    "custom_gradient": jax.custom_gradient(lambda x: (x, lambda g: -g)),
    "inside a jit": jax.jit(RULES["reversal"]),
    "inside a scan": lambda x: jax.lax.scan(lambda c, _: (_straight(c), None), x, length=2)[0],
    "inside a branch": lambda x: jax.lax.cond(True, _straight, lambda x: x, x),
    "inside a checkpoint": jax.checkpoint(_straight),
}


@pytest.mark.parametrize("function", FOREIGN.values(), ids=FOREIGN)
def test_a_rule_that_is_not_known_is_seen(function):
    assert custom_rules(lambda x: jnp.sum(function(x)), jnp.ones(2))


KNOWN = [
    *(jax.nn.relu, jax.nn.relu6, jax.nn.silu, jax.nn.gelu, jax.nn.softmax, jax.nn.log_softmax),
    *(jax.nn.logsumexp, jax.nn.softplus, jax.nn.elu, jax.nn.sigmoid, jnp.sinc, jnp.linalg.norm),
    *(jax.scipy.special.entr, jax.scipy.special.erf, optax.projections.projection_simplex),
    *(jnp.round, jax.lax.stop_gradient, jnp.sort),
]


@pytest.mark.parametrize("function", KNOWN, ids=lambda f: f.__name__)
def test_the_rules_of_jax_and_optax_are_known(function):
    assert custom_rules(lambda x: jnp.sum(function(x)), jnp.ones(2)) == []


def test_known_rules_cost_one_forward_over_reverse_product():
    """The program of a loss with JAX's own rules is that of the same loss without any."""

    def program(activation):
        def loss(w, lam, batch):
            return jnp.sum(activation(batch @ w) ** 2) * jnp.exp(lam)

        problem = BilevelProblem(from_optax(loss, optax.sgd(0.1)), loss)
        return lambda w, lam, x: one_step().estimate(
            problem, (), problem.dynamics.init(w, lam), lam, Window(x, x)
        )

    w, x = jnp.ones((5, 4)), jnp.ones((1, 6, 5))

    def products(activation):
        closed = jax.make_jaxpr(program(activation))(w, 0.1, x)
        return str(closed).count("dot_general")

    plain = products(lambda x: jnp.maximum(x, 0.0))
    assert products(jax.nn.relu) == plain
    assert products(RULES["straight_through"]) != plain
