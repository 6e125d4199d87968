"""What a scale measured on its way, per image."""

from __future__ import annotations

from typing import Any, NamedTuple


class ScaleStatistics(NamedTuple):
    """Arrays of one scale; what was not measured has a length of 0 where the layers or tokens would be.

    Attributes:
      salient_share: the paper's rho: share of tokens whose entropy, averaged over layers and heads, lies below the
        mean; ``[B]``, NaN if not measured.
      spectrum_ratio: the paper's varrho of every layer's map, ``[B, L]``.
      entropy: the maps, in nats, ``[B, L, T]``; tokens that a layer did not compute have their resized old values.
      kept: which tokens each layer computed, bool ``[B, L, T]``.
    """

    salient_share: Any
    spectrum_ratio: Any
    entropy: Any
    kept: Any

    def image(self, index: int) -> ScaleStatistics:
        """One image's part, without the batch axis."""
        return ScaleStatistics(*(field[index] for field in self))
