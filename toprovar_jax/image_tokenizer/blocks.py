"""Building blocks of the convolutional image tokenizer (MODEL_SPEC 8). Channels last."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from toprovar_jax.config import Precision
from toprovar_jax.shapes import Array, Float


class Conv(nnx.Module):
    """A 2-D convolution with bias; kernel ``[kh, kw, in, out]``."""

    def __init__(
        self, width_in: int, width_out: int, size: int = 3, *, stride: int = 1, precision: Precision, rngs: nnx.Rngs
    ):
        initialise = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.kernel = nnx.Param(initialise(rngs.params(), (size, size, width_in, width_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width_out,), jnp.float32))
        self.stride = stride
        self.precision = precision

    def __call__(self, x: Float[Array, "B h w c_in"]) -> Float[Array, "B out_h out_w c_out"]:
        """Convolve. Stride 1 pads evenly; stride 2 pads one row and column at the bottom and right only."""
        size = self.kernel.shape[0]
        padding = (size // 2, size // 2) if self.stride == 1 else (0, 1)
        dtype = jnp.float32 if self.precision == "exact" else jnp.bfloat16
        y = jax.lax.conv_general_dilated(
            x.astype(dtype),
            self.kernel[...].astype(dtype),
            window_strides=(self.stride, self.stride),
            padding=(padding, padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST if self.precision == "exact" else None,
        )
        return y.astype(jnp.float32) + self.bias[...].astype(jnp.float32)[None, None, None]


class GroupNorm(nnx.Module):
    """Group normalisation with 32 groups, or 24 where the width asks for it; epsilon 1e-6; float32 statistics."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.groups = 32 if width % 32 == 0 else 24

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """Normalise over each group's channels and all cells."""
        batch, height, width, channels = x.shape
        grouped = x.reshape(batch, height * width, self.groups, channels // self.groups)
        mean = jnp.mean(grouped, axis=(1, 3), keepdims=True)
        variance = jnp.mean(jnp.square(grouped - mean), axis=(1, 3), keepdims=True)
        normed = ((grouped - mean) * jax.lax.rsqrt(variance + 1e-6)).reshape(x.shape)
        scale, bias = self.scale[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        return normed * scale[None, None, None] + bias[None, None, None]


class ResBlock(nnx.Module):
    """norm, swish, conv, norm, swish, conv, plus the input (through a 1x1 convolution where the width changes)."""

    def __init__(self, width_in: int, width_out: int, *, precision: Precision, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(width_in)
        self.conv1 = Conv(width_in, width_out, precision=precision, rngs=rngs)
        self.norm2 = GroupNorm(width_out)
        self.conv2 = Conv(width_out, width_out, precision=precision, rngs=rngs)
        self.shortcut = None if width_in == width_out else Conv(width_in, width_out, 1, precision=precision, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w c_in"]) -> Float[Array, "B h w c_out"]:
        """Apply the block."""
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return (x if self.shortcut is None else self.shortcut(x)) + y


def upsample_nearest(x: Float[Array, "B h w C"]) -> Float[Array, "B out_h out_w C"]:
    """Double both axes by repetition."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)
