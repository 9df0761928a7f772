"""A small transformer that reads a digit row by row: a rate and a decay for every layer.

    gradhpo tune gradhpo.examples.problems.transformer:task --method reverse --seeds 5 \
        --episodes 10 --steps 200 --outer-rate 0.2

An episode is a whole training, from new weights.
"""

import jax
import jax.numpy as jnp
import optax

import gradhpo as gh
from gradhpo import datasets, spaces
from gradhpo.transforms import decay_by_tree, scale_by_tree

SHAPES = {
    "embed": {"pixels": (8, 32), "places": (8, 32)},
    "attend": {"query": (32, 32), "key": (32, 32), "value": (32, 32), "out": (32, 32)},
    "think": {"wide": (32, 64), "narrow": (64, 32)},
    "head": {"scores": (32, 10)},
}


def init(key):
    shapes, structure = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(shapes))
    draw = [jax.random.normal(k, s) / s[0] ** 0.5 for k, s in zip(keys, shapes, strict=True)]
    return jax.tree.unflatten(structure, draw)


def loss(params, lam, batch):
    attend, think, norm = params["attend"], params["think"], jax.nn.standardize
    x = batch[0][..., 0] @ params["embed"]["pixels"] + params["embed"]["places"]  # (n, 8, 32)
    q, k, v = ((norm(x) @ attend[name]).reshape(-1, 8, 2, 16) for name in ("query", "key", "value"))
    x += jax.nn.dot_product_attention(q, k, v).reshape(x.shape) @ attend["out"]  # two heads
    x += jax.nn.gelu(norm(x) @ think["wide"]) @ think["narrow"]
    scores = norm(x).mean(1) @ params["head"]["scores"]
    value = optax.softmax_cross_entropy_with_integer_labels(scores, batch[1]).mean()
    return value, {"accuracy": jnp.mean(scores.argmax(-1) == batch[1])}


def optimizer(lam):
    rates = scale_by_tree(jax.tree.map(jnp.negative, lam["rate"]))
    return optax.chain(optax.scale_by_adam(eps_root=1e-8), decay_by_tree(lam["decay"]), rates)


PROBLEM = gh.BilevelProblem(
    gh.from_optax(loss, optimizer), loss, begin=lambda params, lam, key: gh.Start(init(key))
)


def task(seed=0):
    train, val, test = datasets.split(datasets.digits().train, (800, 400, 597), seed)
    sources = gh.Resident(train, 50, seed=2 * seed), gh.Resident(val, 100, seed=2 * seed + 1)
    lam = {"rate": dict.fromkeys(SHAPES, 1e-3), "decay": dict.fromkeys(SHAPES, 1e-4)}
    params = init(jax.random.key(seed))
    return gh.Task(PROBLEM, params, lam, *sources, space=spaces.log(), test=test)
