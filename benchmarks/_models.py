"""Two small networks with model state, in plain JAX: a CNN and a transformer.

Both draw Dropout masks and Gaussian input noise from a PRNG key that is model state, and the
CNN keeps the running statistics of BatchNorm there too. Trained by AdamW, with hyperparameters

    lam = {"lr": {layer: log rate}, "wd": log weight decay,
           "smooth": logit of the label smoothing, "noise": log size of the input noise}

A training loss is `(params, lam, batch, model_state) -> (loss, (model_state, metrics))`; a
validation loss takes the same and returns `(loss, metrics)`: running statistics, no noise.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

__all__ = ["DECAY", "EPS", "EPS_ROOT", "MODELS", "Model", "adamw"]

DECAY, EPS, EPS_ROOT = (0.9, 0.999), 1e-8, 1e-8  # of Adam
DROP, MOMENTUM = 0.2, 0.9  # dropout; running statistics
CLASSES = 10
HEADS, LENGTH, WIDTH, TOKENS = 4, 32, 64, 64


class Model(NamedTuple):
    """One task: where training starts, its losses and its data (examples first)."""

    params: Any  # {layer: {name: array}}
    hyperparams: Any
    model_state: Any
    train: tuple[jax.Array, jax.Array]
    val: tuple[jax.Array, jax.Array]
    batch: int
    train_loss: Callable
    val_loss: Callable


def adamw(lam: Any) -> optax.GradientTransformation:
    """AdamW with one rate per layer."""

    def scale(updates, params):
        del params
        rates = {layer: -jnp.exp(lam["lr"][layer]) for layer in updates}
        return {k: jax.tree.map(lambda u, k=k: rates[k] * u, updates[k]) for k in updates}

    return optax.chain(
        optax.scale_by_adam(*DECAY, EPS, eps_root=EPS_ROOT),
        optax.add_decayed_weights(jnp.exp(lam["wd"])),
        optax.stateless(scale),
    )


def starting_point(params: Any, dtype: Any) -> Any:
    return {
        "lr": {layer: jnp.asarray(np.log(1e-3), dtype) for layer in params},
        "wd": jnp.asarray(np.log(1e-2), dtype),
        "smooth": jnp.asarray(-3.0, dtype),
        "noise": jnp.asarray(-3.0, dtype),
    }


# -- what the two share ----------------------------------------------------------------


def noisy(x, lam, key):
    return x + jnp.exp(lam["noise"]) * jax.random.normal(key, x.shape, x.dtype)


def dropped(x, key):
    return jnp.where(jax.random.bernoulli(key, 1 - DROP, x.shape), x / (1 - DROP), 0)


def smoothed(scores, labels, lam):
    """Cross-entropy against `(1 - s) onehot + s / classes`."""
    s, scores = jax.nn.sigmoid(lam["smooth"]), jax.nn.log_softmax(scores)
    return -jnp.mean((1 - s) * pick(scores, labels) + s * scores.mean(-1))


def pick(scores, labels):
    return jnp.take_along_axis(scores, labels[..., None], -1)[..., 0]


def accuracy(scores, labels):
    return {"accuracy": jnp.mean(scores.argmax(-1) == labels, dtype=scores.dtype)}


def judged(scores, labels):
    return -jnp.mean(pick(jax.nn.log_softmax(scores), labels)), accuracy(scores, labels)


def normal(rng, dtype, *shape, fan):
    return jnp.asarray(rng.standard_normal(shape) / np.sqrt(fan), dtype)


# -- CNN ----------------------------------------------------------------


def cnn(dtype: Any = jnp.float32, small: bool = False) -> Model:
    """28x28 images, two 3x3 convolutions of stride 2 with BatchNorm, Dropout, a linear layer."""
    rng = np.random.default_rng(0)
    size, batch, examples, widths = (8, 6, 12, (3, 4)) if small else (28, 100, 1000, (16, 32))
    params, statistics, channels = {}, {}, 1
    for i, width in enumerate(widths, 1):
        kernel = normal(rng, dtype, 3, 3, channels, width, fan=4.5 * channels)
        params[f"conv{i}"] = {"kernel": kernel}
        params[f"norm{i}"] = {"scale": jnp.ones(width, dtype), "bias": jnp.zeros(width, dtype)}
        statistics[f"norm{i}"] = {"mean": jnp.zeros(width, dtype), "var": jnp.ones(width, dtype)}
        channels = width
    features = (size // 4) ** 2 * channels
    kernel = normal(rng, dtype, features, CLASSES, fan=features)
    params["head"] = {"kernel": kernel, "bias": jnp.zeros(CLASSES, dtype)}
    prototypes = rng.standard_normal((CLASSES, size, size, 1))

    def images():
        y = rng.integers(0, CLASSES, examples, dtype=np.int32)
        x = prototypes[y] + 2 * rng.standard_normal((examples, size, size, 1))
        return jnp.asarray(x.clip(0), dtype), jnp.asarray(y)  # half of the pixels are black

    state = {"statistics": statistics, "key": jax.random.key(0)}
    lam = starting_point(params, dtype)
    return Model(params, lam, state, images(), images(), batch, cnn_train_loss, cnn_val_loss)


def convolved(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=numbers)


def normalised(x, p, mean, var):
    return (x - mean) * (p["scale"] * jax.lax.rsqrt(var + 1e-5)) + p["bias"]


def cnn_train_loss(w, lam, batch, state):
    x, y = batch
    key, for_noise, for_drop = jax.random.split(state["key"], 3)
    x, statistics = noisy(x, lam, for_noise), {}
    for i in ("1", "2"):
        x = convolved(x, w["conv" + i]["kernel"])
        mean = x.mean((0, 1, 2))
        var = jnp.mean(x * x, (0, 1, 2)) - mean**2
        old, new = state["statistics"]["norm" + i], {"mean": mean, "var": var}
        statistics["norm" + i] = jax.tree.map(
            lambda a, b: MOMENTUM * a + (1 - MOMENTUM) * b, old, new
        )
        x = jax.nn.relu(normalised(x, w["norm" + i], mean, var))
    x = dropped(x.reshape(len(x), -1), for_drop)
    scores = x @ w["head"]["kernel"] + w["head"]["bias"]
    state = {"statistics": statistics, "key": key}
    return smoothed(scores, y, lam), (state, accuracy(scores, y))


def cnn_val_loss(w, lam, batch, state):
    del lam
    x, y = batch
    for i in ("1", "2"):
        x = convolved(x, w["conv" + i]["kernel"])
        x = jax.nn.relu(normalised(x, w["norm" + i], **state["statistics"]["norm" + i]))
    return judged(x.reshape(len(x), -1) @ w["head"]["kernel"] + w["head"]["bias"], y)


# -- transformer ----------------------------------------------------------------


def transformer(dtype: Any = jnp.float32, small: bool = False) -> Model:
    """Two layers, width 64, 4 heads, 32 tokens; predicts the next token of a Markov chain."""
    rng = np.random.default_rng(0)
    batch, examples = (3, 6) if small else (32, 500)

    def linear(a, b):
        return normal(rng, dtype, a, b, fan=a)

    def norm():
        return {"scale": jnp.ones(WIDTH, dtype), "bias": jnp.zeros(WIDTH, dtype)}

    def block():
        return {
            "norm1": norm(),
            "qkv": linear(WIDTH, 3 * WIDTH),
            "out": linear(WIDTH, WIDTH),
            "norm2": norm(),
            "up": linear(WIDTH, 4 * WIDTH),
            "down": linear(4 * WIDTH, WIDTH),
        }

    embedding = {"token": linear(TOKENS, WIDTH) * 8, "place": linear(LENGTH, WIDTH)}
    params = {"embed": embedding, "block1": block(), "block2": block()}
    params["head"] = {"norm": norm(), "kernel": linear(WIDTH, TOKENS)}
    successors = rng.integers(0, TOKENS, (TOKENS, 4))

    def sequences():
        tokens = [rng.integers(0, TOKENS, examples)]
        for _ in range(LENGTH):
            tokens.append(successors[tokens[-1], rng.integers(0, 4, examples)])
        tokens = jnp.asarray(np.stack(tokens, 1), jnp.int32)
        return tokens[:, :-1], tokens[:, 1:]

    state, lam = {"key": jax.random.key(0)}, starting_point(params, dtype)
    data = sequences(), sequences()
    return Model(params, lam, state, *data, batch, transformer_train_loss, transformer_val_loss)


def layer_norm(x, p):
    mean = x.mean(-1, keepdims=True)
    var = jnp.mean(x * x, -1, keepdims=True) - mean**2
    return (x - mean) * jax.lax.rsqrt(var + 1e-5) * p["scale"] + p["bias"]


def attention(x, p):
    q, k, v = (
        h.reshape(*h.shape[:2], HEADS, -1) for h in jnp.split(x @ p["qkv"], 3, axis=-1)
    )  # (batch, length, heads, width of a head)
    scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) / np.sqrt(q.shape[-1])
    causal = np.tril(np.ones((x.shape[1], x.shape[1]), bool))
    share = jax.nn.softmax(jnp.where(causal, scores, -1e9))
    return jnp.einsum("nhqk,nkhd->nqhd", share, v).reshape(x.shape) @ p["out"]


def embedded(w, tokens):
    return w["embed"]["token"][tokens] + w["embed"]["place"][: tokens.shape[1]]


def blocks(w, x, drop):
    """The scores of the next token; `drop(x, i)` is the i-th Dropout."""
    for i in range(2):
        p = w[f"block{i + 1}"]
        x = x + drop(attention(layer_norm(x, p["norm1"]), p), 2 * i)
        hidden = jax.nn.gelu(layer_norm(x, p["norm2"]) @ p["up"])
        x = x + drop(hidden @ p["down"], 2 * i + 1)
    return layer_norm(x, w["head"]["norm"]) @ w["head"]["kernel"]


def transformer_train_loss(w, lam, batch, state):
    tokens, following = batch
    key, for_noise, *for_drop = jax.random.split(state["key"], 6)
    x = noisy(embedded(w, tokens), lam, for_noise)
    scores = blocks(w, x, lambda x, i: dropped(x, for_drop[i]))
    return smoothed(scores, following, lam), ({"key": key}, accuracy(scores, following))


def transformer_val_loss(w, lam, batch, state):
    del lam, state
    tokens, following = batch
    return judged(blocks(w, embedded(w, tokens), lambda x, i: x), following)


MODELS = {"cnn": cnn, "transformer": transformer}
