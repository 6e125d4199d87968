"""Inputs for the attention tests."""

import numpy as np

from pallas_kernels.attention.float64 import attend

__all__ = ["attend", "draw", "relative"]


def draw(seed, batch, length, num_keys, heads, width, *, spread=1.0):
    """Random float32 ``q, k, v``; ``spread`` is the standard deviation of the scores at scale 1."""
    random = np.random.default_rng(seed)
    q = random.standard_normal((batch, length, heads, width)) * spread / np.sqrt(width)
    k, v = (random.standard_normal((batch, num_keys, heads, width)) for _ in range(2))
    return tuple(np.float32(x) for x in (q, k, v))


def relative(got, want) -> float:
    """Largest error over the largest magnitude (at least one)."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.max(np.abs(got - want), initial=0.0) / max(1.0, np.max(np.abs(want), initial=0.0)))
