"""The check of hypergradients: what it calls exact is, and what is wrong it calls wrong."""

import math
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import (
    BilevelProblem,
    Dynamics,
    InnerState,
    InOrder,
    Start,
    Task,
    Window,
    cli,
    from_optax,
    from_update,
    one_step,
    over_tasks,
    reverse,
    spaces,
)
from gradhpo.algorithms.registry import METHODS
from gradhpo.core.estimator import Cost
from gradhpo.core.status import Status
from gradhpo.diagnostics import check_hypergradient, discrete_gap, episode, known_methods
from gradhpo.diagnostics.flops import arithmetic
from gradhpo.doctor import doctor
from gradhpo.testing import assert_trees_close, relative_error
from gradhpo.testing.problems import (
    batch_norm,
    initial_scale,
    integer_leaves,
    learning_rates,
    mlp_momentum,
    nested,
    ridge,
    straight_line,
)


def rescaled(factor):
    """Reverse mode, wrong by a factor."""

    def make(steps):
        right = reverse(steps)

        def estimate(*args):
            got = right.estimate(*args)
            return got._replace(hypergrad=optax.tree.scale(factor, got.hypergrad))

        return right._replace(estimate=estimate)

    return make


def one_leaf_missing(steps):
    """Reverse mode that forgets a small leaf."""
    right = reverse(steps)

    def estimate(*args):
        got = right.estimate(*args)
        return got._replace(hypergrad={**got.hypergrad, "rate": 0 * got.hypergrad["rate"]})

    return right._replace(estimate=estimate)


@pytest.fixture(scope="module")
def checked():
    """Exact methods, approximations and mistakes on one problem, judged by differences."""
    methods = {
        **{name: name for name in ("forward", "rtho", "one_step", "greedy", "t1t2", "fo")},
        "segments": reverse(4, memory="segments"),
        "flipped": rescaled(-1.0)(4),
        "doubled": rescaled(2.0)(4),
        "forgetful": one_leaf_missing(4),
        "five": reverse(5),
    }
    return check_hypergradient(integer_leaves(4), 4, methods, truth="differences")


@pytest.mark.parametrize("name", ["forward", "rtho", "segments"])
def test_exact_methods_are_exact(checked, name):
    row = checked.rows[name]
    assert row.relative_error < 1e-9 and row.worst_error < 1e-9
    assert row.cosine == pytest.approx(1, abs=1e-12)
    assert row.norm_ratio == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("name", ["one_step", "greedy", "fo"])
def test_approximations_are_not(checked, name):
    assert checked.rows[name].relative_error > 1e-2


def test_mistakes_are_seen(checked):
    flipped, doubled = checked.rows["flipped"], checked.rows["doubled"]
    assert flipped.cosine == pytest.approx(-1) and flipped.norm_ratio == pytest.approx(1)
    assert doubled.cosine == pytest.approx(1) and doubled.norm_ratio == pytest.approx(2)
    assert doubled.relative_error == pytest.approx(1)
    forgetful = checked.rows["forgetful"]
    assert forgetful.worst_leaf == "['rate']" and forgetful.worst_error == pytest.approx(1)


def convolves(params, hyperparams, batch):
    x = jax.lax.conv_general_dilated(batch, params["filter"], (1,), "SAME")
    return jnp.mean(jnp.tanh(x) ** 2) + jnp.exp(hyperparams) * jnp.sum(params["filter"] ** 2)


@pytest.fixture
def convolving():
    """A task whose training step convolves."""
    normal = np.random.default_rng(0).standard_normal
    problem = BilevelProblem(from_optax(convolves, optax.sgd(0.1, momentum=0.5)), convolves)
    params = {"filter": np.float32(normal((2, 1, 3)))}
    train, val = (InOrder(normal((4, 3, 1, 6))) for _ in range(2))
    return Task(problem, params, -1.0, train, val)


