"""Finds the coloured object in a picture without knowing how the picture was made: by chroma, hue and darkness."""

import colorsys
from typing import NamedTuple

import jax
import jax.numpy as jnp

from toprovar_jax.scenes.world import COLOURS
from toprovar_jax.shapes import Array, Bool, Float, Int

#: Pictures are judged with a shorter side of this many pixels.
WORKING_SIDE = 64

_LEAST_CHROMA = 0.13  # noise of 0.05 on a grey floor stays below this after smoothing
_DARK_BELOW = 0.215  # the deepest shadow on the floor is at 0.26
_DARK_CHROMA = 0.10
_LEAST_AREA, _MOST_AREA = 0.03, 0.45
_LEAST_PURITY, _LEAST_FILL, _LEAST_ALONE = 0.70, 0.38, 0.90
_BLACK = list(COLOURS).index("black")
_HUES = [colorsys.rgb_to_hsv(*rgb)[0] for rgb in COLOURS.values()]


class Segment(NamedTuple):
    """The largest connected region that differs from a grey floor, in each picture.

    Attributes:
      found: whether the region is as large, as compact and as uniform in hue as an object is, and is the only one.
      colour: index into ``COLOURS`` of most of the region's pixels.
      mask: the region.
      box: its bounding box (top, bottom, left, right) in pixels, ends exclusive.
    """

    found: Bool[Array, " B"]
    colour: Int[Array, " B"]
    mask: Bool[Array, "B h w"]
    box: Int[Array, "B 4"]


def segment(images: Float[Array, "B h w 3"]) -> Segment:
    """Segments pictures (values in [0, 1]) whose shorter side has about ``WORKING_SIDE`` pixels. Traceable."""
    red, green, blue = (_smooth(images[..., channel]) for channel in range(3))
    value, low = jnp.maximum(jnp.maximum(red, green), blue), jnp.minimum(jnp.minimum(red, green), blue)
    chroma = value - low
    vivid = chroma > jnp.maximum(_LEAST_CHROMA, 0.30 * value)
    dark = (value < _DARK_BELOW) & (chroma < _DARK_CHROMA)
    everything = _majority(vivid | dark)
    mask = _largest_region(everything)

    kinds = _nearest_colour(red, green, blue, value, chroma)
    kinds = jnp.where(vivid, kinds, _BLACK)
    # A vivid pixel counts by its chroma: dark sides carry little hue, and every object's soft edge is partly grey.
    weight = jnp.where(mask, jnp.where(vivid, 0.05 + chroma, 0.15), 0.0)
    votes = jnp.stack([jnp.sum(jnp.where(kinds == k, weight, 0.0), axis=(1, 2)) for k in range(len(COLOURS))], axis=-1)
    purity = votes.max(axis=-1) / jnp.maximum(votes.sum(axis=-1), 1e-6)

    box = _bounding_box(mask)
    area = mask.sum(axis=(1, 2)).astype(jnp.float32)
    box_area = ((box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])).astype(jnp.float32)
    share = area / float(min(images.shape[1], images.shape[2]) ** 2)
    alone = area > _LEAST_ALONE * everything.sum(axis=(1, 2)).astype(jnp.float32)
    sized = (share > _LEAST_AREA) & (share < _MOST_AREA)
    found = alone & sized & (purity > _LEAST_PURITY) & (area > _LEAST_FILL * box_area)
    return Segment(found, votes.argmax(axis=-1).astype(jnp.int32), mask, box)


def _smooth(channel: Array) -> Array:
    """Mean over 3x3 pixels, borders repeated."""
    padded = jnp.pad(channel, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    return (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) * (1.0 / 9.0)


def _majority(mask: Array) -> Array:
    return _smooth(mask.astype(jnp.float32)) > 0.5


def _nearest_colour(red: Array, green: Array, blue: Array, value: Array, chroma: Array) -> Array:
    """Index of the colour whose hue is nearest; black is not among the candidates."""
    safe = jnp.maximum(chroma, 1e-6)
    sixth = jnp.where(
        value == red,
        (green - blue) / safe,
        jnp.where(value == green, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe),
    )
    hue = sixth / 6.0
    distances = [jnp.abs((hue - own + 0.5) % 1.0 - 0.5) + (1.0 if k == _BLACK else 0.0) for k, own in enumerate(_HUES)]
    return jnp.stack(distances, axis=-1).argmin(axis=-1).astype(jnp.int32)


def _largest_region(mask: Array) -> Array:
    """Keeps the largest 4-connected region of each mask: every pixel takes the largest label that reaches it."""
    batch, height, width = mask.shape
    own = jnp.arange(1, height * width + 1, dtype=jnp.int32).reshape(1, height, width)

    def spread(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        labels, _ = carry
        padded = jnp.pad(labels, ((0, 0), (1, 1), (1, 1)))
        across = jnp.maximum(padded[:, 1:-1, :-2], padded[:, 1:-1, 2:])
        down = jnp.maximum(padded[:, :-2, 1:-1], padded[:, 2:, 1:-1])
        wider = jnp.where(mask, jnp.maximum(jnp.maximum(across, down), labels), 0)
        return wider, (wider != labels).any()

    start = jnp.where(mask, own, 0)
    labels, _ = jax.lax.while_loop(lambda carry: carry[1], spread, (start, jnp.array(True)))
    flat = labels.reshape(batch, -1)
    sizes = jax.vmap(lambda row: jnp.bincount(row, length=height * width + 1))(flat)
    largest = sizes[:, 1:].argmax(axis=-1).astype(jnp.int32) + 1
    return mask & (labels == largest[:, None, None])


def _bounding_box(mask: Array) -> Array:
    """(top, bottom, left, right) with exclusive ends; the whole picture where the mask is empty."""
    ends = []
    for axis in (2, 1):
        line = mask.any(axis=axis)
        line = line | ~line.any(axis=-1, keepdims=True)
        ends += [line.argmax(axis=-1), line.shape[-1] - line[:, ::-1].argmax(axis=-1)]
    return jnp.stack(ends, axis=-1).astype(jnp.int32)
