"""From bit scores to bits: guidance, temperature, top-k, top-p, one uniform number per bit (MODEL_SPEC 6.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from toprovar_jax.errors import UserInputError
from toprovar_jax.shapes import Array, Float, Int, Key, UInt8


class ScaleSampling(NamedTuple):
    """:class:`Sampling` as arrays, one value per scale where it may vary.

    Attributes:
      guidance, tau: float32 ``[scales]``.
      top_k: int32 scalar.
      top_p: float32 scalar.
    """

    guidance: Float[Array, " scales"]
    tau: Float[Array, " scales"]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]


class Sampling(NamedTuple):
    """How bits are drawn. A pytree: none of it is static, so changing it never recompiles.

    Attributes:
      guidance: classifier-free guidance scale, one number or one per scale; 1 is no guidance.
      tau: temperature, one number or one per scale.
      top_k: 1 always takes the likelier bit value; 0, and anything above 1, leave both.
      top_p: the less likely value is never drawn where its probability is at most ``1 - top_p``.
    """

    guidance: float | Sequence[float] | Array = 3.0
    tau: float | Sequence[float] | Array = 1.0
    top_k: int | Array = 900
    top_p: float | Array = 0.97

    def for_scales(self, num_scales: int) -> ScaleSampling:
        """The same with arrays: guidance and tau ``[num_scales]`` float32, top_k int32, top_p float32.

        Raises:
          UserInputError: a list that does not reach the last scale.
        """

        def per_scale(name: str, value) -> Array:
            array = jnp.asarray(value, jnp.float32)
            if array.ndim > 1 or (array.ndim == 1 and len(array) < num_scales):
                raise UserInputError(
                    f"{name} of shape {array.shape}",
                    "must be one number, or one per scale",
                    f"give {num_scales} numbers",
                )
            return jnp.broadcast_to(array[None] if array.ndim == 0 else array[:num_scales], (num_scales,))

        top_k = min(self.top_k, 2) if isinstance(self.top_k, int) else self.top_k  # a bit has two values
        return ScaleSampling(
            per_scale("guidance", self.guidance),
            per_scale("tau", self.tau),
            jnp.asarray(top_k, jnp.int32),
            jnp.asarray(self.top_p, jnp.float32),
        )


def guide(
    conditional: Float[Array, "*axes"], unconditional: Float[Array, "*axes"], guidance: Float[Array, ""]
) -> Float[Array, "*axes"]:
    """Extrapolate from the unconditional to the conditional prediction; 1 gives the conditional one."""
    return guidance * conditional + (1.0 - guidance) * unconditional


def bit_probability(
    scores: Float[Array, "B T Z 2"], top_k: Int[Array, ""], top_p: Float[Array, ""]
) -> Float[Array, "B T Z"]:
    """Probability that a bit is 1, after top-k and top-p.

    Two values are left by any ``top_k`` but 1. ``top_p`` drops the less likely value where its probability is at most
    ``1 - top_p``, which makes many bits deterministic at 0.97.
    """
    difference = scores[..., 1] - scores[..., 0]
    less_likely = jax.nn.sigmoid(-jnp.abs(difference))
    certain = (less_likely <= 1.0 - top_p) | ((top_k == 1) & (difference != 0))
    return jnp.where(certain, (difference >= 0).astype(jnp.float32), jax.nn.sigmoid(difference))


def draw_uniforms(keys: Key[Array, " B"], scale: int, tokens: int, bits: int) -> Float[Array, "B T Z"]:
    """One uniform number per bit, from each image's own key and the scale's index alone."""

    def one(key: Key[Array, ""]) -> Float[Array, "T Z"]:
        return jax.random.uniform(jax.random.fold_in(key, scale), (tokens, bits), jnp.float32)

    return jax.vmap(one)(keys)


def sample_bits(probability: Float[Array, "B T Z"], uniforms: Float[Array, "B T Z"]) -> UInt8[Array, "B T Z"]:
    """A bit is 1 where its uniform number is below its probability."""
    return (uniforms < probability).astype(jnp.uint8)
