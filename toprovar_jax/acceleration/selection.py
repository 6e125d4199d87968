"""Which tokens are computed, and moving them out of the sequence and back. Counts are static, indices are data."""

from __future__ import annotations

import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt32

from toprovar_jax.acceleration.budgets import region_along, region_grid, region_minimums
from toprovar_jax.errors import UserInputError
from toprovar_jax.schedule import Grid
from toprovar_jax.shapes import Array, Bool, Float, Int

Table = TypeVar("Table", bound=tuple)

_SIGN = np.uint32(1 << 31)
_FIRST, _LAST = np.uint32(0), np.uint32(2**32 - 1)
"""Before and after every importance: no float32 but NaN is ordered there."""


def region_of_tokens(grid: Grid, regions: int) -> np.ndarray:
    """The region of every token, int32 ``[T]``, regions numbered in raster order (see :func:`region_grid`)."""
    (height, width), (down, across) = grid, region_grid(grid, regions)
    rows, columns = np.array(region_along(height, down)), np.array(region_along(width, across))
    return (rows[:, None] * across + columns[None]).reshape(-1).astype(np.int32)


def select_tokens(
    importance: Float[Array, "B T"], grid: Grid, kept: int, *, regions: int, region_minimum: float
) -> Int[Array, "B K"]:
    """The ``kept`` most important tokens of every image, with a guaranteed share in every region of the grid.

    Every region first keeps its own most important tokens up to its minimum, then the most important of all others
    fill the budget: no other choice that respects the minimums keeps more importance. Deterministic; among equals the
    lower index goes first, NaN counts as less than everything else. No random numbers, no data-dependent shapes, so
    it works under ``jit``, ``vmap``, ``lax.scan`` and ``shard_map``.

    Args:
      importance: any floating type, compared as float32.
      grid: height and width in tokens; ``T = height * width``.
      kept: K, static.
      regions: regions per axis, fewer on small grids (see :func:`region_grid`).
      region_minimum: share of each region's tokens that is kept at least, in [0, 1]. The paper names such a minimum
        without its size.

    Returns:
      Ascending indices, int32.

    Raises:
      UserInputError: ``kept`` outside 1 to T, or less than the minimums of all regions together.
    """
    tokens = importance.shape[1]
    minimums = region_minimums(grid, regions, region_minimum)
    if not 1 <= kept <= tokens:
        raise UserInputError(
            f"{kept} kept tokens on a {_name(grid)} grid", f"must be 1 to {tokens}", "change the pruning ratio"
        )
    if kept < sum(minimums):
        raise UserInputError(
            f"{kept} kept tokens on a {_name(grid)} grid",
            f"must be at least {sum(minimums)}, the region minimum {region_minimum:g} over {len(minimums)} regions",
            "lower region_minimum or the pruning ratio, or use fewer regions",
        )
    batch = importance.shape[0]
    if kept == tokens:
        return jnp.tile(jnp.arange(tokens, dtype=jnp.int32)[None], (batch, 1))
    order = _ordering(importance)
    if sum(minimums):
        order = jnp.where(_guaranteed(order, grid, regions, minimums), _FIRST, order)
    _, indices = _sorted(order, np.arange(tokens, dtype=np.int32)[None])
    return jnp.sort(indices[:, :kept], axis=1)


def gather_tokens(x: Float[Array, "R T D"], indices: Int[Array, "B K"]) -> Float[Array, "R K D"]:
    """The tokens at ``indices``. Guidance rows share the selection: row r uses ``indices[r % B]``."""
    take = lambda row, kept: row.at[kept].get(mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True)
    return jax.vmap(take)(x, _for_rows(indices, x.shape[0]))


def scatter_tokens(
    x: Float[Array, "R T D"], indices: Int[Array, "B K"], values: Float[Array, "R K D"]
) -> Float[Array, "R T D"]:
    """``x`` with the tokens at ``indices`` replaced by ``values``; the other way round than :func:`gather_tokens`."""
    put = lambda row, kept, new: row.at[kept].set(
        new, mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True
    )
    return jax.vmap(put)(x, _for_rows(indices, x.shape[0]), values)


def gather_rotary(table: Table, indices: Int[Array, "B K"], rows: int) -> Table:
    """The rotary table of the kept tokens.

    Args:
      table: cosines and sines of all tokens, ``[T, H/2]`` each.
      indices: kept tokens.
      rows: R, a multiple of B.

    Returns:
      The same kind of table with jax arrays ``[R, K, H/2]``.
    """
    shared = _for_rows(indices, rows)
    return jax.tree.map(lambda part: jnp.asarray(part).at[shared].get(mode="promise_in_bounds"), table)


def _for_rows(indices: Int[Array, "B K"], rows: int) -> Int[Array, "R K"]:
    """One row of indices per row of the sequence: the batch's, repeated."""
    return jnp.tile(indices, (rows // indices.shape[0], 1))


def _ordering(importance: Float[Array, "B T"]) -> UInt32[Array, "B T"]:
    """Unsigned integers that ascend from the most important; NaN as -inf, both zeros equal, room at both ends.

    Integers have one order everywhere, whereas backends disagree on where NaN and -0 belong.
    """
    value = importance.astype(jnp.float32)
    value = jnp.where(jnp.isnan(value), -jnp.inf, value)
    bits = jax.lax.bitcast_convert_type(value, jnp.uint32)
    # -0 is not below 0, so setting the sign gives both zeros the same integer.
    return jnp.where(value < 0, bits, ~(bits | _SIGN))


def _sorted(order: UInt32[Array, "*B T"], index: np.ndarray) -> tuple[UInt32[Array, "*B T"], Int[Array, "*B T"]]:
    """``order`` and the ``index`` beside it, ascending. The index is a key: ``top_k`` need not be stable everywhere."""
    beside = jnp.broadcast_to(jnp.asarray(index), order.shape)
    order, beside = jax.lax.sort((order, beside), num_keys=2, is_stable=False)
    return order, beside


def _guaranteed(order: UInt32[Array, "B T"], grid: Grid, regions: int, minimums: tuple[int, ...]) -> Bool[Array, "B T"]:
    """The ``minimums[r]`` first tokens of every region r: those that do not come after its last guaranteed one."""
    region, members = region_of_tokens(grid, regions), _members(grid, regions)
    inside = jnp.where((members < 0)[None], _LAST, order[:, np.maximum(members, 0)])
    last = (slice(None), np.arange(len(minimums)), np.array(minimums) - 1)
    last_order, last_index = (part[last][:, region] for part in _sorted(inside, members[None]))
    index = np.arange(region.size, dtype=np.int32)[None]
    return (order < last_order) | ((order == last_order) & (index <= last_index))


@functools.cache
def _members(grid: Grid, regions: int) -> np.ndarray:
    """The tokens of each region, int32 ``[regions, largest size]``, ascending, -1 behind them."""
    region = region_of_tokens(grid, regions)
    sizes = np.bincount(region)
    members = np.full((sizes.size, sizes.max()), -1, np.int32)
    for number, size in enumerate(sizes):
        members[number, :size] = np.flatnonzero(region == number)
    return members


def _name(grid: Grid) -> str:
    return f"{grid[0]}x{grid[1]}"
