"""The Triton kernel: one program attends one tile of queries of one head to all of its keys.

Scores stay in units of log2: with ``c = scale * log2(e)`` and the rounded ``shift = c max(s)``, every score is one
fused ``x = s c - shift`` and one ``exp2``. The entropy's moment is summed from the same ``x``, so that the rounding of
``shift``, large where scores are large, cancels between total, moment and log-sum-exp::

    p = 2^x    l = sum p    u = sum p x    LSE = ln 2 (shift + log2 l)    H = ln 2 (log2 l - u / l)

and when the shift moves by ``d = old - new``: ``l' = 2^d l + sum p``, ``u' = 2^d (u + d l) + sum p x`` (see online.py).

Exact for dot products that are, times the scale, between -1e6 and 1e6. The rounding of ``shift`` cancels, but lets
weights exceed 1: by 5% there, by more than float16 holds from about 1e8 on. What reaches -1e30 counts as invisible.

Arrays are dense ``[B, T, N, H]`` and read in place. Only the first and the last tile of keys are compared with the
number of visible keys; those between are visible as a whole, because the visible keys are the first ones.

The loop runs one tile ahead of itself: it multiplies queries and keys of a tile, then starts the product of the
previous tile's weights with its values, and while tensor cores work on that computes the tile's own weights. They are
carried in float32, because Triton would send weights that were already narrowed through shared memory.
"""

# pyright: reportMissingImports=false

import triton
import triton.language as tl

from pallas_kernels.attention.constants import LN_2
from pallas_kernels.attention.reference import MASKED

# Triton reads globals only as constexpr.
_MASKED = tl.constexpr(MASKED)
_LN2 = tl.constexpr(LN_2)


