"""Attention with entropy on Hopper GPUs through Pallas Mosaic GPU: checks, configuration, launch.

The kernel is in ``mosaic_gpu_kernel_sm90``. Queries, keys and values are read where they lie: any number of tokens, and
any head dimension that is a multiple of 8, needs no padding, because the copy engine fills in zeros past the end.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.block_mask import BlockMask
from pallas_kernels.attention.mosaic_gpu_kernel_sm90 import CHUNK, ROWS, Launch, attention_sm90
from pallas_kernels.attention.output import AttentionOutput
from pallas_kernels.attention.problem import Problem
from pallas_kernels.attention.target import Target

MULTIPROCESSORS = 132
"""Blocks of a persistent grid: the multiprocessors of an H100 or H200 (SXM). Another number is correct too."""
SHARED_MEMORY = 232448
"""Bytes of shared memory a block may have on sm_90."""
_SCHEDULES = ("pingpong", "overlap", "overlap_pingpong", "free")
_DTYPES = (np.dtype(jnp.bfloat16), np.dtype(jnp.float16))


@dataclass(frozen=True)
class MosaicGpuConfig:
    """How the kernel divides its work.

    Attributes:
      query_tile: rows of queries per compute warpgroup, 64 or 128.
      key_tile: keys per step, a multiple of 64 up to 256.
      stages: key tiles in flight, at least 2. Where fewer stages leave room for it, the output has memory of its own.
      compute_warpgroups: 1 to 3.
      schedule: ``pingpong``, two compute warpgroups take turns at multiplying and at exponentials; ``overlap``, every
        warpgroup multiplies the weights of one tile while it takes the exponentials of the next; ``overlap_pingpong``,
        both, two compute warpgroups issue such products alternately; ``free``, neither.
      persistent: one block per multiprocessor that walks over the tiles of queries, instead of one block per tile.

    Raises:
      ValueError: a value outside these.
    """

    query_tile: int = 64
    key_tile: int = 128
    stages: int = 2
    compute_warpgroups: int = 2
    schedule: str = "pingpong"
    persistent: bool = True

    def __post_init__(self):
        if self.query_tile not in (ROWS, 2 * ROWS):
            raise ValueError(f"query_tile {self.query_tile}: must be {ROWS} or {2 * ROWS}")
        if self.key_tile % 64 or not 64 <= self.key_tile <= 256:
            raise ValueError(f"key_tile {self.key_tile}: must be 64, 128, 192 or 256")
        if self.stages < 2:
            raise ValueError(f"stages {self.stages}: must be at least 2, one to fill and one to use")
        if self.compute_warpgroups not in (1, 2, 3):
            raise ValueError(f"compute_warpgroups {self.compute_warpgroups}: must be 1, 2 or 3")
        if self.schedule not in _SCHEDULES:
            raise ValueError(f"schedule {self.schedule!r}: must be one of {_SCHEDULES}")
        if "pingpong" in self.schedule and self.compute_warpgroups != 2:
            raise ValueError(
                f"schedule {self.schedule}, {self.compute_warpgroups} compute warpgroups: must be 2; use free"
            )

    @property
    def block_queries(self) -> int:
        """Rows of queries per block."""
        return self.query_tile * self.compute_warpgroups

    def shared_memory(self, head_dim: int, *, output_apart: bool = False) -> int:
        """Bytes of shared memory of a block, the few of its barriers rounded up."""
        row = 2 * CHUNK * -(-head_dim // CHUNK)
        rows = self.block_queries * (2 if output_apart else 1) + 2 * self.stages * self.key_tile
        return row * rows + 8 * self.block_queries + 1024

    def output_apart(self, head_dim: int) -> bool:
        """Whether there is room for the output beside the queries: then the next queries come in earlier."""
        return self.persistent and self.shared_memory(head_dim, output_apart=True) <= SHARED_MEMORY

    def registers(self, head_dim: int) -> int:
        """Registers a compute thread needs for products, weights and output alone."""
        columns = CHUNK * -(-head_dim // CHUNK)
        return self.query_tile // ROWS * (columns + self.key_tile + self.key_tile // 2) // 2


def _why_not_config(config: MosaicGpuConfig, problem: Problem) -> str | None:
    used = config.shared_memory(problem.head_dim)
    if used > SHARED_MEMORY:
        return f"{config}: {used} bytes of shared memory of {SHARED_MEMORY}"
    if problem.block_mask is not None:
        for name, tile, block in (
            ("queries", config.block_queries, problem.block_mask.query_block),
            ("keys", config.key_tile, problem.block_mask.key_block),
        ):
            if block % tile:
                return f"{config}: its tile of {tile} {name} must divide the mask's block {block}"
    return None


def why_not(problem: Problem, target: Target) -> str | None:
    """Why this implementation cannot run a problem; None when it can."""
    if target.platform != "cuda" or target.compute_capability != (9, 0):
        return f"device {target}: the kernel uses instructions of compute capability 9.0 (H100, H200) only"
    if problem.dtype not in _DTYPES:
        return f"dtype {problem.dtype}: must be bfloat16 or float16, the tensor cores round float32 to TF32"
    if problem.head_dim > 256:
        return f"head dimension {problem.head_dim}: must be at most 256, larger output tiles do not fit the registers"
    return None


def default_config(problem: Problem, target: Target) -> MosaicGpuConfig:
    """The configuration used where nothing was tuned."""
    del target
    # A second warpgroup with more than 192 output columns would be short of registers.
    single = problem.num_queries <= ROWS or problem.head_dim > 3 * CHUNK
    return MosaicGpuConfig(
        key_tile=128 if problem.head_dim <= 2 * CHUNK else 64,
        stages=3 if problem.head_dim <= CHUNK else 2,
        compute_warpgroups=1 if single else 2,
        schedule="free" if single else "pingpong",
    )


def candidates(problem: Problem, target: Target) -> tuple[MosaicGpuConfig, ...]:
    """Configurations worth timing; all of them can run."""
    default = default_config(problem, target)
    found = [default]
    shapes = (
        ("pingpong", 2),
        ("overlap_pingpong", 2),
        ("overlap", 2),
        ("free", 2),
        ("overlap", 3),
        ("free", 3),
        ("free", 1),
    )
    for (schedule, warpgroups), key_tile, stages, persistent in itertools.product(
        shapes, (64, 128), (2, 3), (True, False)
    ):
        config = MosaicGpuConfig(64, key_tile, stages, warpgroups, schedule, persistent)
        # Of 255, 232 and 160 registers; the rest is needed for addresses and statistics.
        room = {1: 180, 2: 165, 3: 115}[warpgroups]
        if config.registers(problem.head_dim) <= room and _why_not_config(config, problem) is None:
            found.append(config)
    return tuple(dict.fromkeys(found))


def mosaic_gpu_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    *,
    scale: float,
    key_length: Int[Array, " B"] | None,
    block_mask: BlockMask | None,
    with_entropy: bool,
    config: MosaicGpuConfig | None = None,
) -> AttentionOutput:
    """Attention by the Hopper kernel; see :func:`pallas_kernels.attention` for the arguments.

    Exact for dot products that are, times the scale, between -1e6 and 1e6. The largest of a row is rounded before it is
    subtracted, which cancels, but lets weights exceed 1: by 5% there, by more than float16 holds from about 1e8 on.
    What reaches -1e30 counts as invisible.

    Raises:
      NotImplementedError: the configuration does not fit the device or the mask.
    """
    problem = Problem.of(q, k, key_length=key_length, block_mask=block_mask, with_entropy=with_entropy)
    config = config or default_config(problem, Target("cuda", "sm_90", (9, 0)))
    if reason := _why_not_config(config, problem):
        raise NotImplementedError(f"{reason}; choose smaller tiles or fewer stages")
    # The copy engine wants rows that start at multiples of 16 bytes.
    padding = ((0, 0), (0, 0), (0, 0), (0, -problem.head_dim % 8))
    if padding[-1][1]:
        q, k, v = (jnp.pad(x, padding) for x in (q, k, v))
    limits = None
    if key_length is not None:
        limits = jnp.clip(key_length.astype(jnp.int32), 0, problem.num_keys)
    visits, table, table_width = None, None, 0
    if block_mask is not None:
        visits, table = _visits(problem, block_mask, limits, config)
        table_width, visits, table = table.shape[1], visits.reshape(-1), table.reshape(-1)
    launch = Launch(
        *(problem.batch, problem.heads, problem.num_queries, problem.num_keys, q.shape[-1], scale),
        *(config.query_tile, config.key_tile, config.stages, config.compute_warpgroups, config.schedule),
        blocks=0,
        with_entropy=with_entropy,
        ragged=key_length is not None,
        table_width=table_width,
        output_apart=config.output_apart(q.shape[-1]),
    )
    launch = launch.over(min(launch.tiles, MULTIPROCESSORS) if config.persistent else launch.tiles)
    out, *rows = attention_sm90(q, k, v, limits, visits, table, launch)
    if padding[-1][1]:
        out = out[..., : problem.head_dim]
    rows = [x[..., : problem.num_queries] for x in rows]
    return AttentionOutput(out, rows[0], rows[1] if with_entropy else None)


def _visits(
    problem: Problem, block_mask: BlockMask, limits: Int[Array, " B"] | None, config: MosaicGpuConfig
) -> tuple[Int[Array, "B tiles"], Int[Array, "tiles most"]]:
    """How many key tiles every batch row and block of queries visits, and which: those that start before the limit."""
    tiles = block_mask.tiles(problem.num_queries, problem.num_keys, config.block_queries, config.key_tile)
    indices, counts = jnp.asarray(tiles.indices), jnp.asarray(tiles.counts)
    if limits is None:
        return jnp.broadcast_to(counts[None], (problem.batch, len(tiles.counts))), indices
    listed = jnp.arange(indices.shape[1], dtype=jnp.int32)[None] < counts[:, None]
    seen = listed[None] & (indices[None] * config.key_tile < limits[:, None, None])
    return jnp.sum(seen, axis=-1, dtype=jnp.int32), indices
