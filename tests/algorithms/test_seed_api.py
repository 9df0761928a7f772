"""The public block of the seed, unchanged but for the data and the tutorial's own functions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gradhpo.algorithms.baselines import FOOptimizer, OneStepOptimizer
from gradhpo.algorithms.greedy import GreedyOptimizer
from gradhpo.algorithms.online import OnlineHypergradientOptimizer
from gradhpo.algorithms.t1_t2 import T1T2Optimizer as OtherSpelling
from gradhpo.algorithms.t1t2 import T1T2Optimizer


def init_mlp(key, in_dim, hidden_dim, out_dim):
    k1, k2 = jax.random.split(key)
    return {
        "w1": jax.random.normal(k1, (in_dim, hidden_dim)) * jnp.sqrt(2 / in_dim),
        "b1": jnp.zeros(hidden_dim),
        "w2": jax.random.normal(k2, (hidden_dim, out_dim)) * jnp.sqrt(2 / hidden_dim),
        "b2": jnp.zeros(out_dim),
    }


def mlp_forward(params, x):
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def cross_entropy_loss(params, batch):
    x, y = batch
    return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(mlp_forward(params, x)), axis=-1))


def bilevel_loss(params, hyperparams, batch):
    return cross_entropy_loss(params, batch)


def make_update_fn(loss_fn):
    def update_fn(w, lr_params, batch):
        gradient = jax.grad(loss_fn)(w, batch)
        return jax.tree.map(lambda p, g, r: p - jax.nn.softplus(r) * g, w, gradient, lr_params)

    return update_fn


def make_data(seed=42):
    rng = np.random.default_rng(seed)
    centres = 2 * rng.standard_normal((5, 10))
    labels = rng.integers(0, 5, 700)
    x = (centres[labels] + 0.5 * rng.standard_normal((700, 10))).astype(np.float32)
    noisy = np.where(rng.random(700) < 0.2, rng.integers(0, 5, 700), labels)
    y = np.eye(5, dtype=np.float32)
    return (x[:500], y[noisy[:500]]), (x[500:], y[labels[500:]])


@pytest.mark.usefixtures("x32")
def test_the_public_block_runs_unchanged():
    (X, Y), (X_val, Y_val) = make_data()
    rng = np.random.default_rng(0)

    def iterate(inputs, targets):
        def get():
            rows = rng.integers(0, len(inputs), 128)
            return inputs[rows], targets[rows]

        return get

    train_iter, val_iter = iterate(X, Y), iterate(X_val, Y_val)
    w_init = init_mlp(jax.random.key(42), 10, 32, 5)
    lam_init = jax.tree.map(lambda p: jnp.full(p.shape, jnp.log(jnp.expm1(0.05))), w_init)

    def evaluate(params, X, Y):
        right = jnp.argmax(mlp_forward(params, X), -1) == jnp.argmax(Y, -1)
        return float(cross_entropy_loss(params, (X, Y))), float(jnp.mean(right))

    # -- from here on as printed ------------------------------------------------------------
    update_fn = make_update_fn(cross_entropy_loss)
    losses = []

    def callback(episode, state):  # episode = 1..M
        losses.append(evaluate(state.params, X_val, Y_val)[0])

    opt = OnlineHypergradientOptimizer(update_fn=update_fn, gamma=0.99, estimation_period=10, T=20)
    state = opt.init(w_init, lam_init)
    state = opt.run(
        state, M=60, get_train_batch=train_iter, get_val_batch=val_iter,
        train_loss_fn=bilevel_loss, val_loss_fn=bilevel_loss,
        lr_reptile=1.0, lr_hyper=3e-3, callback=callback,
    )  # fmt: skip

    t1t2 = T1T2Optimizer(update_fn=update_fn, gamma=0.9, T=20)
    s_t1t2 = t1t2.run(
        t1t2.init(w_init, lam_init), M=60, get_train_batch=train_iter, get_val_batch=val_iter,
        train_loss_fn=bilevel_loss, val_loss_fn=bilevel_loss, lr_hyper=3e-3,
    )  # fmt: skip

    greedy = GreedyOptimizer(
        inner_optimizer=optax.sgd(0.01), outer_optimizer=optax.adam(3e-3), unroll_steps=5, gamma=0.9
    )
    with pytest.warns(UserWarning, match="identically zero"):  # lam enters nothing here
        s_greedy = greedy.run(
            greedy.init(w_init, lam_init), M=60, get_train_batch=train_iter, get_val_batch=val_iter,
            train_loss_fn=bilevel_loss, val_loss_fn=bilevel_loss,
        )  # fmt: skip

    one = OneStepOptimizer(update_fn=update_fn)
    s_one = one.run(
        one.init(w_init, lam_init), M=60, T=20, get_train_batch=train_iter, get_val_batch=val_iter,
        train_loss_fn=bilevel_loss, val_loss_fn=bilevel_loss, lr_reptile=1.0, lr_hyper=3e-3,
    )  # fmt: skip

    fo = FOOptimizer(update_fn=update_fn)
    with pytest.warns(UserWarning, match="first-order"):
        s_fo = fo.run(
            fo.init(w_init, lam_init), M=60, T=20, get_train_batch=train_iter,
            get_val_batch=val_iter, train_loss_fn=bilevel_loss, val_loss_fn=bilevel_loss,
            lr_hyper=3e-3,
        )  # fmt: skip

    assert OtherSpelling is T1T2Optimizer
    assert len(losses) == 60 and max(losses[-5:]) < min(0.3, losses[0])
    for s in (state, s_t1t2, s_one, s_fo):
        assert int(s.step) == 60 * 20
        assert evaluate(s.params, X_val, Y_val)[1] > 0.85
    assert int(s_greedy.step) == 60  # T = unroll_steps: one update per episode

    def moved(s):
        gaps = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), s.hyperparams, lam_init)
        return float(max(jax.tree.leaves(gaps)))

    assert moved(s_fo) == moved(s_greedy) == 0.0
    for s in (state, s_t1t2, s_one):
        assert 1e-7 < moved(s) < 1e-2
