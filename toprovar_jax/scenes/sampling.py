"""Draws scenes at random: what is in them, and where, so that everything can be seen and nothing held out is shown."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toprovar_jax.errors import UserInputError
from toprovar_jax.scenes import world
from toprovar_jax.scenes.world import MAX_OBJECTS, Scenes
from toprovar_jax.shapes import Array, Bool, Float, Int, Key

#: What a scene is about -> how often: one object; two different ones; two to five of one shape; three to five of any.
_KINDS = {"one": 0.25, "two": 0.37, "several alike": 0.23, "any": 0.15}
_METAL = 0.35
#: From this number on all objects are small, or there would hardly be room.
_CROWD = 4
#: Places tried for an object before it is left out, and whole scenes before all but the first object are.
_PLACES, _SCENES = 32, 4
#: Least distance of two objects' middles in a picture, in units of the sum of their radii. Objects of one colour must
#: stand apart: where they touch in a picture, nobody can count them.
_APART, _APART_ALIKE = 0.95, 1.20
#: Least distance of two objects on the floor, in the same unit, so that no cubes meet.
_FLOOR_APART = 1.08
#: Objects are compared at this height, in units of their size.
_MIDDLE = 0.7


class _Things(NamedTuple):
    """One scene's objects before they have a place; ``[O]`` each."""

    wanted: Array
    shape: Array
    colour: Array
    material: Array
    size: Array


def sample_scenes(key: Key[Array, ""], batch: int, *, held_out: bool = False) -> Scenes:
    """Draws ``batch`` scenes whose objects lie wholly inside every picture and hide each other only in part.

    Traceable for static ``batch`` and ``held_out``.

    Args:
      key: where the choices come from.
      batch: how many.
      held_out: whether to draw also what training must not show: ``world.HELD_OUT_KINDS`` and ``HELD_OUT_RELATIONS``.

    Raises:
      UserInputError: ``batch`` is less than one.
    """
    if batch < 1:
        raise UserInputError(f"batch {batch}", "must be at least 1", "ask for one scene or more")
    return jax.vmap(functools.partial(_draw_scene, held_out=held_out))(jax.random.split(key, batch))


def held_out_relation(scenes: Scenes) -> Bool[Array, " B"]:
    """Whether a scene shows one of ``world.HELD_OUT_RELATIONS``."""
    return jax.vmap(_shows_held_out_relation)(scenes)


def held_out_kind(scenes: Scenes) -> Bool[Array, " B"]:
    """Whether a scene shows one of ``world.HELD_OUT_KINDS``."""
    return jnp.any(scenes.present & ~_allowed_kinds()[scenes.shape, scenes.colour], axis=-1)


def _allowed_kinds() -> Bool[Array, "shapes colours"]:
    allowed = np.ones((len(world.SHAPES), len(world.COLOURS)), bool)
    for shape, colour in world.HELD_OUT_KINDS:
        allowed[world.SHAPES.index(shape), list(world.COLOURS).index(colour)] = False
    return jnp.asarray(allowed)


def _draw_scene(key: Key[Array, ""], *, held_out: bool) -> Scenes:
    attempts = jax.vmap(functools.partial(_attempt, held_out=held_out))(jax.random.split(key, _SCENES))
    if held_out:
        return jax.tree.map(lambda field: field[0], attempts)
    shows = jax.vmap(_shows_held_out_relation)(attempts)
    scene: Scenes = jax.tree.map(lambda field: field[jnp.argmin(shows)], attempts)
    return scene._replace(present=scene.present & (~shows.all() | (jnp.arange(MAX_OBJECTS) == 0)))


def _attempt(key: Key[Array, ""], *, held_out: bool) -> Scenes:
    thing_key, place_key, yaw_key = jax.random.split(key, 3)
    things = _draw_things(thing_key, held_out)
    present, position = _place(place_key, things)
    yaw = jax.random.uniform(yaw_key, (MAX_OBJECTS,), minval=world.YAW_RANGE[0], maxval=world.YAW_RANGE[1])
    return Scenes(present, things.shape, things.colour, things.material, position, things.size, yaw)


