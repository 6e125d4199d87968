"""Building blocks of the convolutional image tokenizer (MODEL_SPEC 8). Channels last."""

from __future__ import annotations

from typing import NamedTuple

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
        y = self.without_bias(x, pad_rows=(size // 2, size // 2) if self.stride == 1 else (0, 1))
        return y.astype(jnp.float32) + self.bias[...].astype(jnp.float32)[None, None, None]

    def without_bias(self, x: Float[Array, "B h w c_in"], *, pad_rows: tuple[int, int]) -> Float[Array, "B _ _ c_out"]:
        """The convolution alone, in the dtype of its products; columns are padded, rows as told."""
        size = self.kernel.shape[0]
        dtype = jnp.float32 if self.precision == "exact" else jnp.bfloat16
        return jax.lax.conv_general_dilated(
            x.astype(dtype),
            self.kernel[...].astype(dtype),
            window_strides=(self.stride, self.stride),
            padding=(pad_rows, (size // 2, size // 2) if self.stride == 1 else (0, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST if self.precision == "exact" else None,
        )


class Moments(NamedTuple):
    """Of the groups of a map, float32 ``[B, 1, G, 1]``."""

    mean: Float[Array, "B 1 G 1"]
    variance: Float[Array, "B 1 G 1"]


class GroupNorm(nnx.Module):
    """Group normalisation with 32 groups, or 24 where the width asks for it; epsilon 1e-6; float32 statistics."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.groups = 32 if width % 32 == 0 else 24

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """Normalise over each group's channels and all cells."""
        return self.normalised(x, self.moments(x))

    def moments(self, x: Float[Array, "B h w C"]) -> Moments:
        """Mean and variance of every group, over all cells."""
        grouped = self._grouped(x)
        mean = jnp.mean(grouped, axis=(1, 3), keepdims=True)
        return Moments(mean, jnp.mean(jnp.square(grouped - mean), axis=(1, 3), keepdims=True))

    def normalised(self, x: Float[Array, "B h w C"], moments: Moments) -> Float[Array, "B h w C"]:
        """Cells of a map whose moments are known; it may be some of its cells only."""
        normed = ((self._grouped(x) - moments.mean) * jax.lax.rsqrt(moments.variance + 1e-6)).reshape(x.shape)
        scale, bias = self.scale[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        return normed * scale[None, None, None] + bias[None, None, None]

    def _grouped(self, x: Float[Array, "B h w C"]) -> Float[Array, "B _ G _"]:
        batch, height, width, channels = x.shape
        return x.reshape(batch, height * width, self.groups, channels // self.groups)


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
