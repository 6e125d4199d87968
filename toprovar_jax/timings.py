"""Where the time of a run went."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds spent, with what happens only once apart from what every picture costs.

    Attributes:
      load: reading the weights and placing them on the device.
      compile: tracing and compiling; zero once warm.
      text: the text encoder.
      transformer: all scales of the transformer.
      decoder: the image tokenizer's decoder.
      total: wall-clock time of everything, which also covers what the parts above leave out.
    """

    load: float = 0.0
    compile: float = 0.0
    text: float = 0.0
    transformer: float = 0.0
    decoder: float = 0.0
    total: float = 0.0

    @property
    def steady(self) -> float:
        """What the same pictures cost again, once loaded and compiled."""
        return self.text + self.transformer + self.decoder

    def as_dict(self) -> dict[str, float]:
        """All fields and ``steady``, ready for JSON."""
        return {**dataclasses.asdict(self), "steady": self.steady}

    @classmethod
    def combined(cls, parts: Iterable[Timings], *, total: float) -> Timings:
        """The timings of several calls of one pipeline together.

        Args:
          parts: the timings of each call. Their ``load`` is the same loading reported again, so it counts once.
          total: wall-clock seconds of the whole.
        """
        parts = list(parts)
        return cls(
            load=max((part.load for part in parts), default=0.0),
            compile=math.fsum(part.compile for part in parts),
            text=math.fsum(part.text for part in parts),
            transformer=math.fsum(part.transformer for part in parts),
            decoder=math.fsum(part.decoder for part in parts),
            total=total,
        )
