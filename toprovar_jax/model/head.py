"""The bitwise head: two scores per bit, float32 throughout (MODEL_SPEC 4.6)."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from toprovar_jax.config import InfinityConfig
from toprovar_jax.model.layers import Linear, modulate, normalise
from toprovar_jax.shapes import Array, Float


class BitHead(nnx.Module):
    """Adaptive norm and a linear map to ``2 Z`` scores; score ``2 i + b`` is that of bit ``i`` having value ``b``."""

    def __init__(self, config: InfinityConfig, *, rngs: nnx.Rngs):
        options: dict[str, Any] = {"model_width": config.width, "precision": "exact", "rngs": rngs}
        self.modulation = Linear(config.width, 2 * config.width, gain=1e-3, **options)
        self.scores = Linear(config.width, 2 * config.token_bits, gain=0.02, **options)
        self.epsilon = config.norm_epsilon

    def condition(self, pooled: Float[Array, "R D"]) -> Float[Array, "R 2 D"]:
        """Scale and shift of the norm, from the pooled text."""
        return self.modulation(jax.nn.silu(pooled)).reshape(pooled.shape[0], 2, pooled.shape[1])

    def __call__(self, x: Float[Array, "R T D"], modulation: Float[Array, "R 2 D"]) -> Float[Array, "R T Z 2"]:
        """Scores of every bit of every token."""
        scale, shift = modulation[:, 0], modulation[:, 1]
        scores = self.scores(modulate(normalise(x, self.epsilon), scale, shift))
        return scores.reshape(*scores.shape[:2], -1, 2)
