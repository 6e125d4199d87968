"""Rule table of the image tokenizer (MODEL_SPEC 10.2)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from convert.rules import Rule
from toprovar_jax.config import ImageTokenizerConfig


def rules(config: ImageTokenizerConfig, *, with_encoder: bool = True) -> list[Rule]:
    """Official name to parameter path, for both halves or for the decoder alone."""
    return [*(_encoder(config) if with_encoder else ()), *_decoder(config)]


def canonical_name(name: str, *, with_encoder: bool = True) -> str | None:
    """The table's spelling of ``name``; None for the quantiser's buffers (and for the encoder, where left out).

    Convolutions and norms are wrapped officially (``conv1.conv.weight``); the plain spelling (``conv1.weight``) is
    accepted as well.
    """
    if name in ("quantizer.lfq.mask", "quantize.lfq.mask") or (not with_encoder and name.startswith("encoder.")):
        return None
    name = re.sub(r"((?:conv_in|conv_out|conv[12]|nin_shortcut))\.(weight|bias)$", r"\1.conv.\2", name)
    name = re.sub(r"(downsample|upsample)\.conv\.(weight|bias)$", r"\1.conv.conv.\2", name)
    return re.sub(r"(norm[12]|norm_out)\.(weight|bias)$", r"\1.norm.\2", name)


def _conv(official: str, target: str) -> Iterator[Rule]:
    yield Rule(f"{official}.conv.weight", f"{target}.kernel", "conv")
    yield Rule(f"{official}.conv.bias", f"{target}.bias")


def _norm(official: str, target: str) -> Iterator[Rule]:
    yield Rule(f"{official}.norm.weight", f"{target}.scale")
    yield Rule(f"{official}.norm.bias", f"{target}.bias")


def _res_block(official: str, target: str, *, shortcut: bool) -> Iterator[Rule]:
    for i in (1, 2):
        yield from _norm(f"{official}.norm{i}", f"{target}.norm{i}")
        yield from _conv(f"{official}.conv{i}", f"{target}.conv{i}")
    if shortcut:
        yield from _conv(f"{official}.nin_shortcut", f"{target}.shortcut")


def _trunk(half: str) -> Iterator[Rule]:
    yield from _conv(f"{half}.conv_in", f"{half}.conv_in")
    for i in range(2):
        yield from _res_block(f"{half}.mid.block_{i + 1}", f"{half}.middle.{i}", shortcut=False)
    yield from _norm(f"{half}.norm_out", f"{half}.norm_out")
    yield from _conv(f"{half}.conv_out", f"{half}.conv_out")


def _encoder(config: ImageTokenizerConfig) -> Iterator[Rule]:
    yield from _trunk("encoder")
    previous = config.base_width
    for i, width in enumerate(config.widths):
        for b in range(config.num_res_blocks):
            shortcut = b == 0 and previous != width
            yield from _res_block(f"encoder.down.{i}.block.{b}", f"encoder.levels.{i}.blocks.{b}", shortcut=shortcut)
        if i < config.num_downsamples:
            yield from _conv(f"encoder.down.{i}.downsample.conv", f"encoder.levels.{i}.resample")
        previous = width


def _decoder(config: ImageTokenizerConfig) -> Iterator[Rule]:
    yield from _trunk("decoder")
    previous = config.widths[-1]
    for i, width in reversed(list(enumerate(config.widths))):
        for b in range(config.num_res_blocks + 1):
            shortcut = b == 0 and previous != width
            yield from _res_block(f"decoder.up.{i}.block.{b}", f"decoder.levels.{i}.blocks.{b}", shortcut=shortcut)
        if 1 <= i <= config.num_downsamples:
            yield from _conv(f"decoder.up.{i}.upsample.conv", f"decoder.levels.{i}.resample")
        previous = width
