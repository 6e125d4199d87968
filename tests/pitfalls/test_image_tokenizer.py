"""Pitfalls of the image tokenizer, by their number in MODEL_SPEC 13: ours is right, and the wrong way would be seen.

Where the recorded outputs can tell the two apart, a test computes both and shows that they reject the wrong one.
"""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from toprovar_jax.config import ImageTokenizerConfig
from toprovar_jax.image_tokenizer import ImageTokenizer, bits_to_codes, encode_scales
from toprovar_jax.image_tokenizer.blocks import Conv, GroupNorm
from toprovar_jax.image_tokenizer.bsq import decode_scales, next_scale_input, tokens_to_bits
from toprovar_jax.image_tokenizer.resize import (
    area_matrix,
    bilinear_taps,
    pixel_shuffle,
    pixel_unshuffle,
    resize_area,
    resize_bilinear,
)
from toprovar_jax.images import to_uint8
from toprovar_jax.presets import PRESETS
from toprovar_jax.schedule import ASPECT_RATIOS, ScaleSchedule
from toprovar_jax.training.self_correction import self_correct

from ..golden_cases import findings
from ..golden_cases.blocks import load_parts
from .common import (
    SQUARE,
    arrays_of,
    assert_tells_apart,
    channels_last,
    distance,
)


def test_1_bilinear_resizing_does_not_antialias(pieces):
    x = channels_last(pieces["resize_in_16x16_to_6x6"][:, :, 0])
    reference = pieces["resize_trilinear_16x16_to_6x6"][:, :, 0]
    smoothed = jax.image.resize(x, (1, 6, 6, 3), "linear", antialias=True)
    right, wrong = (findings.channels_first(y) for y in (resize_bilinear(x, (6, 6)), smoothed))
    assert_tells_apart(reference, right, wrong, findings.RESIZED_BOUND, by=1000)


def test_1_area_resizing_has_overlapping_bins(pieces):
    x = channels_last(pieces["resize_in_16x16_to_12x12"][:, :, 0])
    reference = pieces["resize_area_16x16_to_12x12"][:, :, 0]
    edges = [round(i * 16 / 12) for i in range(13)]
    disjoint = np.zeros((12, 16), np.float32)
    for i, (start, stop) in enumerate(itertools.pairwise(edges)):
        disjoint[i, start:stop] = 1 / (stop - start)
    wrong = np.einsum("oh,bhwc,pw->bcop", disjoint, x, disjoint)
    right = findings.channels_first(resize_area(x, (12, 12)))
    assert_tells_apart(reference, right, wrong, findings.RESIZED_BOUND, by=1000)
    assert (area_matrix(16, 12) > 0).sum(axis=0).max() == 2


def test_7_codes_of_the_large_model_are_on_the_sphere_of_its_cell():
    token = jnp.ones((1, 1, 56), jnp.uint8)
    codes = bits_to_codes(tokens_to_bits(token, (1, 1), True))
    assert codes.shape == (1, 2, 2, 14)
    np.testing.assert_allclose(codes, 1 / math.sqrt(14), rtol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(codes, axis=-1), 1.0, rtol=1e-6)


