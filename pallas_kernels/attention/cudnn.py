"""Attention by cuDNN's fused kernel; the entropy by a second call that averages the keys.

With ``p`` the weights of a row, ``H = log-sum-exp - scale * q . sum_j p_j k_j``: the expected score under the softmax
is the query's product with the averaged key. So any attention that returns its log-sum-exp can be asked for the
entropy, at twice the work, by passing the keys as values. The averaged key comes back rounded to the dtype of the
inputs, which leaves an error of about ``2^-9 * scale * |q| * |mean k|`` nats in bfloat16: enough to rank tokens, and
the yardstick for the kernels that fuse it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.block_mask import BlockMask
from pallas_kernels.attention.output import AttentionOutput
from pallas_kernels.attention.problem import Problem
from pallas_kernels.attention.reference import MASKED
from pallas_kernels.attention.target import Target


@dataclass(frozen=True)
class CudnnConfig:
    """Nothing to choose: cuDNN picks its own tiles."""


def why_not(problem: Problem, target: Target) -> str | None:
    """The reason why cuDNN cannot run ``problem`` on ``target``, or is not there, in one line; None when it can."""
    if target.platform != "cuda":
        return f"platform {target.platform}: cuDNN needs an NVIDIA GPU"
    if target.compute_capability is not None and target.compute_capability < (8, 0):
        major, minor = target.compute_capability
        return f"compute capability {major}.{minor}: cuDNN attention needs 8.0"
    if problem.block_mask is not None:
        return "block_mask: cuDNN attention has no block-sparse patterns"
    if problem.dtype not in (np.dtype(jnp.bfloat16), np.dtype(np.float16)):
        return f"dtype {problem.dtype}: cuDNN attention takes bfloat16 and float16"
    largest = 256 if target.compute_capability is not None and target.compute_capability >= (9, 0) else 128
    if problem.head_dim % 8 or problem.head_dim > largest:
        return f"head dim {problem.head_dim}: cuDNN attention needs a multiple of 8 up to {largest} on {target}"
    return _missing()


def _missing() -> str | None:
    """The same look that the call takes, so that a list of implementations falls through to the next one."""
    try:
        from jax._src.cudnn.fused_attention_stablehlo import check_cudnn_version

        check_cudnn_version()
    except (ImportError, AttributeError, RuntimeError):
        return "cuDNN not found (jax[cuda13] installs it)"
    return None


def default_config(problem: Problem, target: Target) -> CudnnConfig:
    """The only configuration."""
    del problem, target
    return CudnnConfig()


def candidates(problem: Problem, target: Target) -> tuple[CudnnConfig, ...]:
    """The only configuration."""
    return (default_config(problem, target),)


def cudnn_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    *,
    scale: float,
    key_length: Int[Array, " B"] | None,
    block_mask: BlockMask | None = None,
    with_entropy: bool,
    config: CudnnConfig | None = None,
) -> AttentionOutput:
    """Attention with float32 statistics; see :func:`pallas_kernels.attention`.

    Args:
      q: queries ``[B, T, N, H]``, bfloat16 or float16.
      k: keys ``[B, S, N, H]``.
      v: values ``[B, S, N, H]``.
      scale: positive factor on the dot products.
      key_length: visible keys per batch row, ``[B]``, or None for all.
      block_mask: must be None.
      with_entropy: whether to make the second call for the entropy, in nats.
      config: has no fields.

    Raises:
      NotImplementedError: a block mask, or what cuDNN itself refuses.
    """
    del config
    if block_mask is not None:
        raise NotImplementedError(
            "block_mask: cuDNN attention has no block-sparse patterns; use another implementation"
        )
    length = shown = None
    if key_length is not None:
        length = jnp.clip(key_length, 0, k.shape[1]).astype(jnp.int32)
        # A weight of zero does not stop a hidden NaN from entering the weighted sum.
        visible = (jnp.arange(k.shape[1], dtype=jnp.int32)[None] < length[:, None])[:, :, None, None]
        k, v = (jnp.where(visible, array, jnp.zeros((), array.dtype)) for array in (k, v))
        # A row without keys is shown one, so that no 0 / 0 arises in the kernel, and is overwritten afterwards.
        shown = jnp.maximum(length, 1)
    out, log_sum_exp = _call(q, k, v, scale, shown)
    entropy = None
    if with_entropy:
        averaged_key, _ = _call(q, k, k, scale, shown)
        entropy = entropy_from_averaged_key(q, averaged_key, log_sum_exp, scale)
    result = AttentionOutput(out, log_sum_exp, entropy)
    return result if length is None else blank_empty_rows(result, length)


def entropy_from_averaged_key(
    q: Float[Array, "B T N H"],
    averaged_key: Float[Array, "B T N H"],
    log_sum_exp: Float[Array, "B N T"],
    scale: float,
) -> Float[Array, "B N T"]:
    """``H = log-sum-exp - scale * q . averaged_key`` in nats, float32, not below 0.

    Args:
      q: queries ``[B, T, N, H]``.
      averaged_key: the attention output with the keys as values, ``[B, T, N, H]``.
      log_sum_exp: of the scaled scores, ``[B, N, T]``.
      scale: factor on the dot products.
    """
    expected = jnp.sum(q.astype(jnp.float32) * averaged_key.astype(jnp.float32), axis=-1).transpose(0, 2, 1)
    return jnp.maximum(log_sum_exp - scale * expected, 0.0)


def blank_empty_rows(result: AttentionOutput, key_length: Int[Array, " B"]) -> AttentionOutput:
    """Zeros, zero entropy and a masked log-sum-exp where a batch row sees no key."""
    empty = (key_length == 0)[:, None, None]
    return AttentionOutput(
        jnp.where(empty[..., None], jnp.zeros((), result.out.dtype), result.out),
        jnp.where(empty, MASKED, result.log_sum_exp),
        None if result.entropy is None else jnp.where(empty, 0.0, result.entropy),
    )


def _call(q: Array, k: Array, v: Array, scale: float, key_length: Array | None) -> tuple[Array, Array]:
    """Output and float32 log-sum-exp ``[B, N, T]``."""
    # Below jax.nn.dot_product_attention, which would round the log-sum-exp to the dtype of the output: an error of
    # 0.03 nats at a value of 10. Its own call, with the same keywords in jax 0.10, 0.11 and 0.12.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    padded: dict[str, Any] = {}
    if key_length is not None:
        query_length = jnp.full(q.shape[:1], q.shape[1], jnp.int32)
        padded = {"mask_type": MaskType.PADDING, "q_seqlen": query_length, "kv_seqlen": key_length}
    try:
        result: Any = dot_product_attention(q, k, v, scale=scale, return_residual=True, **padded)
    except RuntimeError as error:
        raise NotImplementedError(f"cuDNN attention: {error} Install jax[cuda13]") from error
    return result[0], result[1]
