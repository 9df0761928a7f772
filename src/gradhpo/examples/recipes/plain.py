"""Plain JAX: BatchNorm and Dropout, tuned while they train.

    python -m gradhpo.examples.recipes.plain

`params` is a tree of arrays. The running statistics and the key of Dropout are the model state,
carried from step to step and never differentiated.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradhpo
from gradhpo import datasets
from gradhpo.transforms import scale_by_tree

__all__ = ["main"]

HYPERPARAMS = {
    "rates": {layer: np.log(1e-3, dtype=np.float32) for layer in ("hidden", "norm", "head")},
    "decay": np.log(1e-2, dtype=np.float32),
    "smoothing": np.float32(-3.0),  # a logit
}


def adamw(hyperparams):
    """AdamW with a rate for each layer."""
    decay = optax.add_decayed_weights(jnp.exp(hyperparams["decay"]))
    rates = scale_by_tree(jax.tree.map(lambda rate: -jnp.exp(rate), hyperparams["rates"]))
    return optax.chain(optax.scale_by_adam(eps_root=1e-8), decay, rates)


def cross_entropy(logits, labels, smoothing):
    targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), smoothing)
    loss = optax.softmax_cross_entropy(logits, targets).mean()
    return loss, {"accuracy": jnp.mean(logits.argmax(-1) == labels)}


RNG = np.random.default_rng(0)
PARAMS = {
    "hidden": {"kernel": RNG.standard_normal((64, 32), np.float32) / 8, "bias": np.zeros(32)},
    "norm": {"scale": np.ones(32), "bias": np.zeros(32)},
    "head": {"kernel": RNG.standard_normal((32, 10), np.float32) / 6, "bias": np.zeros(10)},
}
PARAMS = jax.tree.map(np.float32, PARAMS)
STATE = {"mean": np.zeros(32, np.float32), "var": np.ones(32, np.float32), "key": jax.random.key(0)}


def linear(layer, x):
    return x @ layer["kernel"] + layer["bias"]


def normalised(layer, x, mean, var):
    return jax.nn.relu((x - mean) * jax.lax.rsqrt(var + 1e-5) * layer["scale"] + layer["bias"])


def train_loss(params, hyperparams, batch, state):
    images, labels = batch
    key, for_dropout = jax.random.split(state["key"])
    x = linear(params["hidden"], images)
    mean, var = x.mean(0), x.var(0)
    running = {"mean": 0.9 * state["mean"] + 0.1 * mean, "var": 0.9 * state["var"] + 0.1 * var}
    x = normalised(params["norm"], x, mean, var)
    x = jnp.where(jax.random.bernoulli(for_dropout, 0.8, x.shape), x / 0.8, 0)
    smoothing = jax.nn.sigmoid(hyperparams["smoothing"])
    loss, metrics = cross_entropy(linear(params["head"], x), labels, smoothing)
    return loss, ({"key": key, **running}, metrics)


def val_loss(params, hyperparams, batch, state):
    del hyperparams
    images, labels = batch
    x = linear(params["hidden"], images)
    x = normalised(params["norm"], x, state["mean"], state["var"])
    return cross_entropy(linear(params["head"], x), labels, 0.0)


def main(M=20):
    """Tune on digits; the accuracy after the first episode and after the last."""
    train, val, _ = datasets.split(datasets.digits().train, [800, 400, 597], 0)
    optimizer = gradhpo.OneStepOptimizer(
        inner_optimizer=adamw, outer_optimizer=optax.adam(0.01), T=16
    )
    seen = []
    state = optimizer.run(
        optimizer.init(PARAMS, HYPERPARAMS, model_state=STATE),
        M,
        get_train_batch=gradhpo.Resident((train.inputs.reshape(-1, 64), train.targets), 50),
        get_val_batch=gradhpo.Resident((val.inputs.reshape(-1, 64), val.targets), 50),
        train_loss_fn=train_loss,
        val_loss_fn=val_loss,
        callback=lambda m, state: seen.append(float(state.metadata["val_accuracy"])),
    )
    print(f"validation accuracy {seen[0]:.2f}, then {seen[-1]:.2f}")
    return state


if __name__ == "__main__":
    main()
