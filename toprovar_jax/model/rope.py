"""Two-axis rotary position tables on the finest grid of the aspect ratio (MODEL_SPEC 5)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from toprovar_jax.schedule import Grid, ScaleSchedule
from toprovar_jax.shapes import Array, Float

_MODE_1_GRID = 128


class RotaryTable(NamedTuple):
    """Cosines and sines per token and rotary pair, float32 ``[T, H/2]``; rows' angles first, then columns'.

    Where rows hold different tokens, a table each: ``[R, T, H/2]``.
    """

    cos: np.ndarray | Array
    sin: np.ndarray | Array


@functools.lru_cache(maxsize=256)
def rotary_table(schedule: ScaleSchedule, scale: int, head_dim: int, mode: int) -> RotaryTable:
    """The table of one scale's tokens.

    Args:
      schedule: token grids; only ``grids[scale]`` and ``finest_grid`` matter.
      scale: 0-based index.
      head_dim: H, a multiple of 4.
      mode: 2 nearest index on the finest grid (all released models), 1 bilinear interpolation of a 128 x 128 table,
        0 the token's own coordinates.
    """
    grid, finest = schedule.grids[scale], schedule.finest_grid
    if mode == 1:
        return _interpolated(grid, finest, head_dim)
    rows, columns = (_coordinates(grid[axis], finest[axis], mode) for axis in (0, 1))
    angles = _angles(np.repeat(rows, grid[1]), np.tile(columns, grid[0]), head_dim)
    return RotaryTable(np.cos(angles), np.sin(angles))


def full_rotary_table(schedule: ScaleSchedule, head_dim: int, mode: int) -> RotaryTable:
    """The tables of all scales, one after another: the training sequence's."""
    tables = [rotary_table(schedule, k, head_dim, mode) for k in range(len(schedule))]
    return RotaryTable(*(np.concatenate(parts) for parts in zip(*tables, strict=True)))


def rotate(x: Float[Array, "R T N H"], table: RotaryTable) -> Float[Array, "R T N H"]:
    """Rotate adjacent pairs of the head axis, in float32."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    cos, sin = (jnp.asarray(part)[..., None, :] for part in table)
    if cos.ndim == 3:
        cos, sin = cos[None], sin[None]
    first, second = pairs[..., 0], pairs[..., 1]
    return jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=-1).reshape(x.shape)


def _coordinates(size: int, finest: int, mode: int) -> np.ndarray:
    """Integer coordinates of ``size`` tokens along an axis whose finest grid has ``finest``.

    The product is float32 and rounding goes half to even: at ratio 3:1, scale (54, 18), float64 gives another index.
    """
    index = np.arange(size, dtype=np.float32)
    return index if mode == 0 else np.round(index * np.float32(finest / size)).astype(np.float32)


def _angles(rows: np.ndarray, columns: np.ndarray, head_dim: int) -> np.ndarray:
    half = head_dim // 2
    exponent = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    frequencies = (1.0 / np.power(np.float32(10000.0), exponent)).astype(np.float32)
    return np.concatenate([rows[:, None] * frequencies[None], columns[:, None] * frequencies[None]], axis=1)


def _interpolated(grid: Grid, finest: Grid, head_dim: int) -> RotaryTable:
    """Cosines and sines of a 128 x 128 table, cropped to the ratio and resized with aligned corners."""
    side = np.arange(_MODE_1_GRID, dtype=np.float32)
    angles = _angles(np.repeat(side, _MODE_1_GRID), np.tile(side, _MODE_1_GRID), head_dim)
    angles = angles.reshape(_MODE_1_GRID, _MODE_1_GRID, -1)
    height, width = finest
    if height >= width:
        crop = (_MODE_1_GRID, int(_MODE_1_GRID / height * width))
    else:
        crop = (int(_MODE_1_GRID / width * height), _MODE_1_GRID)
    angles = angles[: crop[0], : crop[1]]
    down, across = _aligned_matrix(crop[0], grid[0]), _aligned_matrix(crop[1], grid[1])
    tables = (np.einsum("oh,hwf,pw->opf", down, trig(angles), across) for trig in (np.cos, np.sin))
    return RotaryTable(*(table.reshape(grid[0] * grid[1], -1).astype(np.float32) for table in tables))


def _aligned_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Bilinear weights ``[size_out, size_in]`` with the corners of both grids aligned."""
    step = (size_in - 1) / (size_out - 1) if size_out > 1 else 0.0
    source = np.arange(size_out) * step
    low = np.minimum(source.astype(np.int64), size_in - 1)
    high = np.minimum(low + 1, size_in - 1)
    fraction = source - low
    matrix = np.zeros((size_out, size_in))
    np.add.at(matrix, (np.arange(size_out), low), 1 - fraction)
    np.add.at(matrix, (np.arange(size_out), high), fraction)
    return matrix
