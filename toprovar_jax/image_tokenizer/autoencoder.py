"""The convolutional encoder and decoder, and the tokenizer that holds them (MODEL_SPEC 8)."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from toprovar_jax.config import ImageTokenizerConfig
from toprovar_jax.errors import UserInputError
from toprovar_jax.image_tokenizer.blocks import Conv, GroupNorm, ResBlock, upsample_nearest
from toprovar_jax.image_tokenizer.strips import decode_in_strips
from toprovar_jax.shapes import Array, Float


class Level(nnx.Module):
    """The residual blocks of one resolution and the convolution that leaves it (absent at the last one)."""

    def __init__(self, blocks: list[ResBlock], resample: Conv | None):
        self.blocks = nnx.List(blocks)
        self.resample = resample


def _level(width_in: int, width: int, num_blocks: int, resample: Conv | None, *, precision, rngs) -> Level:
    widths = [width_in] + [width] * num_blocks
    blocks = [ResBlock(a, b, precision=precision, rngs=rngs) for a, b in itertools.pairwise(widths)]
    return Level(blocks, resample)


class Encoder(nnx.Module):
    """Picture in [-1, 1] to latents; ``levels[i]`` is level i of the official names, finest first."""

    def __init__(self, config: ImageTokenizerConfig, *, rngs: nnx.Rngs):
        options: dict[str, Any] = {"precision": config.precision, "rngs": rngs}
        widths = config.widths
        self.conv_in = Conv(3, config.base_width, **options)
        levels = []
        for i, width in enumerate(widths):
            down = Conv(width, width, stride=2, **options) if i < config.num_downsamples else None
            finer = widths[i - 1] if i else config.base_width
            levels.append(_level(finer, width, config.num_res_blocks, down, **options))
        self.levels = nnx.List(levels)
        self.middle = nnx.List([ResBlock(widths[-1], widths[-1], **options) for _ in range(2)])
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = Conv(widths[-1], config.latent_channels, **options)

    def __call__(self, images: Float[Array, "B h w 3"]) -> Float[Array, "B lat_h lat_w C"]:
        """Encode."""
        x = self.conv_in(images)
        for level in self.levels:
            for block in level.blocks:
                x = block(x)
            if level.resample is not None:
                x = level.resample(x)
        for block in self.middle:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Decoder(nnx.Module):
    """Latents to a picture, not yet clamped; ``levels[i]`` is level i of the official names, applied coarsest first."""

    def __init__(self, config: ImageTokenizerConfig, *, rngs: nnx.Rngs):
        options: dict[str, Any] = {"precision": config.precision, "rngs": rngs}
        widths = config.widths
        self.conv_in = Conv(config.latent_channels, widths[-1], **options)
        self.middle = nnx.List([ResBlock(widths[-1], widths[-1], **options) for _ in range(2)])
        levels = []
        for i, width in enumerate(widths):
            up = Conv(width, width, **options) if 1 <= i <= config.num_downsamples else None
            coarser = widths[min(i + 1, len(widths) - 1)]
            levels.append(_level(coarser, width, config.num_res_blocks + 1, up, **options))
        self.levels = nnx.List(levels)
        self.norm_out = GroupNorm(widths[0])
        self.conv_out = Conv(widths[0], 3, **options)

    def __call__(self, latents: Float[Array, "B lat_h lat_w C"]) -> Float[Array, "B h w 3"]:
        """Decode."""
        x = self.conv_in(latents)
        for block in self.middle:
            x = block(x)
        for level in reversed(list(self.levels)):
            for block in level.blocks:
                x = block(x)
            if level.resample is not None:
                x = level.resample(upsample_nearest(x))
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class ImageTokenizer(nnx.Module):
    """Encoder and decoder. Generation needs the decoder only: ``with_encoder=False`` leaves the other out."""

    def __init__(self, config: ImageTokenizerConfig, *, rngs: nnx.Rngs, with_encoder: bool = True):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs) if with_encoder else None
        self.decoder = Decoder(config, rngs=rngs)

    def encode(self, images: Float[Array, "B h w 3"]) -> Float[Array, "B lat_h lat_w C"]:
        """Pictures in [0, 1] to (unquantised) latents.

        Raises:
          ValueError: the tokenizer was built without its encoder.
        """
        if self.encoder is None:
            raise ValueError("this image tokenizer has no encoder: it was loaded for generation; load it with_encoder")
        return self.encoder(images * 2.0 - 1.0)

    def decode(self, latents: Float[Array, "B lat_h lat_w C"], *, strips: int = 1) -> Float[Array, "B h w 3"]:
        """Summed codes to pictures in [0, 1].

        Args:
          latents: summed codes.
          strips: how many horizontal strips the decoder's convolutions are cut into, to need less memory; from 2 on
            pictures are decoded one after the other. At most one strip for every row of ``latents``.

        Raises:
          UserInputError: ``strips`` is no positive integer.
        """
        if not isinstance(strips, int) or strips < 1:
            raise UserInputError(f"strips {strips!r}", "must be an integer >= 1", "leave it out")
        decoded = self.decoder(latents) if strips == 1 else decode_in_strips(self.decoder, latents, strips)
        return (jnp.clip(decoded, -1.0, 1.0) + 1.0) * 0.5
