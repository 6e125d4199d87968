"""Matrices as 8-bit integers: how near they come, and that products with them are those of what they stand for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from toprovar_jax.model.layers import matmul
from toprovar_jax.model.quantization import (
    LARGEST,
    Int8Matrix,
    dequantise,
    quantise,
    quantise_stack,
    relative_error,
    rows_apart,
)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_the_largest_of_a_column_is_exact_and_the_rest_are_rounded_to_the_nearest():
    matrix = np.array([[127.0, -1.0], [0.4, 0.5], [-0.6, 0.25], [63.5, 0.0]], np.float32)
    quantised = quantise(matrix)
    np.testing.assert_array_equal(quantised.scale, np.array([1, 1 / 127], np.float32))
    # 63.5 lies halfway: to the even one.
    expected = np.array([[127, -127], [0, 64], [-1, 32], [64, 0]], np.int8)
    np.testing.assert_array_equal(quantised.values.reshape(4, 2), expected)
    np.testing.assert_array_equal(dequantise(quantised), expected * quantised.scale[None])


def test_a_column_of_zeros_stays_zero():
    quantised = quantise(np.array([[0.0, 2.0], [0.0, 1.0]], np.float32))
    assert quantised.scale[0] == 0
    np.testing.assert_array_equal(dequantise(quantised)[:, 0], [0, 0])
    assert relative_error(np.zeros((2, 2), np.float32), quantise(np.zeros((2, 2), np.float32))) == 0


@settings(deadline=None, max_examples=60)
@given(
    arrays.arrays(
        np.float32,
        arrays.array_shapes(min_dims=2, max_dims=2, max_side=20),
        elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
    )
)
def test_no_entry_is_off_by_more_than_half_a_scale(matrix):
    quantised = quantise(matrix)
    assert np.abs(quantised.values.astype(np.int32)).max() <= LARGEST
    # Beyond that only the rounding of quotient and product in float32, and what is too small to have a scale.
    allowed = quantised.scale.astype(np.float64) * (0.5 + 3e-5) + LARGEST * np.finfo(np.float32).tiny
    off = np.abs(matrix.astype(np.float64) - dequantise(quantised))
    assert (off <= allowed[None]).all()


@pytest.mark.parametrize(("width", "rows"), [(16, 8), (12, 4), (7, 1)])
def test_rows_lie_in_groups_of_up_to_eight(width, rows):
    assert rows_apart((3, width, 5)) == (3, width // rows, rows, 5)
    matrix = normal(width, 5)
    assert relative_error(matrix, quantise(matrix)) < 0.01


def test_a_stack_is_quantised_layer_by_layer_and_reports_the_error_of_each():
    layers = [normal(16, 6, seed=seed) * 10**seed for seed in range(3)]
    stack, errors = quantise_stack((3, 16, 6), (layer for layer in layers))
    for index, layer in enumerate(layers):
        np.testing.assert_array_equal(dequantise(stack)[index], dequantise(quantise(layer)))
        assert errors[index] == pytest.approx(np.linalg.norm(layer - dequantise(stack)[index]) / np.linalg.norm(layer))
    # 8 bits of a normal distribution: a step of max/127, off by step/sqrt(12) on average.
    assert 0.003 < min(errors) <= max(errors) < 0.01


@pytest.mark.parametrize(("precision", "tolerance"), [("exact", 2e-6), ("fast", 8e-3)])
def test_a_product_is_that_of_the_dequantised_matrix(precision, tolerance):
    quantised, x = quantise(normal(64, 24)), normal(2, 3, 64, seed=1)
    on_device = jax.tree.map(jnp.asarray, quantised)
    product = jax.jit(lambda x, m: matmul(x, m, precision))(x, on_device)
    assert product.dtype == (jnp.float32 if precision == "exact" else jnp.bfloat16)
    expected = x.astype(np.float64) @ dequantise(quantised).astype(np.float64)
    off = np.linalg.norm(np.asarray(product, np.float64) - expected) / np.linalg.norm(expected)
    assert off < tolerance


def test_a_layer_of_a_stack_multiplies_as_it_does_alone():
    stack, _ = quantise_stack((3, 16, 6), normal(3, 16, 6))
    x = jnp.asarray(normal(4, 16, seed=2))

    def body(carry, layer: Int8Matrix):
        return carry, matmul(x, layer, "exact")

    stacked = jax.lax.scan(body, 0, jax.tree.map(jnp.asarray, stack))[1]
    for index in range(3):
        alone = matmul(x, jax.tree.map(lambda leaf, index=index: jnp.asarray(leaf[index]), stack), "exact")
        np.testing.assert_allclose(stacked[index], alone, rtol=1e-6, atol=1e-6)
