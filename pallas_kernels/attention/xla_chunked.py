"""Attention in one pass over chunks of keys: memory grows with ``T`` only, runs on every device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.online import accumulate, finalise, initial_rows
from pallas_kernels.attention.output import AttentionOutput
from pallas_kernels.attention.reference import dot_products, weighted_values
from pallas_kernels.varying import as_varying


def chunked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    *,
    scale: float,
    key_length: Int[Array, " B"] | None,
    with_entropy: bool,
    chunk: int = 512,
) -> AttentionOutput:
    """Online softmax over chunks of ``chunk`` keys with ``lax.scan``; the last chunk may be partial."""
    batch, length, heads, width = q.shape
    num_keys = k.shape[1]
    chunk = min(chunk, num_keys)
    num_chunks = -(-num_keys // chunk)
    limit = jnp.full((batch,), num_keys, jnp.int32) if key_length is None else key_length.astype(jnp.int32)
    padding = ((0, 0), (0, num_chunks * chunk - num_keys), (0, 0), (0, 0))
    k, v = jnp.pad(k, padding), jnp.pad(v, padding)

    def step(carry, index):
        rows, out = carry
        start = index * chunk
        k_tile = jax.lax.dynamic_slice_in_dim(k, start, chunk, axis=1)
        v_tile = jax.lax.dynamic_slice_in_dim(v, start, chunk, axis=1)
        visible = ((start + jnp.arange(chunk))[None] < limit[:, None])[:, None, None]
        rows, tile = accumulate(rows, dot_products(q, k_tile), visible, scale)
        out = out * tile.rescale.transpose(0, 2, 1, 3) + weighted_values(tile.weights, v_tile)
        return (rows, out), None

    initial = (initial_rows((batch, heads, length, 1)), jnp.zeros((batch, length, heads, width), jnp.float32))
    (rows, out), _ = jax.lax.scan(step, as_varying(initial, (q, k, v, limit)), jnp.arange(num_chunks))
    inverse, log_sum_exp, entropy = finalise(rows, scale)
    out = (out * inverse.transpose(0, 2, 1, 3)).astype(v.dtype)
    return AttentionOutput(out, log_sum_exp[..., 0], entropy[..., 0] if with_entropy else None)
