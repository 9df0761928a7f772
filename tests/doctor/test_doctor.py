"""Each fault is found by its name in a task that has it alone, and none in one that is well."""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradhpo as gh
from gradhpo import cli, spaces
from gradhpo.datasets import Masked, batches
from gradhpo.doctor import doctor
from gradhpo.doctor.examine import Measured, _advice
from gradhpo.doctor.faults import Unseen
from gradhpo.doctor.of_data import DRAWN, same_batches, shared_rows
from gradhpo.doctor.patient import patient_of

X = np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32)
Y = np.tanh(X @ np.array([1, -2, 0.5, 0.0], np.float32))
DATA = (X[:40], Y[:40]), (X[40:], Y[40:])
LAM = {"decay": np.float32(0.01), "rate": np.float32(0.1)}


def error(w, batch):
    batch, mask = batch if isinstance(batch, Masked) else (batch, None)
    x, y, *_ = batch
    return jnp.mean((jnp.tanh(x @ w) - y) ** 2, where=mask)


def train_loss(w, lam, batch):
    return error(w, batch) + lam["decay"] * jnp.sum(w**2)


def val_loss(w, lam, batch):
    return error(w, batch)


def sgd(lam):
    return optax.sgd(lam["rate"], momentum=0.9)


def task(train_loss=train_loss, optimizer=sgd, val_loss=val_loss, data=DATA, lam=LAM, **fields):
    """A task that is well, but for what is given; the problem is made once for equal arguments."""
    problem = gh.BilevelProblem(gh.from_optax(train_loss, optimizer), val_loss)
    sources = [gh.Resident(part, 10, seed=i) for i, part in enumerate(data)]
    made = gh.Task(problem, np.zeros(4, np.float32) + 0.1, lam, *sources, space=spaces.log())
    return made.replace(**fields)


def names(found):
    return [fault.name for fault in found.faults]


def test_a_task_that_is_well():
    found = doctor(task(), 8, methods=["one_step", "reverse", "implicit_cg"])
    assert not found.faults and len(found.held) == 8
    assert found.methods["reverse"].row.relative_error < 1e-9
    assert found.methods["reverse"].times > 0 and found.training > 0
    assert found.methods["implicit_cg"].row.refused
    text = str(found)
    assert "ok     every hyperparameter" in text and "implicit_cg  refused" in text
    assert "advice: " in text and "gradhpo compare" in text


def accuracy(w, lam, batch):
    x, y = batch
    return jnp.mean((x @ w > 0) == (y > 0), dtype=jnp.float32)


def closed_over(w, lam, batch):
    return error(w, batch) + 0.01 * jnp.sum(w**2)


def rounded(w, lam, batch):
    return error(w, batch) + jnp.round(lam["decay"]) * jnp.sum(w**2)


def adam(lam):
    return optax.adam(lam["rate"])


def safe_adam(lam):
    return optax.adam(lam["rate"], eps_root=1e-8)


def normalized(w, lam, batch):
    """BatchNorm in training mode."""
    x, y = batch
    h = jnp.tanh(x @ w)
    return jnp.mean(((h - h.mean()) / (h.std() + 1e-3) - y) ** 2)


def dead(data):
    return tuple((x * np.array([1, 1, 1, 0], np.float32), y) for x, y in data)


def plain_error(w, lam, batch):
    return error(w, batch)


RATE = {"rate": LAM["rate"]}
DEAD = {"data": dead(DATA), "train_loss": plain_error, "lam": RATE}
MIXED = tuple(np.concatenate([a[:3], b]) for a, b in zip(*DATA, strict=True))


@pytest.mark.parametrize(
    "name, sick",
    [
        ("validation loss without a derivative", {"val_loss": accuracy}),
        ("hyperparameter ['decay'] is not connected", {"train_loss": closed_over}),
        ("hyperparameter ['decay'] is not connected", {"train_loss": rounded}),
        (
            "eps_root = 0 with a dead feature",
            {
                "optimizer": adam,
                "data": dead(DATA),
                "train_loss": plain_error,
                "lam": {"rate": LAM["rate"]},
            },
        ),
        ("chaotic training", {"lam": LAM | {"rate": np.float32(60.0)}}),
        ("the validation set is the training set", {"data": (DATA[0], DATA[0])}),
        (
            "validation examples that are training examples",
            {
                "data": (
                    DATA[0],
                    tuple(np.concatenate([a[:3], b]) for a, b in zip(*DATA, strict=True)),
                )
            },
        ),
        ("training diverges", {"lam": LAM | {"rate": np.float32(1e30)}}),
    ],
)
def test_a_fault_by_its_name(name, sick):
    found = doctor(task(**sick), 20)
    assert names(found) == [name]
    assert "FAULT  " + name in str(found) and not found.methods and not found.advice


