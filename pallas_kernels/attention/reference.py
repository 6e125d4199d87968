"""The specification: dense attention in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.block_mask import BlockMask
from pallas_kernels.attention.output import AttentionOutput

MASKED = -1e30
"""Score of an invisible key. Finite, so that no ``inf - inf`` or ``0 * inf`` can arise."""


def dot_products(q: Float[Array, "B T N H"], k: Float[Array, "B S N H"]) -> Float[Array, "B N T S"]:
    """All pairs of queries and keys, accumulated in float32, not yet scaled."""
    q, k = _widened(q), _widened(k)
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    return jnp.einsum("btnh,bsnh->bnts", q, k, precision=precision, preferred_element_type=jnp.float32)


def weighted_values(p: Float[Array, "B N T S"], v: Float[Array, "B S N H"]) -> Float[Array, "B T N H"]:
    """Sum of the values under weights ``p``, accumulated in float32."""
    v = _widened(v)
    precision = jax.lax.Precision.HIGHEST if v.dtype == jnp.float32 else None
    return jnp.einsum("bnts,bsnh->btnh", p.astype(v.dtype), v, precision=precision, preferred_element_type=jnp.float32)


def _widened(x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    # Weights and, above all, gradients leave the range of float16; bfloat16 has that of float32.
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


def visible_tokens(block_mask: BlockMask, query: Int[Array, " T"], key: Int[Array, " S"]) -> Bool[Array, "T S"]:
    """Whether the queries at these positions see the keys at those, by the block each lies in.

    Built from the small pattern where it is needed: a token mask as a constant would be part of every program.
    """
    rows = jnp.asarray(block_mask.array)[query // block_mask.query_block]
    return rows[:, key // block_mask.key_block]


def dense_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    *,
    scale: float,
    key_length: Int[Array, " B"] | None,
    block_mask: BlockMask | None,
    with_entropy: bool,
) -> AttentionOutput:
    """Attention over the whole score matrix; memory grows with ``T * S``."""
    visible = jnp.ones(k.shape[1:2], bool)[None, None, None]
    if key_length is not None:
        present = jnp.arange(k.shape[1], dtype=jnp.int32)[None] < key_length.astype(jnp.int32)[:, None]
        # Anything may lie there, even NaN, which a weight of zero does not silence.
        k, v = (jnp.where(present[..., None, None], x, 0) for x in (k, v))
        visible = present[:, None, None]
    products = dot_products(q, k)
    if block_mask is not None:
        visible &= visible_tokens(block_mask, jnp.arange(q.shape[1]), jnp.arange(k.shape[1]))[None, None]
    if key_length is not None or block_mask is not None:
        products = jnp.where(visible, products, MASKED)
    maximum = jax.lax.stop_gradient(jnp.max(products, axis=-1, keepdims=True))
    # Scaled after the subtraction: see online.py.
    shifted = products - maximum
    weights = jnp.where(visible, jnp.exp(scale * shifted), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # Not max(total, tiny): the gradient squares the divisor, and a tiny one underflows to 0 / 0.
    divisor = jnp.where(total != 0, total, 1.0)
    out = weighted_values(weights / divisor, v).astype(v.dtype)
    log_sum_exp = jnp.where(total != 0, scale * maximum + jnp.log(divisor), MASKED)[..., 0]
    entropy = None
    if with_entropy:
        sum_shifted = jnp.sum(weights * jnp.where(visible, shifted, 0.0), axis=-1, keepdims=True)
        entropy = jnp.maximum(jnp.log(divisor) - scale * (sum_shifted / divisor), 0.0)[..., 0]
    return AttentionOutput(out, log_sum_exp, entropy)
