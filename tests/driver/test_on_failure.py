"""What a run does about an update that was rejected: skip it, stop after its episode, raise."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from facade_cases import T, batch, method, sgd, start, train_loss, val_loss

import gradhpo
from gradhpo import GradhpoWarning, InOrder, Status, UpdateRejected
from gradhpo.driver.hooks import Progress

M, BAD = 5, 3 * T - 1  # episodes; the step whose validation batch is NaN, the last of the third


def batches(seed, *shape):
    return np.random.default_rng(seed).standard_normal((M * T, *shape)).astype(np.float32)


def run(opt, state, episodes, bad=BAD, source=InOrder, **more):
    """Some episodes of a run of M, on data that have a NaN in one place."""
    shape = (3, 2) if opt.tasks is None else (opt.tasks, 3, 2)
    val = batches(2, *shape)
    val[bad] = np.nan
    return opt.run(
        state,
        episodes,
        of=M,
        get_train_batch=source(batches(1, *shape)),
        get_val_batch=source(val),
        train_loss_fn=train_loss,
        val_loss_fn=val_loss,
        lr_hyper=0.1,
        **more,
    )


def assert_same(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = (jax.random.key_data(x) if _is_key(x) else x for x in (a, b))
        np.testing.assert_array_equal(a, b)


def _is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


KINDS = {
    "one_step": ({}, {}),
    "one_step, Reptile": ({}, {"lr_reptile": 0.5}),
    "one_step, on the host": ({"loop": "host"}, {}),
    "one_step, two tasks": ({"tasks": 2}, {}),
    "reverse": ({}, {}),
    "hyperdistill": ({"estimation_period": 2}, {}),
}


@pytest.mark.filterwarnings("ignore:.*updates of this run were rejected")
@pytest.mark.parametrize("kind", KINDS)
def test_the_run_ends_at_the_episode_of_the_failure(kind):
    """Bit for bit where the same run of so many episodes ends; and it goes on from there."""
    settings, more = KINDS[kind]
    opt = method(kind.split(",")[0], inner_optimizer=sgd, **settings)
    state = opt.init(*start())
    skipped = run(opt, state, M, **more)  # several episodes to a call where that can be
    with pytest.raises(UpdateRejected, match=r"episode 3 were.*NaN in the validation") as caught:
        run(opt, state, M, on_failure="raise", **more)
    error = caught.value
    assert isinstance(error, FloatingPointError) and error.status == Status.NONFINITE_VAL_LOSS
    assert error.step == (2 if opt.method().unroll_steps == T else BAD)
    assert_same(error.state, run(opt, state, 3, **more))
    with pytest.warns(
        GradhpoWarning, match=rf"at step {error.step}\. NONFINITE.*ends here"
    ) as said:
        stopped = run(opt, state, M, on_failure="stop", **more)
    assert len(said) == 1 and str(error) in str(said[0].message)
    assert_same(stopped, error.state)
    assert_same(run(opt, error.state, 2, on_failure="raise", **more), skipped)


def test_a_source_is_not_read_beyond_the_episode_of_the_failure():
    opt, read = method("one_step", inner_optimizer=sgd), []

    def source():
        read.append(1)
        return batch(0) * (np.nan if len(read) == 2 else 1)

    with pytest.raises(UpdateRejected):
        opt.run(
            opt.init(*start()),
            M,
            get_train_batch=source,
            get_val_batch=lambda: batch(1),
            train_loss_fn=train_loss,
            val_loss_fn=val_loss,
            lr_hyper=0.1,
            on_failure="raise",
        )
    assert len(read) == T


@pytest.mark.filterwarnings("ignore:.*updates of this run were rejected")
def test_the_step_is_said_where_it_is_known():
    """The metadata keep the first one since init: of a later one the episode is known alone."""
    opt = method("one_step", inner_optimizer=sgd)
    state = run(opt, opt.init(*start()), 3)
    with pytest.raises(UpdateRejected, match=r"first at steps 12 to 15\.") as caught:
        run(opt, state, 2, bad=3 * T, on_failure="raise")
    assert caught.value.step is None


def test_hooks_see_the_episode_of_the_failure():
    opt, seen = method("one_step", inner_optimizer=sgd), []

    def callback(episode, state):
        seen.append((episode, state.status_message))

    with pytest.raises(UpdateRejected):
        run(opt, opt.init(*start()), M, bad=T - 1, callback=callback, on_failure="raise")
    assert [episode for episode, _ in seen] == [1]
    assert "Look for NaN in the validation batch" in seen[0][1]


def test_a_rejected_update_stands_in_the_progress_line(capsys):
    opt = method("one_step", inner_optimizer=sgd)
    line = Progress(M, 0, True)
    state = opt.init(*start())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        after = run(opt, state, 1, bad=1)
    line(M, after)
    line.close()
    assert "rejected/NONFINITE_VAL_LOSS=1" in capsys.readouterr().err


def test_of_a_task_and_of_a_word_that_is_none():
    problem = gradhpo.BilevelProblem(
        gradhpo.from_update(lambda w, lam, batch: w - lam * (w - batch)), lambda w, lam, batch: w**2
    )
    train = np.ones(8, np.float32)
    train[5] = np.inf
    task = gradhpo.Task(problem, 2.0, 0.5, InOrder(train), InOrder(np.zeros(8, np.float32)))
    arguments = {"episodes": 4, "T": 2, "on_failure": "stop"}
    with pytest.warns(GradhpoWarning, match="tune: NONFINITE_TRAIN_STATE 1 of the 2 updates of ep"):
        state = gradhpo.tune(task, gradhpo.one_step(), optax.sgd(0.1), **arguments)
    assert int(state.episode) == 3
    with pytest.raises(ValueError, match="on_failure must be 'skip', 'stop' or 'raise', got 'no'"):
        gradhpo.tune(task, gradhpo.one_step(), optax.sgd(0.1), episodes=1, T=2, on_failure="no")  # type: ignore[arg-type]
