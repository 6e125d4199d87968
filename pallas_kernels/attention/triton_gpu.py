"""Attention on NVIDIA GPUs (Ampere, Ada, Hopper): what the Triton kernel can run, its tile sizes, and the call.

Needs the packages ``triton`` and ``jax-triton``, which are imported on first use.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.block_mask import BlockMask
from pallas_kernels.attention.constants import LOG2_E
from pallas_kernels.attention.output import AttentionOutput
from pallas_kernels.attention.problem import Problem
from pallas_kernels.attention.target import Target, current_target
from pallas_kernels.varying import as_varying

_LARGEST_HEAD, _LARGEST_OFFSET, _MOST_MASKED_KEYS = 256, 2**31 - 1, 2**15 * 16
_DTYPES = ("bfloat16", "float16", "float32")

SHARED_MEMORY = {(8, 0): 163 * 1024, (8, 6): 99 * 1024, (8, 7): 163 * 1024, (8, 9): 99 * 1024, (9, 0): 227 * 1024}
"""Bytes of shared memory that one program may take, by compute capability."""

_FEW_PROGRAMS = 192
"""Programs below which query tiles are halved: data-centre GPUs have 108 to 142 multiprocessors."""


@dataclass(frozen=True)
class TritonConfig:
    """Tile sizes of the Triton kernel.

    Attributes:
      query_tile: queries per program, a power of two from 16 to 128.
      key_tile: keys per step, a power of two from 16 to 128.
      warps: warps per program, 1, 2, 4, 8 or 16.
      stages: depth of Triton's pipeline, from 1 to 5; tiles are asked for ``stages - 1`` steps ahead.

    Raises:
      ValueError: values that break these rules.
    """

    query_tile: int = 128
    key_tile: int = 64
    warps: int = 8
    stages: int = 3

    def __post_init__(self):
        for name, least, most in (("query_tile", 16, 128), ("key_tile", 16, 128), ("warps", 1, 16)):
            value = getattr(self, name)
            if not least <= value <= most or value & (value - 1):
                raise ValueError(f"{name} {value}: must be a power of two from {least} to {most}; choose the nearest")
        if not 1 <= self.stages <= 5:
            raise ValueError(f"stages {self.stages}: must be from 1 to 5; choose the nearest")

    def shared_bytes(self, problem: Problem, capability: tuple[int, int]) -> int:
        """The shared memory that one program takes, with Triton 3.6 and 3.7.

        The queries; one tile of keys and of values less than there are stages, or on Hopper one each per stage and one
        of values more, which a product in flight still reads; the weights where warps do not own whole rows.
        """
        width, size = _width(problem.head_dim), problem.dtype.itemsize
        queries, tile = self.query_tile * width * size, self.key_tile * width * size
        if size < 4 and capability >= (9, 0) and self.query_tile >= 64:
            return queries + (2 * self.stages + 1) * tile
        weights = self.query_tile * self.key_tile * size if size == 4 or self.query_tile < width else 0
        return queries + 2 * max(1, self.stages - 1) * tile + weights

    def check(self, problem: Problem, capability: tuple[int, int]) -> None:
        """Whether the tiles suit a problem and a device.

        Raises:
          ValueError: tiles that do not divide the blocks of the mask or overflow the shared memory.
        """
        if problem.block_mask is not None:
            problem.block_mask.tiles(problem.num_queries, problem.num_keys, self.query_tile, self.key_tile)
        needed, most = self.shared_bytes(problem, capability), SHARED_MEMORY[capability]
        if needed > most:
            raise ValueError(
                f"tiles {self.query_tile} x {self.key_tile} in {self.stages} stages: {needed} bytes of shared memory "
                f"at head dim {problem.head_dim} must be at most {most}; use smaller tiles or fewer stages"
            )


_DEFAULTS = {
    "hopper": {64: TritonConfig(128, 128, 8, 3), 128: TritonConfig(128, 64, 8, 3), 256: TritonConfig(128, 32, 8, 3)},
    "ampere": {64: TritonConfig(128, 64, 8, 3), 128: TritonConfig(128, 64, 8, 3), 256: TritonConfig(32, 64, 8, 2)},
    # Exact float32 products run on the general units, with all operands in registers.
    "float32": {64: TritonConfig(64, 32, 8, 2), 128: TritonConfig(32, 16, 4, 2), 256: TritonConfig(16, 16, 4, 2)},
}
"""By the smallest power of two that holds the head dim, for many queries."""

_TILES = {
    "hopper": ((128, 32, 8), (128, 64, 8), (128, 128, 8), (64, 32, 4), (64, 64, 4), (16, 64, 4)),
    "ampere": ((128, 32, 8), (128, 64, 8), (64, 32, 4), (64, 64, 4), (64, 64, 8), (16, 64, 4)),
    "float32": ((16, 16, 4), (32, 16, 4), (64, 16, 8)),
}
"""Queries, keys and warps that the tuner tries."""

_STAGES = {"hopper": (2, 3, 4), "ampere": (2, 3, 4), "float32": (2,)}


@dataclass(frozen=True)
class Launch:
    """One launch of the kernel, whoever launches it: JAX, or Triton's interpreter in the tests.

    Attributes:
      grid: programs.
      scalars: arguments between the input and the output arrays.
      constants: compile-time arguments by name.
      table: the tile table, int16 indices ``[query tiles, most visits]`` and int32 counts ``[query tiles]``, or None to
        visit all.
    """

    grid: tuple[int]
    scalars: tuple[int, int]
    constants: dict[str, int | float | bool]
    table: tuple[np.ndarray, np.ndarray] | None


def why_not(problem: Problem, target: Target) -> str | None:
    """Why the kernel cannot run a problem on a target, in one line, or None."""
    if target.platform != "cuda":
        return f"device {target}: must be an NVIDIA GPU"
    capability = target.compute_capability
    if capability not in SHARED_MEMORY:
        found = "unknown" if capability is None else f"{capability[0]}.{capability[1]}"
        return f"device {target} of compute capability {found}: must be 8.0 to 9.0 (Ampere, Ada or Hopper)"
    if problem.dtype.name not in _DTYPES:
        return f"dtype {problem.dtype}: must be one of {', '.join(_DTYPES)}"
    if problem.head_dim > _LARGEST_HEAD:
        return f"head dim {problem.head_dim}: must be at most {_LARGEST_HEAD}"
    offset = max(problem.num_queries, problem.num_keys) * problem.heads * problem.head_dim
    if offset > _LARGEST_OFFSET:
        return f"{offset} elements per batch row: must be at most {_LARGEST_OFFSET}, the largest 32-bit offset"
    if problem.block_mask is not None and problem.num_keys > _MOST_MASKED_KEYS:
        return f"{problem.num_keys} keys with a block mask: must be at most {_MOST_MASKED_KEYS}, 2^15 tiles of 16"
    return _missing()


def _missing() -> str | None:
    for name in ("triton", "jax_triton"):
        try:
            importlib.import_module(name)
        except (ImportError, AttributeError) as error:
            # AttributeError is what a version made for another JAX ends in.
            reason = (str(error) or type(error).__name__).splitlines()[0]
            return f'module {name} cannot be imported ({reason}): must be installed, pip install "toprovar-jax[gpu]"'
    return None


def default_config(problem: Problem, target: Target) -> TritonConfig:
    """Tile sizes by rule, such that the loop spills no registers or few (see benchmarks/aot_cases_triton.py)."""
    kind = _kind(problem, target)
    config = _DEFAULTS[kind][max(64, _width(problem.head_dim))]
    wanted = max(16, _power_of_two(problem.num_queries))
    if problem.batch * problem.heads * -(-problem.num_queries // config.query_tile) < _FEW_PROGRAMS:
        wanted = min(wanted, 64)
    if wanted >= config.query_tile:
        return config
    if kind == "float32":
        return dataclasses.replace(config, query_tile=wanted, warps=max(4, config.warps * wanted // config.query_tile))
    # On Hopper four warps multiply 64 rows at a time; before it, columns are shared out and more warps spill less.
    warps = 4 if wanted < 64 or kind == "hopper" else 8
    return dataclasses.replace(config, query_tile=wanted, key_tile=min(config.key_tile, 64), warps=warps)


def candidates(problem: Problem, target: Target) -> tuple[TritonConfig, ...]:
    """Every configuration worth timing, the default first."""
    capability = target.compute_capability or (8, 0)
    found, kind = [default_config(problem, target)], _kind(problem, target)
    for query_tile, key_tile, warps in _TILES[kind]:
        for stages in _STAGES[kind]:
            config = TritonConfig(query_tile, key_tile, warps, stages)
            fits = config.shared_bytes(problem, capability) <= SHARED_MEMORY[capability]
            if fits and config not in found and query_tile <= max(16, _power_of_two(problem.num_queries)):
                found.append(config)
    return tuple(found)


def _kind(problem: Problem, target: Target) -> str:
    if problem.dtype.itemsize == 4:
        return "float32"
    return "hopper" if target.compute_capability == (9, 0) else "ampere"


def prepare(problem: Problem, config: TritonConfig, *, scale: float) -> Launch:
    """Grid and arguments of the kernel.

    Args:
      problem: shapes and options.
      config: tile sizes.
      scale: factor on the dot products.
    """
    table, pitch = None, 0
    if problem.block_mask is not None:
        sizes = (problem.num_queries, problem.num_keys, config.query_tile, config.key_tile)
        indices, counts = problem.block_mask.tiles(*sizes)
        # 16 bits are less than an asynchronous copy moves, so that Triton leaves these reads to the L1 cache.
        table, pitch = (indices.astype(np.int16), counts), indices.shape[1]
    constants = {
        "FACTOR": scale * LOG2_E,
        "NUM_HEADS": problem.heads,
        "HEAD_DIM": problem.head_dim,
        "WIDTH": _width(problem.head_dim),
        "QUERY_TILE": config.query_tile,
        "KEY_TILE": config.key_tile,
        "PITCH": pitch,
        "VISITS": _power_of_two(pitch) if table is not None else 0,
        "WITH_ENTROPY": problem.with_entropy,
    }
    programs = problem.batch * problem.heads * -(-problem.num_queries // config.query_tile)
    return Launch((programs,), (problem.num_queries, problem.num_keys), constants, table)


def triton_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    *,
    scale: float,
    key_length: Int[Array, " B"] | None,
    block_mask: BlockMask | None,
    with_entropy: bool,
    config: TritonConfig | None = None,
) -> AttentionOutput:
    """Attention by the Triton kernel, for dot products that are, times the scale, within 1e6 of zero (see the kernel).

    Args:
      q: queries ``[B, T, N, H]``, bfloat16, float16 or float32.
      k: keys ``[B, S, N, H]``.
      v: values ``[B, S, N, H]``.
      scale: positive factor on the dot products.
      key_length: number of visible keys per batch row, ``[B]``; None for all.
      block_mask: block-sparse pattern; None for all.
      with_entropy: also return the entropy of every row.
      config: tile sizes; None for :func:`default_config`.

    Raises:
      ValueError: tiles that do not suit the problem.
      NotImplementedError: a device or a problem that the kernel does not serve, or a missing package.
    """
    problem = Problem.of(q, k, key_length=key_length, block_mask=block_mask, with_entropy=with_entropy)
    target = current_target(q, k, v)
    reason = why_not(problem, target)
    if reason is not None or target.compute_capability is None:
        raise NotImplementedError(reason)
    if config is None:
        config = default_config(problem, target)
    config.check(problem, target.compute_capability)
    launch = prepare(problem, config, scale=scale)
    lengths = jnp.full((problem.batch,), problem.num_keys, jnp.int32) if key_length is None else key_length
    lengths = lengths.astype(jnp.int32)
    # Without a table the kernel does not read it, but the argument has to be there.
    indices, counts = (lengths, lengths) if launch.table is None else map(jnp.asarray, launch.table)
    statistic = jax.ShapeDtypeStruct((problem.batch, problem.heads, problem.num_queries), jnp.float32)
    unused = jax.ShapeDtypeStruct((1,), jnp.float32)
    major, minor = target.compute_capability
    results = _triton_call(
        *(q, k, v, lengths, indices, counts, *launch.scalars),
        outputs=(jax.ShapeDtypeStruct(q.shape, v.dtype), statistic, statistic if with_entropy else unused),
        grid=launch.grid,
        compute_capability=10 * major + minor,
        num_warps=config.warps,
        num_stages=config.stages,
        **launch.constants,
    )
    # Inside shard_map: the call does not say that its results vary over the mesh axes of its operands.
    out, log_sum_exp, entropy = as_varying(tuple(results), (q, k, v, lengths))
    return AttentionOutput(out, log_sum_exp, entropy if with_entropy else None)


def _triton_call(*arguments, outputs, **options):
    """``jax_triton.triton_call`` of the kernel."""
    kernel: Any = importlib.import_module("pallas_kernels.attention.triton_gpu_kernel")
    call: Any = importlib.import_module("jax_triton").triton_call
    # Renamed in jax-triton 0.4, where the old name warns.
    name = "out_type" if "out_type" in inspect.signature(call).parameters else "out_shape"
    return call(*arguments, kernel=kernel.attention_kernel, name="attention", **{name: outputs}, **options)


def _width(head_dim: int) -> int:
    return max(16, _power_of_two(head_dim))


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least ``number``."""
    return 1 << max(0, number - 1).bit_length()
