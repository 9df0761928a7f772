"""Flax Linen: BatchNorm and Dropout, tuned while they train.

    python -m gradhpo.examples.recipes.flax_linen

`params` is the collection of that name. The others, and the key of Dropout, are the model state,
carried from step to step and never differentiated.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

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


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(32, name="hidden")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        return nn.Dense(10, name="head")(nn.Dropout(0.2, deterministic=not train)(x))


VARIABLES = Net().init(jax.random.key(0), np.zeros((1, 64)), train=False)
PARAMS = VARIABLES["params"]
STATE = {"batch_stats": VARIABLES["batch_stats"], "key": jax.random.key(1)}


def train_loss(params, hyperparams, batch, state):
    images, labels = batch
    key, for_dropout = jax.random.split(state["key"])
    logits, updated = Net().apply(
        {"params": params, "batch_stats": state["batch_stats"]},
        images,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": for_dropout},
    )
    loss, metrics = cross_entropy(logits, labels, jax.nn.sigmoid(hyperparams["smoothing"]))
    return loss, ({"key": key, **updated}, metrics)


def val_loss(params, hyperparams, batch, state):
    del hyperparams
    images, labels = batch
    variables = {"params": params, "batch_stats": state["batch_stats"]}
    return cross_entropy(Net().apply(variables, images, train=False), labels, 0.0)


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