def test_convolutions_are_not_looped_over_in_a_program(convolving, monkeypatch):
    """Step by step the same is found, in a fraction of the time on CPU."""
    names = ["one_step", "greedy", "hyperdistill", "reverse", "forward"]
    on_cpu = jax.default_backend() == "cpu"
    inner, window = convolving.begin(4)
    loop = episode.loop_for(convolving.problem, inner, jnp.array(-1.0), window)
    assert (loop == "host") == on_cpu
    monkeypatch.setattr(episode, "loop_for", lambda *args: "host")
    by_step = check_hypergradient(convolving, 4, names)
    by_differences = check_hypergradient(convolving, 4, ["reverse"], truth="differences")
    assert by_differences.rows["reverse"].relative_error < 1e-9
    monkeypatch.setattr(episode, "loop_for", lambda *args: "scan")
    looped = check_hypergradient(convolving, 4, names)
    for name in names:
        one, other = by_step.rows[name], looped.rows[name]
        assert (one.temp_bytes is None) == (name != "forward")  # which is one program
        assert other.temp_bytes is not None
        assert relative_error(one.hypergrad, other.hypergrad) < 1e-12
        assert one.flops == other.flops and one.info.keys() == other.info.keys()


def test_a_loss_that_is_no_number_is_named():
    problem = BilevelProblem(
        from_optax(lambda w, lam, batch: (w - batch) ** 2 * lam, optax.sgd(0.1)),
        lambda w, lam, batch: jnp.sum(w),
    )
    batches = InOrder(jnp.ones((2, 3)))
    task = Task(problem, jnp.zeros(3), 1.0, batches, batches)
    for look in (lambda: check_hypergradient(task, 2, ["reverse"]), lambda: doctor(task, 2)):
        with pytest.raises(TypeError, match="train_loss_fn must return one floating-point scalar"):
            look()


def test_refusals_are_rows(checked):
    assert checked.rows["t1t2"].refused.startswith("finite differences need to know")
    assert checked.rows["five"].refused == "its window of 5 does not divide 4 steps."
    assert math.isnan(checked.rows["five"].cosine)
    text = str(checked)
    assert "five refused: its window" in text and "t1t2 refused: finite" in text
    assert not any(line.startswith("five  ") for line in text.splitlines())


def test_costs(checked):
    row = checked.rows["forward"]  # a rate and a penalty
    assert (row.gradients, row.products) == (5, 8)
    assert (checked.rows["segments"].gradients, checked.rows["segments"].products) == (13, 4)
    assert 1 <= checked.rows["fo"].flops < checked.rows["one_step"].flops < row.flops
    assert all(row.temp_bytes > 0 for row in checked.rows.values() if not row.refused)
    assert checked.hypergrad["rate"].dtype == np.float64


def test_table_is_aligned(checked):
    title, blank, header, *rows = str(checked).splitlines()
    assert "4 steps by differences" in title and not blank
    ends = [line.index(word) + len(word) for word in ("cosine", "error") for line in [header]]
    shown = rows[: rows.index("")]
    assert len(shown) == 9
    assert all(line[end - 1] != " " and line[end] == " " for line in shown for end in ends)


