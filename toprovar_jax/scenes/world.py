"""The embedded world: one solid object on a grey floor. Names, measures, and how scenes are drawn at random.

World axes: x to the right, y up, z away from the viewer; the floor is ``y = 0`` and its origin is near the
middle of the picture. One unit is about 14.5 pixels in a 64-pixel picture.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from toprovar_jax.errors import UserInputError
from toprovar_jax.shapes import Array, Float, Int, Key

SHAPES = ("sphere", "cube", "cylinder", "cone")

#: Name -> albedo (red, green, blue). Hues are at least 24 degrees apart, so that shading and blur do not confuse them.
COLOURS = {
    "red": (0.88, 0.07, 0.12),
    "orange": (1.00, 0.48, 0.03),
    "yellow": (0.98, 0.89, 0.10),
    "green": (0.10, 0.66, 0.17),
    "cyan": (0.10, 0.80, 0.86),
    "blue": (0.10, 0.22, 0.90),
    "purple": (0.56, 0.14, 0.76),
    "black": (0.17, 0.17, 0.18),
}

#: Radius of the small and of the large objects in world units (about 24 and 31 pixels across at 64 pixels).
SIZES = (0.84, 1.06)

#: Extents in units of an object's size: half side of the cube, radius and height of the cylinder, height of the cone.
#: The radii of the sphere and of the foot of the cone are one.
CUBE_HALF_SIDE = 0.80
CYLINDER_RADIUS = 0.80
CYLINDER_HEIGHT = 1.70
CONE_HEIGHT = 2.00

CAMERA_PITCH = math.radians(35.0)
CAMERA_DISTANCE = 10.0
#: The point the camera looks at is this far above the floor's origin.
CAMERA_TARGET_HEIGHT = 0.5
#: Focal length in half picture sides: the shorter side of every picture spans 4.4 world units at the target.
CAMERA_FOCAL = CAMERA_DISTANCE / 2.2

#: No silhouette comes nearer to the picture's border than this part of its half side.
FRAME_MARGIN = 0.04
#: Nothing stands farther away than this z, so that the small objects keep enough pixels.
FAR_LIMIT = 1.5
#: Yaw is drawn from this range (radians), which always shows two unequally lit sides of a cube.
YAW_RANGE = (math.radians(15.0), math.radians(75.0))


class Scenes(NamedTuple):
    """A batch of scenes with one object each; a pytree of arrays.

    Attributes:
      shape: index into ``SHAPES``, int32.
      colour: index into ``COLOURS`` (in their order), int32.
      position: where the object stands on the floor, (x, z) in world units.
      size: radius in world units, one of ``SIZES`` when drawn by ``sample_scenes``.
      yaw: turn about the vertical axis in radians; only visible on cubes.
    """

    shape: Int[Array, " B"]
    colour: Int[Array, " B"]
    position: Float[Array, "B 2"]
    size: Float[Array, " B"]
    yaw: Float[Array, " B"]


def sample_scenes(key: Key[Array, ""], batch: int) -> Scenes:
    """Draws ``batch`` scenes whose objects lie wholly inside every picture.

    Shapes and colours are stratified: each of the 32 combinations is equally likely, and a batch that is a multiple of
    32 holds each equally often. Positions are uniform over the part of the floor that the object's size allows.
    Traceable for a static ``batch``.

    Raises:
      UserInputError: ``batch`` is less than one.
    """
    if batch < 1:
        raise UserInputError(f"batch {batch}", "must be at least 1", "ask for one scene or more")
    kinds, order, sizes, places, turns = jax.random.split(key, 5)
    kind_count = len(SHAPES) * len(COLOURS)
    strata = (jnp.arange(batch, dtype=jnp.float32) + jax.random.uniform(kinds, (batch,))) * (kind_count / batch)
    kind = jax.random.permutation(order, jnp.clip(strata.astype(jnp.int32), 0, kind_count - 1))
    size = jnp.where(jax.random.bernoulli(sizes, 0.5, (batch,)), SIZES[1], SIZES[0]).astype(jnp.float32)
    across, along = jax.random.uniform(places, (2, batch))
    near, far = depth_range(size)
    z = near + along * (far - near)
    x = (2.0 * across - 1.0) * side_limit(size, z)
    yaw = jax.random.uniform(turns, (batch,), minval=YAW_RANGE[0], maxval=YAW_RANGE[1])
    return Scenes(kind % len(SHAPES), kind // len(SHAPES), jnp.stack([x, z], axis=-1), size, yaw)


def depth_range(size: Float[Array, " B"]) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """The nearest and the farthest z at which an object of ``size`` is still inside the picture's height.

    The bounds hold for the largest silhouette, a cube seen corner on.
    """
    sine, cosine, edge = math.sin(CAMERA_PITCH), math.cos(CAMERA_PITCH), 1.0 - FRAME_MARGIN
    reach = CUBE_HALF_SIDE * math.sqrt(2.0) * size
    drop = CAMERA_FOCAL * CAMERA_TARGET_HEIGHT * cosine - edge * (CAMERA_DISTANCE + CAMERA_TARGET_HEIGHT * sine)
    near = drop / (CAMERA_FOCAL * sine + edge * cosine) + reach
    rise = 2.0 * CUBE_HALF_SIDE * size - CAMERA_TARGET_HEIGHT
    climb = edge * (CAMERA_DISTANCE - rise * sine) - CAMERA_FOCAL * rise * cosine
    far = climb / (CAMERA_FOCAL * sine - edge * cosine) - reach
    return near, jnp.minimum(far, FAR_LIMIT)


def side_limit(size: Float[Array, " B"], z: Float[Array, " B"]) -> Float[Array, " B"]:
    """The largest |x| at which an object of ``size`` at depth ``z`` is still inside the picture's width."""
    rise = 2.0 * CUBE_HALF_SIDE * size - CAMERA_TARGET_HEIGHT
    distance = CAMERA_DISTANCE + z * math.cos(CAMERA_PITCH) - rise * math.sin(CAMERA_PITCH)
    return (1.0 - FRAME_MARGIN) * distance / CAMERA_FOCAL - CUBE_HALF_SIDE * math.sqrt(2.0) * size
