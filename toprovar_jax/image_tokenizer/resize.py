"""The three resamplings of the model: bilinear, adaptive average pooling, pixel (un)shuffle.

Bilinear and area resizing are separable: one axis after the other, with constant places and weights. That gives the
exact sampling rule of the original on every backend (``jax.image.resize`` antialiases by default and computes its
coordinates differently).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toprovar_jax.shapes import Array, Float, UInt8


class BilinearTaps(NamedTuple):
    """The two source cells of every output cell along one axis, and how they are blended.

    Attributes:
      low, high: their places, int32 ``[size_out]``, ascending; equal at the far edge.
      fraction: the weight of ``high``, float32 ``[size_out]``; that of ``low`` is the rest.
    """

    low: np.ndarray
    high: np.ndarray
    fraction: np.ndarray


@functools.cache
def bilinear_taps(size_in: int, size_out: int) -> BilinearTaps:
    """Corners not aligned, no antialiasing.

    Output ``i`` samples the source at ``max(0, (i + 0.5) * size_in / size_out - 0.5)``; neighbours are clamped to the
    edge. Coordinates are float32, as in the original (MODEL_SPEC 6.5g, 13.17).
    """
    step = np.float32(size_in) / np.float32(size_out)
    source = np.maximum((np.arange(size_out, dtype=np.float32) + np.float32(0.5)) * step - np.float32(0.5), 0)
    low = np.minimum(source.astype(np.int32), size_in - 1)
    return BilinearTaps(low, np.minimum(low + 1, size_in - 1), source - low.astype(np.float32))


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
    return blend_neighbours(blend_neighbours(x, 1, size[0]), 2, size[1])


def blend_neighbours(x: Float[Array, "*cells"], axis: int, size: int) -> Float[Array, "*out_cells"]:
    """Bilinear resize of one axis, counted from the front, to ``size``; an axis of that size stays as it is."""
    # Not a matrix product: XLA's for GPUs takes up the permutations before and after it, and then finds no tiles where
    # the channels are no power of two (14). A blend also fuses with what surrounds it and knows no reduced precision.
    if x.shape[axis] == size:
        return x
    low, high, fraction = bilinear_taps(x.shape[axis], size)
    others = tuple(other for other in range(x.ndim) if other != axis)
    weight = jnp.asarray(np.expand_dims(fraction, others), x.dtype)
    taken = functools.partial(jnp.take, x, axis=axis, mode="clip", indices_are_sorted=True)
    return weight * taken(high) + (1 - weight) * taken(low)


def resize_area(x: Float[Array, "B h w C"], size: tuple[int, int]) -> Float[Array, "B out_h out_w C"]:
    """Adaptive average pooling to ``size``."""
    height, width = x.shape[1:3]
    if (height, width) == size:
        return x
    down, across = area_matrix(height, size[0]), area_matrix(width, size[1])
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
