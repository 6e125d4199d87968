"""The judge: says which object a picture shows, and where, without having seen any generator.

Colour comes from segmentation. Shape and position come from a network of one hidden layer that looks at the segmented
crop; it is trained only on renders: disturbed ones, which it must recognise, and spoiled ones, which it must refuse, so
that a melted blob does not pass for the nearest shape. Its weights travel with the package and are made anew by::

    python -m toprovar_jax.scenes.judge --train judge.npz
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from toprovar_jax.errors import UserInputError
from toprovar_jax.scenes.renderer import render
from toprovar_jax.scenes.segmentation import WORKING_SIDE, Segment, segment
from toprovar_jax.scenes.world import SHAPES, sample_scenes
from toprovar_jax.shapes import Array, Bool, Float, Int, Key, UInt8

_AnyArray = Array | np.ndarray
_WEIGHTS = pathlib.Path(__file__).with_name("judge.npz")
_CROP = 20
_HIDDEN = 64
_NONE = len(SHAPES)  # the network's class for what is no known shape
_OBJECT_CONTRAST = 0.30  # every object differs more than this from the floor somewhere, no shadow does
_TRAIN_IMAGES, _TRAIN_STEPS, _TRAIN_BATCH = 24_576, 6_000, 256


class Verdicts(NamedTuple):
    """What the judge sees in each picture. Where ``found`` is false, the rest means nothing.

    Attributes:
      found: whether there is one object, and it looks like one of the shapes.
      shape: index into ``SHAPES``.
      colour: index into ``COLOURS``.
      position: where it stands on the floor, (x, z) in world units.
      confidence: probability of ``shape`` in the network's opinion.
    """

    found: Bool[Array, " B"]
    shape: Int[Array, " B"]
    colour: Int[Array, " B"]
    position: Float[Array, "B 2"]
    confidence: Float[Array, " B"]


@dataclasses.dataclass(frozen=True)
class Judge:
    """A judge with its weights; ``Judge.load()(images)`` gives ``Verdicts``. Deterministic."""

    weights: Mapping[str, np.ndarray]

    @classmethod
    def load(cls, path: str | pathlib.Path | None = None) -> "Judge":
        """The judge that comes with the package, or the one whose weights are in the npz file ``path``.

        Raises:
          UserInputError: ``path`` is not a file of judge weights.
        """
        file = pathlib.Path(path) if path is not None else _WEIGHTS
        remedy = "make one with: python -m toprovar_jax.scenes.judge --train FILE"
        if not file.is_file():
            raise UserInputError(f"judge weights {file}", "must be an existing npz file", remedy)
        with np.load(file) as archive:
            weights = {name: archive[name].astype(np.float32) for name in archive.files}
        expected = {name: array.shape for name, array in _initial_weights(0).items()}
        if {name: array.shape for name, array in weights.items()} != expected:
            raise UserInputError(f"judge weights {file}", f"must hold the arrays {expected}", remedy)
        return cls(weights)

    def __call__(self, images: Float[_AnyArray, "B h w 3"] | UInt8[_AnyArray, "B h w 3"]) -> Verdicts:
        """Judges pictures of at least 32 pixels a side: floats in [0, 1] or bytes.

        Raises:
          UserInputError: the array is not a batch of pictures of that size.
        """
        if images.ndim != 4 or images.shape[-1] != 3 or min(images.shape[1:3]) < WORKING_SIDE // 2:
            rule = f"must be [B, H, W, 3] with sides of at least {WORKING_SIDE // 2} pixels"
            raise UserInputError(f"images of shape {tuple(images.shape)}", rule, "give larger pictures, in a batch")
        pixels = jnp.asarray(images).astype(jnp.float32) / (255.0 if images.dtype == np.uint8 else 1.0)
        return _judge(dict(self.weights), pixels)


def agreement(verdicts: Verdicts, shape: Int[Array, " B"], colour: Int[Array, " B"]) -> Bool[Array, " B"]:
    """Whether each picture shows one object of the wanted ``shape`` and ``colour``; -1 stands for "any"."""
    right_shape = (shape < 0) | (verdicts.shape == shape)
    right_colour = (colour < 0) | (verdicts.colour == colour)
    return verdicts.found & right_shape & right_colour


@jax.jit
def _judge(weights: dict[str, Array], images: Array) -> Verdicts:
    images = _to_working_size(images)
    parts = segment(images)
    logits, position = _network(weights, *_look(images, parts))
    known = jax.nn.softmax(logits)[:, :_NONE]
    found = parts.found & (logits.argmax(axis=-1) != _NONE)
    return Verdicts(found, known.argmax(axis=-1).astype(jnp.int32), parts.colour, position, known.max(axis=-1))


def _to_working_size(images: Array) -> Array:
    """Resized so that the shorter side has ``WORKING_SIDE`` pixels."""
    batch, height, width, channels = images.shape
    scale = WORKING_SIDE / min(height, width)
    if scale == 1.0:
        return images
    return jax.image.resize(images, (batch, round(height * scale), round(width * scale), channels), "linear")


def _look(images: Array, parts: Segment) -> tuple[Array, Array]:
    """What the network sees: a square crop of mask and relative brightness ``[B, 800]``, and the box ``[B, 4]``."""
    mask = parts.mask.astype(jnp.float32)
    # Brightness relative to the object's own brightest places: the same face pattern for yellow and for black.
    light = jnp.where(parts.mask, images.max(axis=-1), 0.0)
    light = light / jnp.maximum(light.max(axis=(1, 2), keepdims=True), 0.05)
    top, bottom, left, right = (parts.box[:, k].astype(jnp.float32) for k in range(4))
    side = 1.1 * jnp.maximum(bottom - top, right - left)
    middle = 0.5 * jnp.stack([top + bottom, left + right], axis=-1)

    def crop(planes: Array, middle: Array, side: Array) -> Array:
        scale = jnp.full((2,), _CROP, jnp.float32) / side
        shift = 0.5 * _CROP - middle * scale
        return jax.image.scale_and_translate(planes, (_CROP, _CROP, 2), (0, 1), scale, shift, "linear")

    crops = jax.vmap(crop)(jnp.stack([mask, light], axis=-1), middle, side)
    height, width = images.shape[1:3]
    centre = jnp.array([0.5 * height, 0.5 * width], dtype=jnp.float32)
    half = 0.5 * min(height, width)
    extent = jnp.stack([bottom - top, right - left], axis=-1)
    box = jnp.concatenate([(middle - centre[None]) / half, extent / half - 1.0], axis=-1)
    return crops.reshape(len(images), -1) - 0.5, box


def _network(weights: Mapping[str, Array], crops: Array, box: Array) -> tuple[Array, Array]:
    """Logits of the shapes and of "none of them" ``[B, 5]``, and the floor position ``[B, 2]``."""
    hidden = jax.nn.gelu(crops @ weights["crop"] + box @ weights["box"] + weights["bias"][None])
    out = hidden @ weights["out"] + box @ weights["skip"] + weights["out_bias"][None]
    return out[:, : _NONE + 1], out[:, _NONE + 1 :]


def _initial_weights(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    inputs, outputs = 2 * _CROP * _CROP, _NONE + 1 + 2
    return {
        "crop": rng.normal(0.0, inputs**-0.5, (inputs, _HIDDEN)).astype(np.float32),
        "box": rng.normal(0.0, 0.5, (4, _HIDDEN)).astype(np.float32),
        "bias": np.zeros(_HIDDEN, np.float32),
        "out": rng.normal(0.0, _HIDDEN**-0.5, (_HIDDEN, outputs)).astype(np.float32),
        "skip": np.zeros((4, outputs), np.float32),
        "out_bias": np.zeros(outputs, np.float32),
    }


def disturb(key: Key[Array, ""], images: Float[Array, "B h w 3"]) -> Float[Array, "B h w 3"]:
    """Pictures as a lossy process would leave them; square ones only, traceable.

    They are bent (up to 0.8 pixels rms), blurred (up to 1.3 pixels), partly replaced by half the resolution, made
    brighter or darker (up to 15 %), and overlaid with coarse and fine noise.
    """
    batch, side = images.shape[0], images.shape[1]
    keys = jax.random.split(key, 7)

    def uniform(key: Array, low: float, high: float) -> Array:
        return jax.random.uniform(key, (batch, 1, 1, 1), minval=low, maxval=high)

    sigma = uniform(keys[0], 0.05, 1.3)[:, :, :, 0]
    place = jnp.arange(side, dtype=jnp.float32)
    kernel = jnp.exp(-0.5 * ((place[None, :, None] - place[None, None, :]) / sigma) ** 2)
    kernel = kernel / kernel.sum(axis=-1, keepdims=True)
    bent = _bend(keys[6], images, 0.0, 0.8)
    blurred = jnp.einsum("bij,bjkc,blk->bilc", kernel, bent, kernel)
    coarse = jax.image.resize(blurred, (batch, side // 2, side // 2, 3), "linear")
    softness = uniform(keys[1], 0.0, 1.0)
    soft = blurred + softness * (jax.image.resize(coarse, images.shape, "linear") - blurred)
    patches = jax.random.normal(keys[2], (batch, side // 8, side // 8, 3))
    stains = jax.image.resize(patches, images.shape, "linear") * uniform(keys[3], 0.0, 0.04)
    noise_key, level_key = jax.random.split(keys[4])
    noise = jax.random.normal(noise_key, images.shape) * uniform(level_key, 0.0, 0.04)
    return jnp.clip(soft * uniform(keys[5], 0.85, 1.15) + stains + noise, 0.0, 1.0)


def spoil(key: Key[Array, ""], images: Float[Array, "B h w 3"]) -> Float[Array, "B h w 3"]:
    """Pictures of nothing known: each is bent by 3.5 to 7 pixels rms, or is made of two pictures of the batch.

    Neighbours in the batch are joined at a vertical or horizontal line, or laid over each other. For square pictures;
    traceable.
    """
    bend_key, kind_key, cut_key = jax.random.split(key, 3)
    batch, side = images.shape[0], images.shape[1]
    others = jnp.roll(images, 1, axis=0)
    cut = jax.random.uniform(cut_key, (batch, 1, 1, 1), minval=0.35, maxval=0.65) * side
    place = jnp.arange(side, dtype=jnp.float32)
    variants = [
        _bend(bend_key, images, 3.5, 7.0),
        jnp.where(place[None, None, :, None] < cut, images, others),
        jnp.where(place[None, :, None, None] < cut, images, others),
        jnp.minimum(images, others),
    ]
    kind = jax.random.randint(kind_key, (batch, 1, 1, 1), 0, len(variants))
    mixed = jnp.select([kind == index for index in range(len(variants))], variants)
    # A join that misses one of the objects shows the other one intact: those are bent instead.
    change = [jnp.abs(mixed - whole).max(axis=(1, 2, 3), keepdims=True) for whole in (images, others)]
    return jnp.where(jnp.minimum(*change) > _OBJECT_CONTRAST, mixed, variants[0])


def _bend(key: Array, images: Array, least: float, most: float) -> Array:
    """Moves pixels along a smooth random field of the given strength (pixels rms)."""
    field_key, strength_key = jax.random.split(key)
    batch, side = images.shape[0], images.shape[1]
    field = jax.image.resize(jax.random.normal(field_key, (batch, 7, 7, 2)), (batch, side, side, 2), "cubic")
    strength = jax.random.uniform(strength_key, (batch, 1, 1, 1), minval=least, maxval=most)
    field = field * (strength / jnp.sqrt(jnp.mean(field * field, axis=(1, 2, 3), keepdims=True)))
    place = jnp.arange(side, dtype=jnp.float32)

    def move(image: Array, shift: Array) -> Array:
        where = [shift[..., 0] + place[:, None], shift[..., 1] + place[None, :]]
        planes = [jax.scipy.ndimage.map_coordinates(image[..., c], where, order=1, mode="nearest") for c in range(3)]
        return jnp.stack(planes, axis=-1)

    return jax.vmap(move)(images, field)


def train_judge(seed: int) -> dict[str, np.ndarray]:
    """Trains the network on disturbed renders and returns its weights. About two minutes on two CPU cores."""
    scene_key, batch_key, noise_key = jax.random.split(jax.random.key(seed), 3)
    chunk = 512
    seen = [_training_chunk(key, chunk) for key in jax.random.split(scene_key, _TRAIN_IMAGES // chunk)]
    crops, box, shape, position, usable = (jnp.concatenate(column) for column in zip(*seen, strict=True))
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, _TRAIN_STEPS), weight_decay=1e-3)

    def loss(weights: dict[str, Array], rows: Array, key: Array) -> Array:
        views = crops[rows] + 0.05 * jax.random.normal(key, (len(rows), crops.shape[1]))
        logits, guess = _network(weights, views, box[rows])
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, shape[rows])
        distance = jnp.where(shape[rows] == _NONE, 0.0, jnp.square(guess - position[rows]).sum(axis=-1))
        return ((entropy + distance) * usable[rows]).mean()

    @jax.jit
    def step(carry: tuple, index: Array) -> tuple:
        weights, state = carry
        rows = jax.random.randint(jax.random.fold_in(batch_key, index), (_TRAIN_BATCH,), 0, len(crops))
        gradient = jax.grad(loss)(weights, rows, jax.random.fold_in(noise_key, index))
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its integer step count with floats
            updates, state = optimizer.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state

    weights = jax.tree.map(jnp.asarray, _initial_weights(seed))
    carry = (weights, optimizer.init(weights))
    for index in range(_TRAIN_STEPS):
        carry = step(carry, jnp.int32(index))
    return {name: np.asarray(array) for name, array in carry[0].items()}


def _training_chunk(key: Array, count: int) -> tuple[Array, ...]:
    """Network inputs and truths of ``count`` disturbed renders, a third of them spoiled before.

    Their objects vary more in size than the world's, and neighbours share their colour, as ``spoil`` needs.
    """
    scene_key, size_key, spoil_key, disturb_key = jax.random.split(key, 4)
    scenes = sample_scenes(scene_key, count)
    size = scenes.size * jax.random.uniform(size_key, (count,), minval=0.9, maxval=1.1)
    scenes = scenes._replace(colour=jnp.sort(scenes.colour), size=size)
    images = render(scenes, height=WORKING_SIDE, width=WORKING_SIDE)
    spoiled = jnp.arange(count) % 3 == 0
    images = jnp.where(spoiled[:, None, None, None], spoil(spoil_key, images), images)
    images = disturb(disturb_key, images)
    parts = segment(images)
    crops, box = _look(images, parts)
    return crops, box, jnp.where(spoiled, _NONE, scenes.shape), scenes.position, parts.found.astype(jnp.float32)


def main() -> None:
    """Trains the judge and writes its weights."""
    parser = argparse.ArgumentParser(description="Train the judge of the scenes world on renders.")
    parser.add_argument(
        "--train", metavar="OUT.npz", type=pathlib.Path, required=True, help="where to write the weights"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    weights = train_judge(options.seed)
    halves = {name: array.astype(np.float16) for name, array in weights.items()}
    np.savez_compressed(options.train, allow_pickle=False, **halves)


if __name__ == "__main__":
    main()
