"""The released models: what the names stand for (MODEL_SPEC 1, 3 and 11)."""

from __future__ import annotations

import pytest

from toprovar_jax.presets import PRESETS


def test_every_preset_is_listed_under_its_own_name():
    study = {f"infinity-layer{depth}" for depth in (12, 16, 24, 32, 40, 48)}
    assert set(PRESETS) == {"infinity-2b", "infinity-8b", "infinity-8b-512"} | study
    assert all(card.name == name for name, card in PRESETS.items())
    assert all(card.world is None for card in PRESETS.values())


@pytest.mark.parametrize(
    ("name", "feed_forward_width"),
    [
        ("infinity-2b", 8192),
        ("infinity-8b", 14336),
        ("infinity-layer12", 3072),
        ("infinity-layer16", 4608),
        ("infinity-layer24", 6144),
        ("infinity-layer32", 8192),
        ("infinity-layer40", 10752),
        ("infinity-layer48", 13312),
    ],
)
def test_feed_forward_widths_are_rounded_half_to_even(name, feed_forward_width):
    assert PRESETS[name].transformer.feed_forward_width == feed_forward_width


@pytest.mark.parametrize(
    ("name", "bits", "stride", "chunks", "blocks_per_chunk"),
    [("infinity-2b", 32, 16, 8, 4), ("infinity-8b", 56, 8, 8, 5), ("infinity-layer12", 32, 16, 4, 3)],
)
def test_tokens_and_blocks_are_grouped_as_released(name, bits, stride, chunks, blocks_per_chunk):
    card = PRESETS[name]
    assert card.transformer.token_bits == bits
    assert card.image_tokenizer.stride == stride
    assert card.transformer.block_chunks == chunks
    assert card.transformer.num_layers // chunks == blocks_per_chunk
    assert card.text_encoder.width == card.transformer.text_width == 2048
    assert card.transformer.text_length == 512


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    ("pixels", "side", "scales"), [("0.06M", 256, 7), ("0.25M", 512, 10), ("0.60M", 768, 12), ("1M", 1024, 13)]
)
def test_every_preset_makes_every_released_size(name, pixels, side, scales):
    schedule = PRESETS[name].schedule("1:1", pixels)
    assert schedule.pixel_size == (side, side)
    assert len(schedule) == scales


def test_default_sizes_are_those_the_models_were_trained_for():
    sizes = {name: card.schedule("1:1", None).pixel_size[0] for name, card in PRESETS.items()}
    assert (sizes["infinity-2b"], sizes["infinity-8b"], sizes["infinity-8b-512"]) == (1024, 1024, 512)
