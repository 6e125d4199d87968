"""What the transformer is trained on: cross-entropy per bit, every scale weighted alike (MODEL_SPEC 9.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from toprovar_jax.schedule import ScaleSchedule
from toprovar_jax.shapes import Array, Float, UInt8


def token_weights(schedule: ScaleSchedule) -> Float[np.ndarray, " S"]:
    """Weight of every token's loss: one over the square root of its scale's tokens, summing to one.

    Without it the last scale, with most of the tokens, would be nearly all of the loss.
    """
    counts = np.asarray(schedule.token_counts, np.float64)
    weights = np.repeat(1.0 / np.sqrt(counts), schedule.token_counts)
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