def masked(w, lam, batch):
    x, y = batch
    kept = x[:, 0] > -0.5
    return jnp.sum(kept * (jnp.tanh(x @ w) - y) ** 2) / jnp.sum(kept)


def root(w, lam, batch):
    return jnp.sqrt(error(w, batch))


def summed(w, lam, batch):
    x, y = batch
    return jnp.sum((jnp.tanh(x @ w) - y) ** 2) + 3 * jnp.sum(w**2)


def far(w, lam, batch):
    return 100 + normalized(w, lam, batch)


@pytest.mark.parametrize("loss", [normalized, far])
def test_statistics_that_leak_are_worth_a_look(loss):
    """It may be meant so, and methods are measured all the same."""
    found = doctor(task(val_loss=loss), 4, methods=["one_step"])
    assert names(found) == ["statistics that leak"] and not found.faults[0].sure
    assert "LOOK   statistics that leak" in str(found) and found.methods


def test_a_sum_over_examples_and_a_penalty_is_no_leak():
    assert not doctor(task(val_loss=summed), 4, methods=[]).faults


@pytest.mark.parametrize("loss", [masked, root])
def test_what_is_nearly_a_mean_is_no_fault_that_is_sure(loss):
    assert not any(fault.sure for fault in doctor(task(val_loss=loss), 4, methods=[]).faults)


def dropped(w, lam, batch):
    x, y, key = batch
    return error(w, (x * jax.random.bernoulli(key[0], 0.5, x.shape), y))


@pytest.mark.parametrize("typed", [True, False])
def test_dropout_in_validation_by_a_key_in_the_batch(typed):
    """Batches may hold keys of either kind; they are no examples."""
    make = jax.random.key if typed else jax.random.PRNGKey
    keys = jnp.stack([make(i)[None] for i in range(40)])
    x, y = (np.resize(each, (40, 10, *each.shape[1:])) for each in DATA[1])
    ill = task(val_loss=dropped).replace(val=gh.InOrder((x, y, keys)))
    assert names(doctor(ill, 4)) == ["randomness in the validation loss"]


SAME = "the validation set is the training set"


@pytest.mark.parametrize(
    "data, name",
    [
        # one hot labels repeat, and so do few integers: equal ones are no leak
        (tuple((x, np.eye(3, dtype=np.float32)[np.arange(len(x)) % 3]) for x, _ in DATA), None),
        (tuple(((x > 0).astype(np.float32), y > 0) for x, y in DATA), None),
        # the same examples in another order and in half precision
        (
            (DATA[0], tuple(a[::-1].copy() for a in DATA[0])),
            "the validation set is the training set",
        ),
        (
            tuple((x.astype(t), y) for (x, y), t in zip((DATA[0],) * 2, "ee", strict=True)),
            SAME,
        ),
    ],
)
def test_equal_examples(data, name):
    def loss(w, lam, batch):
        x, y = batch
        return jnp.mean((jnp.tanh(x @ w) - y.reshape(len(y), -1)[:, 0]) ** 2) + lam["decay"] * w @ w

    found = doctor(
        task(loss, val_loss=lambda w, lam, batch: loss(w, {"decay": 0}, batch), data=data),
        4,
        methods=[],
    )
    assert names(found) == ([name] if name else [])


def test_what_could_not_be_looked_at_is_not_well():
    found = doctor(task(lam=LAM | {"rate": np.float32(1e30)}), 4)
    assert any(each.startswith("derivatives foretell a small step: ") for each in found.unseen)
    assert not any("foretell" in each for each in found.held) and "--     derivatives" in str(found)


def test_the_two_reasons_why_nothing_is_connected():
    over, flat = (doctor(task(loss), 4).faults[0] for loss in (closed_over, rounded))
    assert "neither training nor the validation loss uses it" in over.says
    assert "only where derivatives end" in flat.says


def test_with_eps_root_the_dead_feature_does_no_harm():
    assert not doctor(task(optimizer=safe_adam, **DEAD), 20, methods=[]).faults


def test_a_batch_that_recompiles():
    problem = task().problem

    def uneven():
        x, y = DATA[0]
        cut = itertools.cycle([slice(0, 15), slice(15, 30), slice(30, 40)])
        return lambda: (lambda rows: (x[rows], y[rows]))(next(cut))

    val = gh.Resident(DATA[1], 10)
    make = lambda: gh.Task(problem, np.zeros(4, np.float32), LAM, uneven(), val)  # noqa: E731
    (fault,) = doctor(make, 2).faults
    assert fault.name == "a batch that recompiles" and "batch 3 of the train source" in fault.says


