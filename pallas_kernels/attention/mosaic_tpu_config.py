"""Attention on TPU: tile sizes, what they take of the chip's memories, and what the kernel can run."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.mosaic_tpu_kernel import LANES
from pallas_kernels.attention.problem import Problem
from pallas_kernels.attention.target import Target

VMEM_BUDGET = 32 * 2**20
"""Bytes of vector memory that one call may take: half of the smallest chip from v5 on (64 MiB)."""

SMEM_BUDGET = 3 * 2**18
"""Bytes of scalar memory for key lengths and tile tables, of the 1 MiB that a chip has."""

_LARGEST_HEAD = 256
_SUBLANES = 16
"""Rows of a bfloat16 register; float32 has 8."""


@dataclass(frozen=True)
class MosaicTpuConfig:
    """Tile sizes of the TPU kernel.

    Attributes:
      query_tile: queries per tile: a multiple of 128, or of 16 below that for a call with so few queries.
      key_tile: keys fetched per grid step, a multiple of 128.
      compute_tile: keys per pair of matrix products, a multiple of 128 that divides ``key_tile``. Several per fetch let
        the compiler overlap the products of one with the exponentials of the next.

    Raises:
      ValueError: tiles that break these rules.
    """

    query_tile: int = 1024
    key_tile: int = 1024
    compute_tile: int = 512

    def __post_init__(self):
        unit = _SUBLANES if self.query_tile < LANES else LANES
        if self.query_tile < 1 or self.query_tile % unit:
            raise ValueError(f"query_tile {self.query_tile}: must be a multiple of {unit}; round it up")
        if self.key_tile < 1 or self.key_tile % LANES:
            raise ValueError(f"key_tile {self.key_tile}: must be a multiple of {LANES}; round it up")
        if self.compute_tile < 1 or self.compute_tile % LANES or self.key_tile % self.compute_tile:
            raise ValueError(
                f"compute_tile {self.compute_tile}: must be a multiple of {LANES} that divides key_tile "
                f"{self.key_tile}; use {LANES}"
            )

    def vmem_bytes(self, problem: Problem) -> int:
        """Vector memory that the call takes: two buffers per operand, scratch, and the scores in flight."""
        width = _round_up(problem.head_dim, LANES)
        size = problem.dtype.itemsize
        sums = 3 if problem.with_entropy else 2
        operands = 2 * (2 * self.query_tile + 2 * self.key_tile) * width * size
        statistics = 2 * (sums - 1) * 8 * max(self.query_tile, LANES) * 4
        scratch = self.query_tile * (width + sums * LANES) * 4
        # Products, exponents and weights in float32, the weights again in the dtype of the values.
        scores = self.query_tile * self.compute_tile * (3 * 4 + size)
        return operands + statistics + scratch + scores

    def smem_bytes(self, problem: Problem) -> int:
        """Scalar memory that the call takes: key lengths, visits and, with a block mask, the table of tiles."""
        query_tiles = -(-problem.num_queries // self.query_tile)
        table = 0 if problem.block_mask is None else query_tiles * -(-problem.num_keys // self.key_tile)
        return 4 * (problem.batch + problem.batch * query_tiles + table)

    def check(self, problem: Problem) -> None:
        """Whether the tiles suit a problem.

        Raises:
          ValueError: tiles smaller than a register for several tiles of queries, too large for the vector memory, too
            many for the scalar memory, or not dividing the blocks of the mask.
        """
        if self.query_tile < min(LANES, problem.num_queries):
            raise ValueError(
                f"query_tile {self.query_tile}: below {LANES} it must hold all {problem.num_queries} queries; "
                f"use {LANES}"
            )
        if self.vmem_bytes(problem) > VMEM_BUDGET:
            raise ValueError(
                f"tiles {self.query_tile} x {self.key_tile} by {self.compute_tile}: {self.vmem_bytes(problem)} bytes "
                f"of vector memory at head dim {problem.head_dim} must be at most {VMEM_BUDGET}; use smaller tiles"
            )
        if self.smem_bytes(problem) > SMEM_BUDGET:
            raise ValueError(
                f"batch {problem.batch} in tiles of {self.query_tile} queries: {self.smem_bytes(problem)} bytes of "
                f"scalar memory must be at most {SMEM_BUDGET}; use larger tiles or split the batch"
            )
        if problem.block_mask is not None:
            problem.block_mask.tiles(problem.num_queries, problem.num_keys, self.query_tile, self.key_tile)


def why_not(problem: Problem, target: Target) -> str | None:
    """Why the kernel cannot run a problem on a target, in one line, or None."""
    if target.platform != "tpu":
        return f"device {target}: must be a TPU"
    if any(old in target.kind for old in ("v2", "v3", "v4")):
        return f"device {target}: must be TPU v5 or later, which have at least 64 MiB of vector memory"
    if problem.dtype not in (np.dtype(jnp.bfloat16), np.dtype(np.float32)):
        return f"dtype {problem.dtype}: must be bfloat16 or float32, which the matrix unit multiplies"
    if problem.head_dim > _LARGEST_HEAD:
        return f"head dim {problem.head_dim}: must be at most {_LARGEST_HEAD}"
    if default_config(problem, target).smem_bytes(problem) > SMEM_BUDGET:
        return (
            f"batch {problem.batch}: its key lengths and tile tables must fit into {SMEM_BUDGET} bytes of scalar memory"
        )
    return None


def default_config(problem: Problem, target: Target) -> MosaicTpuConfig:
    """Tile sizes by rule: large ones, for every chip alike.

    1024 x 1024 tiles with products over 512 keys are the usual winners of tokamax's published tuning for TPU v5, v6 and
    v7 at lengths of 1024 and more.
    """
    del target
    most = 1024 if problem.dtype.itemsize < 4 and problem.head_dim <= LANES else 512
    if problem.block_mask is not None:
        query_tile = _divisor(problem.block_mask.query_block, most)
        key_tile = _divisor(problem.block_mask.key_block, most)
        return MosaicTpuConfig(query_tile, key_tile, _divisor(key_tile, 512))
    query_tile = _even(problem.num_queries, most, _SUBLANES if problem.num_queries <= LANES else LANES)
    key_tile = _even(problem.num_keys, most, LANES if problem.num_keys <= 512 else 512)
    return MosaicTpuConfig(query_tile, key_tile, _divisor(key_tile, 512))


def candidates(problem: Problem, target: Target) -> tuple[MosaicTpuConfig, ...]:
    """Every configuration worth timing, the default first."""
    found = [default_config(problem, target)]
    for query_tile in (128, 256, 512, 1024, 2048):
        for key_tile in (128, 256, 512, 1024, 2048):
            for compute_tile in (128, 256, 512, 1024):
                if key_tile % compute_tile or compute_tile < min(key_tile, 256):
                    continue
                config = MosaicTpuConfig(query_tile, key_tile, compute_tile)
                if config not in found and _suits(config, problem):
                    found.append(config)
    return tuple(found)


def _suits(config: MosaicTpuConfig, problem: Problem) -> bool:
    if config.query_tile >= 2 * max(problem.num_queries, LANES) or config.key_tile >= 2 * max(problem.num_keys, LANES):
        return False
    try:
        config.check(problem)
    except ValueError:
        return False
    return True


def _even(length: int, most: int, unit: int) -> int:
    """The tile of at most ``most`` that splits a length most evenly into as few tiles, in whole units."""
    tiles = -(-length // most)
    return _round_up(-(-length // tiles), unit)


def _divisor(block: int, most: int) -> int:
    """The largest multiple of 128 up to ``most`` that divides a block."""
    return max(size for size in range(LANES, most + 1, LANES) if block % size == 0)


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
