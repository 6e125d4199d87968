"""What a pipeline returns: pictures, what made them, and where the time went."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from PIL import Image

from toprovar_jax.shapes import Array, Float
from toprovar_jax.timings import Timings

__all__ = ["PipelineOutput", "Timings"]


@dataclasses.dataclass(frozen=True, eq=False)
class PipelineOutput:
    """The pictures of one call, one entry per picture.

    Attributes:
      images: PIL pictures, or an array in [0, 1] ``[B, height, width, 3]`` (numpy or jax, as was asked for).
      seeds: the seed that makes each picture again.
      prompts: the prompt of each picture.
      timings: where the time went, in seconds.
      plan: the generation plan, as it was before anything was known of the pictures.
      plans: the plan that each picture went by.
      statistics: per scale what was measured of each picture, NaN or empty where it was not
        (:class:`~toprovar_jax.acceleration.ScaleStatistics`, numpy).
      warnings: one line each: what was done differently from what was asked.
      bits: the sampled tokens, one array per scale, if they were asked for.
    """

    images: list[Image.Image] | Float[np.ndarray, "B h w 3"] | Float[Array, "B h w 3"]
    seeds: tuple[int, ...]
    prompts: tuple[str, ...]
    timings: Timings
    plan: Any
    plans: tuple[Any, ...] = ()
    statistics: tuple[Any, ...] = ()
    warnings: tuple[str, ...] = ()
    bits: Any = None
