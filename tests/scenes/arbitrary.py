"""Scenes for words alone: anything anywhere on the floor, which takes no device."""

from typing import Any

import numpy as np

from toprovar_jax.scenes.world import COLOURS, MATERIALS, MAX_OBJECTS, SHAPES, SIZES, Scenes


def arbitrary_scenes(count: int, seed: int) -> Scenes:
    """Scenes of one to five objects; in some all have one shape, and in some of these one colour too."""
    rng = np.random.default_rng(seed)
    each = (count, MAX_OBJECTS)
    number = np.minimum(rng.choice([1, 2, 2, 3, 4, 5], (count, 1)), MAX_OBJECTS)
    shape, colour = (rng.integers(len(names), size=each, dtype=np.int32) for names in (SHAPES, COLOURS))
    alike = rng.random((count, 1)) < 0.3
    shape = np.where(alike, shape[:, :1], shape)
    colour = np.where(alike & (rng.random((count, 1)) < 0.5), colour[:, :1], colour)
    return host_scenes(
        np.arange(MAX_OBJECTS) < number,
        shape,
        colour,
        rng.integers(len(MATERIALS), size=each, dtype=np.int32),
        rng.uniform(-1.5, 1.5, (*each, 2)).astype(np.float32),
        rng.choice(np.asarray(SIZES, np.float32), each),
        np.zeros(each, np.float32),
    )


def host_scenes(*fields: Any) -> Scenes:
    """Scenes of numpy arrays."""
    return Scenes(*fields)