def test_plot(checked, tmp_path):
    pytest.importorskip("matplotlib")
    path = checked.plot(tmp_path / "new" / "cosines.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    checked.draw(axes)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(checked.rows)
    found = [name for name, row in checked.rows.items() if np.isfinite(row.cosine)]
    assert len(axes.lines) == len(found) < len(checked.rows)
    words = [text.get_text() for text in axes.texts]
    assert words.count("refuses") == sum(bool(row.refused) for row in checked.rows.values())
    assert "cost" in words


def test_truths_agree_and_a_run_may_be_under_way():
    task = mlp_momentum(3)
    inner, _ = task.begin(3)
    a = check_hypergradient(task, 3, ["reverse"], truth="forward", inner=inner)
    b = check_hypergradient(task, 3, ["reverse"])
    assert a.rows["reverse"].relative_error < 1e-12 and b.rows["reverse"].relative_error == 0
    assert_trees_close(a.hypergrad, b.hypergrad, 1e-12)
    begun = inner._replace(opt_state=jax.tree.map(lambda x: x + 1, inner.opt_state))
    c = check_hypergradient(task, 3, ["reverse"], inner=begun)
    assert relative_error(c.hypergrad, b.hypergrad) > 1e-2


TRUTHS = pytest.mark.parametrize("truth", ["reverse", "forward", "differences"])


def pulled_to_one(dynamics_init, begin=None, **task):
    """w <- 0.9 w + 0.1 for three steps, judged by w_3 squared: s_0 is all that lam acts on."""

    def step(inner, lam, batch):
        return inner._replace(params=inner.params - 0.1 * (inner.params - batch))

    def judge(w, lam, batch):
        return (w - batch) ** 2

    problem = BilevelProblem(Dynamics(dynamics_init, step), judge, begin=begin)
    return Task(problem, 1.0, 2.0, **task)


def scaled(params, lam):
    return InnerState(lam * params, ())


def as_given(params, lam):
    return InnerState(params, ())


ONES_AND_ZEROS = {"train": InOrder(np.ones(3)), "val": InOrder(np.zeros(3))}
# w_0 = 2, w_3 = 1 + 0.9^3 (2 - 1), so that dL/dlam = 2 w_3 0.9^3.
TRUE_VALUE = 2 * (1 + 0.9**3) * 0.9**3
BEGINNINGS = {
    "Dynamics.init": pulled_to_one(scaled, **ONES_AND_ZEROS),
    "begin": pulled_to_one(
        as_given, lambda params, lam, key: Start(lam * params), **ONES_AND_ZEROS
    ),
    "begin with its batches": pulled_to_one(
        as_given,
        lambda params, lam, key: Start(lam * params, Window(jnp.ones(3), jnp.zeros(3))),
    ),
}


@TRUTHS
@pytest.mark.parametrize("name", BEGINNINGS)
def test_initial_weights_are_hyperparameters(name, truth):
    """By hand 2.52; the methods that see one step, or the minimum, see nothing of it."""
    seeing = ["reverse", "forward", "rtho", "drmad"]
    got = check_hypergradient(
        BEGINNINGS[name], 3, [*seeing, "one_step", "hyperdistill"], truth=truth
    )
    assert round(TRUE_VALUE, 2) == 2.52
    assert got.hypergrad == pytest.approx(TRUE_VALUE, rel=1e-9)
    assert all(got.rows[method].relative_error < 1e-9 for method in seeing)
    for method in ("one_step", "hyperdistill"):
        assert got.rows[method].norm_ratio == 0 and not got.rows[method].refused


def test_a_run_under_way_has_no_start():
    """What s_0 once was made from is past: the same state as a constant has derivative zero."""
    got = check_hypergradient(
        BEGINNINGS["begin"], 3, ["reverse"], truth="differences", inner=InnerState(2.0, ())
    )
    assert got.hypergrad == 0 and got.val_loss == pytest.approx((1 + 0.9**3) ** 2)


def test_slots_of_a_type_of_their_own_keep_it():
    """Optax's accumulator is float32 and refuses any other; afresh and in a run under way."""
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    loss = lambda w, lam, batch: jnp.sum((w - batch) ** 2)  # noqa: E731
    dynamics = from_optax(loss, lambda lam: optax.MultiSteps(optax.sgd(lam, momentum=0.9), 2))
    task = Task(
        BilevelProblem(dynamics, loss), np.zeros(3, np.float32), 0.1, InOrder(x), InOrder(x)
    )
    for inner in None, task.begin(4)[0]:
        row = check_hypergradient(task, 4, ["reverse"], truth="differences", inner=inner).rows
        assert row["reverse"].relative_error < 1e-4
        row = check_hypergradient(task, 4, ["forward"], inner=inner).rows["forward"]
        assert row.relative_error < 1e-6


def test_the_draw_of_a_start():
    def begin(params, lam, key):
        return Start(lam * params * jax.random.uniform(key))

    task = pulled_to_one(as_given, begin, **ONES_AND_ZEROS)
    first, again, other = (
        float(check_hypergradient(task, 3, ["reverse"], key=key).hypergrad)
        for key in (None, jax.random.key(0), jax.random.key(1))
    )
    assert first == again != other


def test_batches_that_depend_on_lam_are_refused():
    def begin(params, lam, key):
        return Start(params, Window(lam * jnp.ones(3), jnp.zeros(3)))

    with pytest.raises(ValueError, match="the window that begin returns depends on"):
        check_hypergradient(pulled_to_one(as_given, begin), 3, ["fo"])


@TRUTHS
@pytest.mark.parametrize("task", [batch_norm(4), initial_scale(4)], ids=["state", "start"])
def test_model_states_and_starts_have_one_truth(task, truth):
    got = check_hypergradient(task, 4, ["reverse", "forward", "one_step"], truth=truth)
    for name in ("reverse", "forward"):
        assert got.rows[name].relative_error < 1e-9, name
    assert got.rows["one_step"].relative_error > 1e-2


def test_estimators_over_tasks_are_refused():
    got = check_hypergradient(ridge(3), 3, {"mean": over_tasks(reverse(3), 2)})
    assert got.rows["mean"].refused.startswith("it is over several tasks")


def test_implicit_methods_refuse_learning_rates():
    row = check_hypergradient(learning_rates(2), 2, ["implicit_cg"]).rows["implicit_cg"]
    assert "cannot tune the leaf" in row.refused


def test_a_solver_that_fails_says_so():
    """On a line without curvature, where the Hessian is singular."""
    got = check_hypergradient(straight_line(2), 2, ["implicit_neumann"])
    assert "implicit_neumann status LINEAR_SOLVE_INACCURATE" in str(got)
    assert got.rows["implicit_neumann"].info["linear_iterations"] == 20


def test_float64_lasts_for_the_check_only(x32):
    task = nested(2)
    got = check_hypergradient(task, 2, ["one_step"])
    assert got.hypergrad["rate"]["decoder"].dtype == np.float64
    assert jnp.ones(1).dtype == jnp.float32 and not jax.config.read("jax_enable_x64")
    inner, window = task.begin(2)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((inner, task.hyperparams)))
    with pytest.raises(ValueError, match="at step 2 of 2"):
        bad = jax.tree.map(lambda x: x.at[1].set(jnp.nan), window.train)
        check_hypergradient(task.replace(train=InOrder(bad)), 2, ["one_step"])
    assert jnp.ones(1).dtype == jnp.float32


