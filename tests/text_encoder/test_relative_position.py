import math

import numpy as np
import pytest

from toprovar_jax.text_encoder.relative_position import bucket_starts, position_buckets


def _bucket(offset: int, buckets: int, max_distance: int) -> int:
    """One offset at a time, with logarithms: the formula as it is usually written."""
    half, exact = buckets // 2, buckets // 4
    first = half if offset > 0 else 0
    distance = abs(offset)
    if distance < exact:
        return first + distance
    growth = math.log(distance / exact) / math.log(max_distance / exact)
    return first + min(half - 1, exact + int(growth * exact + 1e-12))


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (4, 9), (64, 100)])
def test_buckets_equal_the_logarithmic_formula(buckets, max_distance):
    offsets = np.arange(-300, 301)
    expected = [_bucket(int(offset), buckets, max_distance) for offset in offsets]
    assert position_buckets(offsets, buckets=buckets, max_distance=max_distance).tolist() == expected


def test_bucket_starts_of_the_released_encoder():
    assert bucket_starts(32, 128) == (0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91)


def test_before_and_after_use_different_buckets():
    offsets = np.arange(1, 200)
    before, after = (position_buckets(sign * offsets, buckets=32, max_distance=128) for sign in (-1, 1))
    np.testing.assert_array_equal(after, before + 16)
    assert before.max() == 15
