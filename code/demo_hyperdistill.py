"""Tune 517 learning rates while a small network trains: six methods, one seed, one script.

    python code/demo_hyperdistill.py [--plot] [--seed N] [--M N] [--T N]

Everything goes through the public classes and plain Python functions that return a batch.
One seed shows how to call them, not which method is best; `gradhpo demo` repeats this over
20 seeds, and in a setting in which the methods differ.
"""

import argparse
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradhpo import (
    FOOptimizer,
    GradhpoWarning,
    GreedyOptimizer,
    OneStepOptimizer,
    OnlineHypergradientOptimizer,
    T1T2Optimizer,
)

FEATURES, HIDDEN, CLASSES = 10, 32, 5
N_TRAIN, N_VAL, BATCH = 500, 200, 128
NOISE = 0.2  # share of the training labels that are drawn anew
START = 0.05  # where all learning rates start
LR_HYPER = 3e-3  # outer rate; `run` lets it fall linearly to zero
LITERAL = "Greedy, literal"  # the call of the original tutorial, which tunes nothing
FIGURE = Path("out/demo_hyperdistill.png")  # figures/ holds the figure of `gradhpo demo`


# -- data ---------------------------------------------------------------------------------


def make_data(key):
    """Five Gaussian clusters: 500 training examples with label noise, 200 clean ones."""
    # A key for every draw: with one key for both, which labels are wrong and what they
    # become would not be independent.
    keys = jax.random.split(key, 5)
    centres = 2.0 * jax.random.normal(keys[0], (CLASSES, FEATURES))
    y = jax.random.randint(keys[1], (N_TRAIN + N_VAL,), 0, CLASSES)
    x = centres[y] + 0.5 * jax.random.normal(keys[2], (N_TRAIN + N_VAL, FEATURES))
    redrawn = jax.random.uniform(keys[3], y.shape) < NOISE
    noisy = jnp.where(redrawn, jax.random.randint(keys[4], y.shape, 0, CLASSES), y)
    y = jnp.where(jnp.arange(len(y)) < N_TRAIN, noisy, y)
    x, y = np.asarray(x), np.eye(CLASSES, dtype=np.float32)[np.asarray(y)]
    return (x[:N_TRAIN], y[:N_TRAIN]), (x[N_TRAIN:], y[N_TRAIN:])


def make_iter(data, seed):
    """A function that returns one batch per call, drawn with replacement."""
    rng = np.random.default_rng(seed)

    def next_batch():
        chosen = rng.integers(len(data[0]), size=BATCH)
        return tuple(array[chosen] for array in data)

    return next_batch


# -- model --------------------------------------------------------------------------------


def init_mlp(key, in_dim, hidden_dim, out_dim):
    """He initialisation: normal with variance 2 / fan-in, zero biases."""
    k1, k2 = jax.random.split(key)
    return {
        "w1": jnp.sqrt(2 / in_dim) * jax.random.normal(k1, (in_dim, hidden_dim)),
        "b1": jnp.zeros(hidden_dim),
        "w2": jnp.sqrt(2 / hidden_dim) * jax.random.normal(k2, (hidden_dim, out_dim)),
        "b2": jnp.zeros(out_dim),
    }


def mlp_forward(params, x):
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def cross_entropy_loss(params, batch):
    x, y_onehot = batch
    return -jnp.mean(jnp.sum(y_onehot * jax.nn.log_softmax(mlp_forward(params, x)), axis=-1))


def bilevel_loss(params, hyperparams, batch):
    """The losses contain no learning rate: those act through the training step alone."""
    del hyperparams
    return cross_entropy_loss(params, batch)


def make_update_fn(loss_fn):
    """One training step, gradient descent with a learning rate `softplus(lr)` per weight."""

    def update_fn(w, lr_params, batch):
        gradient = jax.grad(loss_fn)(w, batch)
        return jax.tree.map(lambda w, lr, g: w - jax.nn.softplus(lr) * g, w, lr_params, gradient)

    return update_fn


@jax.jit
def evaluate(params, x, y_onehot):
    """Loss and accuracy on a whole data set."""
    right = mlp_forward(params, x).argmax(-1) == y_onehot.argmax(-1)
    return cross_entropy_loss(params, (x, y_onehot)), right.mean()


# -- the comparison -----------------------------------------------------------------------