def broken(loss=jnp.square, optimizer=None, start=-1.0, steps=3):
    """One weight on the parabola `w**2 lam`, judged by `loss`."""
    dynamics = from_optax(lambda w, lam, batch: lam * w**2 + 0 * batch, optimizer or optax.sgd(0.1))
    problem = BilevelProblem(dynamics, lambda w, lam, batch: loss(w) + 0 * batch)
    batches = InOrder(np.ones(steps))
    return Task(problem, start, 0.5, batches, batches)


@pytest.mark.parametrize(
    "task, keywords, message",
    [
        (broken(), {"steps": 0}, "steps must be at least 1, got 0"),
        (broken(), {"steps": 4}, "holds the batches of 3 steps, and step 4 is asked for"),
        (broken(), {"methods": ["two_step"]}, "unknown method 'two_step'; known: fo, one_st"),
        (broken(), {"methods": "one_step"}, "methods must be several"),
        (broken(), {"methods": one_step()}, "methods must be several"),
        (broken(), {"truth": "reversed"}, "truth must be 'reverse', 'forward' or 'diff"),
        (broken(start=jnp.inf), {}, "the state that training starts from holds NaN"),
        (broken(jnp.log), {}, "validation loss after step 3 is nan"),
        (broken(lambda w: jnp.sqrt(w - w)), {}, "derivative of the validation loss itself"),
        (broken(optimizer=optax.sgd(1e200)), {}, "in the state at step 2 of 3"),
        (broken(optimizer=optax.adam, start=0.0), {}, r"step 3 of 3 is not.*eps_root"),
    ],
)
def test_bad_input(task, keywords, message):
    with pytest.raises(ValueError, match=message):
        check_hypergradient(task, **{"steps": 3, "methods": ["fo"], **keywords})


def test_what_is_no_task_is_named():
    task = broken()
    with pytest.raises(TypeError, match=r"takes a gradhpo.Task, got BilevelProblem: Task\(problem"):
        check_hypergradient(task.problem, 3)
    with pytest.raises(TypeError, match=r"inner must be a gradhpo.InnerState.*got float; weights"):
        check_hypergradient(task, 3, inner=-1.0)


