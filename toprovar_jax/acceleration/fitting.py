"""Choosing ToProVAR's constants from measurements: plain functions of numpy arrays.

The paper states tau = 0.4 and leaves beta, alpha_min, alpha_max and the range of depths open; how they are chosen here
is ours, and each function says how. Scales are numbered from 1, as in the paper.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import numpy as np

from toprovar_jax.errors import UserInputError
from toprovar_jax.shapes import Float, Int

STABLE_SSIMS = (0.8, 0.9, 0.95, 0.975)
"""A partial picture this similar to the finished one may be taken for stable. The paper's appendix on tau has 0.8;
where pictures are mostly background that is reached too early, so the others are tried too."""

ALPHA_MIN, ALPHA_MAX = 0.3, 0.95
"""Full strength: little enough for layers that carry structure, which stand no loss of half their tokens, and about
the 90 % that layers that carry detail stand (paper, Fig. 3; the numbers are our choice)."""

MAX_PATTERNS = 4

DepthRule = Literal["le", "ge", "fixed"]

_MAX_ROUNDS = 100
"""Clusters settle after a few; rounding could make equally near ones swap for ever."""


def strength_constants(strength: float) -> dict[str, float]:
    """``alpha_min`` and ``alpha_max`` at a strength from 0, which prunes nothing, to 1: (0.3, 0.95), in proportion."""
    return {"alpha_min": round(ALPHA_MIN * strength, 6), "alpha_max": round(ALPHA_MAX * strength, 6)}


def stable_scales(partial_ssim: Float[np.ndarray, "B scales"], bar: float) -> Int[np.ndarray, " B"]:
    """The first scale after which each image's decoded partial sum is stable; the last one's similarity is 1."""
    return np.argmax(partial_ssim >= bar, axis=1) + 1


@dataclasses.dataclass(frozen=True)
class DepthChoice:
    """How the depth D, the first scale that is pruned, is found.

    Attributes:
      rule: ``"le"`` or ``"ge"``: the scale after the first one whose rho is at most, or at least, ``tau``;
        ``"fixed"``: ``depth``.
      tau: threshold on rho, the salient share; for a fixed depth the median of rho at the stable scales.
      depth: the best single depth.
      min_depth, max_depth: range of depths.
      errors: by rule, the mean distance between the depth it gives an image and the scale after its stable one.
    """

    rule: DepthRule
    tau: float
    depth: int
    min_depth: int
    max_depth: int
    errors: dict[str, float]


def choose_depth(salient_share: Float[np.ndarray, "B scales"], stable: Int[np.ndarray, " B"]) -> DepthChoice:
    """The rule that best predicts the scale after each image's first stable one.

    The paper contradicts itself about the direction (rho at most or at least tau), so both are tried, each with the
    tau that serves it best (of several, the nearest to the median of rho at the stable scales), beside one depth for
    all images: the median. The single depth wins ties: where depths hardly vary there is nothing to predict. Bounds
    are the 5th and 95th percentile of the depths, within 2 and the number of scales. An image that does not cross tau
    within the bounds is not pruned, which counts as the depth after the last scale.

    Args:
      salient_share: rho of every image and scale.
      stable: each image's first stable scale.
    """
    num_scales = salient_share.shape[1]
    depths = stable + 1
    low, high = (int(np.percentile(depths, percent, method="nearest")) for percent in (5, 95))
    low, high = (min(max(depth, 2), num_scales) for depth in (low, high))
    # The upper median: of two single depths that are equally good the one that prunes less.
    fixed = int(min(np.sort(depths)[len(depths) // 2], num_scales))
    centre = float(np.median(salient_share[np.arange(len(stable)), stable - 1]))
    errors = {"fixed": float(np.mean(np.abs(depths - fixed)))}
    thresholds = {"fixed": centre}
    directions: tuple[DepthRule, ...] = ("le", "ge")
    for rule in directions:
        candidates = {
            tau: float(np.mean(np.abs(depths - _first_crossing(salient_share, rule, tau, low, high))))
            for tau in _thresholds(salient_share[:, low - 2 : high - 1], centre)
        }
        errors[rule] = min(candidates.values())
        best = (tau for tau, error in candidates.items() if error == errors[rule])
        thresholds[rule] = min(best, key=lambda tau: abs(tau - centre))
    rules: tuple[DepthRule, ...] = ("fixed", *directions)
    rule = min(rules, key=errors.__getitem__)
    return DepthChoice(rule, thresholds[rule], fixed, low, high, errors)


def predicted_depths(salient_share: Float[np.ndarray, "B scales"], choice: DepthChoice) -> Int[np.ndarray, " B"]:
    """Every image's depth by a chosen rule; one more than there are scales for an image that is not pruned."""
    if choice.rule == "fixed":
        return np.full(len(salient_share), choice.depth)
    return _first_crossing(salient_share, choice.rule, choice.tau, choice.min_depth, choice.max_depth)


