"""Matrices as 8-bit integers with one scale per output channel.

``w[i, o]`` is ``scale[o] * q[i, o]`` with q in -127 to 127 and ``scale[o] = max_i |w[i, o]| / 127``, so that no entry
is off by more than half a scale. A product is multiplied out as ``(x @ q) * scale``: the integers are converted one
matrix at a time, on their way into the product, and no stack of converted matrices ever exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toprovar_jax.distributed.parts import whole
from toprovar_jax.shapes import Array, Float

LARGEST = 127
"""-128 is not used: the range is symmetric."""

_ROWS = 8
"""TPUs keep bytes in tiles of 8 rows inside products, but hand 2-D arrays of bytes over in tiles of 32. With 8 rows on
an axis of their own both are the same, and a layer out of a stack is copied without rearranging the stack."""


class Int8Matrix(NamedTuple):
    """A matrix ``[in, out]``, or a stack of them with leading axes. A pytree of arrays, of either numpy or jax.

    Attributes:
      values: int8, ``[.., in / r, r, out]`` with r the largest power of two up to 8 that divides ``in``.
      scale: float32, ``[.., out]``; zero for channels that are all zero.
    """

    values: Any
    scale: Any


def quantise(matrix: np.ndarray) -> Int8Matrix:
    """The nearest :class:`Int8Matrix` of a float array ``[in, out]``, on the host."""
    matrix = matrix.astype(np.float32)
    scale = np.max(np.abs(matrix), axis=0) / np.float32(LARGEST)
    # What is too small to divide by is zero for every purpose.
    scale = np.where(scale < np.finfo(np.float32).tiny, np.float32(0), scale)
    divided = matrix / np.where(scale == 0, np.float32(1), scale)
    values = np.rint(divided, out=divided).astype(np.int8)
    return Int8Matrix(values.reshape(rows_apart(matrix.shape)), scale)


def dequantise(matrix: Int8Matrix) -> np.ndarray:
    """``[.., in, out]``, float32, on the host."""
    values, scale = np.asarray(matrix.values), np.asarray(matrix.scale)
    whole = values.reshape(*values.shape[:-3], -1, values.shape[-1])
    return whole.astype(np.float32) * scale[..., None, :]


def quantise_stack(shape: tuple[int, int, int], layers: Iterable[np.ndarray]) -> tuple[Int8Matrix, list[float]]:
    """Quantises layer by layer; no more than one layer is in float32 at a time.

    Args:
      shape: ``(L, in, out)``.
      layers: its L matrices ``[in, out]``, in order.

    Returns:
      The stack, on the host, and per layer the Frobenius norm of the error over that of the matrix.
    """
    stack = Int8Matrix(np.empty(rows_apart(shape), np.int8), np.empty((shape[0], shape[2]), np.float32))
    errors = []
    for index, layer in enumerate(layers):
        matrix = quantise(layer)
        stack.values[index], stack.scale[index] = matrix
        errors.append(relative_error(layer, matrix))
    return stack, errors


def relative_error(matrix: np.ndarray, quantised: Int8Matrix) -> float:
    """Frobenius norm of the difference over that of ``matrix``; 0 for a matrix of zeros."""
    difference = dequantise(quantised)
    difference -= matrix.astype(np.float32)
    norm = float(np.linalg.norm(matrix.astype(np.float32)))
    return float(np.linalg.norm(difference)) / norm if norm else 0.0


def rows_apart(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of :attr:`Int8Matrix.values` for a matrix or stack of ``shape``."""
    rows = math.gcd(shape[-2], _ROWS)
    return (*shape[:-2], shape[-2] // rows, rows, shape[-1])


def on_device(array: Array) -> Array:
    """``array``, fetched if it lies in host memory: inside a compiled program, just before it is used."""
    if jax.typeof(array).memory_space == jax.memory.Space.Host:
        return jax.device_put(array, jax.memory.Space.Device)
    return array


def int8_matmul(x: Float[Array, "*rows in"], matrix: Int8Matrix, *, precision) -> Float[Array, "*rows out"]:
    """``x`` times one quantised matrix, in the dtype of ``x``; the scales act on the product, in float32."""
    values = on_device(whole(matrix.values))
    product = jnp.matmul(x, values.reshape(-1, values.shape[-1]).astype(x.dtype), precision=precision)
    scale = whole(matrix.scale)
    scale = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
    return (product.astype(jnp.float32) * scale).astype(x.dtype)
