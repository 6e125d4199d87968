"""What a comparison with the reference finds, and the bounds it is held to (tests/golden/README.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

EXACT = 0.0
TEXT_BOUND = 2e-5
RAW_BOUND = 5e-5
BLENDED_HIDDEN_BOUND = 2e-4
GUIDED_BOUND = 1e-4
RESIZED_BOUND = 1e-5
CONVOLUTION_BOUND = 5e-5
IMAGE_BOUND = 1e-4
PIXEL_SHARE_BOUND = 1e-3
BLOCK_BOUND = 5e-5
SCALED_QUERY_BOUND = 1e-4
ROPE_BOUNDS = {0: 1e-6, 1: 1e-5, 2: 1e-6}


@dataclasses.dataclass(frozen=True)
class Measured:
    """One array against the reference: ``error`` (or number of differing values, where ``bound`` is 0) and bound."""

    name: str
    error: float
    bound: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # False for NaN


class Reference:
    """The arrays of one npz file; remembers which were looked at, and what a comparison found."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.arrays = arrays
        self.unused = set(arrays)
        self.measured: list[Measured] = []

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def __getitem__(self, name: str) -> np.ndarray:
        self.unused.discard(name)
        return self.arrays[name]

    def compare(self, name: str, ours: Any, bound: float, *, note: str = "") -> None:
        """Measure ``ours`` against array ``name``; an array that is absent, or shaped otherwise, is over any bound."""
        ours = np.asarray(ours)
        if name not in self.arrays:
            self.measured.append(Measured(name, float("inf"), bound, "missing"))
            return
        theirs = self[name]
        if ours.shape != theirs.shape:
            self.measured.append(Measured(name, float("inf"), bound, f"shape {ours.shape}, reference {theirs.shape}"))
        elif bound == EXACT:
            self.measured.append(Measured(name, float(np.sum(ours != theirs)), bound, note))
        else:
            error = np.max(np.abs(ours.astype(np.float64) - theirs.astype(np.float64)), initial=0.0)
            self.measured.append(Measured(name, float(error), bound, note))

    def state(self, name: str, error: float, bound: float, note: str = "") -> None:
        """Record a finding that is not the distance of two arrays."""
        self.measured.append(Measured(name, float(error), bound, note))


def channels_first(x: Any) -> np.ndarray:
    """The reference's layout, ``[B, C, h, w]``."""
    return np.moveaxis(np.asarray(x), -1, 1)
