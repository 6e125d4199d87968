"""Derivatives in linear memory, for kernels and for chunked XLA; ``vmap`` for kernels.

Kernels compute the forward pass only, and differentiating a scan over chunks would keep the weights of all of them. So
the backward pass recomputes the weights from the log-sum-exp, chunk by chunk, with XLA. ``vmap`` folds the mapped axis
into a kernel's batch, because not every kernel language has a batching rule of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.block_mask import BlockMask
from pallas_kernels.attention.output import AttentionOutput
from pallas_kernels.attention.reference import dot_products, visible_tokens, weighted_values
from pallas_kernels.attention.xla_chunked import chunks_in_use
from pallas_kernels.varying import as_varying

_CHUNK = 512


Forward = Callable[[Array, Array, Array, Array | None], AttentionOutput]
"""A kernel's forward pass with its options bound: ``(q, k, v, key_length) -> AttentionOutput``."""


def with_derivatives(
    forward: Forward,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    key_length: Int[Array, " B"] | None,
    *,
    scale: float,
    block_mask: BlockMask | None,
    is_kernel: bool = True,
) -> AttentionOutput:
    """Run ``forward``; reverse-mode derivatives of all three results, and ``vmap``, work as for plain JAX code.

    Args:
      forward: the forward pass; it must use the ``scale`` and ``block_mask`` given here.
      q: queries.
      k: keys.
      v: values.
      key_length: number of visible keys per batch row, or None for all.
      scale: factor on the dot products.
      block_mask: the block-sparse pattern, or None.
      is_kernel: whether ``forward`` needs ``vmap`` to be folded into the batch; plain JAX code does not.
    """

    @jax.custom_vjp
    def run(q, k, v, key_length):
        return (_folding(forward) if is_kernel else forward)(q, k, v, key_length)

    def run_forward(q, k, v, key_length):
        got = run(q, k, v, key_length)
        return got, (q, k, v, key_length, got)

    def run_backward(saved, cotangent):
        q, k, v, key_length, got = saved
        gradients = attention_gradients(
            *(q, k, v, got, cotangent), scale=scale, key_length=key_length, block_mask=block_mask
        )
        return *gradients, jax.tree.map(lambda length: np.zeros(length.shape, jax.dtypes.float0), key_length)

    run.defvjp(run_forward, run_backward)
    return run(q, k, v, key_length)


def _folding(forward: Forward):
    """``forward`` with a batching rule that merges the mapped axis with the batch."""

    @jax.custom_batching.custom_vmap
    def run(q, k, v, key_length):
        return forward(q, k, v, key_length)

    @run.def_vmap
    def fold(axis_size: int, is_mapped: Any, *arguments):
        if axis_size == 0:
            one = jax.tree.map(lambda mapped, x: jnp.zeros(x.shape[mapped:], x.dtype), tuple(is_mapped), arguments)
            empty = jax.tree.map(lambda x: jnp.zeros((0, *x.shape), x.dtype), jax.eval_shape(run, *one))
            return empty, jax.tree.map(lambda _: True, empty)

        def merge(mapped: bool, array: Array) -> Array:
            full = array if mapped else jnp.broadcast_to(array, (axis_size, *array.shape))
            return full.reshape(axis_size * full.shape[1], *full.shape[2:])

        got = run(*jax.tree.map(merge, tuple(is_mapped), arguments))
        split = jax.tree.map(lambda array: array.reshape(axis_size, -1, *array.shape[1:]), got)
        return split, jax.tree.map(lambda _: True, split)

    return run


def attention_gradients(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    got: AttentionOutput,
    cotangent: AttentionOutput,
    *,
    scale: float,
    key_length: Int[Array, " B"] | None,
    block_mask: BlockMask | None,
    chunk: int = _CHUNK,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S N H"], Float[Array, "B S N H"]]:
    """Gradients for queries, keys and values.

    With weights ``p = exp(z - L)`` of the scaled products ``z``, the log-sum-exp ``L`` and the entropy ``H``, the
    cotangents ``o'``, ``L'``, ``H'`` meet in ``z' = p (o' . v - o' . o + L' - H' (z - L + H))``.

    Args:
      q: queries.
      k: keys.
      v: values.
      got: the result of the forward pass.
      cotangent: one for every result; that of an entropy that was not asked for is None.
      scale: factor on the dot products.
      key_length: number of visible keys per batch row, or None for all.
      block_mask: the block-sparse pattern, or None.
      chunk: keys per step.
    """
    num_keys = k.shape[1]
    chunk = min(chunk, num_keys)
    padded = -(-num_keys // chunk) * chunk
    padding = ((0, 0), (0, padded - num_keys), (0, 0), (0, 0))
    keys, values = jnp.pad(k, padding), jnp.pad(v, padding)
    limit = jnp.full(q.shape[:1], num_keys, jnp.int32) if key_length is None else key_length.astype(jnp.int32)
    d_out = cotangent.out
    # [B, N, T, 1]: what every weight of a row has in common.
    row_term = cotangent.log_sum_exp - jnp.einsum(
        "btnh,btnh->bnt", d_out, got.out, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST
    )
    row_term, log_sum_exp = row_term[..., None], got.log_sum_exp[..., None]

    def step(carry, index):
        d_query, d_keys, d_values = carry
        start = index * chunk
        key, value = (jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1) for x in (keys, values))
        position = start + jnp.arange(chunk, dtype=jnp.int32)
        present = position[None] < limit[:, None]
        key, value = (jnp.where(present[..., None, None], x, 0) for x in (key, value))
        visible = present[:, None, None]
        if block_mask is not None:
            known = jnp.minimum(position, num_keys - 1)
            visible &= visible_tokens(block_mask, jnp.arange(q.shape[1]), known)[None, None]
        log_weight = jnp.where(visible, scale * dot_products(q, key) - log_sum_exp, 0.0)
        weight = jnp.where(visible, jnp.exp(log_weight), 0.0)
        change = dot_products(d_out, value) + row_term
        if cotangent.entropy is not None and got.entropy is not None:
            change -= cotangent.entropy[..., None] * (log_weight + got.entropy[..., None])
        d_products = scale * weight * change
        d_query = d_query + weighted_values(d_products, key)
        d_key = weighted_values(d_products.swapaxes(2, 3), q)
        d_value = weighted_values(weight.swapaxes(2, 3), d_out)
        d_keys, d_values = (
            jax.lax.dynamic_update_slice_in_dim(all_rows, rows, start, axis=1)
            for all_rows, rows in ((d_keys, d_key), (d_values, d_value))
        )
        return (d_query, d_keys, d_values), None

    zeros = [jnp.zeros_like(x, jnp.float32) for x in (q, keys, values)]
    visited = jnp.asarray(chunks_in_use(block_mask, num_keys, chunk))
    (d_query, d_keys, d_values), _ = jax.lax.scan(step, tuple(as_varying(zeros, (q, k, v, limit, d_out))), visited)
    return d_query.astype(q.dtype), d_keys[:, :num_keys].astype(k.dtype), d_values[:, :num_keys].astype(v.dtype)
