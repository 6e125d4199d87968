"""How much is computed: pruning ratios, token buckets, region guarantees and layer groups, all plain integers.

Everything here is decided before a device is touched and becomes part of a static plan, so this file needs neither
jax nor numpy.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from toprovar_jax.errors import UserInputError
from toprovar_jax.schedule import Grid

_ATTENTION_TILE = 128
_SMALLEST_REGION = 4


def prune_ratio(alpha_min: float, alpha_max: float, weight: float) -> float:
    """Share of the tokens of one layer at one scale that is not computed, in [0, 1].

    Our choice: Eq. 6 of the paper with the layer's and the scale's factor only. There a token's score multiplies the
    weight as well, but as printed (Eq. 5) that score is of the order of one over the number of tokens.

    Args:
      alpha_min: the ratio where ``weight`` is 0: layers that carry structure, first scale.
      alpha_max: the ratio where ``weight`` is 1: layers that carry detail, last scale.
      weight: phi(s) R(l), the scale's position in (0, 1] times the layer's detail score in [0, 1].
    """
    return min(1.0, max(0.0, alpha_min + (alpha_max - alpha_min) * weight))


def default_bucket(tokens: int) -> int:
    """Granularity of kept-token counts at a scale of ``tokens`` tokens: a power of two, at most 128.

    128 is the query tile of the attention kernels. Smaller scales take about an eighth of their tokens, so that
    there is something to choose from at every size.
    """
    return min(_ATTENTION_TILE, 1 << max(1, tokens // 8).bit_length() - 1)


def kept_tokens(tokens: int, ratio: float, bucket: int | None = None) -> int:
    """How many of ``tokens`` are computed when the share ``ratio`` is pruned.

    The count is rounded up to a multiple of ``bucket`` (default: :func:`default_bucket`), so that few shapes are
    compiled and attention tiles are full, and is never more than ``tokens``. Ratio 0 keeps all, ratio 1 none.
    """
    bucket = default_bucket(tokens) if bucket is None else bucket
    return min(tokens, _ceil(tokens * (1.0 - ratio) / bucket) * bucket)


def region_grid(grid: Grid, regions: int) -> Grid:
    """Regions down and across a token grid: ``regions`` per axis, fewer where they would be smaller than 4 tokens."""
    height, width = (max(1, min(regions, size // _SMALLEST_REGION)) for size in grid)
    return height, width


def region_along(size: int, regions: int) -> tuple[int, ...]:
    """The region of every position of an axis: contiguous runs whose lengths differ by at most one."""
    return tuple(position * regions // size for position in range(size))


def region_minimums(grid: Grid, regions: int, share: float) -> tuple[int, ...]:
    """Tokens that each region keeps at least, in raster order: ``share`` of its tokens, rounded up.

    Args:
      grid: token grid.
      regions: wanted regions per axis (see :func:`region_grid`).
      share: guaranteed share in [0, 1]; 0 guarantees nothing.
    """
    down, across = (Counter(region_along(*axis)) for axis in zip(grid, region_grid(grid, regions), strict=True))
    return tuple(_ceil(share * down[row] * across[column]) for row in sorted(down) for column in sorted(across))


def padded_sizes(batch: int) -> tuple[int, ...]:
    """Sizes that parts of a batch are padded to: powers of two below it, and the batch itself."""
    return (*(1 << power for power in range((batch - 1).bit_length())), batch)


def layer_groups(scores: Sequence[Sequence[float]], max_groups: int) -> tuple[tuple[int, int], ...]:
    """Contiguous groups of layers that share one budget: ``((start, stop), ...)`` covering all layers.

    The partition minimises the squared deviation of the scores from their group's mean, summed over layers and
    patterns (optimal one-dimensional clustering of an ordered sequence, by dynamic programme). It has the fewest
    groups that reach the minimum, and neighbours with equal scores stay together.

    Args:
      scores: per pattern one score per layer; all patterns have the same layers and get the same groups.
      max_groups: the most groups there may be.

    Raises:
      UserInputError: no layers, patterns of different lengths, or fewer than one group.
    """
    lengths = {len(pattern) for pattern in scores}
    if len(lengths) != 1 or 0 in lengths:
        raise UserInputError(
            f"layer scores of lengths {sorted(lengths)}",
            "every pattern must score the same layers, one at least",
            "give one score per layer in every pattern",
        )
    if max_groups < 1:
        raise UserInputError(f"max_groups {max_groups}", "must be at least 1", "8 is the default")
    layers = list(zip(*scores, strict=True))
    # Only where the scores change can a group start: an optimal partition never gains by splitting equal neighbours.
    edges = [0, *(k for k in range(1, len(layers)) if layers[k] != layers[k - 1]), len(layers)]
    deviation = _segment_deviations(layers, edges)
    runs = len(edges) - 1
    cost = [deviation[0][: runs + 1]]
    starts = [[0] * (runs + 1)]
    for groups in range(2, min(max_groups, runs) + 1):
        cost.append([math.inf] * (runs + 1))
        starts.append([0] * (runs + 1))
        for stop in range(groups, runs + 1):
            cost[-1][stop], starts[-1][stop] = min(
                (cost[-2][start] + deviation[start][stop], start) for start in range(groups - 1, stop)
            )
    rounding = 1e-12 * deviation[0][runs]
    group = next(k for k, costs in enumerate(cost) if costs[runs] <= cost[-1][runs] + rounding)
    found, stop = [], runs
    while group >= 0:
        start = starts[group][stop]
        found.append((edges[start], edges[stop]))
        group, stop = group - 1, start
    return tuple(reversed(found))


def _segment_deviations(layers: Sequence[tuple[float, ...]], edges: Sequence[int]) -> list[list[float]]:
    """Squared deviation from the mean of layers ``edges[i] .. edges[j] - 1``, at ``[i][j]``; 0 where j <= i."""
    table = [[0.0] * len(edges) for _ in edges]
    for i, start in enumerate(edges):
        for j in range(i + 1, len(edges)):
            segment = layers[start : edges[j]]
            for values in zip(*segment, strict=True):
                mean = math.fsum(values) / len(values)
                table[i][j] += math.fsum((value - mean) ** 2 for value in values)
    return table


def _ceil(value: float) -> int:
    """Smallest integer not below ``value``, where 30.000000000000004 (100 tokens, 70 % pruned) counts as 30."""
    return math.ceil(round(value, 9))
