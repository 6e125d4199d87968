"""The five solids: where a ray meets each of them. In a solid's own frame its size is one and it stands on y = 0.

All but the ring are convex: a ray meets them in one interval of its length, found as the intersection of the intervals
of simpler bodies (slabs, an endless cylinder, a cone), and where it begins lies the visible surface. The ring is walked
along, step by step, by the distance to its surface.

Directions are unit vectors; vectors are tuples (x, y, z), so that one fused loop handles their components.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from toprovar_jax.scenes import world
from toprovar_jax.shapes import Array

Number = Array | float
Vector = tuple  # of three arrays or numbers of one shape

_TINY = 1e-6
_TORUS_STEPS = 32
_TORUS_REACH = world.TORUS_RING + world.TORUS_TUBE


class Hit(NamedTuple):
    """How a ray meets a solid.

    Attributes:
      distance: along the ray to the surface; anything where there is no hit.
      depth: how far the ray passes inside the silhouette, negative outside; about the distance to the silhouette's
        edge where that is small. Minus infinity where the solid lies behind the ray's origin.
      normal: unit vector at the surface.
    """

    distance: Array
    depth: Array
    normal: Vector

    @property
    def found(self) -> Array:
        """Whether the ray meets the solid."""
        return self.depth > 0.0


def dot(a: Vector, b: Vector) -> Array:
    """Inner product."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def sphere(origin: Vector, way: Vector) -> Hit:
    """A ball of radius one."""
    centred = (origin[0], origin[1] - 1.0, origin[2])
    entry, leave, depth = _quadratic(1.0, dot(centred, way), dot(centred, centred) - 1.0)
    return Hit(entry, _ahead(depth, leave), tuple(o + entry * w for o, w in zip(centred, way, strict=True)))


def cube(origin: Vector, way: Vector) -> Hit:
    """A cube whose side is twice ``world.CUBE_HALF_SIDE``."""
    side = world.CUBE_HALF_SIDE
    entry_x, leave_x = _slab(origin[0], way[0], -side, side)
    entry_y, leave_y = _slab(origin[1], way[1], 0.0, 2.0 * side)
    entry_z, leave_z = _slab(origin[2], way[2], -side, side)
    entry = jnp.maximum(jnp.maximum(entry_x, entry_y), entry_z)
    leave = jnp.minimum(jnp.minimum(leave_x, leave_y), leave_z)
    normal = tuple(
        jnp.where(entry == own, -jnp.sign(w), 0.0) for own, w in zip((entry_x, entry_y, entry_z), way, strict=True)
    )
    return Hit(entry, _ahead(0.5 * (leave - entry), leave), normal)


def cylinder(origin: Vector, way: Vector) -> Hit:
    """An upright cylinder of ``world.CYLINDER_RADIUS`` and ``world.CYLINDER_HEIGHT``."""
    radius = world.CYLINDER_RADIUS
    entry_side, leave_side, depth = _quadratic(
        way[0] ** 2 + way[2] ** 2, origin[0] * way[0] + origin[2] * way[2], origin[0] ** 2 + origin[2] ** 2 - radius**2
    )
    entry_caps, leave_caps = _slab(origin[1], way[1], 0.0, world.CYLINDER_HEIGHT)
    entry, leave = jnp.maximum(entry_side, entry_caps), jnp.minimum(leave_side, leave_caps)
    cap = entry_caps > entry_side
    normal = (
        jnp.where(cap, 0.0, (origin[0] + entry * way[0]) / radius),
        jnp.where(cap, 1.0, 0.0),
        jnp.where(cap, 0.0, (origin[2] + entry * way[2]) / radius),
    )
    return Hit(entry, _ahead(jnp.minimum(depth, 0.5 * (leave - entry)), leave), normal)