def _draw_things(key: Key[Array, ""], held_out: bool) -> _Things:
    keys = jax.random.split(key, 8)
    kind = jax.random.choice(keys[0], len(_KINDS), p=jnp.asarray(list(_KINDS.values()), jnp.float32))
    low, high = jnp.asarray([1, 2, 2, 3])[kind], jnp.asarray([1, 2, MAX_OBJECTS, MAX_OBJECTS])[kind]
    count = jax.random.randint(keys[1], (), low, high + 1)
    alike = kind == 2
    shape = jax.random.randint(keys[2], (MAX_OBJECTS,), 0, len(world.SHAPES))
    # Two objects that a caption names side by side mostly have two names.
    step = jax.random.randint(keys[3], (), 1, len(world.SHAPES))
    differ = (kind == 1) & (jax.random.uniform(keys[4]) < 0.8)
    shape = shape.at[1].set(jnp.where(differ, (shape[0] + step) % len(world.SHAPES), shape[1]))
    shape = jnp.where(alike, shape[0], shape)
    allowed = jnp.ones((len(world.SHAPES), len(world.COLOURS)), bool) if held_out else _allowed_kinds()
    colour = jax.random.categorical(keys[5], jnp.where(allowed[shape], 0.0, -jnp.inf))
    one_colour, one_size = jax.random.uniform(keys[6], (2,)) < jnp.asarray([0.5, 0.6])
    colour = jnp.where(alike & one_colour, colour[0], colour).astype(jnp.int32)
    chances = jax.random.uniform(keys[7], (2, MAX_OBJECTS))
    size = jnp.where(chances[0] < 0.5, world.SIZES[1], world.SIZES[0]).astype(jnp.float32)
    size = jnp.where(alike & one_size, size[0], size)
    size = jnp.where(count >= _CROWD, jnp.float32(world.SIZES[0]), size)
    material = (chances[1] < _METAL).astype(jnp.int32)
    return _Things(jnp.arange(MAX_OBJECTS) < count, shape, colour, material, size)


def _place(key: Key[Array, ""], things: _Things) -> tuple[Bool[Array, " O"], Float[Array, "O 2"]]:
    """One object after the other at the first of its random places that is free; without one it is left out."""
    near, far = world.depth_range(things.size)
    across, along = jax.random.uniform(key, (2, MAX_OBJECTS, _PLACES))
    z = near[:, None] + along * (far - near)[:, None]
    x = (2.0 * across - 1.0) * world.side_limit(things.size[:, None], z)
    candidates = jnp.stack([x, z], axis=-1)

    def put(carry: tuple[Array, Array], index: Int[Array, ""]) -> tuple[tuple[Array, Array], None]:
        present, position = carry
        free = jnp.all(_clear(candidates[index], index, position, things) | ~present[None], axis=-1)
        there = things.wanted[index] & free.any()
        return (present.at[index].set(there), position.at[index].set(candidates[index, jnp.argmax(free)])), None

    start = jnp.zeros((MAX_OBJECTS,), bool), jnp.zeros((MAX_OBJECTS, 2), jnp.float32)
    return jax.lax.scan(put, start, jnp.arange(MAX_OBJECTS))[0]


def _clear(
    places: Float[Array, "P 2"], index: Int[Array, ""], position: Float[Array, "O 2"], things: _Things
) -> Bool[Array, "P O"]:
    """Whether object ``index`` at each of ``places`` is clear of each object at its ``position``."""
    size = things.size[index]
    reach = size + things.size
    floor = jnp.linalg.norm(places[:, None] - position[None], axis=-1) > _FLOOR_APART * reach[None]
    own, own_unit = world.projected(places, jnp.full(len(places), _MIDDLE * size))
    others, units = world.projected(position, _MIDDLE * things.size)
    distance = jnp.linalg.norm(own[:, None] - others[None], axis=-1)
    radii = own_unit[:, None] * size + (units * things.size)[None]
    apart = jnp.where(things.colour == things.colour[index], _APART_ALIKE, _APART)
    return floor & (distance > apart[None] * radii)


def _shows_held_out_relation(scene: Scenes) -> Bool[Array, ""]:
    both = scene.present[:, None] & scene.present[None]
    shown = jnp.zeros((), bool)
    for first, relation, second in world.HELD_OUT_RELATIONS:
        axis, sign = world.RELATIONS[relation]
        difference = sign * (scene.position[:, None, axis] - scene.position[None, :, axis])
        pair = (scene.shape == world.SHAPES.index(first))[:, None] & (scene.shape == world.SHAPES.index(second))[None]
        shown |= jnp.any(both & pair & (difference >= world.SHOWN_MARGIN))
    return shown
