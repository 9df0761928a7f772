"""Regression on sinusoids of random amplitude and phase (Finn et al. 2017, section 5.1)."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gradhpo.core.problem import Window
from gradhpo.utils.settings import check_count

__all__ = ["Sinusoids"]


@dataclass(frozen=True)
class Sinusoids:
    """`y = a sin(x + b)`: a distribution of tasks, `sample(key) -> Window` of batches `(x, y)`.

    Attributes:
        steps: T, training steps of a task; all of them see the same `shots` points.
        shots: Points to train on.
        queries: Points that validate.
        fresh: New validation points at every step, as Lee et al. (2022) have it by all that their
            numbers tell; False: the same ones all along.
        amplitude, phase, x: Ranges of the uniform distributions.

    >>> window = Sinusoids(steps=30, shots=10, queries=5)(jax.random.key(0))
    >>> window.train[0].shape, window.val[1].shape
    ((30, 10), (30, 5))
    """

    steps: int
    shots: int = 10
    queries: int = 10
    fresh: bool = True
    amplitude: tuple[float, float] = (0.1, 5.0)
    phase: tuple[float, float] = (0.0, jnp.pi)
    x: tuple[float, float] = (-5.0, 5.0)

    def __post_init__(self) -> None:
        for name in ("steps", "shots", "queries"):
            check_count(name, getattr(self, name))

    def curve(self, key: jax.Array) -> Callable[[jax.Array], jax.Array]:
        """The function `x -> y` of the task that this key draws."""
        a, b = (
            jax.random.uniform(key, minval=low, maxval=high)
            for key, (low, high) in zip(
                jax.random.split(jax.random.split(key, 3)[0]),
                (self.amplitude, self.phase),
                strict=True,
            )
        )
        return lambda x: a * jnp.sin(x + b)

    def __call__(self, key: jax.Array) -> Window:
        curve, (_, for_train, for_val) = self.curve(key), jax.random.split(key, 3)

        def points(key: jax.Array, *shape: int) -> tuple[jax.Array, jax.Array]:
            x = jax.random.uniform(key, shape, minval=self.x[0], maxval=self.x[1])
            return x, curve(x)

        def repeated(batch: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.steps, *x.shape)), batch)

        train = repeated(points(for_train, self.shots))
        if self.fresh:
            return Window(train, points(for_val, self.steps, self.queries))
        return Window(train, repeated(points(for_val, self.queries)))
