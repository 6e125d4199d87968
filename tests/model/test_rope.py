import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toprovar_jax.model.rope import RotaryTable, full_rotary_table, rotary_table, rotate
from toprovar_jax.schedule import ASPECT_RATIOS, ScaleSchedule

HEAD_DIM = 8


def _angles(table: RotaryTable) -> np.ndarray:
    return np.arctan2(table.sin, table.cos)


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("ratio", ["1:1", "5:4", "1:3"])
def test_tables_have_a_row_per_token(mode, ratio):
    schedule = ScaleSchedule.of(ratio, 6)
    table = full_rotary_table(schedule, HEAD_DIM, mode)
    assert table.cos.shape == table.sin.shape == (schedule.num_tokens, HEAD_DIM // 2)
    assert table.cos.dtype == table.sin.dtype == np.float32
    for k in range(len(schedule)):
        part = rotary_table(schedule, k, HEAD_DIM, mode)
        np.testing.assert_array_equal(part.cos, table.cos[schedule.offsets[k] : schedule.offsets[k + 1]])


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_a_prefix_of_the_schedule_has_the_prefix_of_the_table(mode):
    short, long = (full_rotary_table(ScaleSchedule.of("2:1", n), HEAD_DIM, mode) for n in (4, 9))
    np.testing.assert_array_equal(short.cos, long.cos[: len(short.cos)])


@pytest.mark.parametrize("ratio", list(ASPECT_RATIOS))
def test_the_finest_scale_has_its_own_coordinates(ratio):
    """At the last of 13 scales nearest coordinates are the tokens' own."""
    schedule = ScaleSchedule.of(ratio, 13)
    nearest, plain = (rotary_table(schedule, 12, 4, mode) for mode in (2, 0))
    np.testing.assert_array_equal(nearest.cos, plain.cos)
    np.testing.assert_array_equal(nearest.sin, plain.sin)


def test_rows_come_first_then_columns():
    angles = _angles(rotary_table(ScaleSchedule.of("3:2", 3), 2, 4, 0)).reshape(3, 2, 2)
    np.testing.assert_allclose(angles[:, :, 0], np.arange(3)[:, None] * np.ones((1, 2)), atol=1e-6)
    np.testing.assert_allclose(angles[:, :, 1], np.ones((3, 1)) * np.arange(2)[None], atol=1e-6)


def test_frequencies_fall_from_one():
    angles = _angles(rotary_table(ScaleSchedule.of("1:1", 2), 1, 16, 0)).reshape(2, 2, 8)
    expected = 10000.0 ** -(np.arange(4) / 4)
    np.testing.assert_allclose(angles[1, 0, :4], expected, rtol=1e-5)
    np.testing.assert_allclose(angles[0, 1, 4:], expected, rtol=1e-5)


def test_interpolated_corners_are_those_of_the_large_table():
    schedule = ScaleSchedule.of("2:1", 13)
    height, width = 30, 15
    table = rotary_table(schedule, 7, 4, 1)
    cos = table.cos.reshape(height, width, 2)
    np.testing.assert_allclose(cos[0, 0], [1.0, 1.0], atol=1e-6)
    np.testing.assert_allclose(cos[-1, -1], np.cos([127.0, 63.0]), atol=1e-5)


def test_rotation_turns_adjacent_pairs_and_keeps_norms():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, HEAD_DIM))
    angles = np.random.default_rng(0).uniform(-3, 3, (5, HEAD_DIM // 2)).astype(np.float32)
    rotated = rotate(x, RotaryTable(np.cos(angles), np.sin(angles)))
    turned = np.asarray(x)[..., 0::2] + 1j * np.asarray(x)[..., 1::2]
    turned = turned * np.exp(1j * angles)[None, :, None]
    np.testing.assert_allclose(rotated[..., 0::2], turned.real, atol=1e-5)
    np.testing.assert_allclose(rotated[..., 1::2], turned.imag, atol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(rotated, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)


def test_products_depend_on_the_distance_alone():
    query, key = jax.random.normal(jax.random.key(1), (2, 1, 1, 1, HEAD_DIM))
    table = rotary_table(ScaleSchedule.of("1:1", 4), 3, HEAD_DIM, 0)

    def product(i, j):
        at = lambda x, token: rotate(x, RotaryTable(table.cos[token : token + 1], table.sin[token : token + 1]))
        return float(jnp.sum(at(query, i) * at(key, j)))

    assert product(0, 7) == pytest.approx(product(14, 21), abs=1e-5)  # one row and one column apart, in a row of six
    assert abs(product(0, 7) - product(0, 8)) > 1e-3


def test_bfloat16_is_rotated_in_float32():
    x = jnp.ones((1, 1, 1, HEAD_DIM), jnp.bfloat16)
    table = rotary_table(ScaleSchedule.of("1:1", 1), 0, HEAD_DIM, 2)
    assert rotate(x, table).dtype == jnp.float32
