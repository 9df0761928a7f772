"""Equinox: BatchNorm and Dropout, tuned while they train.

    python -m gradhpo.examples.recipes.equinox_modules

`eqx.partition` takes the module apart: its floating-point arrays are `params`, and what else it
holds, functions among it, is closed over. The `eqx.nn.State` of BatchNorm and the key of Dropout
are the model state, carried from step to step and never differentiated.
"""

import equinox as eqx
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


class Net(eqx.Module):
    hidden: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    head: eqx.nn.Linear
    drop: eqx.nn.Dropout

    def __init__(self, key):
        keys = jax.random.split(key)
        self.hidden = eqx.nn.Linear(64, 32, key=keys[0])
        self.norm = eqx.nn.BatchNorm(32, axis_name="batch", mode="batch")
        self.head = eqx.nn.Linear(32, 10, key=keys[1])
        self.drop = eqx.nn.Dropout(0.2)

    def __call__(self, x, state, key):
        x, state = self.norm(self.hidden(x), state)
        return self.head(self.drop(jax.nn.relu(x), key=key)), state


NET, STATISTICS = eqx.nn.make_with_state(Net)(jax.random.key(0))
PARAMS, STATIC = eqx.partition(NET, eqx.is_inexact_array)
STATE = {"statistics": STATISTICS, "key": jax.random.key(1)}


def evaluate(net, images, statistics, key):
    one = jax.vmap(net, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))
    return one(images, statistics, jax.random.split(key, len(images)))


def train_loss(params, hyperparams, batch, state):
    images, labels = batch
    key, for_dropout = jax.random.split(state["key"])
    net = eqx.combine(params, STATIC)
    logits, statistics = evaluate(net, images, state["statistics"], for_dropout)
    loss, metrics = cross_entropy(logits, labels, jax.nn.sigmoid(hyperparams["smoothing"]))
    return loss, ({"statistics": statistics, "key": key}, metrics)


def val_loss(params, hyperparams, batch, state):
    del hyperparams
    images, labels = batch
    net = eqx.nn.inference_mode(eqx.combine(params, STATIC))
    return cross_entropy(evaluate(net, images, state["statistics"], state["key"])[0], labels, 0.0)


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
