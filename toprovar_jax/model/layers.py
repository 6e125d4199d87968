"""Linear layers and norms shared by the transformer's parts."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from toprovar_jax.config import Precision
from toprovar_jax.distributed.parts import Split, whole
from toprovar_jax.model.quantization import Int8Matrix, int8_matmul, on_device
from toprovar_jax.shapes import Array, Float


class Linear(nnx.Module):
    """``x @ kernel + bias`` with kernel ``[in, out]``, of floats or an :class:`Int8Matrix`, on the device or the host.

    The kernel may be :class:`~toprovar_jax.distributed.parts.Split` over devices, which is gathered for the product.

    Inputs are cast to the precision's compute dtype, which is also the output's; accumulation is float32.
    Initialised with normal weights of standard deviation ``sqrt(1 / (3 * width))`` times ``gain`` (MODEL_SPEC 9.6),
    ``width`` being the model's.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        *,
        model_width: int,
        precision: Precision,
        rngs: nnx.Rngs,
        gain: float = 1.0,
        use_bias: bool = True,
    ):
        deviation = gain * math.sqrt(1 / (3 * model_width))
        self.kernel = nnx.Param(deviation * jax.random.normal(rngs.params(), (width_in, width_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width_out,), jnp.float32)) if use_bias else None
        self.precision: Precision = precision

    def __call__(
        self, x: Float[Array, "*rows in"], summed: Callable[[Array], Array] | None = None
    ) -> Float[Array, "*out_rows out"]:
        """Apply the map to the last axis.

        Args:
          x: the input, or of a map whose input channels are spread over devices, this device's channels.
          summed: the sum of the product over those devices; the bias comes on top of it, once.
        """
        y = matmul(x, self.kernel.get_value(), self.precision)
        y = y if summed is None else summed(y)
        return y if self.bias is None else y + along_last(self.bias[...].astype(y.dtype), y)


class LayerNorm(nnx.Module):
    """Layer normalisation with weight and bias; float32."""

    def __init__(self, width: int, *, epsilon: float):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Normalise the last axis."""
        normed = normalise(x, self.epsilon)
        scale, bias = self.scale[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        return normed * along_last(scale, normed) + along_last(bias, normed)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation with weight; float32."""

    def __init__(self, width: int, *, epsilon: float):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*rows E"]) -> Float[Array, "*rows E"]:
        """Normalise the last axis."""
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return x * along_last(self.scale[...].astype(jnp.float32), x)


def matmul(
    x: Float[Array, "*rows in"], kernel: Float[Array, "in out"] | Int8Matrix | Split, precision: Precision
) -> Array:
    """``x @ kernel`` in the compute dtype of ``precision``; a kernel in host memory, or in parts, is fetched for it."""
    dtype = compute_dtype(precision)
    highest = jax.lax.Precision.HIGHEST if precision == "exact" else None
    if isinstance(kernel, Int8Matrix):
        return int8_matmul(x.astype(dtype), kernel, precision=highest)
    return jnp.matmul(x.astype(dtype), on_device(whole(kernel)).astype(dtype), precision=highest)


def compute_dtype(precision: Precision):
    """The dtype in which matrix products run: float32 (``exact``) or bfloat16 (``fast``)."""
    return jnp.float32 if precision == "exact" else jnp.bfloat16


def normalise(x: Float[Array, "*rows D"], epsilon: float) -> Float[Array, "*rows D"]:
    """Zero mean and unit variance over the last axis, in float32, without weight or bias."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + epsilon)


def modulate(x: Float[Array, "R T D"], scale: Float[Array, "R D"], shift: Float[Array, "R D"]) -> Array:
    """Adaptive affine map of normalised activations."""
    return x * (1.0 + scale[:, None]) + shift[:, None]


def along_last(vector: Float[Array, " D"], like: Array) -> Array:
    """``vector`` with leading unit axes, to combine with the last axis of ``like``."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)
