"""Restored increments against bins that are spelled out, in float64."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from toprovar_jax.acceleration.restoration import resize_increments

GRIDS = [((4, 4), (6, 6)), ((9, 6), (15, 10)), ((6, 6), (4, 3)), ((5, 4), (10, 8)), ((1, 1), (2, 2))]


def draw(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def averaged(image, size):
    """Cell i is the mean from ``floor(i in / out)`` to ``ceil((i + 1) in / out)``: neighbours may share a source."""
    down, across = (
        [slice(math.floor(i * n / m), math.ceil((i + 1) * n / m)) for i in range(m)]
        for n, m in zip(image.shape[:2], size, strict=True)
    )
    return np.array([[image[rows, columns].mean((0, 1)) for columns in across] for rows in down])


@pytest.mark.parametrize(("grid_in", "grid_out"), GRIDS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 3e-7), (jnp.bfloat16, 2**-8)])
def test_increments_are_area_averages_in_their_own_dtype(grid_in, grid_out, dtype, tolerance):
    increments = jnp.asarray(draw(4, grid_in[0] * grid_in[1], 3), dtype)
    got = resize_increments(increments, grid_in, grid_out)
    assert got.dtype == dtype
    assert got.shape == (4, grid_out[0] * grid_out[1], 3)
    for row in range(4):
        exact = averaged(np.asarray(increments[row], np.float64).reshape(*grid_in, 3), grid_out)
        np.testing.assert_allclose(
            np.asarray(got[row], np.float64), exact.reshape(-1, 3), rtol=tolerance, atol=tolerance * 0.5
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_same_grid_changes_nothing(dtype):
    increments = jnp.asarray(draw(2, 54, 5), dtype)
    np.testing.assert_array_equal(resize_increments(increments, (9, 6), (9, 6)), increments)


def test_doubling_the_grid_repeats_every_token_exactly():
    increments = draw(1, 20, 3)
    got = np.asarray(resize_increments(jnp.asarray(increments), (5, 4), (10, 8))).reshape(10, 8, 3)
    np.testing.assert_array_equal(got, increments.reshape(5, 4, 3).repeat(2, 0).repeat(2, 1))