def _first_crossing(
    salient_share: np.ndarray, rule: DepthRule, tau: float, low: int, high: int
) -> Int[np.ndarray, " B"]:
    tested = salient_share[:, low - 2 : high - 1]  # D = s is decided by rho after scale s - 1
    crossed = tested <= tau if rule == "le" else tested >= tau
    return np.where(crossed.any(axis=1), low + np.argmax(crossed, axis=1), salient_share.shape[1] + 1)


def _thresholds(values: np.ndarray, centre: float) -> list[float]:
    """Every threshold that makes a difference, halfway between neighbouring values, and ``centre``."""
    levels = np.unique(np.concatenate([[0.0, 1.0], values.ravel()]))
    return [centre, *((levels[1:] + levels[:-1]) / 2).tolist()]


def choose_beta(spectrum_ratio: Float[np.ndarray, "B L"]) -> float:
    """The beta of R = exp(-beta (varrho - 1)) that gives the median layer R = 0.5.

    Our choice, the paper states none: ``ln 2 / (median over layers of the mean over images of varrho - 1)``.

    Raises:
      UserInputError: the median layer's maps all have one dominant pattern, or none, so that no beta does.
    """
    median = float(np.median(np.mean(spectrum_ratio, axis=0)))
    if not 1.0 < median < math.inf:
        raise UserInputError(
            f"median ratio of singular values {median:g}",
            "must be finite and above 1 for layers to be told apart",
            "measure a model with a finer representative scale, or more images",
        )
    return math.log(2.0) / (median - 1.0)


def score_patterns(scores: Float[np.ndarray, "B L"], count: int = MAX_PATTERNS) -> Float[np.ndarray, "patterns L"]:
    """At most ``count`` typical rows of ``scores``, in lexicographic order: centroids of a k-means clustering.

    Deterministic: it starts from the row farthest from the mean, and each further start is the row farthest from those
    before. Equal rows are one, so there may be fewer patterns than ``count``.
    """
    centres = scores.mean(axis=0, keepdims=True)
    starts: list[np.ndarray] = []
    for _ in range(count):
        distances = _squared_distances(scores, centres).min(axis=1)
        farthest = int(np.argmax(distances))
        if starts and distances[farthest] == 0:
            break
        starts.append(scores[farthest])
        centres = np.stack(starts)
    nearest = np.full(len(scores), -1)
    for _ in range(_MAX_ROUNDS):
        previous, nearest = nearest, _squared_distances(scores, centres).argmin(axis=1)
        if np.array_equal(nearest, previous):
            break
        centres = np.stack([scores[nearest == index].mean(axis=0) for index in np.unique(nearest)])
    return centres[np.lexsort(centres.T[::-1])]


def _squared_distances(rows: np.ndarray, centres: np.ndarray) -> Float[np.ndarray, "B centres"]:
    return np.sum((rows[:, None] - centres[None]) ** 2, axis=2)


def largest_passing(passes: Callable[[int], bool], last: int) -> int:
    """The largest of 0 to ``last`` that passes, by bisection: 0 is taken to pass, and nothing after a failure does."""
    low, high = 0, last + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if passes(middle) else (low, middle)
    return low
