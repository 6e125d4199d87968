"""The TPU kernel: one tile of queries against the key tiles it sees, one per step of the last grid axis.

The arithmetic is that of ``online.py`` in base two: with ``c = scale * log2(e)`` and the running maximum ``m`` of the
dot products ``s``, ``x = c (s - m)``, ``p = 2^x``, ``l = sum p``, ``u = sum p x``. When the maximum rises by ``d / c``,
``a = 2^-d``, ``l' = a l`` and ``u' = a (u - d l)``. At the end ``H = ln l - ln 2 * u / l``. TPU vector units multiply
and add in two roundings, so subtracting first costs nothing, and the largest score of a row gives exactly ``x = 0``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels.attention.constants import LN_2, LOG2_E, MASKED_SCORE, ONE, ZERO

LANES = 128
"""Width of a vector register, the unit of the last axis."""

_LARGE_SCALE = 1e8
"""Up to here, a difference of two scores within 1e30 does not overflow when it is multiplied by the scale."""


@dataclass(frozen=True)
class Shape:
    """What the kernel is specialised for.

    Attributes:
      query_tiles: number of query tiles of one head.
      visits: steps of the last grid axis, the most key tiles that a query tile sees.
      key_tile: keys fetched per step.
      compute_tile: keys per pair of matrix products; divides ``key_tile``.
      scale: factor on the dot products.
      cut: whether the last key tile of some row may be partly visible.
      with_entropy: whether the entropy is wanted.
    """

    query_tiles: int
    visits: int
    key_tile: int
    compute_tile: int
    scale: float
    cut: bool
    with_entropy: bool


def visited_tile(shape: Shape, row, query_tile, step, visits_ref, tiles_ref):
    """The key tile of a step. Past a row's last visit it stays the same, so that nothing more is fetched.

    Args:
      shape: what the kernel is specialised for.
      row: batch row.
      query_tile: index of the query tile.
      step: index on the last grid axis.
      visits_ref: int32 ``[B * query tiles]``, how many key tiles are visited.
      tiles_ref: int32 ``[query tiles * visits]``, which ones, or None where it is the first ones.
    """
    visit = jnp.maximum(jnp.minimum(step, visits_ref[row * shape.query_tiles + query_tile] - 1), np.int32(0))
    return visit if tiles_ref is None else tiles_ref[query_tile * shape.visits + visit]


def attention_kernel(lengths_ref, visits_ref, tiles_ref, *refs, shape: Shape):
    """Accumulate one key tile; write the results at the last step.

    Args:
      lengths_ref: int32 ``[B]``, visible keys of every batch row, in scalar memory.
      visits_ref: see :func:`visited_tile`.
      tiles_ref: see :func:`visited_tile`.
      *refs: query ``[query tile, H]``, key and value ``[key tile, H]``; then the results: values ``[query tile, H]``,
        log-sum-exp and, if wanted, entropy ``[1, query tile]``; then scratch, all float32: values ``[query tile, H]``,
        maximum, total and, for the entropy, moment ``[query tile, 128]``.
      shape: what the kernel is specialised for.
    """
    query_ref, key_ref, value_ref, out_ref, log_sum_exp_ref, *rest = refs
    entropy_ref = rest.pop(0) if shape.with_entropy else None
    weighted_ref, maximum_ref, total_ref, *moment_ref = rest
    row, query_tile, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(step == 0)
    def start():
        maximum_ref[...] = jnp.full_like(maximum_ref, MASKED_SCORE)
        for ref in (weighted_ref, total_ref, *moment_ref):
            ref[...] = jnp.zeros_like(ref)

    def accumulate(offset: int, remaining):
        """Take in ``compute_tile`` keys from ``offset`` on, the first ``remaining`` of them visible (None: all)."""
        keys = pl.ds(offset, shape.compute_tile)
        value = value_ref[keys, :]
        products = _dot(query_ref[...], key_ref[keys, :], contract=1)
        visible = None
        if remaining is not None:
            visible = jax.lax.broadcasted_iota(jnp.int32, (1, shape.compute_tile), 1) < remaining
            products = jnp.where(visible, products, MASKED_SCORE)
            # Zero weights do not silence what lies past the end of the array: 0 * NaN is NaN.
            held = jax.lax.broadcasted_iota(jnp.int32, (shape.compute_tile, 1), 0) < remaining
            value = jnp.where(held, value, jnp.zeros_like(value))
        before = maximum_ref[...]
        maximum = jnp.maximum(before, jnp.max(products, axis=-1, keepdims=True))
        maximum_ref[...] = maximum
        exponent = (products - _repeat(maximum, shape.compute_tile)) * jnp.float32(shape.scale * LOG2_E)
        weights = jnp.exp2(exponent)
        if visible is not None:
            weights = jnp.where(visible, weights, ZERO)
        # At a row's first keys the difference is that to the mask; finite, it meets a total of zero.
        change = jnp.maximum((before - maximum) * jnp.float32(shape.scale * LOG2_E), MASKED_SCORE)
        rescale = jnp.exp2(change)
        if shape.with_entropy:
            (moment,) = moment_ref
            # Scores differ by up to 2e30, times the scale by more than float32 holds: 0 * inf is NaN.
            finite = exponent if shape.scale < _LARGE_SCALE else jnp.maximum(exponent, MASKED_SCORE)
            moment[...] = rescale * (moment[...] + change * total_ref[...]) + _fold(weights * finite)
        total_ref[...] = rescale * total_ref[...] + _fold(weights)
        added = _dot(weights.astype(value.dtype), value, contract=0)
        weighted_ref[...] = _repeat(rescale, weighted_ref.shape[1]) * weighted_ref[...] + added

    @pl.when(step < visits_ref[row * shape.query_tiles + query_tile])
    def visit():
        offsets = range(0, shape.key_tile, shape.compute_tile)
        if not shape.cut:
            for offset in offsets:
                accumulate(offset, None)
            return
        tile = visited_tile(shape, row, query_tile, step, visits_ref, tiles_ref)
        remaining = lengths_ref[row] - tile * shape.key_tile

        @pl.when(remaining >= shape.key_tile)
        def whole():
            for offset in offsets:
                accumulate(offset, None)

        @pl.when(remaining < shape.key_tile)
        def part():
            for offset in offsets:
                pl.when(remaining > offset)(lambda offset=offset: accumulate(offset, remaining - offset))

    @pl.when(step == shape.visits - 1)
    def finish():
        total = jnp.sum(total_ref[...], axis=1, keepdims=True)
        inverse = 1.0 / jnp.where(total != 0, total, ONE)
        out_ref[...] = (weighted_ref[...] * inverse).astype(out_ref.dtype)
        # One number per query: along lanes, as in the result, a tile takes as many bytes as it has numbers; down
        # sublanes it would take 128 times as many.
        total = jnp.sum(total_ref[...].T, axis=0, keepdims=True)
        divisor = jnp.where(total != 0, total, ONE)
        log_total = jnp.log(divisor)
        log_sum_exp = jnp.float32(shape.scale) * maximum_ref[...].T[:1] + log_total
        log_sum_exp_ref[...] = jnp.where(total != 0, log_sum_exp, MASKED_SCORE)
        if entropy_ref is not None:
            moment = jnp.sum(moment_ref[0][...].T, axis=0, keepdims=True)
            entropy_ref[...] = jnp.maximum(log_total - jnp.float32(LN_2) * (moment / divisor), ZERO)


def _dot(left, right, *, contract: int):
    """``left @ right``, or ``left @ right.T`` with ``contract=1``, in float32."""
    # Explicit, against a global default: "highest" does not compile for bfloat16, and float32 would be rounded to
    # bfloat16 without it.
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((1,), (contract,)), ((), ()))
    return jax.lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _fold(tile):
    """Sum of the registers of every row, ``[T, n * 128] -> [T, 128]``.

    Sums stay spread over the lanes until the end: registers add up in one operation each, the lanes of a register only
    by way of the permute unit. The recurrence is linear in the sums, so that it holds lane by lane.
    """
    return functools.reduce(jnp.add, [tile[:, at : at + LANES] for at in range(0, tile.shape[1], LANES)])


def _repeat(column, width: int):
    """``[T, 128]`` with equal lanes, ``width`` lanes wide."""
    copies = -(-width // LANES)
    return (column if copies == 1 else jnp.tile(column, (1, copies)))[:, :width]
