"""How strongly to augment images, learned through the resampling itself.

    python -m gradhpo.examples.augmentation

Every training image is turned, shifted, scaled and made noisy at random before the network sees
it. Bilinear resampling is differentiable, so the four strengths are hyperparameters like any
other. They act on the training loss only, and weaker augmentation looks better over the next few
steps: it takes whole training runs to see that some of it helps. So an episode is a training
run, and full reverse mode differentiates through all of it. What is printed compares the first run
with the last; the study `gradhpo run augmentation` repeats this over seeds, on larger data too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.ndimage import map_coordinates

import gradhpo
from gradhpo import datasets
from gradhpo.examples.mnist import BATCH, accuracy, cross_entropy, init, val_loss

__all__ = [
    "HYPERPARAMS",
    "KINDS",
    "NO_AUGMENTATION",
    "OUTER",
    "PROBLEM",
    "Batch",
    "augment",
    "batches",
    "main",
    "strengths",
    "task",
    "train_loss",
]

# Softplus of a hyperparameter is its strength: angles in radians, shifts and changes of size as
# parts of the image, noise as a part of the range of grey levels. All start at 0.15, too strong:
# from none at all there is no way up, as the loss is level there (turning left or right is alike).
KINDS = ("rotation", "shift", "scale", "noise")
HYPERPARAMS = {kind: np.float32(np.log(np.expm1(0.15))) for kind in KINDS}
NO_AUGMENTATION = {kind: np.float32(-20) for kind in KINDS}
OUTER = optax.adam(0.1)  # moves them


class Batch(NamedTuple):
    """Examples, and the seed of each one's random draws: the same batch is the same numbers."""

    images: Any  # (n, height, width, channels)
    labels: Any  # (n,)
    seeds: Any  # (n,), int32


def strengths(hyperparams: Any) -> dict[str, jax.Array]:
    """The strengths as they are used, all positive."""
    return {kind: jax.nn.softplus(value) for kind, value in hyperparams.items()}


def augment(image: Any, seed: Any, strength: Any) -> jax.Array:
    """One image turned, scaled, shifted and made noisy by normal draws times the strengths.

    >>> image = np.eye(5)[..., None]
    >>> same = augment(image, 0, dict.fromkeys(KINDS, 0.0))
    >>> bool(jnp.allclose(same, image, atol=1e-6))
    True
    """
    height, width, channels = image.shape
    keys = jax.random.split(jax.random.key(seed), len(KINDS))
    angle = strength["rotation"] * jax.random.normal(keys[0])
    shift = strength["shift"] * jax.random.normal(keys[1], (2,))
    zoom = jnp.exp(strength["scale"] * jax.random.normal(keys[2]))
    y, x = jnp.meshgrid(jnp.linspace(-1, 1, height), jnp.linspace(-1, 1, width), indexing="ij")
    cos, sin = jnp.cos(angle) * zoom, jnp.sin(angle) * zoom
    rows = (cos * y - sin * x + 2 * shift[0] + 1) * (height - 1) / 2  # where each pixel comes from
    columns = (sin * y + cos * x + 2 * shift[1] + 1) * (width - 1) / 2
    moved = [map_coordinates(image[..., c], [rows, columns], order=1) for c in range(channels)]
    noise = jax.random.normal(keys[3], image.shape)
    return jnp.stack(moved, axis=-1) + strength["noise"] * noise


def train_loss(params: Any, hyperparams: Any, batch: Batch) -> jax.Array:
    """Cross-entropy on augmented images."""
    strength = strengths(hyperparams)
    images = jax.vmap(augment, (0, 0, None))(batch.images, batch.seeds, strength)
    return cross_entropy(params, images, batch.labels)


def batches(data: Any, seed: int) -> Callable[[], Batch]:
    """An endless source of training batches, every example with a new seed each time."""
    examples, rng = datasets.batches(data, BATCH, seed), np.random.default_rng(seed)

    def next_batch() -> Batch:
        images, labels = examples()
        return Batch(images, labels, rng.integers(2**31, size=BATCH, dtype=np.int32))

    return next_batch


SGD = optax.sgd(0.03, momentum=0.9)  # trains the network
PROBLEM = gradhpo.BilevelProblem(gradhpo.from_optax(train_loss, SGD), val_loss)


def task(
    seed: int, train: gradhpo.DataBatch, val: gradhpo.DataBatch, test: Any = None
) -> gradhpo.Task:
    """The problem with these images and labels, which is validated on all at once; as in `mnist`.

    >>> data = datasets.digits().train
    >>> f"{strengths(task(0, data, data).hyperparams)['shift']:.2f}"
    '0.15'
    """
    return gradhpo.Task(
        PROBLEM,
        init(seed, train.inputs),
        HYPERPARAMS,
        train=batches(train, 2 * seed),
        val=datasets.batches(val, len(val.targets), 2 * seed + 1),
        natural=strengths,
        test=test,
    )


def main(M: int = 8) -> None:
    """Tune on digits in M > 1 training runs; of the first and the last: accuracy and strengths."""
    train, val, test = datasets.split(datasets.digits().train, [200, 400, 1197], 0)
    runs: list[gradhpo.BilevelState] = []
    gradhpo.tune(
        task(0, train, val, test),
        gradhpo.reverse(300),  # the exact hypergradient of a whole training run
        OUTER,
        episodes=M,
        T=300,
        lr_reptile=0.0,  # the next run starts where this one did
        callback=lambda m, state: runs.append(state),
    )
    for name, used, run in (
        ("before", HYPERPARAMS, runs[0]),
        ("after", runs[-2].hyperparams, runs[-1]),
    ):
        told = ", ".join(f"{kind} {float(x):.3f}" for kind, x in strengths(used).items())
        print(f"{name}: test accuracy {100 * accuracy(run.params, test):.1f} %, {told}")


if __name__ == "__main__":
    main()