def test_7_channels_are_folded_channel_major(pieces):
    x, reference = channels_last(pieces["pixel_unshuffle_in"]), pieces["pixel_unshuffle_out"]
    batch, height, width, channels = x.shape
    offsets_first = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    wrong = offsets_first.reshape(batch, height // 2, width // 2, 4 * channels)
    right = pixel_unshuffle(x, 2)
    assert_tells_apart(
        reference, np.moveaxis(np.asarray(right), -1, 1), np.moveaxis(np.asarray(wrong), -1, 1), 1e-6, by=1e5
    )
    np.testing.assert_array_equal(pixel_shuffle(right, 2), x)


def test_8_the_original_writes_truncated_blue_green_red(golden):
    arrays = arrays_of(golden / "f_end_to_end" / "io.npz")
    image = (np.moveaxis(arrays["image_pm1"], 1, -1) + np.float32(1)) / np.float32(2)
    reference = arrays["image_u8_bgr"]
    ours = to_uint8(image)
    share = {
        "flipped": np.mean(ours[..., ::-1] != reference),
        "not flipped": np.mean(ours != reference),
        "rounded": np.mean(np.round(image[..., ::-1] * 255).astype(np.uint8) != reference),
    }
    assert share["flipped"] <= findings.PIXEL_SHARE_BOUND
    assert share["not flipped"] > 0.5
    assert share["rounded"] > 0.3


def test_11_codes_are_summed_at_full_size(generated):
    """Each scale's codes are resized to the last grid once; nothing is kept at a scale's own size."""
    bits = [tokens_to_bits(jnp.asarray(generated[f"bits_{k}"]), SQUARE.grids[k], False) for k in range(7)]
    reference = generated["summed_codes"]
    right = decode_scales(bits, SQUARE.grids[-1])
    progressive = bits_to_codes(bits[0])
    for grid, more in zip(SQUARE.grids[1:], bits[1:], strict=True):
        progressive = resize_bilinear(progressive, grid) + bits_to_codes(more)
    sums = (findings.channels_first(x) for x in (right, progressive))
    assert_tells_apart(reference, *sums, findings.RESIZED_BOUND, by=1000)


def test_11_the_last_scale_is_added_as_it_is():
    codes = bits_to_codes(jnp.asarray(np.random.default_rng(0).integers(0, 2, (1, 16, 16, 8)), jnp.uint8))
    np.testing.assert_array_equal(resize_bilinear(codes, (16, 16)), codes)
    np.testing.assert_array_equal(resize_area(codes, (16, 16)), codes)


def test_13_epsilon_of_group_norm_is_one_millionth(golden, pieces, monkeypatch):
    parts = load_parts(golden / "e_blocks" / "vae_parts.safetensors", findings.Reference(pieces))
    x = channels_last(pieces["vae_resblock_small_in"])
    right = parts["resblock"](x)
    norm = GroupNorm.__call__
    # Dividing the input by sqrt(10) is the same as an epsilon ten times as large.
    monkeypatch.setattr(GroupNorm, "__call__", lambda self, y: norm(self, y / math.sqrt(10)))
    wrong = parts["resblock"](x)
    reference = np.moveaxis(pieces["vae_resblock_small_out"], 1, -1)
    assert_tells_apart(reference, right, wrong, findings.BLOCK_BOUND)


def test_15_downsampling_pads_at_the_bottom_and_right_only(golden, pieces):
    parts = load_parts(golden / "e_blocks" / "vae_parts.safetensors", findings.Reference(pieces))
    conv = parts["downsample"]
    assert isinstance(conv, Conv)
    x, reference = channels_last(pieces["vae_downsample_in"]), np.moveaxis(pieces["vae_downsample_out"], 1, -1)
    others = []
    for padding in (((1, 0), (1, 0)), ((1, 1), (1, 1))):
        y = jax.lax.conv_general_dilated(
            x, conv.kernel[...], (2, 2), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
        )
        others.append(y[:, : reference.shape[1], : reference.shape[2]] + conv.bias[...][None, None, None])
    for wrong in others:
        assert_tells_apart(reference, conv(x), wrong, findings.CONVOLUTION_BOUND, by=1000)


def test_17_float32_coordinates_differ_from_exact_ones_by_rounding_only():
    worst = 0.0
    for grids in ASPECT_RATIOS.values():
        for size_in, size_out in {(grids[-1][axis], grid[axis]) for grid in grids for axis in (0, 1)}:
            exact = np.maximum((np.arange(size_out) + 0.5) * size_in / size_out - 0.5, 0)
            low, high, fraction = bilinear_taps(size_in, size_out)
            ours = low + (high - low) * fraction.astype(np.float64)
            worst = max(worst, float(np.max(np.abs(ours - np.minimum(exact, size_in - 1)))))
    assert 0 < worst < 1e-5


def features_of(encoded) -> jax.Array:
    return channels_last(encoded["features"])


def test_21_the_encoder_pools_where_the_transformer_interpolates(encoded):
    """Both are recorded. They agree where two cells become one (8 of 16) and where nothing is resized."""
    quantized = encode_scales(features_of(encoded), SQUARE.latent_grids)
    for k, area in enumerate(quantized.area_inputs):
        assert distance(findings.channels_first(area)[:, :, None], encoded[f"var_input_{k}"]) <= findings.RESIZED_BOUND
    flips = [jnp.asarray(encoded[f"bsc_flip_{k}"][:, 0]) for k in range(7)]
    tokens = self_correct(features_of(encoded), SQUARE, flips)
    spans = itertools.pairwise(SQUARE.offsets)
    targets = [
        tokens_to_bits(tokens.targets[:, a:b], grid, False) for (a, b), grid in zip(spans, SQUARE.grids, strict=True)
    ]
    for k in (3, 5):
        flipped = [bits ^ flip for bits, flip in zip(targets[:k], flips, strict=False)]
        total = decode_scales(flipped, SQUARE.latent_grids[-1])
        interpolated = next_scale_input(total, SQUARE, k)
        pooled = resize_area(total, SQUARE.latent_grids[k]).reshape(interpolated.shape)
        recorded = encoded["bsc_transformer_input"][:, SQUARE.offsets[k] - 1 : SQUARE.offsets[k + 1] - 1]
        assert_tells_apart(recorded, interpolated, pooled, findings.RESIZED_BOUND, by=1000)


def test_21_targets_come_from_the_residual_after_the_flipped_bits(encoded):
    flips = [jnp.asarray(encoded[f"bsc_flip_{k}"][:, 0]) for k in range(7)]
    with_flips, without = (self_correct(features_of(encoded), SQUARE, f).targets for f in (flips, ()))
    recorded = np.concatenate([encoded[f"bsc_target_{k}"] for k in range(7)], axis=1)
    np.testing.assert_array_equal(with_flips, recorded)
    assert np.mean(np.asarray(without) != recorded) > 0.01


def test_22_the_large_model_has_twice_the_latents_per_side_and_one_level_less():
    small, large = (PRESETS[name] for name in ("infinity-2b", "infinity-8b"))
    assert (len(small.image_tokenizer.widths), small.image_tokenizer.stride) == (5, 16)
    assert (len(large.image_tokenizer.widths), large.image_tokenizer.stride) == (4, 8)
    for ratio in ASPECT_RATIOS:
        schedules = [
            ScaleSchedule.for_budget(ratio, "1M", latent_per_token=card.transformer.latent_per_token)
            for card in (small, large)
        ]
        assert schedules[0].pixel_size == schedules[1].pixel_size
        assert schedules[1].latent_grids[-1] == tuple(2 * side for side in schedules[0].latent_grids[-1])
        for card, schedule in zip((small, large), schedules, strict=True):
            stride = card.image_tokenizer.stride
            assert tuple(stride * side for side in schedule.latent_grids[-1]) == schedule.pixel_size


@pytest.mark.parametrize(
    ("name", "encoder", "decoder"),
    [("infinity-2b", 45_025_696, 65_092_355), ("infinity-8b", 33_139_598, 48_484_611)],
)
def test_22_both_image_tokenizers_have_the_published_number_of_parameters(name, encoder, decoder):
    config = PRESETS[name].image_tokenizer
    module = nnx.eval_shape(lambda: ImageTokenizer(config, rngs=nnx.Rngs(0)))
    counts = [sum(math.prod(x.shape) for x in jax.tree.leaves(half)) for half in (module.encoder, module.decoder)]
    assert counts == [encoder, decoder]


@pytest.mark.parametrize(("stride", "multipliers"), [(16, (1, 1, 1, 1, 1)), (8, (1, 1, 1, 1))])
def test_22_decoders_reach_the_same_picture_from_either_stride(stride, multipliers):
    config = ImageTokenizerConfig(4, stride=stride, base_width=24, width_multipliers=multipliers, num_res_blocks=1)
    decoder = nnx.eval_shape(lambda: ImageTokenizer(config, rngs=nnx.Rngs(0), with_encoder=False))
    cells = 64 // stride
    picture = jax.eval_shape(lambda d, x: d.decode(x), decoder, jax.ShapeDtypeStruct((1, cells, cells, 4), jnp.float32))
    assert picture.shape == (1, 64, 64, 3)