def in_order(part, size):
    """Batches of ten examples, again and again, and the last ones left out."""
    x, y = part
    rows = itertools.cycle(range(0, size - size % 10, 10))
    return lambda: (lambda i: (x[i : i + 10], y[i : i + 10]))(next(rows))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["function", "InOrder", "filled up"])
def test_examples_that_come_again_in_every_epoch(kind, shared):
    train = DATA[0]
    val = MIXED if shared else DATA[1]
    source = in_order(train, 35)
    if kind == "InOrder":
        source = gh.InOrder(jax.tree.map(lambda *x: np.stack(x), *(source() for _ in range(9))))
    if kind == "filled up":
        source = batches(train, 15, seed=0, pad=True)
    made = task().replace(train=source, val=gh.Resident(val))
    found = list(shared_rows(patient_of(lambda: made, 9)))
    wanted = ["validation examples that are training examples"] * shared
    assert [fault.name for fault in found] == wanted


def test_draws_by_chance_still_say_nothing():
    """The negative control: few different examples, drawn with replacement."""

    def chance():
        generator = np.random.default_rng(0)
        x, y = (a[:12] for a in DATA[0])
        return lambda: (lambda rows: (x[rows], y[rows]))(generator.integers(0, 12, 10))

    (found,) = shared_rows(patient_of(lambda: task().replace(train=chance()), 9))
    assert isinstance(found, Unseen) and "training examples repeat" in found.why


def test_batches_that_no_seed_decides():
    generator, made = np.random.default_rng(0), task()

    source_that_goes_on = made.replace(train=in_order(DATA[0], 40))

    def shuffled():
        x, y = DATA[0]
        return lambda: (lambda rows: (x[rows], y[rows]))(generator.permutation(40)[:10])

    (fault,) = same_batches(lambda: made.replace(train=shuffled()))
    assert fault.name.startswith("batches that differ") and "train source" in fault.says
    assert not fault.sure
    assert not list(same_batches(lambda: made.replace(train=in_order(DATA[0], 40))))
    other = task(val_loss=lambda w, lam, batch: jnp.sum(w**2))
    other = other.replace(val=lambda: (X[:9, :1], Y[:9].astype(np.int8)))
    (unseen,) = shared_rows(patient_of(lambda: other, 2))
    assert "no part of one shape and type" in unseen.why
    (unseen,) = same_batches(lambda: source_that_goes_on)
    assert "the train source goes on" in unseen.why


def test_training_may_bring_more_than_inputs_and_labels():
    """Row numbers, say: what both sides have is compared."""
    x, y = (a[:12] for a in DATA[0])
    made = task().replace(train=lambda: (x, y, np.arange(12)), val=lambda: (x[:6], y[:6]))
    (found,) = shared_rows(patient_of(lambda: made, 2))
    assert found.name == "the validation set is the training set"


def test_a_problem_made_for_every_seed():
    assert names(doctor(lambda: task(), 4)) == ["a problem made anew"]


def test_the_time_limit_is_kept():
    made = task()
    found = doctor(made, 4, methods=["one_step", "reverse"], limit=1e-3)
    assert found.skipped == ["one_step", "reverse"] and "no time was left for" in str(found)
    assert len(found.held) + len(found.unseen) == 8 and not found.methods


def test_a_source_that_goes_on_is_left_alone():
    calls = []

    def source():
        calls.append(1)
        return tuple(a[:10] for a in DATA[0])

    found = doctor(task().replace(train=source), 4, methods=[])
    assert any("the train source goes on" in each for each in found.unseen)
    assert len(calls) < DRAWN  # those that are trained on, and none for their shape


def test_the_advice_is_the_fastest_of_those_that_point_the_right_way():
    patient = patient_of(task, 8)

    def measured(cosine, seconds):
        from gradhpo.diagnostics.rows import Row

        return Measured(Row(cosine=cosine), seconds, 1.0)

    some = {"reverse": measured(1.0, 2.0), "drmad": measured(0.95, 1.0), "fo": measured(0.1, 0.5)}
    assert _advice(patient, some, 50).startswith("advice: drmad, the fastest of those")
    poor = {"one_step": measured(0.3, 1.0), "fo": measured(0.5, 2.0)}
    assert _advice(patient, poor, 50).startswith("advice: fo, none has a cosine of 0.9")
    # 50 episodes are 50 updates of drmad, which looks at eight steps at once: 3 / 50
    assert "Outer rate 0.06" in _advice(patient, {"drmad": some["drmad"]}, 50)
    assert _advice(patient, {}, 50) == ""
    assert "none of these methods points" in _advice(patient, {"fo": measured(-0.4, 1.0)}, 50)
    assert "hypergradient is zero here" in _advice(patient, {"fo": measured(np.nan, 1.0)}, 50)


