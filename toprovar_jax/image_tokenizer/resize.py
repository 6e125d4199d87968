"""The three resamplings of the model: bilinear, adaptive average pooling, pixel (un)shuffle.

Bilinear and area resizing are separable, so each is two small matrix products with constant matrices. That gives the
exact sampling rule of the original on every backend (``jax.image.resize`` antialiases by default and computes its
coordinates differently).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from toprovar_jax.shapes import Array, Float, UInt8


@functools.cache
def bilinear_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Interpolation weights ``[size_out, size_in]``, float32, corners not aligned, no antialiasing.

    Output ``i`` samples the source at ``max(0, (i + 0.5) * size_in / size_out - 0.5)``; neighbours are clamped to the
    edge. Coordinates are float32, as in the original (MODEL_SPEC 6.5g, 13.17).
    """
    step = np.float32(size_in) / np.float32(size_out)
    source = np.maximum((np.arange(size_out, dtype=np.float32) + np.float32(0.5)) * step - np.float32(0.5), 0)
    low = np.minimum(source.astype(np.int64), size_in - 1)
    high = np.minimum(low + 1, size_in - 1)
    fraction = source - low.astype(np.float32)
    matrix = np.zeros((size_out, size_in), np.float32)
    rows = np.arange(size_out)
    np.add.at(matrix, (rows, low), 1 - fraction)
    np.add.at(matrix, (rows, high), fraction)
    return matrix


@functools.cache
def area_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Adaptive-average-pooling weights ``[size_out, size_in]``: bins overlap when the ratio is not an integer."""
    matrix = np.zeros((size_out, size_in), np.float32)
    for i in range(size_out):
        start, stop = (i * size_in) // size_out, -((-(i + 1) * size_in) // size_out)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


def resize_bilinear(x: Float[Array, "B h w C"], size: tuple[int, int]) -> Float[Array, "B out_h out_w C"]:
    """Bilinear resize, up or down, without antialiasing."""
    return _resize(x, size, bilinear_matrix)


def resize_area(x: Float[Array, "B h w C"], size: tuple[int, int]) -> Float[Array, "B out_h out_w C"]:
    """Adaptive average pooling to ``size``."""
    return _resize(x, size, area_matrix)


def _resize(x, size, matrix):
    height, width = x.shape[1:3]
    if (height, width) == size:
        return x
    down, across = matrix(height, size[0]), matrix(width, size[1])
    highest = jax.lax.Precision.HIGHEST
    x = jnp.einsum("oh,bhwc->bowc", down.astype(x.dtype), x, precision=highest)
    return jnp.einsum("ow,bhwc->bhoc", across.astype(x.dtype), x, precision=highest)


def pixel_unshuffle(
    x: Float[Array, "B h w C"] | UInt8[Array, "B h w C"], factor: int = 2
) -> Float[Array, "B out_h out_w Z"] | UInt8[Array, "B out_h out_w Z"]:
    """Fold ``factor x factor`` cells into channels; channel index ``c * factor**2 + dy * factor + dx``."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // factor, factor, width // factor, factor, channels)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, height // factor, width // factor, channels * factor**2)


def pixel_shuffle(
    x: Float[Array, "B h w Z"] | UInt8[Array, "B h w Z"], factor: int = 2
) -> Float[Array, "B out_h out_w C"] | UInt8[Array, "B out_h out_w C"]:
    """The inverse of :func:`pixel_unshuffle`: ``[B, h, w, Z] -> [B, h*factor, w*factor, Z/factor**2]``."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, channels // factor**2, factor, factor)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(batch, height * factor, width * factor, channels // factor**2)
