"""The judge: says which objects a picture shows, and where, without having seen any generator.

A small convolutional network (see ``detector``), trained only on renders: disturbed ones, whose objects it must find,
and spoiled ones, whose objects it must refuse, so that a melted blob does not pass for the nearest shape. Its weights
travel with the package and are made anew by ``python -m toprovar_jax.scenes.judge_training``.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from toprovar_jax.errors import UserInputError
from toprovar_jax.scenes import detector
from toprovar_jax.scenes.detector import WORKING_SIDE, Detections
from toprovar_jax.shapes import Array, Float, UInt8

__all__ = ["Detections", "Judge"]

_AnyArray = Array | np.ndarray
_Seen = TypeVar("_Seen", Array, Detections)
_WEIGHTS = pathlib.Path(__file__).with_name("judge.npz")
#: Pictures looked at together, so that a large batch needs no more memory than a small one.
_TOGETHER = 128
#: How far floats may lie outside [0, 1] (our choice: half a byte's step, which is rounding and not another scale).
_ROUNDING = 0.5 / 255.0


@dataclasses.dataclass(frozen=True)
class Judge:
    """A judge with its weights; ``Judge.load()(images)`` gives ``Detections``. Deterministic."""

    weights: Mapping[str, np.ndarray]

    @classmethod
    def load(cls, path: str | pathlib.Path | None = None) -> "Judge":
        """The judge that comes with the package, or the one whose weights are in the npz file ``path``.

        Raises:
          UserInputError: ``path`` is not a file of judge weights.
        """
        file = pathlib.Path(path) if path is not None else _WEIGHTS
        remedy = "make one with: python -m toprovar_jax.scenes.judge_training --out FILE"
        if not file.is_file():
            raise UserInputError(f"judge weights {file}", "must be an existing npz file", remedy)
        with np.load(file) as archive:
            weights = {name: archive[name].astype(np.float32) for name in archive.files}
        expected = {name: array.shape for name, array in detector.initial_weights(0).items()}
        if {name: array.shape for name, array in weights.items()} != expected:
            raise UserInputError(f"judge weights {file}", f"must hold the arrays {expected}", remedy)
        return cls(weights)

    def __call__(self, images: Float[_AnyArray, "B h w 3"] | UInt8[_AnyArray, "B h w 3"]) -> Detections:
        """The objects in pictures of at least 32 pixels a side: floats in [0, 1] or bytes.

        Of no pictures, no rows. Under ``jax.jit`` values are not known, so only shape and type are checked.

        Raises:
          UserInputError: not an array, not a batch of pictures of that size, or values of another type or range.
        """
        return self._look(_detect, images)

    def features(self, images: Float[_AnyArray, "B h w 3"] | UInt8[_AnyArray, "B h w 3"]) -> Float[Array, "B F"]:
        """What the network makes of whole pictures, for distances between sets of them (a Frechet distance).

        Means and maxima over the picture of the last two maps of features; the pictures are those of ``__call__``.

        Raises:
          UserInputError: as ``__call__``.
        """
        return self._look(_features, images)

    def _look(self, look: Callable[[dict[str, Array], Array], _Seen], images: _AnyArray) -> _Seen:
        _check(images)
        weights = {name: jnp.asarray(array) for name, array in self.weights.items()}
        if not len(images):  # of which XLA can make no convolution
            one = jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32)
            return jax.tree.map(
                lambda field: jnp.zeros((0, *field.shape[1:]), field.dtype), jax.eval_shape(look, weights, one)
            )
        scale = 255.0 if images.dtype == np.uint8 else 1.0
        starts = range(0, len(images), _TOGETHER)
        parts = [
            look(weights, jnp.asarray(images[start : start + _TOGETHER]).astype(jnp.float32) / scale)
            for start in starts
        ]
        return jax.tree.map(lambda *fields: jnp.concatenate(fields), *parts)


def _check(images: _AnyArray) -> None:
    if not isinstance(images, np.ndarray | jax.Array):
        rule = "must be one array of numpy or jax"
        raise UserInputError(f"images of type {type(images).__name__}", rule, "join pictures with np.stack")
    if images.dtype != np.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        rule = "must be floats in [0, 1] or bytes (uint8)"
        remedy = "use .astype(np.uint8) where they are 0 to 255, or make them floats"
        raise UserInputError(f"images of {images.dtype}", rule, remedy)
    if images.ndim != 4 or images.shape[-1] != 3 or min(images.shape[1:3]) < WORKING_SIDE // 2:
        rule = f"must be [B, H, W, 3] with sides of at least {WORKING_SIDE // 2} pixels"
        raise UserInputError(f"images of shape {tuple(images.shape)}", rule, "give larger pictures, in a batch")
    if images.dtype == np.uint8 or not images.size or isinstance(images, Tracer):
        return
    values = np.asarray(images)  # numpy's, since jax would trace the range of a constant inside a trace
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        remedy = "look for what made them, or give bytes"
        raise UserInputError("images with values that are not finite", "must be floats in [0, 1]", remedy)
    if low < -_ROUNDING or high > 1.0 + _ROUNDING:
        remedy = "scale them (x / 255, or (x + 1) / 2 from [-1, 1]) or clip them"
        raise UserInputError(f"images with values from {low:.4g} to {high:.4g}", "must be floats in [0, 1]", remedy)


@jax.jit
def _detect(weights: dict[str, Array], images: Array) -> Detections:
    pixels = detector.to_working_size(images)
    _, features = detector.feature_maps(weights, pixels)
    return detector.decode(detector.heads(weights, features), pixels.shape[1], pixels.shape[2])


@jax.jit
def _features(weights: dict[str, Array], images: Array) -> Array:
    maps = detector.feature_maps(weights, detector.to_working_size(images))
    pooled = [pool(features, axis=(1, 2)) for features in maps for pool in (jnp.mean, jnp.max)]
    return jnp.concatenate(pooled, axis=-1)