def cone(origin: Vector, way: Vector) -> Hit:
    """An upright cone of ``world.CONE_HEIGHT``.

    Valid for rays less steep than the cone's side (63 degrees): the light and all rays that can meet an object are.
    """
    taper = 1.0 / world.CONE_HEIGHT
    fall, drop = taper * (world.CONE_HEIGHT - origin[1]), -taper * way[1]
    steepness, approach = way[0] ** 2 + way[2] ** 2 - drop**2, origin[0] * way[0] + origin[2] * way[2] - fall * drop
    entry_side, leave_side, depth = _quadratic(steepness, approach, origin[0] ** 2 + origin[2] ** 2 - fall**2)
    # Where the ray comes closest, the cone is as wide as a cylinder of this radius; above its tip there is nothing.
    radius = fall - drop * approach / jnp.maximum(steepness, _TINY)
    depth = jnp.where(radius > 0.0, depth / jnp.maximum(radius, 0.05), -1.0)
    entry_base, leave_base = _slab(origin[1], way[1], 0.0, world.CONE_HEIGHT)
    entry, leave = jnp.maximum(entry_side, entry_base), jnp.minimum(leave_side, leave_base)
    x, z = origin[0] + entry * way[0], origin[2] + entry * way[2]
    norm = jax.lax.rsqrt((x * x + z * z) * (1.0 + taper**2) + _TINY)
    normal = (x * norm, taper / math.sqrt(1.0 + taper**2) * jnp.ones_like(norm), z * norm)
    return Hit(entry, _ahead(jnp.minimum(depth, 0.5 * (leave - entry)), leave), normal)


def torus(origin: Vector, way: Vector) -> Hit:
    """A ring that lies on the floor, of ``world.TORUS_RING`` and ``world.TORUS_TUBE``."""
    centred = (origin[0], origin[1] - world.TORUS_TUBE, origin[2])
    middle = -dot(centred, way)
    start = jnp.maximum(middle - _TORUS_REACH, 0.0)

    def walk(_: Array, carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        place, least, first, inside = carry
        x, y, z = (o + place * w for o, w in zip(centred, way, strict=True))
        distance = jnp.sqrt((jnp.sqrt(x * x + z * z) - world.TORUS_RING) ** 2 + y * y) - world.TORUS_TUBE
        closer = distance < least
        # Near enough: a tenth of a pixel in a picture of 512.
        enters = ~inside & (distance < 2e-3)
        first = jnp.where(enters, place + distance, first)
        # Through the tube, where only the deepest place counts, the walk may be coarser.
        stride = jnp.where(inside, jnp.maximum(jnp.abs(distance), 0.03), jnp.maximum(distance, 0.01))
        return place + stride, jnp.where(closer, distance, least), first, inside | enters

    zeros = jnp.zeros_like(start)
    far = (start, zeros + jnp.inf, start, jnp.zeros(start.shape, bool))
    _, least, first, inside = jax.lax.fori_loop(0, _TORUS_STEPS, walk, far)
    depth = jnp.where(inside, jnp.maximum(-least, _TINY), -jnp.abs(least))
    x, y, z = (o + first * w for o, w in zip(centred, way, strict=True))
    ring = 1.0 - world.TORUS_RING * jax.lax.rsqrt(x * x + z * z + _TINY)
    normal = (x * ring, y, z * ring)
    norm = jax.lax.rsqrt(dot(normal, normal) + _TINY)
    return Hit(first, _ahead(depth, middle + _TORUS_REACH), tuple(component * norm for component in normal))


#: In the order of ``world.SHAPES``.
SOLIDS: tuple[Callable[[Vector, Vector], Hit], ...] = (sphere, cube, cylinder, cone, torus)


def _ahead(depth: Array, leave: Array) -> Array:
    return jnp.where(leave > 0.0, depth, -jnp.inf)


def _slab(origin: Number, way: Number, low: float, high: float) -> tuple[Array, Array]:
    """Entry and exit of the layer ``low <= coordinate <= high``."""
    pace = 1.0 / jnp.where(jnp.abs(way) < _TINY, _TINY, way)
    first, second = (low - origin) * pace, (high - origin) * pace
    return jnp.minimum(first, second), jnp.maximum(first, second)


def _quadratic(a: Number, b: Number, c: Number) -> tuple[Array, Array, Array]:
    """Where ``a t² + 2 b t + c <= 0`` for ``a > 0``: entry, exit (the same where nowhere) and depth.

    The depth is half the squared half chord: for bodies of radius one, about the distance to the silhouette.
    """
    pace = 1.0 / jnp.where(jnp.abs(a) < _TINY, _TINY, a)
    discriminant = b * b - a * c
    root = jnp.sqrt(jnp.maximum(discriminant, 0.0))
    return (-b - root) * pace, (-b + root) * pace, 0.5 * discriminant * pace
