"""Pitfalls of the rotary positions, by their number in MODEL_SPEC 13: ours is right, and the wrong way would be seen.

Where the recorded outputs can tell the two apart, a test computes both and shows that they reject the wrong one.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from toprovar_jax.model.rope import full_rotary_table, rotary_table, rotate
from toprovar_jax.schedule import ASPECT_RATIOS, ScaleSchedule

from ..golden_cases import findings
from .common import (
    SQUARE,
    assert_tells_apart,
)


def test_6_rotation_is_of_adjacent_pairs(conditioned, pieces):
    unrotated, reference = pieces["sa_q_scaled_3"], pieces["sa_q_rot_3"]
    head_dim = unrotated.shape[-1]
    table = rotary_table(SQUARE, 3, head_dim, 2)
    x = jnp.asarray(unrotated.transpose(0, 2, 1, 3))
    right = rotate(x, table).transpose(0, 2, 1, 3)
    first, second = np.split(unrotated, 2, axis=-1)
    wrong = np.concatenate([first * table.cos - second * table.sin, first * table.sin + second * table.cos], axis=-1)
    assert_tells_apart(reference, right, wrong, findings.SCALED_QUERY_BOUND, by=1000)


def test_6_rows_take_the_first_half_of_the_pairs(pieces):
    table = full_rotary_table(ScaleSchedule.of("2:3", 7), 16, 2)
    swapped = np.roll(table.cos, 4, axis=1)
    assert_tells_apart(pieces["rope_dim16_mode2_ratio0.666_pn0.06M_cos"], table.cos, swapped, 1e-6, by=1e5)


def test_6_coordinates_live_on_the_finest_grid_at_every_size(pieces):
    schedule = ScaleSchedule.for_budget("2:3", "0.06M")
    assert schedule.finest_grid == (52, 78)
    table = full_rotary_table(schedule, 16, 2)
    own = full_rotary_table(ScaleSchedule(schedule.aspect_ratio, schedule.grids, schedule.grids[-1]), 16, 2)
    assert_tells_apart(pieces["rope_dim16_mode2_ratio0.666_pn0.06M_cos"], table.cos, own.cos, 1e-6, by=1e5)


def _rounded(size: int, finest: int, dtype, half_up: bool = False) -> np.ndarray:
    product = np.arange(size, dtype=dtype) * dtype(finest / size)
    return (np.floor(product + dtype(0.5)) if half_up else np.round(product)).astype(int)


def _rows_of(ratio: str, scale: int, axis: int) -> np.ndarray:
    """The coordinates in use, read off the angles of the one frequency that a head of 4 has."""
    schedule = ScaleSchedule.of(ratio, 13)
    height, width = schedule.grids[scale]
    table = rotary_table(schedule, scale, 4, 2)
    complex_angle = (table.cos + 1j * table.sin).reshape(height, width, 2)[:, :, axis]
    along = complex_angle[:, 0] if axis == 0 else complex_angle[0]
    candidates = np.exp(1j * np.arange(schedule.finest_grid[axis] + 1))
    return np.abs(along[:, None] - candidates[None]).argmin(axis=1)


def test_6_the_product_is_float32(pieces):
    """Ratio 3:1, scale (54, 18): row 27 is 55.5 in real numbers."""
    assert (_rounded(54, 111, np.float32)[27], _rounded(54, 111, np.float64)[27]) == (56, 55)
    assert _rows_of("3:1", 9, 0)[27] == 56
    assert _rows_of("1:3", 9, 1)[27] == 56
    schedule = ScaleSchedule.of("3:1", 13)
    table = full_rotary_table(schedule, 4, 2)
    token = schedule.offsets[9] + 27 * 18
    reference = pieces["rope_dim4_mode2_ratio3.0_pn1M_cos"]
    assert_tells_apart(reference[token, 0], table.cos[token, 0], math.cos(55), 1e-6, by=1e4)


def test_6_rounding_is_half_to_even():
    different = 0
    for name, grids in ASPECT_RATIOS.items():
        for scale, grid in enumerate(grids):
            for axis in (0, 1):
                even, up = (_rounded(grid[axis], grids[-1][axis], np.float32, half) for half in (False, True))
                different += not np.array_equal(even, up)
                if name in ("5:4", "3:1", "2:5"):
                    np.testing.assert_array_equal(_rows_of(name, scale, axis), even)
    assert different == 64
    assert _rows_of("5:4", 6, 0)[1] == 4  # 3.5
    assert _rows_of("5:4", 6, 0)[3] == 10  # 10.5


def test_20_positions_of_a_scale_start_after_those_of_all_scales_before(pieces):
    reference = pieces["rope_dim16_mode2_ratio1.0_pn0.06M_cos"]
    for k in range(1, 7):
        start, count = SQUARE.offsets[k], SQUARE.token_counts[k]
        ours = rotary_table(SQUARE, k, 16, 2).cos
        assert_tells_apart(ours, reference[start : start + count], reference[:count], 1e-6, by=1e4)