def compare(seed, M, T):
    """Train once with every method, on the same batches; losses and accuracies by method."""
    data_key, model_key = jax.random.split(jax.random.key(seed))
    train, val = make_data(data_key)
    w_init = init_mlp(model_key, FEATURES, HIDDEN, CLASSES)
    lam_init = jax.tree.map(lambda w: jnp.full_like(w, np.log(np.expm1(START))), w_init)
    update_fn = make_update_fn(cross_entropy_loss)
    unroll = 5 if T % 5 == 0 else T
    # Method, and its outer rate. The last inner optimizer contains no hyperparameter, nor do
    # the losses.
    methods = {
        "FO": (FOOptimizer(update_fn=update_fn, T=T), LR_HYPER),
        "One-step": (OneStepOptimizer(update_fn=update_fn, T=T), LR_HYPER),
        "T1T2": (T1T2Optimizer(update_fn=update_fn, gamma=0.9, T=T), LR_HYPER),
        "Greedy": (
            GreedyOptimizer(update_fn=update_fn, unroll_steps=unroll, gamma=0.9, T=T),
            LR_HYPER,
        ),
        "HyperDistill": (
            OnlineHypergradientOptimizer(
                update_fn=update_fn, gamma=0.99, estimation_period=10, T=T
            ),
            LR_HYPER,
        ),
        LITERAL: (
            GreedyOptimizer(
                inner_optimizer=optax.sgd(0.01),
                outer_optimizer=optax.adam(3e-3),
                unroll_steps=5,
                gamma=0.9,
            ),
            None,
        ),
    }

    history = {"Fixed": train_fixed(update_fn, w_init, lam_init, train, val, seed, M, T)}
    for name, (optimizer, lr_hyper) in methods.items():
        scores = history[name] = []

        def callback(episode, state, name=name, scores=scores):
            scores.append([float(x) for x in evaluate(state.params, *val)])
            progress(name, episode, M, scores)

        optimizer.run(
            optimizer.init(w_init, lam_init),
            M=M,
            get_train_batch=make_iter(train, seed),
            get_val_batch=make_iter(val, seed + 1),
            train_loss_fn=bilevel_loss,
            val_loss_fn=bilevel_loss,
            lr_reptile=1.0,
            lr_hyper=lr_hyper,
            callback=callback,
        )
    return {name: np.array(scores) for name, scores in history.items()}


def train_fixed(update_fn, w, lam, train, val, seed, M, T):
    """The baseline: the same steps on the same batches, no tuning."""
    step, get_batch, scores = jax.jit(update_fn), make_iter(train, seed), []
    for episode in range(1, M + 1):
        for _ in range(T):
            w = step(w, lam, get_batch())
        scores.append([float(x) for x in evaluate(w, *val)])
        progress("Fixed", episode, M, scores)
    return scores


def progress(name, episode, M, scores):
    if episode % 10 == 0 or episode == M:
        loss, accuracy = scores[-1]
        print(f"{name:15} episode {episode:3}/{M}  loss {loss:.4f}  accuracy {accuracy:.3f}")


def print_table(history):
    print(f"\n{'method':15}  {'last-5 loss':>11}  {'best loss':>9}  {'best accuracy':>13}")
    for name, scores in history.items():
        loss, accuracy = scores.T
        print(f"{name:15}  {loss[-5:].mean():11.4f}  {loss.min():9.4f}  {accuracy.max():13.3f}")
    fixed, *tuned = [scores[-5:, 0].mean() for name, scores in history.items() if name != LITERAL]
    spread = max(abs(loss - fixed) for loss in tuned)
    same = "exactly" if np.array_equal(history["FO"], history["Fixed"]) else "up to rounding"
    print(f"\nFO is Fixed {same}: the validation loss contains no learning rate. Without the last")
    print(
        f"row, no method is farther than {spread:.1g} from Fixed: a single seed at this outer rate"
    )
    print("ranks nothing. `gradhpo demo` runs 20 seeds, and a setting that separates the methods.")


def plot(history):
    from gradhpo.report.plots import curves

    losses = {name: scores[None, :, 0] for name, scores in history.items()}
    title = "517 learning rates, one seed"
    path = curves(losses, FIGURE, "episode", "validation loss", title, log_y=True, band=False)
    print(f"wrote {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", action="store_true", help=f"save {FIGURE}")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--M", type=int, default=60, help="episodes")
    parser.add_argument("--T", type=int, default=20, help="inner steps per episode")
    arguments = parser.parse_args()
    for name in ("M", "T"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if arguments.seed < 0:
        parser.error("--seed must not be negative")

    # gradhpo warns of hyperparameters without effect; here FO and the literal call of Greedy
    # are such cases on purpose.
    warnings.simplefilter("ignore", GradhpoWarning)
    started = time.perf_counter()
    history = compare(arguments.seed, arguments.M, arguments.T)
    print_table(history)
    if arguments.plot:
        plot(history)
    print(f"{time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
