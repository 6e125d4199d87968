"""Attention in float64 numpy, one batch row and head at a time: what every implementation is held to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from pallas_kernels.attention.block_mask import BlockMask


class ExactAttention(NamedTuple):
    """Attention of some queries.

    Attributes:
      out: float64 ``[B, T, N, H]``.
      log_sum_exp: float64 ``[B, N, T]``, ``-inf`` in rows without visible keys.
      entropy: float64 ``[B, N, T]`` in nats.
    """

    out: np.ndarray
    log_sum_exp: np.ndarray
    entropy: np.ndarray


def attend(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    scale: float,
    key_length: ArrayLike | Sequence[int] | None = None,
    block_mask: BlockMask | None = None,
    rows: np.ndarray | None = None,
) -> ExactAttention:
    """Softmax attention of the queries ``q [B, T, N, H]`` at the positions ``rows`` (default all).

    Args:
      q: queries.
      k: keys ``[B, S, N, H]``.
      v: values ``[B, S, N, H]``.
      scale: factor on the dot products.
      key_length: number of visible keys per batch row; clipped to what there is.
      block_mask: the block-sparse pattern.
      rows: which queries to compute; the results have only these.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, num_queries, heads, _ = q.shape
    num_keys = k.shape[1]
    rows = np.arange(num_queries) if rows is None else rows
    q = q[:, rows]
    seen = np.ones((len(rows), num_keys), bool)
    if block_mask is not None:
        seen = block_mask.array[rows // block_mask.query_block][:, np.arange(num_keys) // block_mask.key_block]
    lengths = np.full(batch, num_keys) if key_length is None else np.clip(np.asarray(key_length), 0, num_keys)
    out = np.zeros(q.shape)
    log_sum_exp = np.full((batch, heads, len(rows)), -np.inf)
    entropy = np.zeros((batch, heads, len(rows)))
    for b, length in enumerate(lengths):
        visible = seen & (np.arange(num_keys) < length)[None]
        alive = np.flatnonzero(visible.any(axis=1))
        if not len(alive):
            continue
        mask = visible[alive, :length]
        for n in range(heads):
            logits = np.where(mask, scale * (q[b, alive, n] @ k[b, :length, n].T), -np.inf)
            peak = logits.max(axis=1, keepdims=True)
            total = peak + np.log(np.exp(logits - peak).sum(axis=1, keepdims=True))
            log_p = logits - total
            p = np.exp(log_p)
            out[b, alive, n] = p @ v[b, :length, n]
            log_sum_exp[b, n, alive] = total[:, 0]
            entropy[b, n, alive] = -np.sum(p * np.where(mask, log_p, 0.0), axis=1)
    return ExactAttention(out, log_sum_exp, entropy)
