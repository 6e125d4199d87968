"""Attention in one pass over chunks of keys: memory grows with ``T`` only, runs on every device."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.block_mask import BlockMask
from pallas_kernels.attention.online import accumulate, finalise, initial_rows
from pallas_kernels.attention.output import AttentionOutput
from pallas_kernels.attention.reference import dot_products, visible_tokens, weighted_values
from pallas_kernels.varying import as_varying


def chunked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    *,
    scale: float,
    key_length: Int[Array, " B"] | None,
    block_mask: BlockMask | None,
    with_entropy: bool,
    chunk: int = 512,
) -> AttentionOutput:
    """Online softmax over chunks of ``chunk`` keys with ``lax.scan``; the last chunk may be partial.

    With a block mask, chunks that no query sees are not computed.
    """
    batch, length = q.shape[:2]
    num_keys = k.shape[1]
    chunk = min(chunk, num_keys)
    num_chunks = -(-num_keys // chunk)
    visited = chunks_in_use(block_mask, num_keys, chunk)
    limit = jnp.full((batch,), num_keys, jnp.int32) if key_length is None else key_length.astype(jnp.int32)
    padding = ((0, 0), (0, num_chunks * chunk - num_keys), (0, 0), (0, 0))
    k, v = jnp.pad(k, padding), jnp.pad(v, padding)

    def step(carry, index):
        rows, out = carry
        start = index * chunk
        k_tile = jax.lax.dynamic_slice_in_dim(k, start, chunk, axis=1)
        v_tile = jax.lax.dynamic_slice_in_dim(v, start, chunk, axis=1)
        position = start + jnp.arange(chunk, dtype=jnp.int32)
        present = position[None] < limit[:, None]
        # Past the length anything may lie, even NaN, which a weight of zero does not silence.
        k_tile, v_tile = (jnp.where(present[..., None, None], x, 0) for x in (k_tile, v_tile))
        visible = present[:, None, None]
        if block_mask is not None:
            # Padding past the last block has no column of its own; it is invisible by its position.
            known = jnp.minimum(position, num_keys - 1)
            visible &= visible_tokens(block_mask, jnp.arange(length), known)[None, None]
        rows, tile = accumulate(rows, dot_products(q, k_tile), visible, scale)
        out = out * tile.rescale.transpose(0, 2, 1, 3) + weighted_values(tile.weights, v_tile)
        return (rows, out), None

    # Made of the queries, so that the carry is sharded from the start as it will be.
    zeros = jnp.zeros_like(q, jnp.float32)
    initial = (initial_rows(zeros[..., :1].transpose(0, 2, 1, 3)), zeros)
    (rows, out), _ = jax.lax.scan(step, as_varying(initial, (q, k, v, limit)), jnp.asarray(visited))
    inverse, log_sum_exp, entropy = finalise(rows, scale)
    out = (out * inverse.transpose(0, 2, 1, 3)).astype(v.dtype)
    return AttentionOutput(out, log_sum_exp[..., 0], entropy[..., 0] if with_entropy else None)


def chunks_in_use(block_mask: BlockMask | None, num_keys: int, chunk: int) -> np.ndarray:
    """Indices, int32, of the chunks of ``chunk`` keys that any query sees."""
    num_chunks = -(-num_keys // chunk)
    if block_mask is None:
        return np.arange(num_chunks, dtype=np.int32)
    seen = np.repeat(block_mask.array.any(axis=0), block_mask.key_block)[:num_keys]
    used = np.logical_or.reduceat(seen, np.arange(num_chunks) * chunk)
    return np.flatnonzero(used).astype(np.int32)
