"""How far each method is from the exact hypergradient, on a problem of the user's own.

    print(check_hypergradient(problem, params, hyperparams, window))

Every method estimates the hypergradient of the same window of T training steps, in float64
and with lam held fixed: those that look at a window of one step, or of a few, go through it
window by window, and their last estimate counts. The truth is the derivative of the
validation loss after the T steps,

    h = dL_val(s_T, lam; V_T)/dlam + sum_{t=1}^{T} alpha_T A_T ... A_{t+1} B_t

Implicit and single-loop methods aim at another quantity, the hypergradient at the minimum
of the training loss; the two agree where training has converged.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.interpreters import partial_eval

from gradhpo.algorithms.registry import METHODS
from gradhpo.core.dynamics import InnerState, linearize
from gradhpo.core.estimator import Estimator, roll
from gradhpo.core.inspect import check_problem
from gradhpo.core.problem import BilevelProblem, Window, check_window, outer_gradients
from gradhpo.core.status import Status
from gradhpo.core.step import strengthen
from gradhpo.core.types import Hyper, Params
from gradhpo.utils._jaxpr import inside
from gradhpo.utils.finite_differences import richardson
from gradhpo.utils.gradients import tree_is_finite, tree_last
from gradhpo.utils.validation import check_hyperparams, check_params, leaves_with_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["HypergradientCheck", "Row", "check_hypergradient", "known_methods"]

TRUTHS = ("reverse", "forward", "differences")
DEFAULT = (
    *("fo", "one_step", "t1t2", "greedy", "hyperdistill", "reverse", "forward", "drmad"),
    *("implicit_cg", "implicit_neumann", "es"),
)
"""What `methods=None` runs."""


def known_methods() -> tuple[str, ...]:
    """What `check_hypergradient` knows by name: entries of `METHODS` as they are now, but those
    whose settings have to fit the problem (`saba`, `fds`); give those as estimators.

    >>> known_methods()[:2]
    ('fo', 'one_step')
    """
    return tuple(name for name, method in METHODS.items() if not method.needs)


@dataclass(frozen=True)
class Row:
    """One method against the truth.

    Attributes:
        cosine: Of the angle between the two; NaN where one of them is zero.
        norm_ratio: Norm of the estimate over that of the truth.
        relative_error: Norm of the difference over that of the truth.
        worst_leaf: The leaf that is furthest off, and
        worst_error: by how much, relative to its own norm, or to a hundredth of the whole
            tree's where that is larger.
        gradients: Gradients of a loss, training and validation alike; None where not known.
        products: Second-order products.
        flops: Arithmetic of the method's program, in units of training alone over the window.
        temp_bytes: What the compiled program allocates beside its inputs and outputs.
        status: Of the last estimate, a code of `gradhpo.Status`.
        info: Metrics of the last estimate.
        hypergrad: The estimate, shaped like the hyperparameters.
        refused: Why the method does not apply; all else is then NaN or None.
    """

    cosine: float = math.nan
    norm_ratio: float = math.nan
    relative_error: float = math.nan
    worst_leaf: str = ""
    worst_error: float = math.nan
    gradients: float | None = None
    products: float | None = None
    flops: float = math.nan
    temp_bytes: int | None = None
    status: Status = Status.OK
    info: Mapping[str, float] = field(default_factory=dict)
    hypergrad: Hyper = None
    refused: str = ""


@dataclass(frozen=True)
class HypergradientCheck:
    """Every method against the truth; `print` it, or look at `rows`.

    Attributes:
        rows: Results by method.
        truth: "reverse", "forward" or "differences".
        hypergrad: The exact hypergradient, in float64.
        val_loss: The validation loss after the window.
        steps: T.
    """

    rows: Mapping[str, Row]
    truth: str
    hypergrad: Hyper
    val_loss: float
    steps: int

    def __str__(self) -> str:
        norm = _norm(_floats(self.hypergrad))
        title = (
            f"hypergradient of {self.steps} steps by {self.truth}, float64: norm {norm:.4g}, "
            f"validation loss {self.val_loss:.4g}"
        )
        lines, notes = [_HEADER], {}
        for name, row in self.rows.items():
            if not row.refused:
                lines.append(_cells(name, row))
            if row.refused or row.status != Status.OK:
                note = f"refused: {row.refused}" if row.refused else f"status {row.status.name}"
                notes.setdefault(note, []).append(name)
        said = [f"{', '.join(names)} {note}" for note, names in notes.items()]
        return "\n".join([title, "", *_align(lines), *([""] if said else []), *said])

    def plot(self, path: str | Path) -> Path:
        """Draw cosine against cost into a file; the suffix of `path` is the format.

        Raises:
            ImportError: Matplotlib is missing.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError('Figures need Matplotlib: pip install ".[plot]"') from error
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.add_subplot()
        self.draw(axes)
        axes.set_title(f"Hypergradient of {self.steps} steps", loc="left", fontsize=11, pad=12)
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(figure).print_figure(file, dpi=160, facecolor="white")
        return file

    def draw(self, axes: "Axes") -> None:
        """Put one labelled point per method on Matplotlib axes; a known name looks alike on all."""
        known = known_methods()
        order = [*known, *(name for name in self.rows if name not in known)]
        shown = {n: row for n, row in self.rows.items() if math.isfinite(row.cosine)}
        for name, row in shown.items():
            i = order.index(name)
            color, marker = _COLORS[i % len(_COLORS)], _MARKERS[i % len(_MARKERS)]
            style = {"color": color, "marker": marker, "edgecolor": "white", "linewidth": 0.6}
            axes.scatter(row.flops, row.cosine, s=64, label=name, clip_on=False, **style)
        axes.set_xscale("log")
        axes.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
        axes.minorticks_off()
        axes.set_xlim(0.9, 1.2 * max([10, *(row.flops for row in shown.values())]))
        # Even steps are even angles: near 1 a cosine tells little apart.
        axes.set_yscale("function", functions=(lambda c: -np.arccos(np.clip(c, -1, 1)), np.cos))
        lowest = max(-1.0, min([0.0, *(row.cosine for row in shown.values())]) - 0.2)
        axes.set_ylim(lowest, 1)
        ticks = [c for c in (1, 0.99, 0.95, 0.8, 0.5, 0, -0.5, -0.9, -1) if c >= lowest]
        axes.set_yticks(ticks, [f"{c:g}" for c in ticks])
        axes.grid(axis="y", color="#EBEBEB", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel("arithmetic, in units of training alone")
        axes.set_ylabel("cosine to the exact hypergradient")
        axes.spines[["top", "right"]].set_visible(False)


def check_hypergradient(
    problem: BilevelProblem,
    params: Params | InnerState,
    hyperparams: Hyper,
    window: Window,
    methods: Iterable[str] | Mapping[str, Estimator | str] | None = None,
    *,
    truth: str = "reverse",
) -> HypergradientCheck:
    """Compare methods with the exact hypergradient of a window of training.

    Args:
        problem: Dynamics and validation loss, as for `bilevel_step`.
        params: Weights at the start of the window; or an `InnerState`, to start with the
            optimizer's slots of a run under way.
        hyperparams: lam, held fixed.
        window: T train batches and T validation batches, stacked along the leading axis; the
            last validation batch is the one that judges.
        methods: Names (`known_methods()`), or a mapping from names of your choice to estimators
            (or names). None runs the ones that need no setting and no minimum, and two that do.
        truth: "reverse" (memory for T states), "forward" (one column per hyperparameter),
            or "differences": Richardson's, four runs per hyperparameter, independent of all
            derivatives.

    Floating leaves are cast to float64 for the time of the check; a loss that casts to
    float32 inside limits what "exact" can mean. One program is compiled per method.

    Raises:
        ValueError: no window, an unknown method or truth, or a truth that is not finite; the
            message says at which step.

    >>> import jax, jax.numpy as jnp, optax
    >>> from gradhpo import from_optax
    >>> loss = lambda w, lam, batch: jnp.sum((w - batch) ** 2) / 2 + jnp.exp(lam) * jnp.sum(w**2)
    >>> judge = lambda w, lam, batch: jnp.sum((w - batch) ** 2)
    >>> problem = BilevelProblem(from_optax(loss, optax.sgd(0.1)), judge)
    >>> window = Window(jnp.ones((5, 2)), jnp.ones((5, 2)))
    >>> got = check_hypergradient(problem, jnp.zeros(2), -1.0, window, ["fo", "reverse"])
    >>> print(got.rows["reverse"].cosine, got.rows["fo"].norm_ratio)
    1.0 0.0
    """
    chosen = _choose(methods)
    if truth not in TRUTHS:
        raise ValueError(f"truth must be one of {', '.join(TRUTHS)}, got {truth!r}.")
    window = Window(*window)
    steps = check_window(window)
    if not steps:
        raise ValueError("the window is empty: give the batches of at least one step.")
    with _float64():
        lam, window = _wide(hyperparams), _wide(window)
        check_hyperparams(lam)
        inner = params
        if not isinstance(params, InnerState):
            check_params(params)
            inner = problem.dynamics.init(strengthen(_wide(params)), lam)
        inner = strengthen(_wide(inner))
        check_problem(problem, inner, lam, window)
        loss, exact = _truth(truth, problem, inner, lam, window, steps)
        if not (np.isfinite(loss) and tree_is_finite(exact)):
            raise ValueError(_first_bad(problem, inner, lam, window, steps))
        train = jax.make_jaxpr(partial(roll, problem.dynamics))
        training = _flops(train(inner, lam, window.train))[0]
        rows = {
            name: _measure(choice, problem, inner, lam, window, steps, exact, training)
            for name, choice in chosen.items()
        }
        as_numpy = jax.tree.map(np.asarray, exact)
    return HypergradientCheck(MappingProxyType(rows), truth, as_numpy, float(loss), steps)


def _choose(methods: Any) -> dict[str, Estimator | str]:
    if methods is None:
        return {name: name for name in DEFAULT}
    if isinstance(methods, str | Estimator):
        raise ValueError(
            "methods must be several: a list of names, or a mapping from names to estimators, "
            f"got {type(methods).__name__}."
        )
    chosen = dict(methods) if isinstance(methods, Mapping) else {name: name for name in methods}
    known = known_methods()
    for choice in chosen.values():
        if isinstance(choice, Estimator) or choice in known:
            continue
        raise ValueError(
            f"unknown method {choice!r}; known: {', '.join(known)}. Anything else is given as an "
            "estimator, in a mapping: {'mine': my_estimator()}."
        )
    return chosen


def _float64() -> Any:
    """64-bit types for a while; the context manager has moved between versions of JAX."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64  # type: ignore[attr-defined]

    return enable_x64()


def _wide(tree: Any) -> Any:
    """Floating leaves as float64 arrays; integers and keys as they are."""

    def wide(x):
        return jnp.asarray(x, jnp.float64 if jnp.issubdtype(_dtype(x), jnp.floating) else None)

    return jax.tree.map(wide, tree)


def _dtype(x: Any) -> Any:
    return x.dtype if hasattr(x, "dtype") else jnp.result_type(x)


# -- the truth -------------------------------------------------------------------------------


def _truth(name, problem, inner, lam, window, steps) -> tuple[Any, Hyper]:
    """`(L_val, h)` after the whole window."""

    def loss(lam):
        end = roll(problem.dynamics, inner, lam, window.train)
        return problem.outer_loss(end.params, lam, tree_last(window.val))

    if name == "differences":
        return jax.jit(loss)(lam), richardson(jax.jit(loss), lam)
    exact = _named(name, steps)

    @jax.jit
    def estimate(inner, lam, window):
        return exact.estimate(problem, (), inner, lam, window)

    got = estimate(inner, lam, window)
    return got.info["val_loss"], got.hypergrad


def _first_bad(problem, inner, lam, window, steps) -> str:
    """Where the exact hypergradient stops being finite."""
    step = jax.jit(problem.dynamics.step)
    batches = [jax.tree.map(lambda x: x[t], window.train) for t in range(steps)]  # noqa: B023
    states = [inner]
    for t, batch in enumerate(batches, start=1):
        states.append(step(states[-1], lam, batch))
        if not tree_is_finite(states[-1]):
            return (
                f"there is no exact hypergradient to compare with: training leaves NaN or infinity "
                f"in the state at step {t} of {steps}. Look for NaN in that batch, or a learning "
                "rate that is too large."
            )
    loss, alpha, direct = outer_gradients(problem, states[-1], lam, tree_last(window.val))
    if not np.isfinite(loss):
        return (
            f"there is no exact hypergradient to compare with: training is finite, but the "
            f"validation loss after step {steps} is {loss}. Look at the last validation batch."
        )
    where = "of the validation loss itself" if not tree_is_finite((alpha, direct)) else ""
    for t in range(steps, 0, -1):
        if where:
            break
        alpha, term = linearize(problem.dynamics, states[t - 1], lam, batches[t - 1])[1](alpha)
        if not tree_is_finite((alpha, term)):
            where = f"of step {t} of {steps}"
    return (
        "there is no exact hypergradient to compare with: the losses are finite, but the "
        f"derivative {where} is not. With Adam set eps_root=1e-8: its square root has no "
        "derivative at zero."
    )


# -- one method ------------------------------------------------------------------------------


def _measure(choice, problem, inner, lam, window, steps, exact, training) -> Row:
    try:
        estimator = _named(choice, steps) if isinstance(choice, str) else choice
        if steps % estimator.window:
            raise ValueError(f"its window of {estimator.window} does not divide {steps} steps.")
        traced = jax.jit(_episode(problem, estimator)).trace(inner, lam, window)
    except (TypeError, ValueError) as error:
        notes = [note for note in getattr(error, "__notes__", ()) if "gradhpo" in note]
        if isinstance(error, TypeError) and not notes:
            raise
        return Row(refused=_sentence(notes[-1] if notes else str(error)))
    compiled = traced.lower().compile()
    hypergrad, info = compiled(inner, lam, window)
    hypergrad = jax.tree.map(np.asarray, hypergrad)
    iterations = float(np.mean(info.get("linear_iterations", 0.0)))
    gradients, products = None, None
    if isinstance(choice, str):
        size = sum(np.size(x) for x in jax.tree.leaves(lam))
        gradients, products = METHODS[choice].cost(steps, size, estimator.window)
        products += iterations - METHODS[choice].iterations
        if estimator.start is not None:  # HyperDistill's fit
            gradients, products = gradients + 2 * steps + 1, products + 2 * steps
    fixed, looped = _flops(traced.jaxpr)
    last = {name: float(np.asarray(x)[-1]) for name, x in info.items()}
    status = Status(int(last.pop("status", Status.OK)))
    if status == Status.OK and not tree_is_finite(hypergrad):
        status = Status.NONFINITE_HYPERGRAD
    return Row(
        **_compare(hypergrad, exact),
        gradients=gradients,
        products=products,
        flops=float((fixed + looped * max(iterations, 1)) / max(training, 1)),
        temp_bytes=getattr(compiled.memory_analysis(), "temp_size_in_bytes", None),
        status=status,
        info=MappingProxyType(last),
        hypergrad=hypergrad,
    )


def _named(name: str, steps: int) -> Estimator:
    """A method of the registry, for a run of T steps."""
    method = METHODS[name].over(steps, inner_optimizer=optax.identity())  # the problem has its own
    return method.estimator()


def _episode(problem: BilevelProblem, estimator: Estimator) -> Callable:
    """`(s_0, lam, window) -> (last estimate, info of all)`, lam held fixed."""

    def run(inner, lam, window):
        steps = estimator.window

        def piece(i):  # a slice, where windows made beforehand would be a copy of all the data
            return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * steps, steps), window)

        memory = estimator.init(inner, lam, piece(0))
        if estimator.start is not None:
            memory = estimator.start(problem, memory, inner, lam, window)

        def body(carry, i):
            memory, inner, _ = carry
            got = estimator.estimate(problem, memory, inner, lam, piece(i))
            return (got.memory, got.inner, got.hypergrad), dict(got.info)

        carry = strengthen((memory, inner, optax.tree.zeros_like(lam)))
        windows = jnp.arange(jax.tree.leaves(window)[0].shape[0] // steps)
        (_, _, hypergrad), info = lax.scan(body, carry, windows)
        return hypergrad, info

    return run


def _sentence(text: str) -> str:
    """The first one."""
    return " ".join(text.split()).split(". ")[0].removesuffix(".") + "."


def _floats(tree: Any) -> list[np.ndarray]:
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]


def _norm(leaves: list[np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(x * x) for x in leaves)))


def _compare(got: Hyper, want: Hyper) -> dict[str, Any]:
    a, b = _floats(got), _floats(want)
    size, whole = _norm(a), _norm(b)
    if not np.isfinite(size):
        return {}
    dot = sum(float(np.sum(x * y)) for x, y in zip(a, b, strict=True))
    off = [_norm([x - y]) for x, y in zip(a, b, strict=True)]
    own = [max(_norm([y]), 1e-2 * whole) for y in b]
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.divide(off, own)
        worst = int(np.argmax(errors))
        return {
            "cosine": float(np.divide(dot, size * whole)),
            "norm_ratio": float(np.divide(size, whole)),
            "relative_error": float(np.divide(_norm([np.array(off)]), whole)),
            "worst_leaf": leaves_with_names(want)[worst][0],
            "worst_error": float(errors[worst]),
        }


# -- its arithmetic --------------------------------------------------------------------------
# XLA's own count takes the body of a loop once, however long the loop is.

_MOVES = set(
    "broadcast_in_dim concatenate convert_element_type copy copy_p dynamic_slice gather iota "
    "dynamic_update_slice pad reshape rev select_n slice squeeze stop_gradient transpose".split()
)


def _flops(closed: Any) -> np.ndarray:
    """`[fixed, per iteration]`: arithmetic of a program, loops multiplied out.

    The second number is that of loops whose length only the run decides (solvers).
    """
    jaxpr = getattr(closed, "jaxpr", closed)
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(used)


def _count(jaxpr: Any) -> np.ndarray:
    total = np.zeros(2)
    seen, first = {}, {}  # equal equations are computed once, as the compiler does
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        inputs = [str(v) if hasattr(v, "val") else first.get(v, v) for v in equation.invars]
        key = name, tuple(inputs), str(params)
        if key in seen:
            first.update(zip(equation.outvars, seen[key], strict=True))
            continue
        seen[key] = equation.outvars
        bodies = [_count(body) for body in inside(equation)]
        if name == "scan":
            total += params["length"] * sum(bodies)
        elif name == "while":
            total[1] += np.sum(bodies)
        elif name == "cond":
            total += np.max(bodies, axis=0)
        elif bodies:
            total += sum(bodies)
        else:
            total[0] += _operations(name, params, equation)
    return total


def _operations(name: str, params: Mapping[str, Any], equation: Any) -> float:
    out, *_ = (v.aval for v in equation.outvars)
    sizes = [getattr(v.aval, "size", 0) for v in equation.invars]
    if name in _MOVES or not jnp.issubdtype(out.dtype, jnp.floating):
        return 0.0
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2.0 * out.size * math.prod(equation.invars[0].aval.shape[d] for d in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        return 2.0 * out.size * kernel.size / kernel.shape[params["dimension_numbers"].rhs_spec[0]]
    return float(max([out.size, *sizes]) if name.startswith("reduce") else out.size)


# -- the table -------------------------------------------------------------------------------

_HEADER = [
    *("method", "cosine", "norm ratio", "error", "worst leaf", "off by"),
    *("gradients", "products", "flops", "temp bytes"),
]
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^v<>PX*ph"


def _cells(name: str, row: Row) -> list[str]:
    def whole(x):
        return "" if x is None else f"{x:,.10g}"

    return [
        *(name, f"{row.cosine:.4f}", f"{row.norm_ratio:.3g}", f"{row.relative_error:.1e}"),
        *(row.worst_leaf, f"{row.worst_error:.1e}", whole(row.gradients), whole(row.products)),
        *(f"{row.flops:.3g}", whole(row.temp_bytes)),
    ]


def _align(rows: list[list[str]]) -> list[str]:
    """Columns of one width; words on the left, numbers on the right."""
    words = [_HEADER.index("method"), _HEADER.index("worst leaf")]
    lines = [""] * len(rows)
    for i, column in enumerate(zip(*rows, strict=True)):
        width = max(map(len, column))
        for j, cell in enumerate(column):
            lines[j] += (cell.ljust(width) if i in words else cell.rjust(width)) + "  "
    return [line.rstrip() for line in lines]
