"""What the transformer is trained on: cross-entropy per bit, weighted by scale (MODEL_SPEC 9.2)."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from toprovar_jax.schedule import ScaleSchedule
from toprovar_jax.shapes import Array, Float, UInt8

ScaleWeights = Literal["root", "none"]


def token_weights(schedule: ScaleSchedule, scale_weights: ScaleWeights = "root") -> Float[np.ndarray, " S"]:
    """Weight of every token's loss, summing to one.

    ``root`` is one over the square root of the tokens of its scale, ``none`` the same for all: then the last scale,
    with most of the tokens, is nearly all of the loss.
    """
    counts = np.asarray(schedule.token_counts, np.float64)
    weights = np.repeat(
        1.0 / np.sqrt(counts) if scale_weights == "root" else np.ones_like(counts), schedule.token_counts
    )
    return (weights / weights.sum()).astype(np.float32)


def bit_cross_entropy(scores: Float[Array, "B S Z 2"], targets: UInt8[Array, "B S Z"]) -> Float[Array, "B S"]:
    """Two-class cross-entropy in nats, mean over each token's bits."""
    # -log softmax of two classes needs only their difference, signed by the target.
    sign = 2.0 * targets.astype(jnp.float32) - 1.0
    difference = scores[..., 1].astype(jnp.float32) - scores[..., 0].astype(jnp.float32)
    return jnp.mean(jax.nn.softplus(-sign * difference), axis=-1)


def weighted_loss(cross_entropy: Float[Array, "B S"], weights: Float[Array, " S"]) -> Float[Array, ""]:
    """Mean over images of the weighted sum over tokens; ``weights`` from :func:`token_weights`."""
    return jnp.mean(jnp.sum(cross_entropy * weights[None], axis=1))


def bit_accuracy(
    scores: Float[Array, "B S Z 2"], targets: UInt8[Array, "B S Z"], schedule: ScaleSchedule
) -> Float[Array, " scales"]:
    """Share of bits of each scale whose likelier value is the target."""
    right = ((scores[..., 1] > scores[..., 0]) == (targets > 0)).astype(jnp.float32)
    spans = zip(schedule.offsets[:-1], schedule.offsets[1:], strict=True)
    return jnp.stack([jnp.mean(right[:, start:stop]) for start, stop in spans])
