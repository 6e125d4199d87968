"""The function that users call: validate, choose an implementation."""

from __future__ import annotations

import math
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.output import AttentionOutput
from pallas_kernels.attention.reference import dense_attention
from pallas_kernels.attention.xla_chunked import chunked_attention

Implementation = Literal["reference", "xla"]
"""``reference``: dense float32 softmax. ``xla``: chunked, linear memory. Both run on every device."""

_DENSE_LIMIT = 2**24
"""Score-matrix size (elements per batch row) up to which the dense form is chosen: 64 MiB in float32."""


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    *,
    scale: float,
    key_length: Int[Array, " B"] | None = None,
    with_entropy: bool = False,
    implementation: Implementation | None = None,
) -> AttentionOutput:
    """Softmax attention, with the log-sum-exp and, on request, the entropy of every row.

    Any lengths; float32 statistics whatever the input dtype. Keys at or past ``key_length`` are invisible; a row
    without visible keys gives zeros and zero entropy.

    Args:
      q: queries ``[B, T, N, H]``.
      k: keys ``[B, S, N, H]``.
      v: values ``[B, S, N, H]``.
      scale: positive factor on the dot products.
      key_length: number of visible keys per batch row, ``[B]``; default all.
      with_entropy: also return each row's entropy in nats.
      implementation: one of :data:`Implementation`; default by problem size.

    Returns:
      ``AttentionOutput(out, log_sum_exp, entropy)``.

    Raises:
      ValueError: ranks, heads, dimensions or dtypes that do not match, no keys at all, integer inputs, lengths that
        are not integers, a scale that is not positive, an unknown implementation.
    """
    _validate(q, k, v, scale, key_length)
    if implementation is None:
        dense = q.shape[1] * k.shape[1] * q.shape[2] <= _DENSE_LIMIT
        implementation = "reference" if dense else "xla"
    if implementation not in get_args(Implementation):
        known = ", ".join(get_args(Implementation))
        raise ValueError(f"implementation {implementation!r}: must be one of {known}; None chooses for you")
    run = dense_attention if implementation == "reference" else chunked_attention
    return run(q, k, v, scale=scale, key_length=key_length, with_entropy=with_entropy)


def _validate(q, k, v, scale: float, key_length) -> None:
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise ValueError(f"{shapes}: must all have rank 4 [batch, length, heads, head dim]; add the missing axes")
    if k.shape != v.shape or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(f"{shapes}: batch, heads and head dim must agree, and k and v be alike; check the projections")
    if k.shape[1] == 0:
        raise ValueError(f"{shapes}: must hold at least one key; hide keys with key_length instead")
    if not jnp.issubdtype(q.dtype, jnp.floating) or not (q.dtype == k.dtype == v.dtype):
        raise ValueError(f"dtypes {q.dtype}, {k.dtype}, {v.dtype}: must be one floating dtype; cast the inputs")
    if not 0.0 < scale < math.inf:
        raise ValueError(f"scale {scale}: must be positive and finite; negate the queries instead")
    if key_length is not None and key_length.shape != q.shape[:1]:
        raise ValueError(f"key_length {key_length.shape}: must be one number per batch row {q.shape[:1]}; reshape it")
    if key_length is not None and not jnp.issubdtype(key_length.dtype, jnp.integer):
        raise ValueError(f"key_length dtype {key_length.dtype}: must be an integer; cast it")
