"""Resampling against plain loops that spell the rule out, one output cell at a time."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toprovar_jax.image_tokenizer.resize import (
    bilinear_taps,
    pixel_shuffle,
    pixel_unshuffle,
    resize_area,
    resize_bilinear,
)

SIZES = [
    *(((1, 1), (4, 6)), ((4, 4), (4, 4)), ((2, 3), (7, 5)), ((5, 7), (11, 13)), ((3, 3), (6, 9))),
    *(((16, 16), (4, 4)), ((13, 11), (5, 3)), ((12, 9), (4, 3)), ((7, 5), (1, 1)), ((3, 8), (6, 4))),
    *(((21, 14), (16, 10)), ((1, 9), (3, 2))),
]


def draw(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def bilinear_line(line, size):
    """Corners not aligned, edges clamped, two neighbours whatever the ratio: no antialiasing."""
    result = []
    for i in range(size):
        source = max(0.0, (i + 0.5) * len(line) / size - 0.5)
        low = min(math.floor(source), len(line) - 1)
        high = min(low + 1, len(line) - 1)
        result.append((1 - (source - low)) * line[low] + (source - low) * line[high])
    return np.stack(result)


def area_line(line, size):
    """The mean over bins that start at the floor and stop at the ceiling, so that they may overlap."""
    bins = [(math.floor(i * len(line) / size), math.ceil((i + 1) * len(line) / size)) for i in range(size)]
    return np.stack([np.mean(line[a:b], axis=0) for a, b in bins])


def along_both_axes(line, x, size):
    down = np.stack([line(image, size[0]) for image in np.float64(x)])
    return np.stack([line(image, size[1]) for image in down.transpose(0, 2, 1, 3)]).transpose(0, 2, 1, 3)


@pytest.mark.parametrize(("size_in", "size_out"), SIZES, ids=str)
@pytest.mark.parametrize(("resize", "line"), [(resize_bilinear, bilinear_line), (resize_area, area_line)])
def test_agrees_with_the_rule_spelled_out(resize, line, size_in, size_out):
    x = draw(2, *size_in, 3)
    got = resize(jnp.asarray(x), size_out)
    assert got.shape == (2, *size_out, 3)
    # Float32 coordinates: up to 4e-6 from exact ones (MODEL_SPEC 13.17).
    np.testing.assert_allclose(got, along_both_axes(line, x, size_out), atol=4e-6)


def bilinear_matrix(size_in, size_out):
    low, high, fraction = bilinear_taps(size_in, size_out)
    matrix = np.zeros((size_out, size_in), np.float32)
    np.add.at(matrix, (np.arange(size_out), low), 1 - fraction)
    np.add.at(matrix, (np.arange(size_out), high), fraction)
    return matrix


@pytest.mark.parametrize(("height", "out_height"), [*itertools.product((1, 2, 5, 16, 21), repeat=2)])
def test_blending_neighbours_is_multiplying_by_the_bilinear_matrices(height, out_height):
    """Up, down, equal and to or from a single cell, to the rounding of float32; so is what flows back."""
    (width, out_width), x = (7, 12), draw(2, height, 7, 3)
    down, across = bilinear_matrix(height, out_height), bilinear_matrix(width, out_width)
    expected = np.einsum("oh,pw,bhwc->bopc", *map(np.float64, (down, across, x)))
    resize = jax.jit(lambda x: resize_bilinear(x, (out_height, out_width)))
    got, backward = jax.vjp(resize, jnp.asarray(x))
    np.testing.assert_allclose(got, expected, atol=5e-7)
    flowing = draw(2, out_height, out_width, 3)
    expected = np.einsum("oh,pw,bopc->bhwc", *map(np.float64, (down, across, flowing)))
    np.testing.assert_allclose(backward(jnp.asarray(flowing))[0], expected, atol=4e-6)


@pytest.mark.parametrize("resize", [resize_bilinear, resize_area])
def test_the_same_size_changes_nothing(resize):
    x = jnp.asarray(draw(1, 5, 6, 2))
    np.testing.assert_array_equal(resize(x, (5, 6)), x)


@pytest.mark.parametrize("resize", [resize_bilinear, resize_area])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (9, 4), (20, 20)], ids=str)
def test_a_constant_stays_constant(resize, size):
    np.testing.assert_allclose(resize(jnp.full((1, 6, 7, 1), 3.0, jnp.float32), size), 3.0, rtol=1e-6)


def test_bilinear_shrinking_is_not_antialiased():
    """A single bright pixel between the two samples of a fourfold reduction leaves no trace."""
    x = np.zeros((1, 8, 8, 1), np.float32)
    x[0, 0, 0] = 1.0
    np.testing.assert_array_equal(resize_bilinear(jnp.asarray(x), (2, 2)), 0.0)
    assert resize_area(jnp.asarray(x), (2, 2))[0, 0, 0, 0] == 1 / 16


def test_area_bins_overlap_where_sizes_do_not_divide():
    x = jnp.arange(3, dtype=jnp.float32)[None, :, None, None]
    np.testing.assert_array_equal(resize_area(x, (2, 1))[0, :, 0, 0], [0.5, 1.5])
    x = jnp.arange(5, dtype=jnp.float32)[None, None, :, None]
    np.testing.assert_allclose(resize_area(x, (1, 3))[0, 0, :, 0], [0.5, 2.0, 3.5])


def test_resizing_keeps_images_and_channels_apart():
    x = draw(3, 4, 4, 5)
    for resize in (resize_bilinear, resize_area):
        whole = np.asarray(resize(jnp.asarray(x), (6, 3)))
        alone = np.asarray(resize(jnp.asarray(x[1:2, :, :, 2:3]), (6, 3)))
        np.testing.assert_allclose(whole[1, :, :, 2], alone[0, :, :, 0], rtol=1e-6, atol=1e-7)


def test_unshuffled_channels_are_ordered_channel_then_row_then_column():
    x = draw(2, 4, 6, 3)
    folded = np.asarray(pixel_unshuffle(jnp.asarray(x)))
    assert folded.shape == (2, 2, 3, 12)
    for c in range(3):
        for dy in range(2):
            for dx in range(2):
                np.testing.assert_array_equal(folded[..., c * 4 + dy * 2 + dx], x[:, dy::2, dx::2, c])


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_shuffling_undoes_unshuffling(factor):
    x = jnp.asarray(draw(2, 6, 12, 5))
    np.testing.assert_array_equal(pixel_shuffle(pixel_unshuffle(x, factor), factor), x)


@pytest.mark.parametrize("name", ["trilinear", "area"])
def test_agrees_with_the_reference_outputs(golden, name):
    data = np.load(golden / "e_blocks" / "io.npz")
    resize = {"trilinear": resize_bilinear, "area": resize_area}[name]
    cases = [key for key in data.files if key.startswith(f"resize_{name}_")]
    assert len(cases) > 2
    for key in cases:
        source, target = key.removeprefix(f"resize_{name}_").split("_to_")
        got = resize(channels_last(data[f"resize_in_{source}_to_{target}"]), tuple(map(int, target.split("x"))))
        np.testing.assert_allclose(got, channels_last(data[key]), atol=1e-5, err_msg=key)


@pytest.mark.parametrize(("name", "function"), [("pixel_shuffle", pixel_shuffle), ("pixel_unshuffle", pixel_unshuffle)])
def test_shuffles_agree_with_the_reference_outputs(golden, name, function):
    data = np.load(golden / "e_blocks" / "io.npz")
    np.testing.assert_array_equal(function(channels_last(data[f"{name}_in"])), channels_last(data[f"{name}_out"]))


def channels_last(x):
    x = x.reshape(*x.shape[:2], *x.shape[-2:])
    return jnp.asarray(x.transpose(0, 2, 3, 1))
