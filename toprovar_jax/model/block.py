"""One transformer block: self-attention, cross-attention to the text, feed-forward (MODEL_SPEC 4.3 to 4.5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import attention
from toprovar_jax.config import InfinityConfig, Precision
from toprovar_jax.distributed.parts import TensorParts
from toprovar_jax.model.layers import LayerNorm, Linear, compute_dtype, modulate, normalise
from toprovar_jax.model.rope import RotaryTable, rotate
from toprovar_jax.shapes import Array, Float

Attend = Callable[[Array, Array, Array], tuple[Array, object]]
"""``(q, k, v) -> (attended values, carry)``: how a block's queries meet keys: through the cache, or block-causally."""

MAX_LOG_SCALE = math.log(100.0)


class LayerText(NamedTuple):
    """One layer's cross-attention keys and values ``[R, P, N, H]`` and the visible lengths ``[R]``."""

    keys: Array
    values: Array
    lengths: Array


class SelfAttention(nnx.Module):
    """Cosine attention: unit queries and keys, a learned and clamped scale per head, rotary positions."""

    def __init__(self, config: InfinityConfig, *, rngs: nnx.Rngs):
        width = config.width
        options: dict[str, Any] = {"model_width": width, "precision": config.precision, "rngs": rngs}
        self.qkv = Linear(width, 3 * width, use_bias=False, **options)
        self.query_bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.value_bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.log_scale = nnx.Param(jnp.full((config.num_heads,), math.log(4.0), jnp.float32))
        self.out = Linear(width, width, gain=_residual_gain(config), **options)

    def project(self, x: Float[Array, "R T D"], rope: RotaryTable) -> tuple[Array, Array, Array]:
        """Queries and keys, normalised, scaled and rotated, and values: ``[R, T, N, H]`` each, compute dtype.

        N are the heads that this device has.
        """
        rows, length, _ = x.shape
        heads = self.log_scale.shape[0]
        qkv = self.qkv(x)
        query, key, value = jnp.split(qkv, 3, axis=-1)
        query = query + self.query_bias[...].astype(query.dtype)[None, None]
        value = value + self.value_bias[...].astype(value.dtype)[None, None]
        query, key, value = (part.reshape(rows, length, heads, -1) for part in (query, key, value))
        scale = jnp.exp(jnp.minimum(self.log_scale[...].astype(jnp.float32), MAX_LOG_SCALE))
        query = _unit(query) * scale[None, None, :, None]
        return rotate(query, rope).astype(qkv.dtype), rotate(_unit(key), rope).astype(qkv.dtype), value


