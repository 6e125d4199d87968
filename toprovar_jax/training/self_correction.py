"""Bitwise self-correction: inputs with flipped bits, targets that repair them (MODEL_SPEC 9.1).

Bits are flipped before their codes enter the running sum, and the next scale's target is taken from what is then
left to express. The transformer so learns to undo the mistakes that it makes itself when it generates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from toprovar_jax.errors import UserInputError
from toprovar_jax.image_tokenizer.bsq import bits_to_codes, bits_to_tokens, latents_to_bits, next_scale_input
from toprovar_jax.image_tokenizer.resize import resize_area, resize_bilinear
from toprovar_jax.schedule import ScaleSchedule
from toprovar_jax.shapes import Array, Float, Key, UInt8


class TrainingTokens(NamedTuple):
    """One batch as the transformer sees it.

    Attributes:
      inputs: resized code sums (with mistakes) of the scales after the first.
      targets: the right bits of all scales.
    """

    inputs: Float[Array, "B T Z"]
    targets: UInt8[Array, "B S Z"]


def self_correct(
    latents: Float[Array, "B h w C"], schedule: ScaleSchedule, flips: Sequence[UInt8[Array, "B _ _ C"]]
) -> TrainingTokens:
    """Inputs and targets of one batch, given which bits to flip.

    Args:
      latents: unquantised output of the image tokenizer's encoder; its size is the last scale's latent grid.
      schedule: the scales.
      flips: for each of the first scales, 1 where a bit is flipped, ``[B, h_k, w_k, C]`` on its latent grid; scales
        beyond are left as they are. None at all is plain teacher forcing.

    Returns:
      Inputs float32 and targets uint8 in the transformer's token layout.
    """
    grids, patchify = schedule.latent_grids, schedule.latent_per_token == 2
    total = jnp.zeros_like(latents)
    inputs, targets = [], []
    for k, grid in enumerate(grids):
        bits = latents_to_bits(resize_area(latents - total, grid))
        targets.append(bits_to_tokens(bits, patchify))
        if k < len(flips):
            bits = bits ^ flips[k]
        total = total + resize_bilinear(bits_to_codes(bits), grids[-1])
        if k + 1 < len(grids):
            inputs.append(next_scale_input(total, schedule, k + 1))
    return TrainingTokens(jnp.concatenate(inputs, axis=1), jnp.concatenate(targets, axis=1))


def draw_flips(
    key: Key[Array, ""],
    schedule: ScaleSchedule,
    batch: int,
    channels: int,
    *,
    strength: float | Sequence[float],
    scales: int,
) -> list[UInt8[Array, "B _ _ C"]]:
    """Random flips: one probability per scale, shared by the batch, uniform on 0, 0.01, ... its ``strength``.

    Args:
      key: where they come from.
      schedule: the scales.
      batch, channels: B and C of the latents.
      strength: largest probability, in [0, 1]; or one for each of the first scales, the last for those after too.
      scales: how many of the first scales are disturbed; more than there are means all.

    Raises:
      UserInputError: ``strength`` is not a probability, or none is given.
    """
    strengths = (strength,) if isinstance(strength, (int, float)) else tuple(strength)
    if not strengths or not all(0.0 <= each <= 1.0 for each in strengths):
        raise UserInputError(f"self-correction strength {strength}", "must be in [0, 1]", "0.3 is the released models'")
    keys, flips = jax.random.split(key, len(schedule)), []
    for k, grid in enumerate(schedule.latent_grids[:scales]):
        which, where = jax.random.split(keys[k])
        # Not int(100 * strength): 100 * 0.29 is 28.999...
        levels = math.floor(100 * strengths[min(k, len(strengths) - 1)] + 1e-6) + 1
        probability = jax.random.randint(which, (), 0, levels).astype(jnp.float32) * 0.01
        mask = jax.random.bernoulli(where, probability, (batch, *grid, channels))
        flips.append(mask.astype(jnp.uint8))
    return flips
