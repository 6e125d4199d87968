"""Attention on TPU: the call of the Mosaic kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.block_mask import BlockMask
from pallas_kernels.attention.mosaic_tpu_config import (
    VMEM_BUDGET,
    MosaicTpuConfig,
    candidates,
    default_config,
    why_not,
)
from pallas_kernels.attention.mosaic_tpu_kernel import LANES, Shape, attention_kernel, visited_tile
from pallas_kernels.attention.output import AttentionOutput
from pallas_kernels.attention.problem import Problem
from pallas_kernels.attention.target import current_target
from pallas_kernels.varying import as_varying

__all__ = ["MosaicTpuConfig", "candidates", "default_config", "mosaic_tpu_attention", "why_not"]


def mosaic_tpu_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    *,
    scale: float,
    key_length: Int[Array, " B"] | None,
    block_mask: BlockMask | None,
    with_entropy: bool,
    config: MosaicTpuConfig | None = None,
) -> AttentionOutput:
    """Attention by the Mosaic TPU kernel.

    Args:
      q: queries ``[B, T, N, H]``, bfloat16 or float32.
      k: keys ``[B, S, N, H]``.
      v: values ``[B, S, N, H]``.
      scale: positive factor on the dot products.
      key_length: number of visible keys per batch row, ``[B]``; None for all.
      block_mask: block-sparse pattern; None for all.
      with_entropy: also return the entropy of every row.
      config: tile sizes; None for :func:`default_config`.

    Raises:
      ValueError: tiles that do not suit the problem.
    """
    problem = Problem.of(q, k, key_length=key_length, block_mask=block_mask, with_entropy=with_entropy)
    if config is None:
        config = default_config(problem, current_target(q, k, v))
    config.check(problem)
    lengths, visits, tiles = _schedule(problem, config, key_length)
    shape = Shape(
        query_tiles=-(-problem.num_queries // config.query_tile),
        visits=-(-problem.num_keys // config.key_tile) if tiles is None else tiles.shape[1],
        key_tile=config.key_tile,
        compute_tile=config.compute_tile,
        scale=scale,
        cut=problem.ragged or problem.num_keys % config.key_tile != 0,
        with_entropy=with_entropy,
    )
    prefetched = (lengths, visits.reshape(-1)) + (() if tiles is None else (tiles.reshape(-1),))
    # Heads before tokens: the register tiles of a TPU array span its last two axes, so that one head of [T, N, H] is
    # one sublane of each, which no copy engine fetches well.
    operands = tuple(x.transpose(0, 2, 1, 3) for x in (q, k, v))
    # Inside shard_map, one call needs all of its arrays to vary over the same mesh axes.
    operands, prefetched = as_varying((operands, prefetched), (operands, prefetched))
    # The results vary over the mesh axes that the operands do; shard_map's checks want it said.
    call = _call(problem, config, shape, jax.typeof(operands[0]).manual_axis_type)
    out, log_sum_exp, *entropy = call(*prefetched, *operands)
    entropy = entropy[0][:, :, 0, : problem.num_queries] if entropy else None
    return AttentionOutput(out.transpose(0, 2, 1, 3), log_sum_exp[:, :, 0, : problem.num_queries], entropy)


def _schedule(problem: Problem, config: MosaicTpuConfig, key_length):
    """``(lengths [B], visits [B, query tiles], tiles [query tiles, most visits] or None)``, all int32."""
    batch, num_keys = problem.batch, problem.num_keys
    if key_length is None:
        lengths = jnp.full((batch,), num_keys, jnp.int32)
    else:
        lengths = jnp.clip(key_length.astype(jnp.int32), 0, num_keys)
    reached = (lengths + (config.key_tile - 1)) // config.key_tile
    if problem.block_mask is None:
        query_tiles = -(-problem.num_queries // config.query_tile)
        return lengths, jnp.broadcast_to(reached[:, None], (batch, query_tiles)), None
    table = problem.block_mask.tiles(problem.num_queries, num_keys, config.query_tile, config.key_tile)
    # Tiles ascend, so those within a length are the first ones.
    listed = np.arange(table.indices.shape[1])[None] < table.counts[:, None]
    within = listed[None] & (table.indices[None] < reached[:, None, None])
    return lengths, jnp.sum(within, axis=-1, dtype=jnp.int32), jnp.asarray(table.indices)


def _call(problem: Problem, config: MosaicTpuConfig, shape: Shape, axes):
    """``(lengths, visits[, tiles], q, k, v) -> (out, log-sum-exp[, entropy])``, heads before tokens in all of them."""
    masked = problem.block_mask is not None
    batch, heads, head_dim = problem.batch, problem.heads, problem.head_dim
    query_tile = config.query_tile
    # Where 64-bit types are enabled, a Python number would be a 64-bit index, which no TPU computes.
    first = np.int32(0)

    def query_block(row, head, query, step, *prefetched):
        return row, head, query, first

    def key_block(row, head, query, step, lengths_ref, visits_ref, tiles_ref=None):
        return row, head, visited_tile(shape, row, query, step, visits_ref, tiles_ref), first

    def statistic_block(row, head, query, step, *prefetched):
        return row, head, first, query

    def kernel(lengths_ref, visits_ref, *refs):
        tiles_ref, refs = (refs[0], refs[1:]) if masked else (None, refs)
        attention_kernel(lengths_ref, visits_ref, tiles_ref, *refs, shape=shape)

    query_spec = pl.BlockSpec((None, None, query_tile, head_dim), query_block)
    key_spec = pl.BlockSpec((None, None, config.key_tile, head_dim), key_block)
    statistic_spec = pl.BlockSpec((None, None, 1, query_tile), statistic_block)
    statistic = jax.ShapeDtypeStruct(
        (batch, heads, 1, shape.query_tiles * query_tile), jnp.float32, manual_axis_type=axes
    )
    out = jax.ShapeDtypeStruct((batch, heads, problem.num_queries, head_dim), problem.dtype, manual_axis_type=axes)
    statistics = 2 if problem.with_entropy else 1
    per_lane = pltpu.VMEM((query_tile, LANES), jnp.float32)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3 if masked else 2,
            grid=(batch, heads, shape.query_tiles, shape.visits),
            in_specs=[query_spec, key_spec, key_spec],
            out_specs=[query_spec] + [statistic_spec] * statistics,
            scratch_shapes=[pltpu.VMEM((query_tile, head_dim), jnp.float32)] + [per_lane] * (1 + statistics),
        ),
        out_shape=[out] + [statistic] * statistics,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BUDGET
        ),
        cost_estimate=_cost(problem, shape),
        name="attention_with_entropy" if problem.with_entropy else "attention",
    )


def _cost(problem: Problem, shape: Shape) -> pl.CostEstimate:
    """What the compiler's scheduler is told; a ragged problem counts in full."""
    batch, heads, num_queries, head_dim = problem.batch, problem.heads, problem.num_queries, problem.head_dim
    scores = problem.flops / (4 * head_dim)
    fetched = 2 * shape.query_tiles * shape.visits * shape.key_tile + 2 * num_queries
    return pl.CostEstimate(
        flops=int(problem.flops),
        transcendentals=int(scores),
        bytes_accessed=batch * heads * fetched * head_dim * problem.dtype.itemsize,
    )
