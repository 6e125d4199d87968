"""Picture similarity: against another implementation's numbers, and the properties that any such measure has."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toprovar_jax.errors import UserInputError
from toprovar_jax.similarity import SSIM_WINDOW, psnr, ssim


def picture(height: int, width: int, phase: float = 0.0) -> np.ndarray:
    y, x, c = np.ogrid[:height, :width, :3]
    return 0.5 + 0.3 * np.sin(0.3 * x + 0.17 * y + c + phase) + 0.2 * np.cos(0.05 * x * y + 2.0 * c * phase)


def shifted(a: np.ndarray) -> np.ndarray:
    return picture(*a.shape[:2], 0.4)


def noisy(a: np.ndarray) -> np.ndarray:
    y, x, c = np.ogrid[: a.shape[0], : a.shape[1], :3]
    return np.clip(0.9 * a + 0.1 * np.mod(37 * x + 61 * y + 13 * c, 17) / 17, 0, 1)


def inverse(a: np.ndarray) -> np.ndarray:
    return 1 - a


# scikit-image 0.26.0: peak_signal_noise_ratio(data_range=1), and structural_similarity(gaussian_weights=True,
# sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=-1).
KNOWN = [
    ((11, 11), shifted, 13.743891135596213, 0.6459805373292912),
    ((11, 11), noisy, 27.149505432221353, 0.9770598357100088),
    ((11, 11), inverse, 3.9339580319238747, -0.7668581807789335),
    ((24, 16), shifted, 15.060171005850158, 0.6310262874033101),
    ((24, 16), noisy, 27.841914498074715, 0.9648086008661383),
    ((24, 16), inverse, 5.077870557446995, -0.6300694876098528),
    ((33, 40), shifted, 15.765983818686408, 0.6524706937824204),
    ((33, 40), noisy, 28.136825493654168, 0.9751257550570366),
    ((33, 40), inverse, 5.616257293075342, -0.7265033107656921),
]


@pytest.mark.parametrize(("size", "change", "decibels", "structure"), KNOWN)
def test_agrees_with_another_implementation(size, change, decibels, structure):
    a = picture(*size)
    b = change(a)
    np.testing.assert_allclose(psnr(a[None], b[None]), [decibels], rtol=1e-13)
    np.testing.assert_allclose(ssim(a[None], b[None]), [structure], rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_pictures_are_infinitely_and_wholly_alike(dtype):
    a = np.stack([picture(16, 12), np.full((16, 12, 3), 0.3)]).astype(dtype)
    assert psnr(a, a).dtype == ssim(a, a).dtype == np.float64
    np.testing.assert_array_equal(psnr(a, a), [np.inf, np.inf])
    np.testing.assert_allclose(ssim(a, a), [1.0, 1.0], rtol=1e-13)


def test_each_pair_is_compared_alone():
    a = np.stack([picture(20, 14, phase) for phase in (0.0, 1.0, 2.0)])
    b = np.stack([noisy(a[0]), inverse(a[1]), a[2]])
    for measure in (psnr, ssim):
        np.testing.assert_array_equal(measure(a, b), [measure(a[i : i + 1], b[i : i + 1])[0] for i in range(3)])


@given(seed=st.integers(0, 2**16), height=st.integers(11, 30), width=st.integers(11, 30))
@settings(max_examples=20, deadline=None)
def test_does_not_depend_on_order_orientation_or_channel(seed, height, width):
    a, b = np.random.default_rng(seed).uniform(size=(2, 2, height, width, 3))
    for measure in (psnr, ssim):
        want = measure(a, b)
        assert np.all(want <= (1.0 if measure is ssim else np.inf))
        for change in (
            lambda x: x[:, ::-1],
            lambda x: x[:, :, ::-1],
            lambda x: x.transpose(0, 2, 1, 3),
            lambda x: x[..., ::-1],
        ):
            np.testing.assert_allclose(measure(change(a), change(b)), want, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(measure(b, a), want, rtol=1e-12)


def test_more_noise_is_less_alike():
    a = picture(24, 24)
    noise = np.random.default_rng(0).uniform(-1, 1, a.shape)
    worse = np.stack([np.clip(a + strength * noise, 0, 1) for strength in (0.01, 0.03, 0.1, 0.3)])
    for measure in (psnr, ssim):
        assert np.all(np.diff(measure(np.stack([a] * 4), worse)) < 0)


def test_a_picture_is_as_alike_as_its_windows_on_average():
    a = picture(14, 13)
    b = inverse(a)
    windows = [
        [x[top : top + SSIM_WINDOW, left : left + SSIM_WINDOW] for top in range(4) for left in range(3)] for x in (a, b)
    ]
    np.testing.assert_allclose(ssim(a[None], b[None])[0], np.mean(ssim(*map(np.stack, windows))), rtol=1e-12)


REFUSED = {
    "sizes": (np.zeros((1, 12, 12, 3)), np.zeros((1, 12, 13, 3)), "must have one shape"),
    "counts": (np.zeros((2, 12, 12, 3)), np.zeros((1, 12, 12, 3)), "must have one shape"),
    "bytes": (np.zeros((1, 12, 12, 3)), np.full((1, 12, 12, 3), 255.0), "divide bytes by 255"),
    "negative": (np.full((1, 12, 12, 3), -0.01), np.zeros((1, 12, 12, 3)), "between 0 and 1"),
    "not a number": (np.full((1, 12, 12, 3), np.nan), np.zeros((1, 12, 12, 3)), "between 0 and 1"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("measure", [psnr, ssim])
def test_what_cannot_be_compared_is_refused(case, measure):
    a, b, expected = REFUSED[case]
    with pytest.raises(UserInputError, match=expected):
        measure(a, b)


@pytest.mark.parametrize("size", [(10, 30), (30, 10), (8, 8)])
def test_pictures_smaller_than_the_window_have_no_structure_to_compare(size):
    a = picture(*size)[None]
    with pytest.raises(UserInputError, match=f"pictures of {size[0]}x{size[1]} pixels: must be at least 11"):
        ssim(a, a)
    assert psnr(a, a) == np.inf
