"""The T5 v1.1 encoder: token ids to text features."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from toprovar_jax.distributed.parts import whole
from toprovar_jax.shapes import Array, Float, Int
from toprovar_jax.text_encoder.config import T5Config
from toprovar_jax.text_encoder.relative_position import position_buckets


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan: int) -> nnx.Param:
    """A float32 parameter drawn with standard deviation ``fan ** -0.5``."""
    return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) * fan**-0.5)


def _product(equation: str, left: Array, right: Array, dtype: str) -> Array:
    """An einsum of operands in ``dtype`` with a float32 result; float32 operands are never rounded on the way."""
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    left, right = left.astype(dtype), right.astype(dtype)
    return jnp.einsum(equation, left, right, precision=precision, preferred_element_type=jnp.float32)


def _matmul(inputs: Array, kernel: nnx.Param, dtype: str) -> Array:
    """``inputs @ kernel`` over the last axis: operands in ``dtype``, result in float32."""
    return _product("...i,io->...o", inputs, whole(kernel.get_value()), dtype)


class RMSNorm(nnx.Module):
    """Scales by the root mean square, without mean and without bias; always float32."""

    def __init__(self, config: T5Config):
        self.epsilon = config.norm_epsilon
        self.scale = nnx.Param(jnp.ones((config.width,), jnp.float32))

    def __call__(self, hidden: Float[Array, "B P E"]) -> Float[Array, "B P E"]:
        """Float32 in, float32 out; no errors of its own."""
        mean_square = jnp.mean(jnp.square(hidden), axis=-1, keepdims=True)
        return hidden * jax.lax.rsqrt(mean_square + self.epsilon) * self.scale[...].astype(jnp.float32)[None, None]


class SelfAttention(nnx.Module):
    """Bias-free attention of all tokens to all tokens; logits are not divided by ``sqrt(H)``."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        inner = config.num_heads * config.head_dim
        # The missing division by sqrt(H) is part of the initial query scale, as in the original T5.
        self.query = _normal(rngs, (config.width, inner), config.width * config.head_dim)
        self.key = _normal(rngs, (config.width, inner), config.width)
        self.value = _normal(rngs, (config.width, inner), config.width)
        self.output = _normal(rngs, (inner, config.width), inner)

    def __call__(self, hidden: Float[Array, "B P E"], logit_bias: Float[Array, "B N P P"]) -> Float[Array, "B P E"]:
        """``logit_bias`` holds both the position bias and the mask, float32."""
        dtype = self.config.compute_dtype
        heads = (*hidden.shape[:2], self.config.num_heads, self.config.head_dim)
        query, key, value = (
            _matmul(hidden, kernel, dtype).reshape(heads) for kernel in (self.query, self.key, self.value)
        )
        logits = _product("bqnh,bknh->bnqk", query, key, dtype)
        weights = jax.nn.softmax(logits + logit_bias, axis=-1)
        mixed = _product("bnqk,bknh->bqnh", weights, value, dtype)
        return _matmul(mixed.reshape(*hidden.shape[:2], -1), self.output, dtype)


class FeedForward(nnx.Module):
    """``down(gelu(gate x) * up x)`` with the tanh form of GELU."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.dtype = config.compute_dtype
        self.gate = _normal(rngs, (config.width, config.feed_forward_width), config.width)
        self.up = _normal(rngs, (config.width, config.feed_forward_width), config.width)
        self.down = _normal(rngs, (config.feed_forward_width, config.width), config.feed_forward_width)

    def __call__(self, hidden: Float[Array, "B P E"]) -> Float[Array, "B P E"]:
        """Float32 in, float32 out."""
        gate = jax.nn.gelu(_matmul(hidden, self.gate, self.dtype), approximate=True)
        return _matmul(gate * _matmul(hidden, self.up, self.dtype), self.down, self.dtype)


class T5Layer(nnx.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config)
        self.attention = SelfAttention(config, rngs=rngs)
        self.feed_forward_norm = RMSNorm(config)
        self.feed_forward = FeedForward(config, rngs=rngs)

    def __call__(self, hidden: Float[Array, "B P E"], logit_bias: Float[Array, "B N P P"]) -> Float[Array, "B P E"]:
        """One step of the encoder; shapes and types unchanged."""
        hidden = hidden + self.attention(self.attention_norm(hidden), logit_bias)
        return hidden + self.feed_forward(self.feed_forward_norm(hidden))


class T5Encoder(nnx.Module):
    """T5 v1.1 encoder, a container of float32 parameters with a pure call.

    The parameters of the layers are stacked on a leading axis of length L under ``layers``; matmul kernels are stored
    (in, out). Initialised for training from scratch (normal, scaled by fan-in as in T5); ``nnx.eval_shape`` builds it
    without memory.

    Args:
      config: sizes and compute type.
      rngs: draws the initial parameters from its ``params`` stream.
    """

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = _normal(rngs, (config.vocab_size, config.width), 1)
        self.relative_bias = _normal(rngs, (config.relative_buckets, config.num_heads), config.width)
        self.final_norm = RMSNorm(config)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(layer_rngs: nnx.Rngs) -> T5Layer:
            return T5Layer(config, rngs=layer_rngs)

        self.layers = stack(rngs)

    def __call__(
        self, tokens: Int[Array, "B P"], lengths: Int[Array, " B"], *, unroll: bool = False
    ) -> Float[Array, "B P E"]:
        """Text features of padded prompts.

        Args:
          tokens: ids below ``config.vocab_size``; whatever stands at or after a prompt's length is ignored.
          lengths: tokens of each prompt, its end token included, at most P.
          unroll: compile every layer instead of a loop over them.

        Returns:
          float32 features after the final norm; rows at or after a prompt's length are zero. An id outside the
          vocabulary makes the features of its prompt NaN, since values cannot be checked inside a trace.

        Source: MODEL_SPEC 2.1, "T5 equations".
        """
        valid = jnp.arange(tokens.shape[1], dtype=lengths.dtype)[None] < lengths[:, None]
        logit_bias = (
            self._position_bias(tokens.shape[1])[None]
            + jnp.where(valid, jnp.float32(0), jnp.finfo(jnp.float32).min)[:, None, None]
        )
        embedding = whole(self.embedding.get_value())
        hidden = jnp.take(embedding, jnp.where(valid, tokens, 0), axis=0, mode="fill").astype(jnp.float32)
        hidden, _ = jax.lax.scan(
            lambda carry, layer: (layer(carry, logit_bias), None), hidden, self.layers, unroll=unroll
        )
        return jnp.where(valid[..., None], self.final_norm(hidden), 0)

    def _position_bias(self, length: int) -> Float[Array, "N P P"]:
        """Bias of every head for every (query, key) pair of positions, in logits."""
        offsets = np.arange(1 - length, length)
        config = self.config
        buckets = position_buckets(offsets, buckets=config.relative_buckets, max_distance=config.relative_max_distance)
        by_offset = self.relative_bias[...].astype(jnp.float32)[buckets]
        positions = jnp.arange(length, dtype=jnp.int32)
        pairs = positions[None, :] - positions[:, None] + (length - 1)
        return by_offset[pairs].transpose(2, 0, 1)
