"""Which learned position bias belongs to which distance between two tokens."""

from __future__ import annotations

import numpy as np

from toprovar_jax.shapes import Int


def bucket_starts(buckets: int, max_distance: int) -> tuple[int, ...]:
    """Smallest distance of each bucket of one direction, in tokens, ascending; ``buckets // 2`` of them.

    The first half holds one distance each; from there on the starts grow geometrically towards ``max_distance``.
    With ``m = buckets // 4``, bucket ``m + j`` starts at the smallest n with ``m ln(n/m) >= j ln(max_distance/m)``.
    Both sides are compared as integer powers: logarithms could round to the wrong side of a boundary.
    """
    exact = buckets // 4
    starts = list(range(exact))
    distance = exact
    for step in range(exact):
        while distance**exact * exact**step < max_distance**step * exact**exact:
            distance += 1
        starts.append(distance)
    return tuple(starts)


def position_buckets(offsets: Int[np.ndarray, " T"], *, buckets: int, max_distance: int) -> Int[np.ndarray, " T"]:
    """Bucket of every offset ``key position - query position`` (int32 in ``[0, buckets)``).

    Host-side, since offsets are known when the computation is traced. Keys after the query use the upper half.
    Source: the released encoder's bidirectional buckets (32 buckets, distances up to 128 tokens).
    """
    direction = np.where(offsets > 0, buckets // 2, 0)
    steps = np.searchsorted(np.asarray(bucket_starts(buckets, max_distance)), np.abs(offsets), side="right") - 1
    return (direction + steps).astype(np.int32)
