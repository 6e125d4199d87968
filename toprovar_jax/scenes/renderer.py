"""Draws scenes: an analytic ray caster in plain jnp.

Every ray is followed to the nearest solid, the floor or the backdrop; from there to the light past all other solids,
whose silhouettes soften with their distance (the light is not a point).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from toprovar_jax.errors import UserInputError
from toprovar_jax.scenes import world
from toprovar_jax.scenes.solids import SOLIDS, Hit, Vector, dot
from toprovar_jax.scenes.world import Scenes
from toprovar_jax.shapes import Array, Float

_PITCH_SINE, _PITCH_COSINE = math.sin(world.CAMERA_PITCH), math.cos(world.CAMERA_PITCH)
_EYE = (
    0.0,
    world.CAMERA_TARGET_HEIGHT + world.CAMERA_DISTANCE * _PITCH_SINE,
    -world.CAMERA_DISTANCE * _PITCH_COSINE,
)
_FLOOR_FAR, _FLOOR_NEAR, _FLOOR_FADE = 0.46, 0.24, 18.0
_SHADOW_STRENGTH, _CONTACT_STRENGTH, _CONTACT_REACH = 0.40, 0.35, 1.7
_AMBIENT, _DIFFUSE, _SPECULAR, _GLOSS = 0.50, 0.72, 0.20, 32
_SHINE, _POLISH = 0.85, 96
#: Where the floor begins to rise into the backdrop and where it has become it (z), and the backdrop's colour.
_RISE = (3.4, 6.8)
_BACKDROP = (0.57, 0.63, 0.70)
#: Rays of all pictures that are cast at once where pictures are drawn together.
_RAYS_TOGETHER = 2**24


class Studio(NamedTuple):
    """What surrounds the objects.

    Attributes:
      light: direction to the light, (x, y, z), not steeper than 60 degrees.
      light_size: the light's diameter over its distance; the width of soft shadows over their length.
      backdrop: how much the backdrop differs from the floor, 0 (an endless floor) to 1.
    """

    light: tuple[float, float, float] | Float[Array, "3"]
    light_size: float | Float[Array, ""]
    backdrop: float | Float[Array, ""]


#: The light comes from the left, above and a little in front, so that no two visible faces of a cube match.
STUDIO = Studio((-0.62, 0.95, -0.32), 0.16, 1.0)


def render(
    scenes: Scenes, *, height: int, width: int, samples: int = 2, studio: Studio = STUDIO
) -> Float[Array, "B h w 3"]:
    """Pictures of ``scenes``: red, green, blue in [0, 1].

    The same scenes give the same picture every time; in a batch of another size it may differ in the last bits.

    The shorter side always shows the same square of the world; a longer side shows more floor and backdrop.
    On a CPU the pictures are drawn one by one, and only the present objects are intersected; elsewhere together.

    Args:
      scenes: what to draw.
      height, width: size in pixels, at least 8 each; static under ``jit``.
      samples: rays per pixel along each side: 2 is fourfold supersampling.
      studio: light and surroundings, of all pictures.

    Raises:
      UserInputError: a size or number of samples is too small.
    """
    _check_size(height, width, samples)
    return _render(scenes, _as_arrays(studio), height, width, samples)


def empty_scene_image(height: int, width: int) -> Float[Array, "h w 3"]:
    """The studio alone, float32 in [0, 1], as ``render`` draws it around objects.

    Raises:
      UserInputError: a side is shorter than 8 pixels.
    """
    _check_size(height, width, 2)
    return _empty(_as_arrays(STUDIO), height, width)


def _check_size(height: int, width: int, samples: int) -> None:
    if min(height, width) < 8:
        raise UserInputError(f"size {height}x{width}", "each side must have at least 8 pixels", "use 64 or more")
    if samples < 1:
        raise UserInputError(f"samples {samples}", "must be at least 1", "2 is a good value")


def _as_arrays(studio: Studio) -> Studio:
    return Studio(*(jnp.asarray(field, jnp.float32) for field in studio))


@functools.partial(jax.jit, static_argnames=("height", "width"))
def _empty(studio: Studio, height: int, width: int) -> Array:
    rays = _rays(height, width, 2)
    return _average(_surroundings(rays, studio, jnp.ones(())), 2)


@functools.partial(jax.jit, static_argnames=("height", "width", "samples"))
def _render(scenes: Scenes, studio: Studio, height: int, width: int, samples: int) -> Array:
    rays = _rays(height, width, samples)
    draw = functools.partial(_draw, rays, studio, samples)
    together = max(1, _RAYS_TOGETHER // (height * width * samples * samples))
    return jax.lax.platform_dependent(
        scenes,
        cpu=lambda scenes: jax.lax.map(draw, scenes),
        default=lambda scenes: jax.lax.map(draw, scenes, batch_size=together),
    )


def _rays(height: int, width: int, samples: int) -> Vector:
    """Unit directions of all rays, each component ``[h * samples, w * samples]``."""
    half = 0.5 * min(height, width) * samples
    down = (jnp.arange(height * samples, dtype=jnp.float32) + (0.5 - 0.5 * height * samples)) / half
    right = (jnp.arange(width * samples, dtype=jnp.float32) + (0.5 - 0.5 * width * samples)) / half
    x, up = jnp.broadcast_arrays(right[None, :], -down[:, None])
    norm = jax.lax.rsqrt(x * x + up * up + world.CAMERA_FOCAL**2)
    y = up * _PITCH_COSINE - world.CAMERA_FOCAL * _PITCH_SINE
    z = up * _PITCH_SINE + world.CAMERA_FOCAL * _PITCH_COSINE
    return x * norm, y * norm, z * norm


def _average(channels: tuple[Array, ...], samples: int) -> Array:
    """Pixels ``[h, w, 3]`` from the samples of each channel."""
    height, width = channels[0].shape[0] // samples, channels[0].shape[1] // samples
    shape = (height, samples, width, samples)
    return jnp.stack([channel.reshape(shape).mean(axis=(1, 3)) for channel in channels], axis=-1)


def _floor_distance(rays: Vector) -> Array:
    """Where rays meet the floor; those at or above the horizon go very far."""
    return -_EYE[1] / jnp.minimum(rays[1], -1e-3)


def _surroundings(rays: Vector, studio: Studio, floor_light: Array) -> tuple[Array, ...]:
    """Floor and backdrop; shadows darken the floor alone."""
    reach = _floor_distance(rays)
    x, z = _EYE[0] + reach * rays[0], _EYE[2] + reach * rays[2]
    floor = (_FLOOR_FAR + _FLOOR_NEAR / (1.0 + (x * x + z * z) / _FLOOR_FADE)) * floor_light
    climb = jnp.clip((z - _RISE[0]) / (_RISE[1] - _RISE[0]), 0.0, 1.0)
    rise = studio.backdrop * climb * climb * (3.0 - 2.0 * climb)
    glow = 0.80 + 0.42 / (1.0 + 9.0 * rays[0] * rays[0] + 6.0 * jnp.square(rays[1] + 0.30))
    return tuple(floor + rise * (tint * glow - floor) for tint in _BACKDROP)


class _Seen(NamedTuple):
    """What each ray has met so far: the distance, the unit normal there, and which object (-1: none)."""

    distance: Array
    normal: Vector
    owner: Array


def _draw(rays: Vector, studio: Studio, samples: int, scene: Scenes) -> Array:
    """One picture ``[h, w, 3]``."""
    direction = jnp.asarray(studio.light)
    light = tuple(direction * jax.lax.rsqrt(jnp.sum(direction * direction)))
    seen = _look(rays, scene)
    point = tuple(e + seen.distance * r for e, r in zip(_EYE, rays, strict=True))
    lit, touched = _illuminate(point, light, jnp.asarray(studio.light_size), seen.owner, scene)

    owner = jnp.maximum(seen.owner, 0)
    palette = jnp.asarray(list(world.COLOURS.values()), jnp.float32)[scene.colour]
    albedo = tuple(_choose(owner, palette[:, channel]) for channel in range(3))
    metal = _choose(owner, scene.material) == world.MATERIALS.index("metal")
    elevation = jnp.clip(point[1] / _choose(owner, scene.size), 0.0, 2.0)

    floor_light = (1.0 - _SHADOW_STRENGTH * (1.0 - lit)) * touched
    facing = jnp.maximum(dot(seen.normal, light), 0.0) * lit
    ambient = _AMBIENT * (0.72 + 0.28 * seen.normal[1]) * (0.70 + 0.15 * elevation)
    back = 2.0 * dot(seen.normal, rays)
    mirrored = tuple(r - back * n for r, n in zip(rays, seen.normal, strict=True))
    toward = jnp.maximum(dot(mirrored, light), 0.0) * lit
    matt = ambient + _DIFFUSE * facing
    polished = _reflection(mirrored, toward) * (0.80 + 0.10 * elevation) + 0.25 * facing
    body = jnp.where(metal, polished, matt)
    shine = jnp.where(metal, _SHINE * _power(toward, _POLISH), _SPECULAR * _power(toward, _GLOSS))

    around = _surroundings(rays, studio, floor_light)
    channels = (
        jnp.where(seen.owner >= 0, jnp.minimum(a * body + shine, 1.0), b) for a, b in zip(albedo, around, strict=True)
    )
    return _average(tuple(channels), samples)


def _choose(owner: Array, values: Array) -> Array:
    """``values[owner]`` without a gather, which would end the fused loop."""
    chosen = jnp.broadcast_to(values[0], owner.shape)
    for index in range(1, len(values)):
        chosen = jnp.where(owner == index, values[index], chosen)
    return chosen


def _power(value: Array, exponent: int) -> Array:
    return jnp.exp(exponent * jnp.log(jnp.maximum(value, 1e-6)))


def _reflection(mirrored: Vector, toward: Array) -> Array:
    """Brightness of what metal reflects: a dim floor, a dark line at the horizon, a brighter room, a wide softbox."""
    up = mirrored[1]
    room = jnp.where(up > 0.0, 0.62 + 0.50 * up, 0.48 - 0.22 * up)
    horizon = 0.40 * jnp.exp(-jnp.square(up / 0.16))
    return room - horizon + 0.45 * toward * toward * toward


def _look(rays: Vector, scene: Scenes) -> _Seen:
    """The nearest surface along each ray."""
    floor = _floor_distance(rays)
    nothing = jnp.zeros_like(floor)
    seen = _Seen(floor, (nothing, nothing + 1.0, nothing), jnp.full(floor.shape, -1, jnp.int32))

    def add(index: Array, seen: _Seen) -> _Seen:
        turn, size = _turn(scene, index), scene.size[index]
        x, z = scene.position[index]
        eye = _to_solid((_EYE[0] - x, jnp.float32(_EYE[1]), _EYE[2] - z), turn, 1.0 / size)
        hit = _meet(scene.shape[index], eye, _to_solid(rays, turn, jnp.ones(())))
        distance = hit.distance * size
        nearer = hit.found & (distance < seen.distance)
        back = (turn[0], -turn[1])
        normal = _to_solid(hit.normal, back, jnp.ones(()))
        return _Seen(
            jnp.where(nearer, distance, seen.distance),
            tuple(jnp.where(nearer, new, old) for new, old in zip(normal, seen.normal, strict=True)),
            jnp.where(nearer, index, seen.owner),
        )

    return _over_present(scene, add, seen)


def _illuminate(point: Vector, light: Vector, light_size: Array, owner: Array, scene: Scenes) -> tuple[Array, Array]:
    """How much of the light reaches each point past the objects that do not own it, and how open its surroundings are.

    The second is for the floor: objects darken it where they touch it.
    """

    def shade(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        lit, touched = carry
        turn, size = _turn(scene, index), scene.size[index]
        x, z = scene.position[index]
        here = _to_solid((point[0] - x, jnp.maximum(point[1], 1e-5), point[2] - z), turn, 1.0 / size)
        toward = _to_solid(light, turn, jnp.ones(()))
        way = tuple(jnp.broadcast_to(component, owner.shape) for component in toward)
        hit = _meet(scene.shape[index], here, way)
        # The penumbra is as wide as the light looks from the edge that casts it.
        width = 0.5 * light_size * jnp.clip(hit.distance, 0.05, 4.0) + 0.01
        ramp = jnp.clip(0.5 + 0.5 * hit.depth / width, 0.0, 1.0)
        cover = jnp.where(owner == index, 0.0, ramp * ramp * (3.0 - 2.0 * ramp))
        closeness = jnp.maximum(1.0 - (here[0] ** 2 + here[2] ** 2) / _CONTACT_REACH**2, 0.0)
        return lit * (1.0 - cover), touched * (1.0 - _CONTACT_STRENGTH * closeness * closeness)

    ones = jnp.ones_like(point[1])
    return _over_present(scene, shade, (ones, ones))


def _over_present(scene: Scenes, body: Callable[[Array, Any], Any], carry: Any) -> Any:
    """``body(index, carry)`` for every present object."""

    def visit(index: Array, carry: Any) -> Any:
        return jax.lax.cond(scene.present[index], lambda c: body(index, c), lambda c: c, carry)

    return jax.lax.fori_loop(0, scene.present.shape[0], visit, carry)


def _meet(shape: Array, origin: Vector, way: Vector) -> Hit:
    return jax.lax.switch(shape, SOLIDS, origin, way)


def _turn(scene: Scenes, index: Array) -> tuple[Array, Array]:
    return jnp.cos(scene.yaw[index]), jnp.sin(scene.yaw[index])


def _to_solid(vector: Vector, turn: tuple[Array, Array], scale: Array) -> Vector:
    x, y, z = vector
    cosine, sine = turn
    return (cosine * x - sine * z) * scale, y * scale, (sine * x + cosine * z) * scale
