"""The judge's network: finds the objects of a picture, what they are and where, at one sixteenth of its pixels.

A convolutional network looks at cells of 4 by 4 pixels. Each cell says whether the middle of an object is there, and
what the object is; the local maxima are the objects (the idea of CenterNet, arXiv:1904.07850).
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toprovar_jax.scenes.world import (
    CAMERA_DISTANCE,
    CAMERA_FOCAL,
    CAMERA_PITCH,
    CAMERA_TARGET_HEIGHT,
    COLOURS,
    SHAPES,
    SIZES,
)
from toprovar_jax.shapes import Array, Bool, Float, Int

#: Pictures are looked at with a shorter side of this many pixels.
WORKING_SIDE = 64
#: Pixels along each side of a cell.
CELL = 4
#: Most objects that are found in a picture.
MOST_DETECTIONS = 8
#: An object's middle is this far above the floor, in units of its size.
MIDDLE = 0.7
#: Objects are found from this confidence on.
LEAST_CONFIDENCE = 0.5
#: Objects of this radius and more are large.
LARGE_FROM = math.sqrt(SIZES[0] * SIZES[1])

#: What each cell says -> in how many numbers: whether the middle of an object is near, the way there (right, down; in
#: cells), what the object is, and how far it stands from :func:`usual_position`.
HEADS = {"object": 1, "offset": 2, "shape": len(SHAPES), "colour": len(COLOURS), "size": len(SIZES), "floor": 2}

_STEM, _WIDTH, _BLOCKS = 32, 48, 4


class Detections(NamedTuple):
    """The objects of each picture, the most confident first. Where ``found`` is false, the rest means nothing.

    Attributes:
      found: whether there is such an object.
      shape: index into ``SHAPES``.
      colour: index into ``COLOURS`` (in their order).
      size: index into ``SIZES``.
      position: where it stands on the floor, (x, z) in world units.
      centre: where its middle is in the picture, (right, down) from the picture's middle in half shorter sides.
      confidence: probability that there is an object, 0 to 1.
    """

    found: Bool[Array, "B D"]
    shape: Int[Array, "B D"]
    colour: Int[Array, "B D"]
    size: Int[Array, "B D"]
    position: Float[Array, "B D 2"]
    centre: Float[Array, "B D 2"]
    confidence: Float[Array, "B D"]


def initial_weights(seed: int) -> dict[str, np.ndarray]:
    """Weights before training: the blocks do nothing yet, and no cell expects an object."""
    rng = np.random.default_rng(seed)

    def kernel(*shape: int) -> np.ndarray:
        fan_in = math.prod(shape[-4:-1])
        return rng.normal(0.0, math.sqrt(2.0 / fan_in), shape).astype(np.float32)

    outputs = sum(HEADS.values())
    bias = np.zeros(outputs, np.float32)
    bias[0] = -3.0
    return {
        "stem": kernel(3, 3, 12, _STEM),
        "stem_bias": np.zeros(_STEM, np.float32),
        "down": kernel(3, 3, _STEM, _WIDTH),
        "down_bias": np.zeros(_WIDTH, np.float32),
        "first": kernel(_BLOCKS, 3, 3, _WIDTH, _WIDTH),
        "first_bias": np.zeros((_BLOCKS, _WIDTH), np.float32),
        "second": 0.1 * kernel(_BLOCKS, 3, 3, _WIDTH, _WIDTH),
        "second_bias": np.zeros((_BLOCKS, _WIDTH), np.float32),
        "head": 0.3 * kernel(_WIDTH, outputs),
        "head_bias": bias,
    }


def to_working_size(images: Float[Array, "B h w 3"]) -> Float[Array, "B _ _ 3"]:
    """Resized, antialiased, so that the shorter side has ``WORKING_SIDE`` pixels."""
    batch, height, width, channels = images.shape
    scale = WORKING_SIDE / min(height, width)
    if scale == 1.0:
        return images
    return jax.image.resize(images, (batch, round(height * scale), round(width * scale), channels), "linear")


def feature_maps(
    weights: Mapping[str, Array], images: Float[Array, "B h w 3"]
) -> tuple[Float[Array, "B down right F"], Float[Array, "B down right F"]]:
    """The last two maps of features, cell by cell. Sides that are no multiple of a cell are continued to one."""
    batch, height, width, _ = images.shape
    pixels = jnp.pad(images, ((0, 0), (0, -height % CELL), (0, -width % CELL), (0, 0)), mode="edge")
    rows, columns = pixels.shape[1] // 2, pixels.shape[2] // 2
    folded = pixels.reshape(batch, rows, 2, columns, 2, 3).transpose(0, 1, 3, 2, 4, 5)
    folded = 2.0 * folded.reshape(batch, rows, columns, 12) - 1.0
    features = jax.nn.gelu(_convolve(folded, weights["stem"], weights["stem_bias"]))
    features = _convolve(features, weights["down"], weights["down_bias"], stride=2)
    before = features
    for index in range(_BLOCKS):
        before = features
        inner = _convolve(_normalise(features), weights["first"][index], weights["first_bias"][index])
        features = features + _convolve(jax.nn.gelu(inner), weights["second"][index], weights["second_bias"][index])
    return _normalise(before), _normalise(features)


def heads(weights: Mapping[str, Array], features: Float[Array, "B down right F"]) -> dict[str, Array]:
    """What each cell says: the numbers of ``HEADS``, ``[B, down, right, n]``; of "object" the logit, without ``n``."""
    numbers = features @ weights["head"] + weights["head_bias"][None, None, None]
    ends = np.cumsum(list(HEADS.values()))[:-1].tolist()
    said = dict(zip(HEADS, jnp.split(numbers, ends, axis=-1), strict=True))
    return said | {"object": said["object"][..., 0]}


def decode(said: Mapping[str, Array], height: int, width: int) -> Detections:
    """The objects that the cells of pictures of ``height`` and ``width`` pixels speak of."""
    logits = said["object"]
    batch = logits.shape[0]
    around = jax.lax.reduce_window(logits, -jnp.inf, jax.lax.max, (1, 3, 3), (1, 1, 1), "SAME")
    peaks = jnp.where(logits >= around, jax.nn.sigmoid(logits), 0.0)
    confidence, cell = jax.lax.top_k(peaks.reshape(batch, -1), MOST_DETECTIONS)

    def pick(values: Array) -> Array:
        flat = values.reshape(batch, -1, values.shape[-1])
        return jnp.take_along_axis(flat, cell[..., None], axis=1)

    where = cell_centres(logits.shape[1], logits.shape[2], height, width)
    where = jnp.broadcast_to(where[None], (batch, *where.shape))
    middle = pick(where)
    return Detections(
        found=confidence > LEAST_CONFIDENCE,
        shape=pick(said["shape"]).argmax(axis=-1).astype(jnp.int32),
        colour=pick(said["colour"]).argmax(axis=-1).astype(jnp.int32),
        size=pick(said["size"]).argmax(axis=-1).astype(jnp.int32),
        position=usual_position(middle) + pick(said["floor"]),
        centre=middle + pick(said["offset"]) * (2.0 * CELL / min(height, width)),
        confidence=confidence,
    )


def cell_centres(down: int, right: int, height: int, width: int) -> Float[Array, "down right 2"]:
    """The middles of the cells, (right, down) from the picture's middle in half shorter sides."""
    half = 0.5 * min(height, width)
    across = ((jnp.arange(right, dtype=jnp.float32) + 0.5) * CELL - 0.5 * width) / half
    along = ((jnp.arange(down, dtype=jnp.float32) + 0.5) * CELL - 0.5 * height) / half
    return jnp.stack(jnp.meshgrid(across, along), axis=-1)


