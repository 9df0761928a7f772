"""`run(checkpoint=...)`: what it goes on with, and what it refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from facade_cases import Source, T, method, run, sgd, start, train_loss, val_loss

from gradhpo import (
    BilevelProblem,
    GradhpoWarning,
    InOrder,
    Resident,
    Start,
    StopRun,
    Task,
    UpdateRejected,
    checkpoint,
    es,
    from_optax,
    hyperdistill,
    one_step,
    tune,
)
from gradhpo.checkpoint import (
    CheckpointError,
    CheckpointMismatch,
    Checkpoints,
    Writer,
    reader,
)
from gradhpo.datasets import from_loader
from gradhpo.driver.identity import digest_of
from gradhpo.driver.saving import Saver
from gradhpo.utils.logging import CSVLogger, JSONLinesLogger, MultiLogger

DATA = np.random.default_rng(0).standard_normal((12, 2)).astype(np.float32)
STACKED = np.random.default_rng(1).standard_normal((4 * T, 3, 2)).astype(np.float32)


def shuffled(seed):
    """Shuffles that follow one another, as a loader with a generator of its own has them."""
    draw = np.random.default_rng(seed)
    return from_loader(lambda: iter(np.split(draw.permutation(DATA), 4)))


def by_epoch(seed):
    def epoch(number):
        return iter(np.split(np.random.default_rng((seed, number)).permutation(DATA), 4))

    return from_loader(epoch)


SOURCES = {
    "resident": lambda seed: Resident(DATA, 3, seed=seed),
    "whole": lambda seed: Resident(DATA),
    "in order": lambda seed: InOrder(STACKED),
    "function": Source,
    "shuffled": shuffled,
    "by epoch": by_epoch,
}


def sources(train, val):
    return {"get_train_batch": SOURCES[train](1), "get_val_batch": SOURCES[val](2)}


class Cut(Exception):
    pass


def cut(directory, opt, state, episode=3, M=4, seconds=0, **settings):
    """Leave a run in the middle of its hooks of this episode: the one before it is the last."""

    def callback(number, state):
        if number == episode:
            raise Cut

    kept = Checkpoints(directory=directory, seconds=seconds)
    with pytest.raises(Cut):
        run(opt, state, M=M, callback=callback, checkpoint=kept, **settings)


@pytest.mark.parametrize(
    "train, val",
    [
        ("resident", "shuffled"),
        ("whole", "by epoch"),
        ("in order", "function"),
        ("by epoch", "by epoch"),
        ("shuffled", "function"),
    ],
)
def test_the_data_go_on(tmp_path, train, val):
    opt = method("one_step")
    state = opt.init(*start())
    unbroken, found = sources(train, val), sources(train, val)
    whole = run(opt, state, M=4, **unbroken)
    cut(tmp_path, opt, state, **sources(train, val))
    again = run(opt, state, M=4, checkpoint=tmp_path, **found)
    assert digest_of(again) == digest_of(whole)
    if train == "by epoch":
        assert found["get_train_batch"].position == unbroken["get_train_batch"].position


class Changing(Source):
    """Batches of another size, or of another type, in every second episode."""

    def __init__(self, seed, what):
        super().__init__(seed)
        self.what = what

    def __call__(self):
        rows = super().__call__()
        other = (self.calls - 1) // T % 2
        if self.what == "type":
            return rows.astype(np.float16 if other else np.float32)
        rows = rows[: 3 - other]
        if self.what == "rows":
            return rows
        return rows, jax.random.split(jax.random.key(self.calls), len(rows))


def noisy(w, lam, batch):
    """The training loss, for rows that come with keys as well."""
    rows = batch
    if isinstance(batch, tuple):
        rows = batch[0] + 0.1 * jax.vmap(lambda key: jax.random.normal(key, (2,)))(batch[1])
    return train_loss(w, lam, rows)


@pytest.mark.filterwarnings("ignore:.*shapes:gradhpo.GradhpoWarning")
@pytest.mark.parametrize(
    "name, what, episode",
    [("one_step", "rows", 3), ("hyperdistill", "type", 3), ("hyperdistill", "keys", 3)]
    + [("hyperdistill", "rows", episode) for episode in (2, 3, 4)],
)
def test_batches_that_change_go_on(tmp_path, name, what, episode):
    """HyperDistill keeps a batch, which looks as those of the latest episode."""
    opt = method(name, inner_optimizer=sgd)
    state = opt.init(*start())

    def sides():
        data = {"get_train_batch": Changing(1, what), "get_val_batch": Source(2)}
        return {**data, "losses": (noisy, val_loss)}

    whole = run(opt, state, M=5, **sides())
    cut(tmp_path, opt, state, episode=episode, M=5, **sides())
    assert digest_of(run(opt, state, M=5, checkpoint=tmp_path, **sides())) == digest_of(whole)


def test_sources_of_the_same_process_go_back(tmp_path):
    """As in a notebook, where the cell of a run is executed again."""
    opt, found = method("one_step"), sources("by epoch", "resident")
    state = opt.init(*start())
    cut(tmp_path, opt, state, **found)
    again = run(opt, state, M=4, checkpoint=tmp_path, **found)
    assert digest_of(again) == digest_of(run(opt, state, M=4, **sources("by epoch", "resident")))
    functions = sources("function", "function")
    cut(tmp_path / "b", opt, state, **functions)
    with pytest.raises(CheckpointMismatch, match="data of the first episode"):
        run(opt, state, M=4, checkpoint=tmp_path / "b", **functions)


@pytest.mark.parametrize("tasks", [None, 2])
def test_tasks_go_on(tmp_path, tasks):
    def begin(params, lam, draw):
        return Start({"w": params["w"] + jax.random.normal(draw, (2,))})

    def keys():
        return iter(jax.random.split(jax.random.key(7), 64)).__next__

    opt = method("one_step", begin=begin, tasks=tasks)
    state = opt.init(*start())
    settings = sources("resident", "resident")
    if tasks:
        stacked = np.stack([STACKED] * tasks, axis=1)
        settings = {"get_train_batch": InOrder(stacked), "get_val_batch": InOrder(stacked)}
    whole = run(opt, state, M=4, get_task=keys(), **settings)
    cut(tmp_path, opt, state, get_task=keys(), **settings)
    again = run(opt, state, M=4, get_task=keys(), checkpoint=tmp_path, **settings)
    assert digest_of(again) == digest_of(whole)


def test_logs_are_those_of_a_run_in_one_piece(tmp_path):
    """Also where the log is ahead of the checkpoint, as after a kill."""
    opt = method("hyperdistill", estimation_period=3)
    state, data = opt.init(*start()), sources("resident", "resident")

    def logged(directory, **settings):
        directory.mkdir(exist_ok=True)
        files = CSVLogger(directory / "a.csv"), JSONLinesLogger(directory / "a.jsonl")
        with MultiLogger(*files) as logger:
            return run(opt, state, logger=logger, **data, **settings)

    whole = logged(tmp_path / "whole", M=5)
    kept = Checkpoints(directory=tmp_path / "c", seconds=0)

    def callback(episode, state):
        if episode == 4:
            raise Cut

    with pytest.raises(Cut):
        logged(tmp_path / "cut", M=5, callback=callback, checkpoint=kept)
    assert len((tmp_path / "cut/a.csv").read_text().splitlines()) == 1 + 4
    assert checkpoint.steps(tmp_path / "c")[-1] == 3 * T
    again = logged(tmp_path / "cut", M=5, checkpoint=kept)
    assert digest_of(again) == digest_of(whole)
    for name in ("a.csv", "a.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_hook_is_told(tmp_path):
    opt, told, data = method("one_step"), [], sources("resident", "resident")
    state = opt.init(*start())
    cut(tmp_path, opt, state, **data)

    class Hook:
        def __call__(self, episode, state):
            told.append(episode)

        def resumed(self, state):
            told.append(("from", int(state.episode)))

    run(opt, state, M=4, callback=Hook(), checkpoint=tmp_path, **data)
    assert told == [("from", 2), 3, 4]


def test_a_longer_run_goes_on_where_nothing_decays(tmp_path):
    opt, data = method("one_step", outer_optimizer=optax.adam(0.1)), sources("resident", "whole")
    state = opt.init(*start())
    run(opt, state, M=2, checkpoint=tmp_path, **data)
    longer = run(opt, state, M=4, checkpoint=tmp_path, **data)
    assert digest_of(longer) == digest_of(run(opt, state, M=4, **data))
    with pytest.raises(CheckpointMismatch, match="after episode 4, and this run ends after"):
        run(opt, state, M=3, checkpoint=tmp_path, **data)


def other_loss(w, lam, batch):
    return train_loss(w, lam, batch) + 0.01 * jnp.sum(w["w"])


def other(name):
    """A run that differs in one thing from that of `method("one_step")`."""
    opt, lr, data = method("one_step"), {"lr_hyper": 0.1}, sources("resident", "function")
    params, lam = start()
    losses, M = (train_loss, val_loss), 4
    if name == "T":
        opt = method("one_step", T=2 * T)
    elif name == "method":
        opt = method("greedy")
    elif name == "lr_hyper":
        lr = {"lr_hyper": 0.2}
    elif name == "decays over":
        M = 5
    elif name == "lr_reptile":
        lr["lr_reptile"] = 0.5
    elif name == "start":
        params = {"w": params["w"] + 1}
    elif name == "programs.training step":
        opt = method("one_step", update_fn=lambda w, lam, batch: {"w": w["w"] * 0.5})
    elif name == "programs.validation loss":
        losses = train_loss, other_loss
    elif name == "train data.sha256":
        changed = DATA.copy()
        changed[3, 1] += 1
        data["get_train_batch"] = Resident(changed, 3, seed=1)
    elif name == "train data.seed":
        data["get_train_batch"] = Resident(DATA, 3, seed=5)
    elif name == "train data.batch_size":
        data["get_train_batch"] = Resident(DATA, 4, seed=1)
    elif name == "data of the first episode":
        data["get_val_batch"] = Source(9)
    elif name == "about":
        lr["checkpoint"] = {"about": {"note": 2}}
    return opt, opt.init(params, lam), {"M": M, "losses": losses, **lr, **data}


NAMES = (
    *("T", "method", "lr_hyper", "decays over", "lr_reptile", "start", "programs.training step"),
    *("programs.validation loss", "train data.sha256", "train data.seed"),
    *("train data.batch_size", "data of the first episode", "about"),
)


@pytest.mark.filterwarnings("ignore:.*hyperparameters")
@pytest.mark.parametrize("name", NAMES)
def test_another_run_is_refused_by_name(tmp_path, name):
    opt, state, settings = other("")
    run(opt, state, **settings, checkpoint=Checkpoints(directory=tmp_path, about={"note": 1}))
    before = sorted(path.name for path in tmp_path.iterdir())
    opt, state, settings = other(name)
    about = settings.pop("checkpoint", {"about": {"note": 1}})
    with pytest.raises(CheckpointMismatch, match=f"{name}[^;]*: .* -> "):
        run(opt, state, **settings, checkpoint=Checkpoints(directory=tmp_path, **about))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_changes_can_be_accepted(tmp_path):
    opt, data = method("one_step"), sources("resident", "resident")
    state = opt.init(*start())
    cut(tmp_path, opt, state, **data)
    kept = Checkpoints(directory=tmp_path, accept_changes=True)
    with pytest.warns(GradhpoWarning, match=r"lr_hyper: 0.1 -> 0.2.*accept_changes=True"):
        got = run(opt, state, M=4, lr_hyper=0.2, checkpoint=kept, **data)
    assert int(got.episode) == 4


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_a_disk_that_is_full_for_a_while(tmp_path, monkeypatch, on_error):
    opt, data = method("one_step"), sources("resident", "resident")
    state, real, calls = opt.init(*start()), Writer._write, []

    def failing(writer, state, step, *rest):
        calls.append(step)
        if len(calls) in (2, 3):
            raise CheckpointError("cannot save: No space left on device.")
        return real(writer, state, step, *rest)

    monkeypatch.setattr(Writer, "_write", failing)
    kept = Checkpoints(directory=tmp_path, seconds=0, on_error=on_error)
    if on_error == "raise":
        with pytest.raises(CheckpointError, match="No space left") as raised:
            run(opt, state, M=5, checkpoint=kept, **data)
        assert int(raised.value.state.episode) >= 2
        return
    with pytest.warns(GradhpoWarning, match="No space left.*goes on, and tries again") as warned:
        got = run(opt, state, M=5, callback=lambda m, s: None, checkpoint=kept, **data)
    assert len(warned) == 1 and int(got.episode) == 5
    assert checkpoint.steps(tmp_path) == [4 * T, 5 * T]
    assert digest_of(got) == digest_of(run(opt, state, M=5, **data))


def test_a_last_save_that_fails_is_an_error_with_the_state(tmp_path, monkeypatch):
    opt, data = method("one_step"), sources("resident", "resident")

    def failing(writer, state, step, *rest):
        raise CheckpointError("cannot save: No space left on device.")

    monkeypatch.setattr(Writer, "_write", failing)
    with pytest.raises(CheckpointError, match="No space left") as raised:
        run(opt, opt.init(*start()), M=2, checkpoint=tmp_path, **data)
    assert int(raised.value.state.episode) == 2


def test_wrong_arguments(tmp_path):
    opt, data = method("one_step"), sources("resident", "resident")
    with pytest.raises(TypeError, match="path of a directory or a gradhpo.checkpoint.Checkpoints"):
        run(opt, opt.init(*start()), checkpoint=3, **data)
    seconds = ({"seconds": value} for value in (-1, float("nan"), None))
    for wrong in ({"keep": 0}, {"on_error": "no"}, *seconds):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Checkpoints(directory=tmp_path, **wrong)
    for wrong in ({"takeover": "no"}, {"accept_changes": 1}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            Checkpoints(directory=tmp_path, **wrong)
    with pytest.raises(TypeError, match="directory"):
        Checkpoints(directory=3)


def test_a_run_that_has_ended_leaves_its_sources_where_it_did(tmp_path):
    """The next run of a script takes the next batches, also when the first has nothing to do."""
    opt = method("one_step")
    state = opt.init(*start())
    for train, val in (("function", "function"), ("by epoch", "by epoch")):
        first, again = sources(train, val), sources(train, val)
        run(opt, state, M=2, of=4, checkpoint=tmp_path / train, **first)
        half = run(opt, state, M=2, of=4, checkpoint=tmp_path / train, **again)
        ends = [run(opt, half, M=2, of=4, **each) for each in (first, again)]
        assert digest_of(ends[0]) == digest_of(ends[1])


def test_loaders_that_share_a_generator_go_on(tmp_path):
    def both():
        draw = np.random.default_rng(3)
        # Episodes end within an epoch: what is left of it tells in which order shuffles were drawn.
        sides = (from_loader(lambda: iter(np.split(draw.permutation(DATA), 3))) for _ in range(2))
        return dict(zip(("get_train_batch", "get_val_batch"), sides, strict=True))

    opt = method("one_step")
    state = opt.init(*start())
    whole = run(opt, state, M=6, **both())
    cut(tmp_path, opt, state, episode=5, M=6, **both())
    assert digest_of(run(opt, state, M=6, checkpoint=tmp_path, **both())) == digest_of(whole)


def test_a_callback_that_stops_by_an_exception_is_saved(tmp_path):
    def callback(episode, state):
        if episode == 3:
            raise StopRun

    opt, data = method("one_step"), sources("resident", "resident")
    kept = Checkpoints(directory=tmp_path)
    got = run(opt, opt.init(*start()), M=5, callback=callback, checkpoint=kept, **data)
    assert checkpoint.steps(tmp_path) == [int(got.step)] == [3 * T]


def test_a_position_may_be_a_number(tmp_path):
    class Counting(Source):
        position = property(lambda self: self.calls)

        def go_to(self, position):
            self.calls = position

    def sides():
        return {"get_train_batch": Counting(1), "get_val_batch": Counting(2)}

    opt = method("one_step")
    state = opt.init(*start())
    cut(tmp_path, opt, state, **sides())
    again = run(opt, state, M=4, checkpoint=tmp_path, **sides())
    assert digest_of(again) == digest_of(run(opt, state, M=4, **sides()))


def test_a_log_that_has_been_closed_is_named(tmp_path):
    opt, data = method("one_step"), sources("resident", "resident")
    state = opt.init(*start())
    with CSVLogger(tmp_path / "a.csv") as logger:
        cut(tmp_path, opt, state, logger=logger, **data)
    with pytest.raises(ValueError, match=r"the logger of .*a.csv is closed: make another"):
        run(opt, state, M=4, logger=logger, checkpoint=tmp_path, **data)


def test_a_log_goes_back_beyond_the_checkpoint_that_a_killed_run_began_with(tmp_path):
    """Two runs end; a third is killed, and what it began with is damaged."""
    opt, data = method("one_step"), sources("resident", "resident")
    state = opt.init(*start())

    def logged(M, killed=None):
        with CSVLogger(tmp_path / "a.csv") as logger, pytest.MonkeyPatch.context() as patch:
            if killed:  # from that episode on nothing is saved
                patch.setattr(Saver, "after", lambda *_, **__: None)
                patch.setattr(Saver, "rescue", lambda self: None)
            try:
                end = lambda episode, state: 1 / (episode != killed)  # noqa: E731
                run(opt, state, M, callback=end, logger=logger, checkpoint=tmp_path, of=6, **data)
            except ZeroDivisionError:
                pass
        _, *rows = (tmp_path / "a.csv").read_text().splitlines()
        return [int(row.split(",")[0]) for row in rows]

    for M in (2, 3):
        assert logged(M) == [T * i for i in range(1, M + 1)]
    assert logged(6, killed=5) == [T * i for i in range(1, 6)]
    (tmp_path / f"step-{3 * T:010d}/manifest.json").write_text("{}")
    with pytest.warns(GradhpoWarning, match="An earlier one is taken"):
        assert logged(6) == [T * i for i in range(1, 7)]


def test_records_of_another_run_in_a_log_stay(tmp_path):
    path = tmp_path / "a.jsonl"
    for steps in ((10, 20, 30), (10, 20, 40)):
        with JSONLinesLogger(path) as logger:
            for step in steps:
                logger.log({"x": 1.0}, step)
    with JSONLinesLogger(path) as logger:
        logger.rewind(20)
        logger.log({"x": 2.0}, 30)
    found = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert found == [10, 20, 30, 10, 20, 30]


def test_a_rejected_update_is_saved_before_it_is_raised(tmp_path):
    """So the same call goes on past it."""
    bad = STACKED.copy()
    bad[T] = np.nan
    data = {"get_train_batch": InOrder(bad), "get_val_batch": InOrder(STACKED)}
    opt = method("one_step")
    state = opt.init(*start())
    with pytest.raises(UpdateRejected, match=r"In the data, the first value.*batch 1 of episode 2"):
        run(opt, state, M=4, on_failure="raise", checkpoint=tmp_path, **data)
    assert checkpoint.steps(tmp_path) == [2 * T]
    assert int(run(opt, state, M=4, on_failure="raise", checkpoint=tmp_path, **data).episode) == 4


def tuned(directory, estimator, loss=train_loss, outer=None, **settings):
    problem = BilevelProblem(from_optax(loss, optax.sgd(0.1)), val_loss)
    source = Resident(DATA, 3)
    task = Task(problem, *start(), source, source)
    outer = outer or optax.adam(0.1)
    return tune(task, estimator, outer, episodes=2, T=T, checkpoint=directory, **settings)


KEY = jax.random.key(5)


def test_what_a_program_does_not_show_is_told_apart(tmp_path):
    """Seeds in a method's memory, rates in an optimizer's state, the fit of HyperDistill."""
    pairs = [
        ({"estimator": es(T, seed=0)}, {"estimator": es(T, seed=1)}, "start"),
        (
            {"estimator": one_step(), "outer": optax.inject_hyperparams(optax.adam)(0.1)},
            {"estimator": one_step(), "outer": optax.inject_hyperparams(optax.adam)(0.5)},
            "start",
        ),
        (
            {"estimator": hyperdistill()},
            {"estimator": hyperdistill(theta=0.5)},
            "start|programs",
        ),
        (
            {"estimator": hyperdistill()},
            {"estimator": hyperdistill(points="trajectory")},
            r"of another run: programs\.fit: [^;]*$",
        ),
    ]
    for i, (one, other, named) in enumerate(pairs):
        tuned(tmp_path / str(i), **one)
        with pytest.raises(CheckpointMismatch, match=named):
            tuned(tmp_path / str(i), **other)


def test_losses_may_close_over_keys_and_remat_by_names(tmp_path):
    policy = jax.checkpoint_policies.save_only_these_names("a", "b", "c")

    def loss(w, lam, batch):
        inner = jax.checkpoint(lambda w: train_loss(w, lam, batch), policy=policy)
        return inner(w) + 0.0 * jax.random.uniform(KEY)

    ends = [tuned(tmp_path, one_step(), loss) for _ in range(2)]
    assert digest_of(ends[0]) == digest_of(ends[1])


def test_the_state_before_one_that_fails_is_saved(tmp_path, monkeypatch):
    """As where a computation fails after its episode was launched."""
    opt, data = method("one_step"), sources("resident", "resident")
    real = Writer._write

    def failing(writer, state, step, *rest):
        if int(state.episode) == 3:
            raise CheckpointError("the state was not computed.")
        return real(writer, state, step, *rest)

    monkeypatch.setattr(Writer, "_write", failing)
    cut(tmp_path, opt, opt.init(*start()), episode=4, M=5, seconds=1000, **data)
    assert checkpoint.steps(tmp_path) == [2 * T]


def test_one_log_of_several_runs(tmp_path):
    """A script that is run again keeps the records of all its runs, finished or ended by a hook."""
    opt, path = method("one_step"), tmp_path / "a.jsonl"
    state = opt.init(*start())

    def script():
        with JSONLinesLogger(path) as logger:
            for name, M in (("ended", 2), ("whole", 4), ("another", 3)):
                data = sources("resident", "resident")
                stop = {"callback": lambda *_: False} if name == "ended" else {}
                kept = Checkpoints(directory=tmp_path / name, seconds=0)
                run(opt, state, M=M, logger=logger, checkpoint=kept, **stop, **data)
        return [json.loads(line)["step"] for line in path.read_text().splitlines()]

    first = script()
    assert first == [T, *(T * n for n in (1, 2, 3, 4)), *(T * n for n in (1, 2, 3))]
    # The first goes on from its second episode; nothing of the others is lost.
    assert script() == [*first, 2 * T]
    assert script() == [*first, 2 * T]


def test_a_log_after_a_run_that_went_on_and_was_cut_again(tmp_path):
    """The process that took the checkpoint told no hook of a later episode; the next one did."""
    opt, path = method("one_step"), tmp_path / "a.jsonl"
    state = opt.init(*start())

    def on(callback, seconds=1e6):
        kept = Checkpoints(directory=tmp_path / "kept", seconds=seconds)
        with JSONLinesLogger(path) as logger:
            data = sources("resident", "resident")
            run(opt, state, M=5, logger=logger, callback=callback, checkpoint=kept, **data)

    def process(callback):
        with pytest.MonkeyPatch.context() as patch:  # killed: it saves nothing on its way out
            patch.setattr(Saver, "rescue", lambda saver: None)
            with pytest.raises(Cut):
                on(callback)

    def cut_at(last):
        def callback(episode, state):
            if episode == last:
                raise Cut

        return callback

    on(lambda episode, state: episode < 2)
    process(cut_at(4))
    on(lambda episode, state: True)
    found = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert found == [T, 2 * T, 3 * T, 4 * T, 5 * T]


def test_an_earlier_save_that_failed_is_a_warning_once_the_last_one_is_there(tmp_path, monkeypatch):
    opt, data = method("one_step"), sources("resident", "resident")
    real = Writer._write

    def failing(writer, state, step, *rest):
        if int(state.episode) == 2:
            raise CheckpointError("cannot save: no space left on device.")
        return real(writer, state, step, *rest)

    monkeypatch.setattr(Writer, "_write", failing)
    end = 3

    def callback(episode, state):
        if episode == end + 1:
            raise Cut

    settings = {"callback": callback, **data}
    kept = Checkpoints(directory=tmp_path / "a", seconds=0)
    with pytest.warns(GradhpoWarning, match="no space left"):
        got = run(opt, opt.init(*start()), M=3, checkpoint=kept, **settings)
    assert int(got.episode) == 3 and checkpoint.steps(tmp_path / "a")[-1] == 3 * T
    end = 2  # the error of the callback comes while the failed save is the newest
    kept = Checkpoints(directory=tmp_path / "b", seconds=0)
    with pytest.raises(Cut) as caught:
        run(opt, opt.init(*start()), M=3, checkpoint=kept, **settings)
    assert "no space left" in str(caught.value.__notes__)
    assert "another state" not in str(caught.value.__notes__)


@pytest.mark.skipif(not hasattr(jax, "enable_x64"), reason="JAX has it by another name")
def test_settings_of_jax_are_those_of_the_caller(tmp_path):
    """By a context manager they are those of one thread, and another one writes."""
    opt = method("one_step")
    for name, context in (("x64", jax.enable_x64), ("draws", jax.threefry_partitionable)):
        data = sources("resident", "resident")
        with context(name == "x64"):
            state = opt.init(*start())
            cut(tmp_path / name, opt, state, **data)
            again = run(opt, state, M=4, checkpoint=tmp_path / name, **data)
            assert int(again.episode) == 4
            path = checkpoint.save(tmp_path / f"{name} number", {"n": 0.1}, step=1)
            leaf = checkpoint.load(path.parent)[0]["['n']"]
            assert leaf.dtype == jnp.result_type(float)
        if name == "draws":
            state = opt.init(*start())
            with pytest.warns(GradhpoWarning, match="threefry_partitionable: False -> True"):
                run(opt, state, M=4, checkpoint=tmp_path / name, **data)


def test_programs_are_compared_unless_jax_is_another(tmp_path, monkeypatch):
    tuned(tmp_path, one_step())
    real = reader.environment
    for package, compared in (("numpy", True), ("jax", False)):
        monkeypatch.setattr(reader, "environment", lambda p=package: {**real(), p: "99"})
        if compared:
            with pytest.warns(GradhpoWarning, match="numpy") as caught:
                with pytest.raises(CheckpointMismatch, match="validation loss|training step"):
                    tuned(tmp_path, one_step(), other_loss)
            assert "could not be compared" not in str(caught[0].message)
        else:
            with pytest.warns(GradhpoWarning, match="Losses and optimizers could not be compared"):
                tuned(tmp_path, one_step(), other_loss)


def test_a_state_after_the_checkpoint_is_refused(tmp_path):
    opt, data = method("one_step"), sources("resident", "resident")
    state = opt.init(*start())
    cut(tmp_path, opt, state, **data)
    later = run(opt, state, M=3, **sources("resident", "resident"))
    kept = Checkpoints(directory=tmp_path, accept_changes=True)
    with pytest.warns(GradhpoWarning, match="first episode: 0 -> 3"):
        with pytest.raises(CheckpointMismatch, match="after episode 2, and this run begins .* 3"):
            run(opt, later, M=2, checkpoint=kept, **data)


def test_another_loop_is_another_run(tmp_path):
    tuned(tmp_path, one_step(), loop="auto")
    tuned(tmp_path, one_step(), loop="scan")  # what that means here
    with pytest.raises(CheckpointMismatch, match="loop: scan -> host"):
        tuned(tmp_path, one_step(), loop="host")
