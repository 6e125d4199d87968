"""The embedded world: one to five solids on the floor of a photo studio. Names, measures, and what stays unseen.

World axes: x to the right, y up, z away from the viewer; the floor is ``y = 0`` and its origin is near the
middle of the picture. One unit is about 14.5 pixels in a 64-pixel picture.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp

from toprovar_jax.shapes import Array, Bool, Float, Int

SHAPES = ("sphere", "cube", "cylinder", "cone", "torus")

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

MATERIALS = ("matt", "metal")

#: Radius of the small and of the large objects in world units (about 16 and 24 pixels across at 64 pixels).
SIZES = (0.56, 0.82)

#: Most objects of a scene.
MAX_OBJECTS = 5

#: Extents in units of an object's size: half side of the cube, radius and height of the cylinder, height of the cone,
#: distance of the ring's middle line from its axis and radius of its tube. The radii of the sphere and of the foot of
#: the cone are one.
CUBE_HALF_SIDE = 0.80
CYLINDER_RADIUS = 0.80
CYLINDER_HEIGHT = 1.70
CONE_HEIGHT = 2.00
TORUS_RING = 0.74
TORUS_TUBE = 0.25

CAMERA_PITCH = math.radians(35.0)
CAMERA_DISTANCE = 10.0
#: The point the camera looks at is this far above the floor's origin.
CAMERA_TARGET_HEIGHT = 0.5
#: Focal length in half picture sides: the shorter side of every picture spans 4.4 world units at the target.
CAMERA_FOCAL = CAMERA_DISTANCE / 2.2

#: No silhouette comes nearer to the picture's border than this part of its half side.
FRAME_MARGIN = 0.04
#: Nothing stands farther away than this z, where the backdrop begins to rise.
FAR_LIMIT = 2.8
#: Yaw is drawn from this range (radians), which always shows two unequally lit sides of a cube.
YAW_RANGE = (math.radians(15.0), math.radians(75.0))

#: Relation of one object to another -> (axis of the floor position, sign of the difference).
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "in front of": (1, -1), "behind": (1, 1)}
#: The same said from the other object.
OPPOSITE = {"left of": "right of", "right of": "left of", "in front of": "behind", "behind": "in front of"}
#: From this difference on (world units) a relation is plain to see, and captions may state it.
RELATION_MARGIN = 0.6
#: From this difference on a picture shows a relation that was asked for; training shows no held-out one beyond it.
SHOWN_MARGIN = 0.5 * RELATION_MARGIN

#: (shape, colour) that training never shows: every shape and five of the colours appear once.
HELD_OUT_KINDS = (
    ("sphere", "purple"),
    ("cube", "cyan"),
    ("cylinder", "orange"),
    ("cone", "blue"),
    ("torus", "green"),
)
#: (shape, relation, shape) that training never shows, whatever the colours and whoever else is in the picture.
HELD_OUT_RELATIONS = (
    ("cone", "left of", "cube"),
    ("torus", "right of", "sphere"),
    ("cylinder", "in front of", "torus"),
    ("sphere", "behind", "cone"),
)


class Scenes(NamedTuple):
    """A batch of scenes of up to ``O`` objects; a pytree of arrays.

    Attributes:
      present: whether there is such an object; where not, the other fields mean nothing. The first always is.
      shape: index into ``SHAPES``, int32.
      colour: index into ``COLOURS`` (in their order), int32.
      material: index into ``MATERIALS``, int32.
      position: where the object stands on the floor, (x, z) in world units.
      size: radius in world units, one of ``SIZES`` when drawn by ``sample_scenes``.
      yaw: turn about the vertical axis in radians; only visible on cubes.
    """

    present: Bool[Array, "B O"]
    shape: Int[Array, "B O"]
    colour: Int[Array, "B O"]
    material: Int[Array, "B O"]
    position: Float[Array, "B O 2"]
    size: Float[Array, "B O"]
    yaw: Float[Array, "B O"]


def depth_range(size: Float[Array, "*N"]) -> tuple[Float[Array, "*N"], Float[Array, "*N"]]:
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


def side_limit(size: Float[Array, "..."], z: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """The largest |x| at which an object of ``size`` at depth ``z`` is still inside the picture's width."""
    rise = 2.0 * CUBE_HALF_SIDE * size - CAMERA_TARGET_HEIGHT
    distance = CAMERA_DISTANCE + z * math.cos(CAMERA_PITCH) - rise * math.sin(CAMERA_PITCH)
    return (1.0 - FRAME_MARGIN) * distance / CAMERA_FOCAL - CUBE_HALF_SIDE * math.sqrt(2.0) * size


def projected(
    position: Float[Array, "*N 2"], height: Float[Array, "*N"]
) -> tuple[Float[Array, "*N 2"], Float[Array, "*N"]]:
    """Where points above the floor appear in a picture.

    Args:
      position: (x, z) below the point.
      height: above the floor.

    Returns:
      (right, down) from the middle of the picture, in half shorter sides; and how long one world unit is there, in
      the same unit.
    """
    sine, cosine = math.sin(CAMERA_PITCH), math.cos(CAMERA_PITCH)
    x, z, rise = position[..., 0], position[..., 1], height - CAMERA_TARGET_HEIGHT
    unit = CAMERA_FOCAL / (CAMERA_DISTANCE + z * cosine - rise * sine)
    return jnp.stack([x * unit, -(z * sine + rise * cosine) * unit], axis=-1), unit