def test_an_error_of_the_user_is_not_a_refusal():
    """A TypeError in a method is a bug, unless gradhpo explains it."""

    def estimate(*args):
        raise TypeError("oops")

    with pytest.raises(TypeError, match="oops"):
        mine = one_step()._replace(estimate=estimate)
        check_hypergradient(broken(), 2, {"mine": mine})


def test_no_forward_mode_is_a_refusal():
    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))
    problem = BilevelProblem(
        from_update(lambda w, lam, batch: w - lam * square(w)), lambda w, lam, batch: w
    )
    batches = InOrder(np.ones(2))
    task = Task(problem, 1.0, 0.1, batches, batches)
    got = check_hypergradient(task, 2, ["reverse", "forward"])
    assert "no forward mode" in got.rows["forward"].refused
    assert not got.rows["reverse"].refused


def test_arithmetic():
    """Loops multiplied out, what nobody needs left out, what is equal taken once."""
    n, T = 8, 5

    def f(w, xs):
        def body(w, x):
            return x @ w, x @ x  # nobody looks at the second

        return jax.lax.scan(body, w, xs)[0]

    shapes = jnp.ones((n, n)), jnp.ones((T, n, n))
    assert arithmetic(jax.make_jaxpr(f)(*shapes))[0] == 2 * n**3 * T
    twice = jax.make_jaxpr(lambda w: jnp.sin(w @ w) + jnp.cos(w @ w))(shapes[0])
    assert arithmetic(twice)[0] == 2 * n**3 + 3 * n**2

    def until(w):
        return jax.lax.while_loop(lambda w: w[0, 0] < 9, lambda w: w @ w, w)

    assert arithmetic(jax.make_jaxpr(until)(shapes[0]))[1] == 2 * n**3


def test_the_study(tmp_path):
    pytest.importorskip("matplotlib")
    from gradhpo import report
    from gradhpo.studies import check

    out, lines = tmp_path / "check", []
    settings = {"fast": True, "steps": 2, "seeds": 2, "method": ("implicit_cg",)}
    result = check.run(check.Config(out=out, **settings), lines.append)
    report.write(result, out)
    assert (out / "check.png").read_bytes().startswith(b"\x89PNG")
    at_minimum = report.read(out).methods["ridge at its minimum: implicit_cg"].metrics
    assert at_minimum["relative_error"].mean < 1e-5 and at_minimum["cosine"].seeds.shape == (2,)
    assert any(line.startswith("implicit_cg ") for line in lines)
    table = report.table(result)
    assert "cosine (higher is better)" in table and "norm_ratio (1 is best)" in table
    with pytest.raises(ValueError, match="steps must be at least 1"):
        check.Config(steps=0)
    with pytest.raises(ValueError, match="unknown method 'saba'"):
        check.Config(method=("saba",))


@pytest.mark.parametrize("steps", [1, 10, 13, 15])
def test_any_length_of_run(steps):
    """Windowed methods take the longest window, up to ten, that divides it."""
    methods = ["reverse", "pes", "amigo", "stocbio", "f2sa"]
    rows = check_hypergradient(ridge(steps), steps, methods).rows
    assert not any(row.refused for row in rows.values())
    pieces = {1: 1, 10: 1, 13: 13, 15: 3}[steps]
    assert rows["reverse"].gradients == 2 * steps + 1
    assert rows["pes"].gradients == 33 * (steps + pieces)
    assert rows["f2sa"].gradients == 3 * (steps + pieces)
    assert rows["amigo"].products == rows["stocbio"].products == 11 * pieces


def test_a_registered_method_is_known(monkeypatch, capsys):
    """An entry of `METHODS` is all it takes, whenever it is made."""
    one = METHODS["one_step"]._replace(description="mine alone")
    monkeypatch.setitem(METHODS, "mine", one)
    monkeypatch.setitem(METHODS, "whole", METHODS["greedy"])
    monkeypatch.setitem(METHODS, "choosy", one._replace(needs=("rank",)))
    assert known_methods()[-2:] == ("mine", "whole")
    rows = check_hypergradient(ridge(3), 3, ["mine", "one_step", "whole"]).rows
    assert rows["mine"].relative_error == rows["one_step"].relative_error > 0
    assert (rows["mine"].gradients, rows["mine"].products) == (6, 3)
    assert not rows["whole"].refused  # all three steps in one window
    with pytest.raises(ValueError, match="unknown method 'choosy'"):
        check_hypergradient(ridge(3), 3, ["choosy"])
    assert cli.main(["list"]) == 0
    assert "mine alone" in capsys.readouterr().out


