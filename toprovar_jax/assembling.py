"""From what was drawn, in parts and batches, to the pictures of a call in the order in which they were asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from PIL import Image

from toprovar_jax.acceleration import GenerationPlan, ScaleStatistics
from toprovar_jax.drivers import Drawn
from toprovar_jax.images import to_uint8

OutputType = Literal["pil", "np", "jax"]


class Picture(NamedTuple):
    """One image of a batch's result."""

    image: Any
    bits: tuple[np.ndarray, ...]
    statistics: tuple[ScaleStatistics, ...]
    plan: GenerationPlan


def in_order(drawn: Sequence[Drawn]) -> list[Picture]:
    """The images of all parts, in the order in which they were asked for."""
    pictures: dict[int, Picture] = {}
    for part in drawn:
        for row, index in enumerate(part.indices):
            measured = tuple(statistics.image(row) for statistics in part.statistics)
            bits = tuple(np.asarray(scale[row]) for scale in part.bits)
            pictures[index] = Picture(part.images[row], bits, measured, part.plan)
    return [pictures[index] for index in sorted(pictures)]


def assemble(
    drawn: Sequence[Drawn], output_type: OutputType
) -> tuple[Any, tuple[np.ndarray, ...], tuple[ScaleStatistics, ...]]:
    """Pictures in the form that was asked for, and bits and statistics per scale.

    Pictures that did not run a scale have no bits there, and nothing measured: the arrays end with the last scale that
    all pictures ran.
    """
    pictures = in_order(drawn)
    scales = min(len(picture.bits) for picture in pictures)
    bits = tuple(np.stack([picture.bits[scale] for picture in pictures]) for scale in range(scales))
    statistics = tuple(
        ScaleStatistics(*_stacked(zip(*(picture.statistics[scale] for picture in pictures), strict=True)))
        for scale in range(scales)
    )
    if output_type == "jax" and len(drawn) == 1:
        return drawn[0].images, bits, statistics
    images = np.stack([np.asarray(picture.image) for picture in pictures])
    if output_type == "jax":
        return jax.device_put(images), bits, statistics
    if output_type == "np":
        return images, bits, statistics
    return [Image.fromarray(picture) for picture in to_uint8(images)], bits, statistics


def _stacked(fields: Iterable[tuple[np.ndarray, ...]]) -> Iterator[np.ndarray]:
    """Per field all pictures' values; nothing where some have none, as pictures that go different ways may."""
    for values in fields:
        alike = len({np.shape(value) for value in values}) == 1
        yield np.stack(values) if alike else np.zeros((len(values), 0), np.asarray(values[0]).dtype)