class CrossAttention(nnx.Module):
    """Attention to the text; its keys and values do not change over scales and are computed once per image."""

    def __init__(self, config: InfinityConfig, *, rngs: nnx.Rngs):
        width = config.width
        options: dict[str, Any] = {"model_width": width, "precision": config.precision, "rngs": rngs}
        self.query = Linear(width, width, **options)
        self.key_value = Linear(width, 2 * width, use_bias=False, **options)
        self.value_bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.out = Linear(width, width, gain=_residual_gain(config), **options)
        self.implementation = config.attention

    def project_text(self, text: Float[Array, "R P D"], heads: int) -> tuple[Array, Array]:
        """Keys and values of the projected text, ``[R, P, N, H]``."""
        rows, length, width = text.shape
        key, value = jnp.split(self.key_value(text), 2, axis=-1)
        value = value + self.value_bias[...].astype(value.dtype)[None, None]
        shape = (rows, length, heads, width // heads)
        return key.reshape(shape), value.reshape(shape)

    def __call__(self, x: Float[Array, "R T D"], text: LayerText) -> Float[Array, "R T D"]:
        """Attend to the visible text rows."""
        rows, length, width = x.shape
        heads, head_dim = text.keys.shape[-2:]
        query = self.query(x).reshape(rows, length, heads, head_dim)
        out = attention(
            *(query, text.keys, text.values),
            scale=1 / math.sqrt(head_dim),
            key_length=text.lengths,
            implementation=self.implementation,
        ).out
        return self.out(out.reshape(rows, length, width))


class FeedForward(nnx.Module):
    """Two linear maps around a tanh GELU."""

    def __init__(self, config: InfinityConfig, *, rngs: nnx.Rngs):
        options: dict[str, Any] = {"model_width": config.width, "precision": config.precision, "rngs": rngs}
        self.up = Linear(config.width, config.feed_forward_width, **options)
        self.down = Linear(config.feed_forward_width, config.width, gain=_residual_gain(config), **options)

    def __call__(
        self, x: Float[Array, "R T D"], summed: Callable[[Array], Array] | None = None
    ) -> Float[Array, "R out_T D"]:
        """Apply; ``summed`` as in :meth:`Linear.__call__`, for hidden channels that are spread over devices."""
        return self.down(jax.nn.gelu(self.up(x), approximate=True), summed)


class Block(nnx.Module):
    """One layer. ``modulation`` ``[6, D]`` is added to the shared, text-dependent part."""

    def __init__(self, config: InfinityConfig, *, rngs: nnx.Rngs):
        rows = jnp.array([5e-6, 5e-6, 1e-3, 1e-3, 1e-3, 1e-3], jnp.float32)
        noise = jax.random.normal(rngs.params(), (6, config.width), jnp.float32) / math.sqrt(config.width)
        self.modulation = nnx.Param(rows[:, None] * noise)
        self.self_attention = SelfAttention(config, rngs=rngs)
        self.cross_norm = LayerNorm(config.width, epsilon=config.norm_epsilon)
        self.cross_attention = CrossAttention(config, rngs=rngs)
        self.feed_forward = FeedForward(config, rngs=rngs)
        self.epsilon = config.norm_epsilon
        self.precision: Precision = config.precision
        self.parts = TensorParts(config.tensor_parts)

    def __call__(
        self,
        x: Float[Array, "R T D"],
        text: LayerText,
        shared_modulation: Float[Array, "R 6 D"],
        rope: RotaryTable,
        attend: Attend,
        keep: Float[Array, "2 R"] | None = None,
    ) -> tuple[Float[Array, "R T D"], object]:
        """Apply the block.

        Args:
          x: residual stream, float32.
          text: this layer's text keys and values.
          shared_modulation: ``[R, 6, D]``.
          rope: the tokens' table.
          attend: see :data:`Attend`.
          keep: stochastic-depth factors of the self-attention and feed-forward branches (training only).

        Returns:
          The new residual stream, and whatever ``attend`` carries on.
        """
        own = self.modulation[...].astype(jnp.float32)
        gate1, gate2, scale1, scale2, shift1, shift2 = jnp.unstack(shared_modulation + own[None], axis=1)
        if keep is not None:
            gate1, gate2 = gate1 * keep[0][:, None], gate2 * keep[1][:, None]
        dtype = compute_dtype(self.precision)
        rows, length, _ = x.shape
        parts = self.parts

        h = modulate(normalise(x, self.epsilon), scale1, shift1).astype(dtype)
        attended, carry = attend(*self.self_attention.project(h, rope))
        out = self.self_attention.out(attended.reshape(rows, length, -1), parts.scattered_sum)
        # From here to the end every device has its share of the tokens, where there are several.
        x = parts.own_tokens(x) + gate1[:, None] * out.astype(jnp.float32)
        x = x + self.cross_attention(self.cross_norm(x).astype(dtype), text).astype(jnp.float32)
        h = modulate(normalise(x, self.epsilon), scale2, shift2).astype(dtype)
        out = self.feed_forward(parts.all_tokens(h, length), parts.scattered_sum)
        return parts.all_tokens(x + gate2[:, None] * out.astype(jnp.float32), length), carry


def _unit(x: Float[Array, "R T N H"]) -> Float[Array, "R T N H"]:
    """``x`` over its norm along the head axis, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True)), 1e-12)


def _residual_gain(config: InfinityConfig) -> float:
    """Initial weights of projections into the residual stream shrink with depth."""
    return 1 / math.sqrt(2 * config.num_layers)


def stack_layers(config: InfinityConfig, rngs: nnx.Rngs) -> Block:
    """All blocks as one module whose parameters have a leading layer axis."""

    @nnx.vmap(in_axes=0, out_axes=0)
    def create(keys: nnx.Rngs) -> Block:
        return Block(config, rngs=keys)

    return create(rngs.split(config.num_layers))