@triton.jit
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    length_ptr,
    index_ptr,
    count_ptr,
    num_queries,
    num_keys,
    out_ptr,
    log_sum_exp_ptr,
    entropy_ptr,
    FACTOR: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    PITCH: tl.constexpr,
    VISITS: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
):
    """Attention of ``QUERY_TILE`` queries.

    Args:
      q_ptr: ``[B, T, N, H]``.
      k_ptr: ``[B, S, N, H]``.
      v_ptr: ``[B, S, N, H]``.
      length_ptr: visible keys, int32 ``[B]``.
      index_ptr: key tiles to visit, ascending, int32 ``[query tiles, PITCH]``; not read where ``VISITS`` is 0.
      count_ptr: how many of them, int32 ``[query tiles]``; not read where ``VISITS`` is 0.
      num_queries: T.
      num_keys: S.
      out_ptr: ``[B, T, N, H]``.
      log_sum_exp_ptr: float32 ``[B, N, T]``.
      entropy_ptr: float32 ``[B, N, T]``; not written without entropy.
      FACTOR: scale times log2(e).
      NUM_HEADS: N.
      HEAD_DIM: H.
      WIDTH: the power of two that holds H.
      QUERY_TILE: queries per program.
      KEY_TILE: keys per step.
      PITCH: row length of the tile table.
      VISITS: the power of two that holds ``PITCH``; 0 without a table.
      WITH_ENTROPY: whether to compute the entropy.
    """
    TOKEN: tl.constexpr = NUM_HEADS * HEAD_DIM
    # Query tiles run fastest: programs that are resident together share the keys of few heads in the L2 cache.
    query_tiles = tl.cdiv(num_queries, QUERY_TILE)
    program = tl.program_id(0)
    query_tile = program % query_tiles
    pair = program // query_tiles
    batch = (pair // NUM_HEADS).to(tl.int64)
    head = pair % NUM_HEADS

    queries = query_tile * QUERY_TILE + tl.arange(0, QUERY_TILE)
    keys = tl.arange(0, KEY_TILE)
    columns = tl.arange(0, WIDTH)
    query_offsets = queries[:, None] * TOKEN + columns[None, :]
    key_offsets = keys[:, None] * TOKEN + columns[None, :]
    query_mask = (queries < num_queries)[:, None]
    if HEAD_DIM != WIDTH:
        query_mask = query_mask & (columns < HEAD_DIM)[None, :]
    query_base = batch * num_queries * TOKEN + head * HEAD_DIM
    key_base = batch * num_keys * TOKEN + head * HEAD_DIM
    q = tl.load(q_ptr + query_base + query_offsets, mask=query_mask, other=0.0)
    k_ptr += key_base
    v_ptr += key_base

    limit = tl.minimum(tl.maximum(tl.load(length_ptr + batch), 0), num_keys)
    if VISITS == 0:
        visits = tl.cdiv(limit, KEY_TILE)
    else:
        index_ptr += query_tile * PITCH
        listed = tl.arange(0, VISITS)
        count = tl.load(count_ptr + query_tile)
        tiles = tl.load(index_ptr + listed, mask=listed < count, other=0).to(tl.int32)
        visits = tl.sum(((listed < count) & (tiles * KEY_TILE < limit)).to(tl.int32))
        limit = tl.where(visits > 0, limit, 0)

    shift = tl.full([QUERY_TILE], _MASKED, tl.float32)
    zeros = tl.zeros([QUERY_TILE], tl.float32)
    out = tl.zeros([QUERY_TILE, WIDTH], tl.float32)
    last = _start(index_ptr, tl.maximum(visits - 1, 0), KEY_TILE, VISITS)
    k = _load(k_ptr, last, key_offsets, keys, columns, limit, TOKEN, HEAD_DIM, WIDTH, True)
    weights, rescale, shift, total, moment = _weigh(
        _dot(q, tl.trans(k)), keys < limit - last, shift, zeros, zeros, FACTOR, True, WITH_ENTROPY
    )
    for visit in range(0, visits - 1):
        # This order (both numbers, both tiles, both products) spills no registers on Ampere; others do. The second
        # number is not carried over from the last step, or Triton would not fetch the values ahead.
        start = _start(index_ptr, visit, KEY_TILE, VISITS)
        before = _start(index_ptr, tl.where(visit == 0, visits, visit) - 1, KEY_TILE, VISITS)
        k = _load(k_ptr, start, key_offsets, keys, columns, limit, TOKEN, HEAD_DIM, WIDTH, False)
        v = _load(v_ptr, before, key_offsets, keys, columns, limit, TOKEN, HEAD_DIM, WIDTH, True)
        products = _dot(q, tl.trans(k))
        out = _dot(weights.to(v.dtype), v, out * rescale[:, None])
        weights, rescale, shift, total, moment = _weigh(
            products, keys < limit, shift, total, moment, FACTOR, False, WITH_ENTROPY
        )
    before = _start(index_ptr, tl.maximum(visits - 2, 0), KEY_TILE, VISITS)
    v = _load(v_ptr, before, key_offsets, keys, columns, limit, TOKEN, HEAD_DIM, WIDTH, True)
    out = _dot(weights.to(v.dtype), v, out * rescale[:, None])

    # Compared with zero, so that a NaN among the inputs stays one.
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    log_total = tl.log2(divisor)
    out = out * (1.0 / divisor)[:, None]
    tl.store(out_ptr + query_base + query_offsets, out.to(out_ptr.dtype.element_ty), mask=query_mask)
    statistics = pair.to(tl.int64) * num_queries + queries
    log_sum_exp = tl.where(empty, _MASKED, _LN2 * (shift + log_total))
    tl.store(log_sum_exp_ptr + statistics, log_sum_exp, mask=queries < num_queries)
    if WITH_ENTROPY:
        entropy = _LN2 * (log_total - moment / divisor)
        # Not a maximum: that of NaN and zero is zero.
        entropy = tl.where(entropy < 0.0, 0.0, entropy)
        tl.store(entropy_ptr + statistics, entropy, mask=queries < num_queries)


@triton.jit
def _start(index_ptr, visit, KEY_TILE: tl.constexpr, VISITS: tl.constexpr):
    """The first key of a visit."""
    if VISITS == 0:
        return visit * KEY_TILE
    else:
        return tl.load(index_ptr + visit).to(tl.int32) * KEY_TILE


@triton.jit
def _load(
    tile_ptr,
    start,
    offsets,
    keys,
    columns,
    limit,
    TOKEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CUT: tl.constexpr,
):
    """A tile of keys or values ``[KEY_TILE, WIDTH]``; with ``CUT``, zeros from key ``limit`` on."""
    tile = tile_ptr + start * TOKEN + offsets
    if CUT:
        inside = (keys < limit - start)[:, None]
        if HEAD_DIM != WIDTH:
            inside = inside & (columns < HEAD_DIM)[None, :]
        return tl.load(tile, mask=inside, other=0.0)
    elif HEAD_DIM != WIDTH:
        return tl.load(tile, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(tile)


@triton.jit
def _dot(a, b, accumulator=None):
    """Matrix product in float32. "ieee" keeps float32 operands from being rounded to TF32; others are exact anyway."""
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def _weigh(
    products, visible, shift, total, moment, FACTOR: tl.constexpr, CUT: tl.constexpr, WITH_ENTROPY: tl.constexpr
):
    """One tile's weights, the factor for what was accumulated, and the new ``(shift, total, moment)``."""
    if CUT:
        products = tl.where(visible[None, :], products, _MASKED)
    moved = tl.maximum(shift, tl.max(products, axis=1) * FACTOR)
    exponents = tl.fma(products, tl.full(products.shape, FACTOR, tl.float32), tl.zeros_like(products) - moved[:, None])
    if CUT:
        exponents = tl.where(visible[None, :], exponents, 0.0)
    weights = tl.exp2(exponents)
    if CUT:
        weights = tl.where(visible[None, :], weights, 0.0)
    change = shift - moved
    rescale = tl.exp2(change)
    if WITH_ENTROPY:
        moment = rescale * tl.fma(change, total, moment) + tl.sum(weights * exponents, axis=1)
    total = tl.fma(rescale, total, tl.sum(weights, axis=1))
    return weights, rescale, moved, total, moment
