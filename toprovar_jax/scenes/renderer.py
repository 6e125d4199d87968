"""Draws scenes: an analytic ray caster in plain jnp, one image at a time so that only the present shape is intersected.

All four solids are convex. A ray meets a convex solid in one interval of its length, found as the intersection of the
intervals of simpler bodies (slabs, an endless cylinder, a cone); where it begins lies the visible surface.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toprovar_jax.errors import UserInputError
from toprovar_jax.scenes import world
from toprovar_jax.scenes.world import Scenes
from toprovar_jax.shapes import Array, Float

_PITCH_SINE, _PITCH_COSINE = math.sin(world.CAMERA_PITCH), math.cos(world.CAMERA_PITCH)
_EYE = (
    0.0,
    world.CAMERA_TARGET_HEIGHT + world.CAMERA_DISTANCE * _PITCH_SINE,
    -world.CAMERA_DISTANCE * _PITCH_COSINE,
)
#: Direction to the light: from the left, above and a little in front, so that no two visible faces of a cube match.
_LIGHT = tuple((np.array([-0.62, 0.95, -0.32]) / np.linalg.norm([-0.62, 0.95, -0.32])).tolist())

_FLOOR_FAR, _FLOOR_NEAR, _FLOOR_FADE = 0.46, 0.24, 18.0
_SHADOW_STRENGTH, _CONTACT_STRENGTH, _CONTACT_REACH = 0.38, 0.35, 1.7
_AMBIENT, _DIFFUSE, _SPECULAR = 0.50, 0.72, 0.35
_TINY = 1e-6

_Number = Array | float
_Vector = tuple  # three arrays or floats (x, y, z): components stay apart so that one fused loop handles them


class _Hit(NamedTuple):
    """Where a ray enters a solid: ``distance`` along the ray, whether it does, and the unit ``normal`` there."""

    distance: Array
    found: Array
    normal: _Vector


def render(scenes: Scenes, *, height: int, width: int, samples: int = 2) -> Float[Array, "B h w 3"]:
    """Pictures of ``scenes``: red, green, blue in [0, 1], the same bytes for the same scene on one kind of machine.

    The shorter side always shows the same square of the world; a longer side shows more floor. Apart from the object,
    its shadow and the darkening where it touches the floor, every picture equals ``empty_scene_image``.

    Args:
      scenes: what to draw.
      height, width: size in pixels, at least 8 each; static under ``jit``.
      samples: rays per pixel along each side.

    Raises:
      UserInputError: a size or number of samples is too small.
    """
    _check_size(height, width, samples)
    return _render(scenes, height, width, samples)


def empty_scene_image(height: int, width: int) -> Float[Array, "h w 3"]:
    """The floor alone, float32 in [0, 1], as ``render`` draws it around an object.

    Raises:
      UserInputError: a side is shorter than 8 pixels.
    """
    _check_size(height, width, 2)
    return _empty(height, width)


def _check_size(height: int, width: int, samples: int) -> None:
    if min(height, width) < 8:
        raise UserInputError(f"size {height}x{width}", "each side must have at least 8 pixels", "use 64 or more")
    if samples < 1:
        raise UserInputError(f"samples {samples}", "must be at least 1", "2 is a good value")


@functools.partial(jax.jit, static_argnames=("height", "width"))
def _empty(height: int, width: int) -> Array:
    return _average(_floor_shade(_floor_points(_rays(height, width, 2))), 2)[..., None] * jnp.ones((1, 1, 3))


@functools.partial(jax.jit, static_argnames=("height", "width", "samples"))
def _render(scenes: Scenes, height: int, width: int, samples: int) -> Array:
    rays = _rays(height, width, samples)
    palette = jnp.asarray(list(world.COLOURS.values()), dtype=jnp.float32)

    def draw(scene: Scenes) -> Array:
        solids = [_sphere, _cube, _cylinder, _cone]
        branches = [functools.partial(_draw, solid, rays) for solid in solids]
        channels = jax.lax.switch(scene.shape, branches, scene, palette[scene.colour])
        return jnp.stack([_average(channel, samples) for channel in channels], axis=-1)

    return jax.lax.map(draw, scenes)


def _rays(height: int, width: int, samples: int) -> _Vector:
    """Unit directions of all rays, each component ``[h * samples, w * samples]``."""
    half = 0.5 * min(height, width) * samples
    down = (jnp.arange(height * samples, dtype=jnp.float32) + (0.5 - 0.5 * height * samples)) / half
    right = (jnp.arange(width * samples, dtype=jnp.float32) + (0.5 - 0.5 * width * samples)) / half
    x, up = jnp.broadcast_arrays(right[None, :], -down[:, None])
    norm = jax.lax.rsqrt(x * x + up * up + world.CAMERA_FOCAL**2)
    y = up * _PITCH_COSINE - world.CAMERA_FOCAL * _PITCH_SINE
    z = up * _PITCH_SINE + world.CAMERA_FOCAL * _PITCH_COSINE
    return x * norm, y * norm, z * norm


def _average(channel: Array, samples: int) -> Array:
    height, width = channel.shape[0] // samples, channel.shape[1] // samples
    return channel.reshape(height, samples, width, samples).mean(axis=(1, 3))


def _floor_points(rays: _Vector) -> tuple[Array, Array]:
    """Where rays meet the floor, (x, z); rays at or above the horizon go very far."""
    reach = -_EYE[1] / jnp.minimum(rays[1], -1e-3)
    return _EYE[0] + reach * rays[0], _EYE[2] + reach * rays[2]


def _floor_shade(points: tuple[Array, Array]) -> Array:
    x, z = points
    return _FLOOR_FAR + _FLOOR_NEAR / (1.0 + (x * x + z * z) / _FLOOR_FADE)


def _draw(solid: Callable, rays: _Vector, scene: Scenes, albedo: Array) -> tuple[Array, Array, Array]:
    """Casts all rays of one picture; everything about the solid happens in its own frame, where its size is one."""
    turn = (jnp.cos(scene.yaw), jnp.sin(scene.yaw))
    eye = _to_solid((_EYE[0] - scene.position[0], _EYE[1], _EYE[2] - scene.position[1]), turn, 1.0 / scene.size)
    light = _to_solid(_LIGHT, turn, 1.0)
    ways = _to_solid(rays, turn, 1.0)
    hit = solid(eye, ways)

    x, z = _floor_points(rays)
    ground = _to_solid((x - scene.position[0], 0.0, z - scene.position[1]), turn, 1.0 / scene.size)
    shadow = jnp.where(solid((ground[0], _TINY, ground[2]), light).found, _SHADOW_STRENGTH, 0.0)
    closeness = jnp.maximum(1.0 - (ground[0] ** 2 + ground[2] ** 2) / _CONTACT_REACH**2, 0.0)
    floor = _floor_shade((x, z)) * (1.0 - shadow) * (1.0 - _CONTACT_STRENGTH * closeness * closeness)

    elevation = jnp.clip(eye[1] + hit.distance * ways[1], 0.0, 2.0)
    facing = jnp.maximum(_dot(hit.normal, light), 0.0)
    ambient = _AMBIENT * (0.72 + 0.28 * hit.normal[1]) * (0.70 + 0.15 * elevation)
    body = ambient + _DIFFUSE * facing
    halfway = tuple(a - b for a, b in zip(light, ways, strict=True))
    gloss = _dot(hit.normal, halfway) * jax.lax.rsqrt(_dot(halfway, halfway))
    gloss = jnp.where(facing > 0.0, jnp.maximum(gloss, 0.0), 0.0)
    for _ in range(5):
        gloss = gloss * gloss
    shine = _SPECULAR * gloss
    red, green, blue = (jnp.where(hit.found, jnp.minimum(albedo[c] * body + shine, 1.0), floor) for c in range(3))
    return red, green, blue


def _to_solid(vector: _Vector, turn: tuple[Array, Array], scale: _Number) -> _Vector:
    x, y, z = vector
    cosine, sine = turn
    return (cosine * x - sine * z) * scale, y * scale, (sine * x + cosine * z) * scale


def _dot(a: _Vector, b: _Vector) -> Array:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _slab(origin: _Number, way: _Number, low: float, high: float) -> tuple[Array, Array]:
    """Entry and exit of the layer ``low <= coordinate <= high``."""
    pace = 1.0 / jnp.where(jnp.abs(way) < _TINY, _TINY, way)
    first, second = (low - origin) * pace, (high - origin) * pace
    return jnp.minimum(first, second), jnp.maximum(first, second)


def _quadratic(a: _Number, b: _Number, c: _Number) -> tuple[Array, Array]:
    """The interval where ``a t² + 2 b t + c <= 0`` for ``a > 0``; an empty one (entry after exit) if there is none."""
    discriminant = b * b - a * c
    root = jnp.sqrt(jnp.maximum(discriminant, 0.0))
    pace = 1.0 / jnp.where(jnp.abs(a) < _TINY, _TINY, a)
    entry = jnp.where(discriminant > 0.0, (-b - root) * pace, jnp.inf)
    return entry, (-b + root) * pace


def _sphere(origin: _Vector, way: _Vector) -> _Hit:
    centred = (origin[0], origin[1] - 1.0, origin[2])
    entry, leave = _quadratic(1.0, _dot(centred, way), _dot(centred, centred) - 1.0)
    return _Hit(entry, (entry < leave) & (leave > 0.0), tuple(o + entry * w for o, w in zip(centred, way, strict=True)))


def _cube(origin: _Vector, way: _Vector) -> _Hit:
    side = world.CUBE_HALF_SIDE
    entry_x, leave_x = _slab(origin[0], way[0], -side, side)
    entry_y, leave_y = _slab(origin[1], way[1], 0.0, 2.0 * side)
    entry_z, leave_z = _slab(origin[2], way[2], -side, side)
    entry = jnp.maximum(jnp.maximum(entry_x, entry_y), entry_z)
    leave = jnp.minimum(jnp.minimum(leave_x, leave_y), leave_z)
    normal = tuple(
        jnp.where(entry == own, -jnp.sign(w), 0.0) for own, w in zip((entry_x, entry_y, entry_z), way, strict=True)
    )
    return _Hit(entry, (entry < leave) & (leave > 0.0), normal)


def _cylinder(origin: _Vector, way: _Vector) -> _Hit:
    radius = world.CYLINDER_RADIUS
    entry_side, leave_side = _quadratic(
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
    return _Hit(entry, (entry < leave) & (leave > 0.0), normal)


def _cone(origin: _Vector, way: _Vector) -> _Hit:
    # Valid for rays less steep than the cone's side (63 degrees): the light and all rays that can meet an object are.
    taper = 1.0 / world.CONE_HEIGHT
    fall, drop = taper * (world.CONE_HEIGHT - origin[1]), -taper * way[1]
    entry_side, leave_side = _quadratic(
        way[0] ** 2 + way[2] ** 2 - drop**2,
        origin[0] * way[0] + origin[2] * way[2] - fall * drop,
        origin[0] ** 2 + origin[2] ** 2 - fall**2,
    )
    entry_base, leave_base = _slab(origin[1], way[1], 0.0, world.CONE_HEIGHT)
    entry, leave = jnp.maximum(entry_side, entry_base), jnp.minimum(leave_side, leave_base)
    x, z = origin[0] + entry * way[0], origin[2] + entry * way[2]
    norm = jax.lax.rsqrt((x * x + z * z) * (1.0 + taper**2) + _TINY)
    return _Hit(entry, (entry < leave) & (leave > 0.0), (x * norm, taper / math.sqrt(1.0 + taper**2), z * norm))