def usual_position(centre: Float[Array, "*N 2"]) -> Float[Array, "*N 2"]:
    """Where an object of medium size stands whose middle appears at ``centre``: (x, z) on the floor.

    The inverse of ``world.projected``. At and above the horizon it is some place far away.
    """
    sine, cosine = math.sin(CAMERA_PITCH), math.cos(CAMERA_PITCH)
    rise = MIDDLE * LARGE_FROM - CAMERA_TARGET_HEIGHT
    right, down = centre[..., 0], centre[..., 1]
    slope = jnp.maximum(CAMERA_FOCAL * sine + cosine * down, 0.5)
    z = -(CAMERA_FOCAL * rise * cosine + down * (CAMERA_DISTANCE - rise * sine)) / slope
    x = right * (CAMERA_DISTANCE + z * cosine - rise * sine) / CAMERA_FOCAL
    return jnp.stack([x, z], axis=-1)


def _normalise(features: Array) -> Array:
    return features * jax.lax.rsqrt(jnp.mean(features * features, axis=-1, keepdims=True) + 1e-6)


def _convolve(features: Array, kernel: Array, bias: Array, stride: int = 1) -> Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    out = jax.lax.conv_general_dilated(features, kernel, (stride, stride), "SAME", dimension_numbers=numbers)
    return out + bias[None, None, None]
