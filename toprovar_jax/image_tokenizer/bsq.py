"""Multi-scale binary spherical quantisation: latents <-> bits, residual over scales (MODEL_SPEC 7).

Latents are channels-last, ``[B, h, w, C]``, float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from toprovar_jax.image_tokenizer.resize import (
    pixel_shuffle,
    pixel_unshuffle,
    resize_area,
    resize_bilinear,
)
from toprovar_jax.schedule import Grid, ScaleSchedule
from toprovar_jax.shapes import Array, Float, UInt8


class Quantized(NamedTuple):
    """Result of :func:`encode_scales`.

    Attributes:
      latents: sum of the upsampled codes, ``[B, h, w, C]``.
      bits: per scale, uint8 ``[B, h_k, w_k, C]``.
      area_inputs: per scale but the first, the running sum pooled to that scale's grid. The original encoder returns
        them; they are *not* the transformer's inputs, which are bilinear.
    """

    latents: Array
    bits: tuple[Array, ...]
    area_inputs: tuple[Array, ...]


def latents_to_bits(latents: Float[Array, "*cells C"]) -> UInt8[Array, "*cells C"]:
    """The sign of every channel; zero counts as negative."""
    return (latents > 0).astype(jnp.uint8)


def bits_to_codes(bits: UInt8[Array, "*cells C"]) -> Float[Array, "*cells C"]:
    """Bits to points on the unit sphere: ``±1 / sqrt(C)``."""
    scale = 1.0 / math.sqrt(bits.shape[-1])
    return (2.0 * bits.astype(jnp.float32) - 1.0) * scale


def quantize_straight_through(latents: Float[Array, "*cells C"]) -> Float[Array, "*cells C"]:
    """Codes of ``latents`` whose gradient is that of the normalised latents."""
    norm = jnp.sqrt(jnp.sum(jnp.square(latents), axis=-1, keepdims=True))
    unit = latents / jnp.maximum(norm, 1e-12)
    return unit + jax.lax.stop_gradient(bits_to_codes(latents_to_bits(latents)) - unit)


def encode_scales(latents: Float[Array, "B h w C"], grids: Sequence[Grid]) -> Quantized:
    """Quantise a latent map residually, coarse to fine.

    Args:
      latents: encoder output.
      grids: latent grids of all scales; the last one is the map's own size.
    """
    size = (latents.shape[1], latents.shape[2])
    residual, total = latents, jnp.zeros_like(latents)
    bits, area_inputs = [], []
    for k, grid in enumerate(grids):
        bits.append(latents_to_bits(resize_area(residual, grid)))
        codes = resize_bilinear(bits_to_codes(bits[-1]), size)
        residual, total = residual - codes, total + codes
        if k + 1 < len(grids):
            area_inputs.append(resize_area(total, grids[k + 1]))
    return Quantized(total, tuple(bits), tuple(area_inputs))


def decode_scales(bits: Sequence[UInt8[Array, "B _ _ C"]], size: Grid) -> Float[Array, "B out_h out_w C"]:
    """Sum of the codes of all scales, each resized to ``size``: the decoder's input."""
    return sum(
        (resize_bilinear(bits_to_codes(scale), size) for scale in bits[1:]),
        start=resize_bilinear(bits_to_codes(bits[0]), size),
    )


def bits_to_tokens(
    bits: Float[Array, "B h w C"] | UInt8[Array, "B h w C"], patchify: bool
) -> Float[Array, "B T Z"] | UInt8[Array, "B T Z"]:
    """Latent-grid bits (or numbers of the same layout) to the transformer's layout ``[B, T, Z]``, row-major."""
    folded = pixel_unshuffle(bits, 2) if patchify else bits
    return folded.reshape(folded.shape[0], -1, folded.shape[-1])


def tokens_to_bits(tokens: UInt8[Array, "B T Z"], grid: Grid, patchify: bool) -> UInt8[Array, "B h w C"]:
    """The inverse of :func:`bits_to_tokens`; ``grid`` is the token grid."""
    bits = tokens.reshape(tokens.shape[0], *grid, tokens.shape[-1])
    return pixel_shuffle(bits, 2) if patchify else bits


def next_scale_input(latents: Float[Array, "B h w C"], schedule: ScaleSchedule, scale: int) -> Float[Array, "B T Z"]:
    """What the transformer sees at ``scale`` (0-based, at least 1): the code sum so far, resized to that scale's grid.

    Bilinear without antialiasing although it shrinks (MODEL_SPEC 6.5g); patchified if the schedule's tokens are 2x2.
    """
    resized = resize_bilinear(latents, schedule.latent_grids[scale])
    return bits_to_tokens(resized, schedule.latent_per_token == 2)