def test_the_outer_rate_fits_what_is_stored():
    """Hyperparameters in natural scale are moved by their own size, not by e^3."""
    from gradhpo.doctor.examine import _outer_rate

    assert (
        "0.06 for Adam: in 50 episodes it takes 50 updates and can move a hyperparameter by 3 "
        in (_outer_rate(patient_of(task, 8), 50, 50))
    )
    raw = _outer_rate(patient_of(lambda: task(space=None), 8), 50, 50)
    assert "Outer rate 0.0002 for Adam" in raw and "declare spaces.log()" in raw
    assert "can move a hyperparameter by 0.3 " in _outer_rate(patient_of(task, 8), 1, 1)


def test_a_simplex_that_is_kept_by_projection_is_measured():
    def mixed(w, lam, batch):
        return lam["k"][0] * error(w, batch) + lam["k"][1] * jnp.sum(w**2)

    lam = {"k": np.array([0.7, 0.3], np.float32), "rate": LAM["rate"]}
    simplex = {"k": spaces.simplex(by="projection"), "rate": spaces.log()}
    made = task(mixed, lam=lam, space=None).replace(space=simplex)
    assert doctor(made, 4, methods=["one_step"]).methods["one_step"].row.cosine > 0


def test_an_episode_that_brings_its_batches_has_its_own_length():
    def begin(params, lam, key):
        x = jax.random.normal(key, (7, 10, 4))
        return gh.Start(params, gh.Window((x, x[..., 0]), (x, x[..., 1])))

    made = task()
    begun = made.replace(problem=made.problem._replace(begin=begin), train=None, val=None)
    found = doctor(begun, 20, methods=["reverse"])
    assert found.steps == 7 and found.methods["reverse"].row.relative_error < 1e-9


def test_a_task_with_a_model_state_and_a_learned_start():
    """Running statistics, a key, and initial weights that are hyperparameters."""

    def loss(w, lam, batch, state):
        x, y = batch
        key, own = jax.random.split(state["key"])
        kept = jax.random.bernoulli(own, 0.9, x.shape)
        mean = 0.9 * state["mean"] + 0.1 * x.mean(0)
        value = error(w, ((x - x.mean(0)) * kept, y)) + lam["decay"] * jnp.sum(w**2)
        return value, ({"key": key, "mean": mean}, {})

    def judge(w, lam, batch, state):
        x, y = batch
        return error(w, (x - state["mean"], y))

    problem = gh.BilevelProblem(
        gh.from_optax(loss, lambda lam: optax.sgd(0.1)),
        judge,
        begin=lambda params, lam, key: gh.Start(lam["start"]),
    )
    sick = gh.Task(
        problem,
        np.zeros(4, np.float32),
        {"start": np.zeros(4, np.float32), "decay": np.float32(0.1)},
        *(gh.Resident(part, 10, seed=i) for i, part in enumerate(DATA)),
        model_state={"key": jax.random.key(0), "mean": np.zeros(4, np.float32)},
    )
    found = doctor(sick, 5, methods=["reverse"])
    assert not found.faults and found.methods["reverse"].row.relative_error < 1e-9


FILE = """
import jax.numpy as jnp
import numpy as np
import optax

import gradhpo as gh


def loss(w, lam, batch):
    return jnp.mean((w - batch) ** 2)


def task(data=40):
    rows = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    problem = gh.BilevelProblem(gh.from_optax(loss, lambda lam: optax.sgd(lam)), loss)
    sources = gh.Resident(rows[:data], 5), gh.Resident(rows[20:], 5)
    return gh.Task(problem, np.zeros(3, np.float32), np.float32(0.1), *sources)
"""


def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    """Every fault is a line, and the status says that there are some."""
    pytest.importorskip("tyro")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "ill.py").write_text(FILE)
    try:
        assert cli.main(["doctor", "ill:task", "--steps", "4"]) == 1
        out, err = capsys.readouterr()
        assert "FAULT  a problem made anew" in out
        assert "FAULT  the validation set is the training set" in out
        assert "nothing is begun after 120 s" in err and "looking whether" in err
        assert cli.main(["doctor", "ill:nothing"]) == 1
        assert "has no 'nothing'" in capsys.readouterr().err
    finally:
        sys.modules.pop("ill", None)


@pytest.mark.parametrize("option", ["--steps=0", "--limit=0", "--method=tpe", "--method=none"])
def test_options_out_of_range(option, capsys):
    with pytest.raises(SystemExit):
        cli.main(["doctor", "ill:task", option])
    assert "gradhpo doctor --help" in capsys.readouterr().err
