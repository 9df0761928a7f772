"""Numbers as scaled integers, and their product with a fraction n / d, undone bit by bit.

Maclaurin et al. (2015), section 2.2 and algorithm 3. To decay an integer c by n / d, with an
information buffer i beside every entry,

    i <- i d + (c mod d),    c <- c div d,    c <- c n + (i mod n),    i <- i div n

loses nothing: the same four steps with n and d exchanged lead back. What the product forgets of
c is log2(d / n) bits, and by that much i grows, to at most

    i + 1 <= (1 + n_1 / d + n_1 n_2 / d^2 + …) d^T / (n_1 … n_T)

Two things differ from the paper, so that every integer has a fixed width; d is 2^16 as there.

Numbers. They are multiples of a unit, held as integers (fixed-point arithmetic). c n / d comes out
with an error of up to d units, because i mod n is as good as random. So a number has 16 bits below
its unit, and the error stays within one unit: 2^-52 (int64, where JAX runs with 64 bits) or 2^-20
(int32).

Buffer. In place of one long integer per entry we keep its upper part as a uint32, and move the
low 16 bits of every entry at once to a plane of uint16 whenever the next step could overflow.
The steps at which this happens follow from the fractions alone (`plan`), so nothing but the bits is
stored, and a step costs two divisions however long the buffer is.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = [
    "DENOMINATOR",
    "LIMIT",
    "Buffer",
    "Number",
    "Plan",
    "add",
    "allocated_bits",
    "decay",
    "decode",
    "empty_buffer",
    "encode",
    "in_range",
    "is_empty",
    "numerator",
    "plan",
    "quantize",
    "same",
    "subtract",
    "undo_decay",
    "used_bits",
    "worst_bits",
]

DENOMINATOR = 2**16  # d: the step from one 16-bit limb to the next, so that i d is a shift
LIMIT = 1024.0  # half the range of either format: the sum of two such numbers cannot wrap
HEAD = 32  # bits of the upper part
PLANE = 16


class Number(NamedTuple):
    """An array of scaled integers, `hi + lo / 2^16` units."""

    hi: jax.Array  # int32 or int64
    lo: jax.Array  # uint16


def _format() -> tuple[Any, float]:
    """`(dtype of hi, units per 1)`."""
    wide = jnp.result_type(int) == jnp.int64
    return (jnp.int64, 2.0**52) if wide else (jnp.int32, 2.0**20)


def encode(value: jax.Array) -> Number:
    """The nearest scaled integers.

    >>> print(decode(encode(jnp.array([0.5, -1.25])), jnp.float32))
    [ 0.5  -1.25]
    """
    dtype, unit = _format()
    units = value.astype(jnp.result_type(float)) * unit
    hi = jnp.floor(units)
    lo = jnp.rint((units - hi) * DENOMINATOR).astype(jnp.uint32)  # up to d: carried by `_join`
    return _join(hi.astype(dtype), lo)


def decode(number: Number, dtype: Any) -> jax.Array:
    """The nearest floating-point numbers."""
    _, unit = _format()
    wide = jnp.result_type(float)
    units = number.hi.astype(wide) + number.lo.astype(wide) / DENOMINATOR
    return (units / unit).astype(dtype)


def add(a: Number, b: Number) -> Number:
    """The exact sum, if it is in range."""
    return _join(a.hi + b.hi, a.lo.astype(jnp.uint32) + b.lo)


def subtract(a: Number, b: Number) -> Number:
    """The exact difference: the inverse of `add`."""
    lo = a.lo.astype(jnp.int32) - b.lo.astype(jnp.int32)
    return Number(a.hi - b.hi + (lo >> 16).astype(a.hi.dtype), (lo & 0xFFFF).astype(jnp.uint16))


def _join(hi: jax.Array, lo: jax.Array) -> Number:
    return Number(hi + (lo >> 16).astype(hi.dtype), (lo & 0xFFFF).astype(jnp.uint16))


def same(a: Number, b: Number) -> jax.Array:
    """Whether all entries are equal, bit for bit."""
    return jnp.all(a.hi == b.hi) & jnp.all(a.lo == b.lo)


def in_range(value: jax.Array) -> jax.Array:
    """Whether all entries can be encoded and added without wrapping; False where one is NaN."""
    return jnp.all(jnp.abs(value) < LIMIT)


def numerator(fraction: jax.Array) -> jax.Array:
    """The n for which n / d is nearest to the fraction, from 2 to d - 1; of its shape.

    >>> print(numerator(jnp.array([0.5, 0.9])))
    [32768 58982]
    """
    return jnp.clip(jnp.rint(fraction * DENOMINATOR), 2, DENOMINATOR - 1).astype(jnp.uint32)


def quantize(fraction: jax.typing.ArrayLike) -> jax.Array:
    """`n / d`, with the derivative of the fraction itself: rounding is not differentiated.

    >>> print(quantize(0.9) * DENOMINATOR, jax.grad(quantize)(0.9))
    58982.0 1.0
    """
    fraction = jnp.asarray(fraction)
    rounded = numerator(lax.stop_gradient(fraction)).astype(fraction.dtype) / DENOMINATOR
    return rounded + (fraction - lax.stop_gradient(fraction))


class Buffer(NamedTuple):
    """What the decays of an array forgot."""

    head: jax.Array  # uint32, like the array: the upper part of i
    planes: jax.Array  # uint16, (planes, *array): the lower parts; the last plane is spare


class Plan(NamedTuple):
    """When the buffer spills, known from the fractions alone."""

    spill: jax.Array  # bool (T,): before this step the low bits move to a plane
    plane: jax.Array  # int32 (T,): planes in use before this step
    planes: jax.Array  # int32 (): planes in use in the end


def worst_bits(fractions: np.ndarray) -> float:
    """Bits per entry after decays by these fractions n / d (T,), at most.

    >>> worst_bits(np.full(1000, 0.9))  # 1000 log2(1 / 0.9) + log2(10)
    155.32...
    """
    products = np.cumsum(np.log2(fractions))  # of the first k of them
    return float(np.log2(1 + np.sum(np.exp2(products))) - products[-1]) if len(fractions) else 0.0


def empty_buffer(shape: tuple[int, ...], bits: float) -> Buffer:
    """Room for so many bits per entry, as `worst_bits` counts them, and a spare plane."""
    planes = max(0, math.ceil((bits - HEAD) / PLANE))
    spare = 1 if planes else 0
    return Buffer(jnp.zeros(shape, jnp.uint32), jnp.zeros((planes + spare, *shape), jnp.uint16))


def allocated_bits(buffer: Buffer) -> int:
    """Bits per entry, the spare plane included.

    >>> allocated_bits(empty_buffer((), bits=155.3))  # 8 planes and the spare one
    176
    """
    return HEAD + PLANE * buffer.planes.shape[0]


def plan(numerators: jax.Array) -> Plan:
    """When to spill, for decays by the numerators (T,).

    `bound` stays above every i + 1. A spill comes before a step in which it could reach 2^32. A
    few units in the last place are added, so that rounding cannot make it too low.
    """

    def step(carry, n):
        bound, plane = carry
        growth = DENOMINATOR / n.astype(jnp.float32)

        def grown(bound):
            return (bound * growth + 1) * (1 + 2.0**-20)

        spill = grown(bound) >= 2.0**HEAD
        after = grown(jnp.where(spill, bound / DENOMINATOR + 1, bound))
        return (after, plane + spill), (spill, plane)

    start = (jnp.ones((), jnp.float32), jnp.zeros((), jnp.int32))
    (_, planes), (spill, plane) = lax.scan(step, start, numerators)
    return Plan(spill, plane, planes)


def decay(
    value: Number, buffer: Buffer, n: jax.Array, spill: jax.Array, plane: jax.Array
) -> tuple[Number, Buffer]:
    """`value n / d`, with what it forgets in the buffer.

    Args:
        value: Any shape.
        buffer: Of the same shape.
        n: Numerators, uint32, a scalar or broadcasting against `value`.
        spill, plane: Of this step, from `plan`.

    >>> value, buffer = encode(jnp.array([3.0, -0.7])), empty_buffer((2,), bits=16.0)
    >>> n, no, first = numerator(jnp.array(0.9)), jnp.array(False), jnp.array(0)
    >>> after, kept = decay(value, buffer, n, no, first)
    >>> print(decode(after, jnp.float32).round(4))
    [ 2.7  -0.63]
    >>> back, kept = undo_decay(after, kept, n, no, first)
    >>> print(same(back, value), kept.head)
    True [0 0]
    """
    head, planes = buffer
    if planes.shape[0]:  # planes beyond those in use may hold anything
        planes = planes.at[plane].set((head & 0xFFFF).astype(jnp.uint16))
        head = jnp.where(spill, head >> 16, head)
    # value = hi d + lo, so c div d is hi and c mod d is lo. Divide i d + lo by n, in two limbs:
    upper = head // n
    x = ((head - upper * n) << 16) | value.lo
    lower = x // n
    head = (upper << 16) | lower
    x = (value.hi & 0xFFFF).astype(jnp.uint32) * n + (x - lower * n)  # hi n + (i mod n)
    return _join((value.hi >> 16) * n.astype(value.hi.dtype), x), Buffer(head, planes)


def undo_decay(
    value: Number, buffer: Buffer, n: jax.Array, spill: jax.Array, plane: jax.Array
) -> tuple[Number, Buffer]:
    """The inverse of `decay` with the same arguments."""
    head, planes = buffer
    upper, x = jnp.divmod(value.hi, n.astype(value.hi.dtype))  # rounds down, as the shifts above do
    x = (x.astype(jnp.uint32) << 16) | value.lo
    lower = x // n
    hi = (upper << 16) + lower.astype(value.hi.dtype)
    x = (head & 0xFFFF) * n + (x - lower * n)  # i n + (c mod n)
    head = (head >> 16) * n + (x >> 16)
    if planes.shape[0]:
        head = jnp.where(spill, (head << 16) | planes[plane], head)
    return Number(hi, (x & 0xFFFF).astype(jnp.uint16)), Buffer(head, planes)


def used_bits(buffer: Buffer, planes: jax.Array) -> jax.Array:
    """Bits that the fullest entry holds, with so many planes in use."""
    top = jnp.max(buffer.head, initial=0).astype(jnp.float32)
    return PLANE * planes + jnp.log2(top + 1)


def is_empty(buffer: Buffer) -> jax.Array:
    """Whether every decay has been undone (the planes are then out of use)."""
    return jnp.all(buffer.head == 0)
