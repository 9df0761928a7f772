"""Convolution as one product of matrices."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ["convolution"]


def convolution(
    inputs: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int] = (1, 1),
    padding: str = "SAME",
    **rest: Any,
) -> jax.Array:
    """As `jax.lax.conv_general_dilated` of images, channels last, by `patches @ kernel`.

    Inside a compiled loop XLA runs convolutions on CPU 15-20 times slower than outside (jax issue
    12868), and convolutions whose kernels are mapped over tasks, which become grouped ones, several
    times slower. A product of matrices has neither fault; it takes k x k times the memory of the
    images. Flax layers take it as `conv_general_dilated=`.

    Args:
        inputs: Images (n, height, width, channels).
        kernel: (height, width, channels in, channels out).
        window_strides: Along height and width.
        padding: "SAME" or "VALID".
        rest: What Flax passes on; only what leaves the plain convolution is taken.

    >>> x, w = jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 2))
    >>> print(convolution(x, w, (2, 2))[0, :, :, 0])
    [[9. 6.]
     [6. 4.]]
    """
    del rest
    rows, columns, _, features = kernel.shape
    images, *sides, channels = inputs.shape
    if padding == "SAME":
        after = [-(-side // stride) for side, stride in zip(sides, window_strides, strict=True)]
        missing = [
            max((n - 1) * stride + k - side, 0)
            for n, stride, k, side in zip(
                after, window_strides, (rows, columns), sides, strict=True
            )
        ]
        around = [(m // 2, m - m // 2) for m in missing]
        inputs = jnp.pad(inputs, ((0, 0), *around, (0, 0)))
    else:
        after = [
            (side - k) // stride + 1
            for side, k, stride in zip(sides, (rows, columns), window_strides, strict=True)
        ]
    patches = jnp.concatenate(
        [
            lax.slice(
                inputs,
                (0, *corner, 0),
                (
                    images,
                    *(
                        c + (n - 1) * s + 1
                        for c, n, s in zip(corner, after, window_strides, strict=True)
                    ),
                    channels,
                ),
                (1, *window_strides, 1),
            )
            for corner in np.ndindex(rows, columns)
        ],
        axis=-1,
    )
    return (patches.reshape(-1, patches.shape[-1]) @ kernel.reshape(-1, features)).reshape(
        images, *after, features
    )
