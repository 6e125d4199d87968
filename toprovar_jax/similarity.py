"""How alike two pictures are: peak signal-to-noise ratio and structural similarity, in float64 on the host."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter1d

from toprovar_jax.errors import UserInputError
from toprovar_jax.shapes import Float

SSIM_WINDOW = 11
"""Taps of the Gaussian window along an axis; no smaller picture has a structural similarity."""

_SIGMA = 1.5
_RADIUS = SSIM_WINDOW // 2
_STABLE_MEAN, _STABLE_VARIANCE = 0.01**2, 0.03**2  # (K1 range)^2 and (K2 range)^2 of the paper; the range is 1


def psnr(a: Float[np.ndarray, "B h w 3"], b: Float[np.ndarray, "_ _ _ _"]) -> Float[np.ndarray, " B"]:
    """Peak signal-to-noise ratio of picture pairs, in decibels: ``-10 log10 mean (a - b)^2``; infinite for equal ones.

    Args:
      a, b: pictures in [0, 1], of one shape.

    Raises:
      UserInputError: shapes that differ, or values outside [0, 1].
    """
    _check(a, b)
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2, axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return -10.0 * np.log10(error)


def ssim(a: Float[np.ndarray, "B h w 3"], b: Float[np.ndarray, "_ _ _ _"]) -> Float[np.ndarray, " B"]:
    """Mean structural similarity of picture pairs, at most 1, which equal pictures have.

    Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to structural similarity",
    2004: Gaussian window of 11 taps with sigma 1.5, K1 = 0.01, K2 = 0.03, variances divided by N. Colour channels are
    compared apart and averaged; centres closer than five pixels to a border, where the window would leave the
    picture, do not count.

    Args:
      a, b: pictures in [0, 1], of one shape, at least 11 pixels along each side.

    Raises:
      UserInputError: shapes that differ, pictures smaller than the window, or values outside [0, 1].
    """
    _check(a, b)
    height, width = a.shape[1:3]
    if min(height, width) < SSIM_WINDOW:
        raise UserInputError(
            f"pictures of {height}x{width} pixels",
            f"must be at least {SSIM_WINDOW} pixels along each side for a structural similarity",
            "use a larger pixel budget, or psnr",
        )
    a, b = a.astype(np.float64), b.astype(np.float64)
    mean_a, mean_b = _windowed(a), _windowed(b)
    variances = _windowed(a * a) - mean_a**2 + _windowed(b * b) - mean_b**2
    covariance = _windowed(a * b) - mean_a * mean_b
    same_mean = (2.0 * mean_a * mean_b + _STABLE_MEAN) / (mean_a**2 + mean_b**2 + _STABLE_MEAN)
    same_structure = (2.0 * covariance + _STABLE_VARIANCE) / (variances + _STABLE_VARIANCE)
    return np.mean(same_mean * same_structure, axis=(1, 2, 3))


def _windowed(pictures: Float[np.ndarray, "B h w 3"]) -> Float[np.ndarray, "B inner_h inner_w 3"]:
    """Weighted means under the window at every centre at which it lies inside the picture."""
    inside = slice(_RADIUS, -_RADIUS)
    down = gaussian_filter1d(pictures, _SIGMA, axis=1, radius=_RADIUS)[:, inside]
    return gaussian_filter1d(down, _SIGMA, axis=2, radius=_RADIUS)[:, :, inside]


def _check(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        raise UserInputError(
            f"pictures of shapes {a.shape} and {b.shape}", "must have one shape", "compare pictures of one size"
        )
    for pictures in (a, b):
        if not np.all((pictures >= 0.0) & (pictures <= 1.0)):  # so written, NaN is refused too
            raise UserInputError(
                "pictures with values outside [0, 1]",
                "must lie between 0 and 1",
                "divide bytes by 255, clip what a network made",
            )
