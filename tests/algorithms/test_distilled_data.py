"""HyperDistill's D* through the class: keys, leaves without examples, sizes that change."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo import (
    GradhpoWarning,
    InOrder,
    OnlineHypergradientOptimizer,
    Resident,
    Status,
    status_message,
)

LAM = np.float32(0.1)
PARAMS = np.ones(3, np.float32)


def distill(**settings):
    settings = {"inner_optimizer": optax.sgd(0.1), "T": 2, "gamma": 0.9, **settings}
    return OnlineHypergradientOptimizer(**settings)


def keyed_loss(w, lam, batch):
    """Dropout of the input: every example has a key of its own."""
    x, keys = batch
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (3,)))(keys)
    return jnp.mean(jnp.where(kept, w - x, 0) ** 2) + lam * jnp.sum(w**2)


def one_key_loss(w, lam, key):
    return jnp.mean((w - jax.random.normal(key, (3,))) ** 2) + lam * jnp.sum(w**2)


def keyed_batch(seed):
    keys = jax.random.split(jax.random.key(seed), 4)
    return np.random.default_rng(seed).standard_normal((4, 3)).astype(np.float32), keys


@pytest.mark.parametrize("sampling", ["bernoulli", "round"])
def test_keys_are_kept_like_any_leaf(sampling):
    """A key belongs to its example: whichever example D* keeps, it keeps with its key."""
    opt = distill(gamma=1.0, sampling=sampling, theta="fixed")
    state = opt.init(PARAMS, LAM)
    batches = [keyed_batch(seed) for seed in range(3)]
    for batch in batches:
        state = opt.step(state, batch, batch, keyed_loss, keyed_loss, lr_hyper=0.1)
    x, keys = state.memory.data
    came = [[np.array_equal(x[i], b[0][i]) for b in batches].index(True) for i in range(4)]
    assert len(set(came)) > 1
    for i, t in enumerate(came):
        assert jnp.array_equal(jax.random.key_data(keys[i]), jax.random.key_data(batches[t][1][i]))


def test_a_run_with_keys():
    """Through `run`, with the fit of theta."""
    opt, counts = distill(), iter(range(100))
    state = opt.run(
        opt.init(PARAMS, LAM),
        M=2,
        get_train_batch=lambda: keyed_batch(next(counts)),
        get_val_batch=lambda: keyed_batch(0),
        train_loss_fn=keyed_loss,
        val_loss_fn=keyed_loss,
        lr_hyper=0.1,
    )
    assert int(state.metadata["n_rejected"]) == 0
    assert jnp.issubdtype(state.memory.data[1].dtype, jax.dtypes.prng_key)


NO_EXAMPLES = {
    "a key": (one_key_loss, jax.random.key(0)),
    "lengths that differ": (
        lambda w, lam, b: jnp.mean((w - b["x"]) ** 2) * b["scale"] + lam * jnp.sum(w**2),
        {"x": np.ones((4, 3), np.float32), "scale": np.float32(0.5)},
    ),
}


@pytest.mark.parametrize("kind", NO_EXAMPLES)
def test_batches_without_examples_under_jit(kind):
    """With the batch shown to `init` the step may be traced, and D* is said to be D_t."""
    loss, batch = NO_EXAMPLES[kind]
    opt = distill()

    def step(state):
        return opt.step(state, batch, batch, loss, loss, lr_hyper=0.1)

    with pytest.warns(GradhpoWarning, match="share no leading axis.*D\\* is always") as caught:
        eager = step(opt.init(PARAMS, LAM))  # allocated by the step
        again = step(eager)
    assert len(caught) == 1
    state = jax.jit(step)(opt.init(PARAMS, LAM, train_batch=batch))
    state, _ = jax.lax.scan(lambda s, _: (step(s), None), state, None, length=1)
    np.testing.assert_allclose(state.hyperparams, again.hyperparams, rtol=1e-5)
    assert int(state.metadata["n_rejected"]) == 0 and state.memory.data == ()
    with pytest.raises(ValueError, match="share no leading axis"):
        strict = distill(strict=True)
        strict.step(strict.init(PARAMS, LAM), batch, batch, loss, loss, lr_hyper=0.1)


def plain_loss(w, lam, batch):
    return jnp.mean((w - batch) ** 2) + lam * jnp.sum(w**2)


@pytest.mark.parametrize("loop", ["scan", "host"])
def test_another_batch_size_at_an_episode_border(loop, compilations):
    """Every episode fills D* anew: the size may change there, and costs one compilation."""
    opt = distill(loop=loop, estimation_period=2)
    sizes, seen = [4, 4, 6, 6, 4, 4], []

    def run(M):
        batches = iter([np.full((n, 3), 0.5 * i, np.float32) for i, n in enumerate(sizes)])
        return opt.run(
            opt.init(PARAMS, LAM),
            M,
            get_train_batch=lambda: next(batches),
            get_val_batch=lambda: np.zeros((4, 3), np.float32),
            train_loss_fn=plain_loss,
            val_loss_fn=plain_loss,
            lr_hyper=0.1,
            callback=lambda m, state: seen.append(state.memory.data.shape),
        )

    state = run(3)
    assert seen == [(4, 3), (6, 3), (4, 3)]
    assert int(state.step) == 6 and int(state.metadata["n_rejected"]) == 0
    before = compilations()
    run(3)
    assert compilations() == before


def test_within_an_episode_the_size_stays():
    opt = distill(theta="fixed")
    four, six = np.ones((4, 3), np.float32), np.ones((6, 3), np.float32)
    state = opt.step(opt.init(PARAMS, LAM), four, four, plain_loss, plain_loss, 0.1)
    with pytest.raises(ValueError, match="within an episode all batches have one shape"):
        opt.step(state, six, six, plain_loss, plain_loss, 0.1)


def test_the_fit_for_a_loop_of_ones_own_takes_another_size():
    """Its D* is its own, so an episode may begin with another batch size."""
    opt = distill()
    old, new = np.ones((4, 3), np.float32), np.zeros((6, 3), np.float32)
    state = opt.step(opt.init(PARAMS, LAM), old, old, plain_loss, plain_loss, 0.1)
    fitted = opt.estimate_theta(state, [new, new], new, plain_loss, plain_loss)
    fresh = opt.estimate_theta(
        opt.init(state.params, state.hyperparams, new), [new, new], new, plain_loss, plain_loss
    )
    assert float(fitted.get_metric("theta_fit")) == float(fresh.get_metric("theta_fit")) > 0


def test_resident_data_have_examples():
    data = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    opt = distill(strict=True)
    source = Resident(data, 4)
    state = opt.run(
        opt.init(PARAMS, LAM),
        M=1,
        get_train_batch=source,
        get_val_batch=source,
        train_loss_fn=plain_loss,
        val_loss_fn=plain_loss,
        lr_hyper=0.1,
    )
    assert state.memory.data.shape == (4, 3)


# -- the guard of theta ------------------------------------------------------------------------


def towards_lam(w, lam, batch):
    return jnp.sum((w - lam) ** 2) / 2 + 0 * jnp.sum(batch)


def judge(w, lam, batch):
    return jnp.sum((w - 3.0) ** 2) / 2


@pytest.mark.parametrize("guard", [True, False])
def test_a_theta_that_is_too_large_is_refused(guard):
    """Momentum makes the past grow: theta is fitted at 4.5, R^2 0.99, cosine 1, where training
    that forgets nothing would give 20 / S_20 = 1.1. A rate that suits S_t v_t then diverges."""
    opt = distill(
        inner_optimizer=optax.sgd(0.01, momentum=0.9),
        T=20,
        gamma=0.99,
        estimation_period=1,
        theta_guard=guard,
    )
    zeros = np.zeros(2, np.float32)
    state = opt.run(
        opt.init(zeros, zeros),
        M=20,
        get_train_batch=lambda: zeros,
        get_val_batch=lambda: zeros,
        train_loss_fn=towards_lam,
        val_loss_fn=judge,
        lr_hyper=1.0,
    )
    assert float(state.get_metric("theta_fit")) == pytest.approx(4.5, abs=0.1)
    assert float(state.get_metric("theta_r2")) > 0.98
    assert int(state.metadata["n_rejected"]) == 0
    left = float(judge(state.params, None, None))
    if guard:
        assert state.metadata["status"] == Status.THETA_REJECTED
        assert "T / S_T" in status_message(state.metadata["status"])
        assert float(state.get_metric("theta")) == 1.0 and left < 1e-3
    else:
        assert state.metadata["status"] == Status.OK and left > 100


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_training_that_forgets_nothing_keeps_its_theta(gamma):
    """A_t = I: s equal terms fitted by S_s of them; theta makes up for a discount that forgets."""
    s = np.arange(1, 21)
    S = np.cumsum(gamma ** (s - 1.0))
    opt = distill(
        inner_optimizer=None,
        update_fn=lambda w, lam, batch: w - 0.1 * lam + 0 * batch.sum(),
        T=20,
        gamma=gamma,
    )
    zeros = np.zeros((2, 1), np.float32)
    state = opt.init(PARAMS, np.ones(3, np.float32), zeros)
    state = opt.estimate_theta(state, [zeros] * 20, zeros, judge, judge)
    assert state.memory.status == Status.OK
    theta = float(state.get_metric("theta"))
    assert theta == pytest.approx(np.sum(S * s) / np.sum(S * S), rel=1e-4)
    assert 1 - 1e-4 < theta < (1 + 1e-4) * 20 / S[-1]


def several_loss(w, lam, batch):
    x, scale = batch
    return jnp.mean((w - scale[..., None] * x) ** 2) + lam * jnp.sum(w**2)


@pytest.mark.parametrize("source", ["functions", "in order"])
@pytest.mark.parametrize("examples", [True, False], ids=["examples", "none"])
def test_several_tasks_keep_a_batch_each(examples, source, x64):
    """A run makes room for D* by task: those of a task share an axis of examples, or they do not,
    whatever the axis of tasks is. The room is that of a state that was shown a batch."""
    rng = np.random.default_rng(0)
    shape = (4, 3, 5) if examples else (4, 3)
    x, scale = rng.standard_normal((*shape, 3)), rng.uniform(1, 2, shape)
    opt, one = distill(tasks=3, estimation_period=2), (x[0], scale[0])

    def side():
        if source == "in order":
            return InOrder((x, scale))
        batches = iter([*zip(x, scale, strict=True)] * 2)
        return lambda: next(batches)

    def run(state):
        return opt.run(
            state,
            2,
            get_train_batch=side(),
            get_val_batch=side(),
            train_loss_fn=several_loss,
            val_loss_fn=several_loss,
            lr_hyper=0.1,
        )

    states = opt.init(PARAMS, LAM), opt.init(PARAMS, LAM, one)
    if not examples:
        with pytest.warns(GradhpoWarning, match="share no leading axis"):
            got, shown = map(run, states)
        assert got.memory.data == ()
    else:
        got, shown = map(run, states)
        assert [leaf.shape for leaf in got.memory.data] == [(3, 5, 3), (3, 5)]
    assert not int(got.metadata["n_rejected"])
    for a, b in zip(
        *(jax.tree.leaves((s.params, s.hyperparams)) for s in (got, shown)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
