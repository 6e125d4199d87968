import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toprovar_jax.image_tokenizer.bsq import (
    bits_to_codes,
    bits_to_tokens,
    decode_scales,
    encode_scales,
    latents_to_bits,
    next_scale_input,
    quantize_straight_through,
    tokens_to_bits,
)
from toprovar_jax.image_tokenizer.resize import resize_area, resize_bilinear
from toprovar_jax.schedule import ScaleSchedule

GRIDS = ((1, 1), (2, 2), (3, 2), (6, 4))


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def draw_bits(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 2, shape), jnp.uint8)


def test_zero_is_negative():
    latents = jnp.array([[0.0, -0.0, 1e-30, -1e-30]], jnp.float32)
    np.testing.assert_array_equal(latents_to_bits(latents), [[0, 0, 1, 0]])


@pytest.mark.parametrize("channels", [1, 14, 16, 32, 64])
def test_codes_lie_on_the_unit_sphere(channels):
    codes = bits_to_codes(draw_bits(5, channels))
    np.testing.assert_allclose(jnp.linalg.norm(codes, axis=-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(jnp.abs(codes), channels**-0.5, rtol=1e-7)


def test_bits_survive_codes():
    bits = draw_bits(2, 3, 4, 14)
    np.testing.assert_array_equal(latents_to_bits(bits_to_codes(bits)), bits)


def test_only_the_direction_of_a_latent_counts():
    latents = draw(4, 7)
    np.testing.assert_array_equal(latents_to_bits(latents), latents_to_bits(latents * 1e-6))


def test_straight_through_has_the_value_of_the_codes_and_the_gradient_of_the_unit_latents():
    latents, weights = draw(3, 6), draw(3, 6, seed=1)
    got = quantize_straight_through(latents)
    np.testing.assert_allclose(got, bits_to_codes(latents_to_bits(latents)), atol=1e-7)

    gradient = jax.grad(lambda x: jnp.sum(weights * quantize_straight_through(x)))(latents)
    norm = jnp.linalg.norm(latents, axis=-1, keepdims=True)
    unit = latents / norm
    tangent = weights - unit * jnp.sum(unit * weights, axis=-1, keepdims=True)
    np.testing.assert_allclose(gradient, tangent / norm, rtol=1e-5, atol=1e-6)


def test_straight_through_of_nothing_is_a_code():
    got = quantize_straight_through(jnp.zeros((1, 4), jnp.float32))
    np.testing.assert_array_equal(got, jnp.full((1, 4), -0.5))


def test_encoding_gives_the_bits_of_every_grid_and_decoding_their_sum():
    latents = draw(2, 6, 4, 5)
    encoded = encode_scales(latents, GRIDS)
    assert [bits.shape for bits in encoded.bits] == [(2, *grid, 5) for grid in GRIDS]
    assert {bits.dtype for bits in encoded.bits} == {jnp.dtype(jnp.uint8)}
    np.testing.assert_allclose(decode_scales(encoded.bits, (6, 4)), encoded.latents, atol=1e-6)


def test_each_scale_quantises_what_the_coarser_ones_left():
    latents = draw(1, 6, 4, 5)
    encoded = encode_scales(latents, GRIDS)
    total = jnp.zeros_like(latents)
    for k, grid in enumerate(GRIDS):
        np.testing.assert_array_equal(encoded.bits[k], latents_to_bits(resize_area(latents - total, grid)))
        total = total + resize_bilinear(bits_to_codes(encoded.bits[k]), (6, 4))
        if k + 1 < len(GRIDS):
            np.testing.assert_allclose(encoded.area_inputs[k], resize_area(total, GRIDS[k + 1]), atol=1e-6)
    assert len(encoded.area_inputs) == len(GRIDS) - 1


def test_every_further_code_of_the_full_grid_comes_closer():
    latents = 4.0 * bits_to_codes(draw_bits(1, 6, 4, 5)) + 0.3 * draw(1, 6, 4, 5)
    errors = [jnp.linalg.norm(latents - encode_scales(latents, [(6, 4)] * count).latents) for count in range(4)]
    assert all(after < before for before, after in itertools.pairwise(errors))


def test_the_last_scale_alone_is_read_back_without_a_resize():
    bits = draw_bits(1, 6, 4, 5)
    np.testing.assert_array_equal(encode_scales(bits_to_codes(bits), [(6, 4)]).bits[0], bits)
    np.testing.assert_array_equal(decode_scales([bits], (6, 4)), bits_to_codes(bits))


def test_tokens_are_row_major():
    bits = draw_bits(2, 3, 5, 4)
    tokens = bits_to_tokens(bits, patchify=False)
    assert tokens.shape == (2, 15, 4)
    np.testing.assert_array_equal(tokens[1, 1 * 5 + 3], bits[1, 1, 3])


def test_patchified_tokens_hold_two_by_two_cells_channel_first():
    bits = draw_bits(1, 4, 6, 3)
    tokens = bits_to_tokens(bits, patchify=True)
    assert tokens.shape == (1, 6, 12)
    for c in range(3):
        for dy in range(2):
            for dx in range(2):
                assert tokens[0, 1 * 3 + 2, c * 4 + dy * 2 + dx] == bits[0, 2 + dy, 4 + dx, c]


@settings(max_examples=10, deadline=None, derandomize=True)
@given(height=st.integers(1, 4), width=st.integers(1, 4), channels=st.integers(1, 3), patchify=st.booleans())
def test_tokens_and_bits_are_inverse(height, width, channels, patchify):
    factor = 2 if patchify else 1
    bits = draw_bits(2, height * factor, width * factor, channels)
    tokens = bits_to_tokens(bits, patchify)
    np.testing.assert_array_equal(tokens_to_bits(tokens, (height, width), patchify), bits)


@pytest.mark.parametrize("factor", [1, 2])
def test_the_transformer_sees_the_bilinear_code_sum_of_the_scale_to_come(factor):
    schedule = ScaleSchedule.of("3:2", 6, latent_per_token=factor)
    latents = draw(2, *schedule.latent_grids[-1], 3)
    for scale in (1, 3, 5):
        got = next_scale_input(latents, schedule, scale)
        assert got.shape == (2, schedule.token_counts[scale], 3 * factor**2)
        resized = resize_bilinear(latents, schedule.latent_grids[scale])
        np.testing.assert_array_equal(got, bits_to_tokens(resized, factor == 2))
        pooled = resize_area(latents, schedule.latent_grids[scale])
        assert scale == 5 or jnp.max(jnp.abs(pooled - resized)) > 0.1


def test_agrees_with_the_reference_quantiser(golden):
    data = np.load(golden / "e_blocks" / "io.npz")
    latents = jnp.asarray(data["lfq_in"][:, :, 0].transpose(0, 2, 3, 1))
    bits = latents_to_bits(latents)
    np.testing.assert_array_equal(bits, data["lfq_bits"][:, 0])
    for name in ("lfq_quantized", "lfq_codes_from_bits"):
        np.testing.assert_allclose(bits_to_codes(bits), data[name][:, :, 0].transpose(0, 2, 3, 1), rtol=1e-6)


@pytest.mark.parametrize("case", ["c_vae", "c_vae_stride8"])
def test_reference_features_give_the_reference_bits(golden, case):
    data = np.load(golden / case / "io.npz")
    features = jnp.asarray(data["features"].transpose(0, 2, 3, 1))
    count = sum(key.startswith("bits_") for key in data.files)
    want = [data[f"bits_{k}"][:, 0] for k in range(count)]
    encoded = jax.jit(encode_scales, static_argnums=1)(features, tuple(bits.shape[1:3] for bits in want))
    for got, expected in zip(encoded.bits, want, strict=True):
        np.testing.assert_array_equal(got, expected)
    np.testing.assert_allclose(encoded.latents.transpose(0, 3, 1, 2), data["quantized"], atol=1e-5)
