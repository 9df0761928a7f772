"""Flax NNX: BatchNorm and Dropout, tuned while they train.

    python -m gradhpo.examples.recipes.flax_nnx

`nnx.split` takes the module apart: the `nnx.Param` variables are `params`, and all others (running
statistics, the keys and counts of Dropout) are the model state, carried and never differentiated.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

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


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(nnx.relu(self.norm(self.hidden(x)))))


GRAPH, PARAMS, STATE = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)


def train_loss(params, hyperparams, batch, state):
    images, labels = batch
    net = nnx.merge(GRAPH, params, state, copy=True)
    net.train()
    loss, metrics = cross_entropy(net(images), labels, jax.nn.sigmoid(hyperparams["smoothing"]))
    return loss, (nnx.split(net, nnx.Param, ...)[2], metrics)


def val_loss(params, hyperparams, batch, state):
    del hyperparams
    images, labels = batch
    net = nnx.merge(GRAPH, params, state, copy=True)
    net.eval()
    return cross_entropy(net(images), labels, 0.0)


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
