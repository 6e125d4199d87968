"""Static block-sparse patterns: which blocks of keys each block of queries sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

BLOCK = 128
"""Smallest block, and the unit of all block sizes: the tile that every kernel can skip as a whole."""


class TileTable(NamedTuple):
    """The key tiles that each query tile visits, in ascending order.

    Attributes:
      indices: int32 ``[query tiles, most visits]``; past a row's count its last tile is repeated (0 if it has none).
      counts: int32 ``[query tiles]``.
    """

    indices: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class BlockMask:
    """A block-sparse pattern. Hashable, so that it can be a static argument.

    Attributes:
      visible: one row per block of queries, one column per block of keys.
      query_block: queries per block, a multiple of 128; the last block may be partial.
      key_block: keys per block, a multiple of 128; the last block may be partial.

    Raises:
      ValueError: an empty or ragged pattern, or blocks that are not multiples of 128.
    """

    visible: tuple[tuple[bool, ...], ...]
    query_block: int = BLOCK
    key_block: int = BLOCK

    def __post_init__(self):
        for name, size in (("query_block", self.query_block), ("key_block", self.key_block)):
            if not isinstance(size, int) or size < BLOCK or size % BLOCK:
                raise ValueError(
                    f"{name} {size!r}: must be an integer multiple of {BLOCK}; merge the blocks of the pattern"
                )
        if not all(isinstance(seen, bool) for row in self.visible for seen in row):
            raise ValueError("visible with entries that are not bool: must hold True and False; use from_array")
        widths = {len(row) for row in self.visible}
        if len(widths) != 1 or 0 in widths:
            raise ValueError(f"visible with rows of {sorted(widths)} blocks: must be a rectangle; fill it up")

    @classmethod
    def from_array(cls, visible: np.ndarray, *, query_block: int = BLOCK, key_block: int = BLOCK) -> BlockMask:
        """From a boolean array ``[query blocks, key blocks]``.

        Raises:
          ValueError: another rank or dtype.
        """
        visible = np.asarray(visible)
        if visible.ndim != 2 or visible.dtype != np.bool_:
            raise ValueError(
                f"block_mask {visible.dtype}{list(visible.shape)}: must be boolean [query blocks, key blocks]; "
                "one pattern serves all heads and batch rows"
            )
        return cls(tuple(tuple(map(bool, row)) for row in visible), query_block, key_block)

    @classmethod
    def from_predicate(
        cls,
        sees: Callable[[np.ndarray, np.ndarray], np.ndarray],
        num_queries: int,
        num_keys: int,
        *,
        query_block: int = BLOCK,
        key_block: int = BLOCK,
    ) -> BlockMask:
        """A block is visible where any of its queries sees any of its keys.

        Args:
          sees: ``(query index [n, 1], key index [1, num_keys]) -> bool [n, num_keys]``; called per block of queries.
          num_queries: number of queries.
          num_keys: number of keys.
          query_block: queries per block.
          key_block: keys per block.
        """
        keys = np.arange(num_keys)[None]
        starts = np.arange(0, num_keys, key_block)
        rows = []
        for start in range(0, num_queries, query_block):
            queries = np.arange(start, min(start + query_block, num_queries))[:, None]
            seen = np.broadcast_to(np.asarray(sees(queries, keys), bool), (len(queries), num_keys)).any(axis=0)
            rows.append(np.logical_or.reduceat(seen, starts))
        return cls.from_array(np.stack(rows), query_block=query_block, key_block=key_block)

    @cached_property
    def array(self) -> np.ndarray:
        """The pattern as booleans ``[query blocks, key blocks]``; do not write to it."""
        return np.array(self.visible, bool)

    @property
    def density(self) -> float:
        """Share of the blocks that is visible."""
        return float(self.array.mean())

    def check(self, num_queries: int, num_keys: int) -> None:
        """Whether the pattern covers these lengths.

        Raises:
          ValueError: the pattern has another shape.
        """
        wanted = (-(-num_queries // self.query_block), -(-num_keys // self.key_block))
        if self.array.shape != wanted:
            raise ValueError(
                f"block_mask of {self.array.shape} blocks: must be {wanted}, blocks of {self.query_block} x "
                f"{self.key_block} over {num_queries} queries and {num_keys} keys; rebuild it for these lengths"
            )

    def tokens(self, num_queries: int, num_keys: int) -> np.ndarray:
        """The pattern token by token, boolean ``[num_queries, num_keys]``."""
        rows = np.repeat(self.array, self.query_block, axis=0)[:num_queries]
        return np.repeat(rows, self.key_block, axis=1)[:, :num_keys]

    def tiles(self, num_queries: int, num_keys: int, query_tile: int, key_tile: int) -> TileTable:
        """The pattern for a kernel whose tiles divide the blocks.

        Args:
          num_queries: number of queries.
          num_keys: number of keys.
          query_tile: queries per tile of the kernel; divides ``query_block``.
          key_tile: keys per tile of the kernel; divides ``key_block``.

        Raises:
          ValueError: tiles that do not divide the blocks.
        """
        for name, tile, block in (
            ("query tile", query_tile, self.query_block),
            ("key tile", key_tile, self.key_block),
        ):
            if tile < 1 or block % tile:
                raise ValueError(f"{name} {tile}: must divide the mask's block {block}; choose a smaller tile")
        pattern = np.repeat(self.array, self.query_block // query_tile, axis=0)[: -(-num_queries // query_tile)]
        pattern = np.repeat(pattern, self.key_block // key_tile, axis=1)[:, : -(-num_keys // key_tile)]
        counts = pattern.sum(axis=1).astype(np.int32)
        indices = np.zeros((len(pattern), max(1, int(counts.max()))), np.int32)
        for row, seen in enumerate(pattern):
            found = np.flatnonzero(seen)
            indices[row, : len(found)] = found
            indices[row, len(found) :] = found[-1] if len(found) else 0
        return TileTable(indices, counts)