def test_nan_is_not_ok():
    def estimate(*args):
        got = reverse(3).estimate(*args)
        return got._replace(hypergrad=optax.tree.scale(jnp.nan, got.hypergrad))

    mine = {"mine": reverse(3)._replace(estimate=estimate)}
    row = check_hypergradient(ridge(3), 3, mine).rows["mine"]
    assert row.status == Status.NONFINITE_HYPERGRAD


def test_estimators_state_their_price():
    """Of the fit before an episode and of the iterations of a solver, by no method's name."""
    steps = 4
    fitted = one_step()._replace(
        start=lambda problem, memory, *episode: memory,
        start_price=lambda T: Cost(100 * T, 10 * T),
    )
    unknown = one_step()._replace(price=None)
    named = {name: name for name in ("hyperdistill", "implicit_cg", "implicit_neumann")}
    chosen = {"mine": fitted, "unknown": unknown, **named}
    rows = check_hypergradient(ridge(steps), steps, chosen).rows
    assert rows["unknown"].gradients is None and rows["unknown"].products is None
    assert (rows["mine"].gradients, rows["mine"].products) == (102 * steps, 11 * steps)
    distilled = rows["hyperdistill"]
    assert (distilled.gradients, distilled.products) == (4 * steps + 1, 3 * steps)
    for name, more in {"implicit_cg": 3, "implicit_neumann": 2}.items():
        assert rows[name].products == rows[name].info["linear_iterations"] + more


def test_what_deciding_costs():
    """Gradient descent towards `size * mix`, written out, with the values and with the choice."""
    problem = BilevelProblem(
        from_update(lambda w, lam, b: w - 0.5 * (w - lam["size"] * lam["mix"] @ jnp.arange(3.0))),
        lambda w, lam, batch: (w - batch) ** 2,
    )
    lam = {"size": np.float32(2), "mix": np.array([0.25, 0.25, 0.5], np.float32)}
    space = {"size": spaces.integer(1, 3), "mix": spaces.categorical(3)}
    task = Task(problem, 0.0, lam, lambda: 0.0, lambda: 1.0, space=space)
    stored = {"size": jnp.float32(2.6), "mix": jnp.log(jnp.asarray(lam["mix"]))}
    got = discrete_gap(task, stored, steps=3)
    reached = 1 - 0.5**3
    assert got.relaxed == pytest.approx((reached * 3 * 1.25 - 1) ** 2, rel=1e-5)
    assert got.discrete == pytest.approx((reached * 3 * 2.0 - 1) ** 2, rel=1e-5)
    assert got.gap == pytest.approx(got.discrete - got.relaxed)
    assert got.settled["size"] == 3 and got.settled["mix"].tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="give the task a space="):
        discrete_gap(task.replace(space=None), lam, steps=3)


def test_a_check_keeps_no_problem_alive(collect):
    """Nor what its losses close over, without anybody clearing a cache."""
    data = np.ones((1000, 2), np.float32)
    kept = weakref.ref(data)

    def loss(w, lam, batch, data=data):
        return jnp.mean((w - batch) ** 2) + lam * jnp.mean(data @ w) ** 2

    batches = InOrder(np.ones((3, 2), np.float32))
    problem = BilevelProblem(from_optax(loss, optax.sgd(0.1, momentum=0.9)), loss)
    task = Task(problem, np.ones(2, np.float32), np.float32(0.1), batches, batches)
    check_hypergradient(task, 3, ["one_step", "reverse"])
    choice = task.replace(hyperparams=np.float32(1), space=spaces.integer(0, 2))
    discrete_gap(choice, np.float32(0.0), steps=3)
    del loss, data, problem, task, choice
    collect()
    assert kept() is None
