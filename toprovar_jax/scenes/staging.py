"""Scenes that show what a task's prompt asks for: what a perfect model would draw."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from toprovar_jax.errors import UserInputError, unknown_name
from toprovar_jax.scenes import sampling, world
from toprovar_jax.scenes.tasks import TaskPrompt
from toprovar_jax.scenes.world import COLOURS, MAX_OBJECTS, RELATION_MARGIN, RELATIONS, SHAPES, Scenes
from toprovar_jax.shapes import Array, Bool, Float, Int, Key

#: Arrangements tried at once.
_TRIES = 64
#: Where objects of one description have the colour, or the size, of its first: how often, as in ``sample_scenes``.
_ONE_COLOUR, _ONE_SIZE = 0.5, 0.6


def scenes_showing(prompts: Sequence[TaskPrompt], seed: int) -> Scenes:
    """One scene per prompt, with exactly the objects asked for and in the relation asked for.

    Objects are placed by the rules of ``sample_scenes``, again and again until all have a place and the relation is
    plain. What a prompt leaves open is drawn at random, but never one of ``world.HELD_OUT_KINDS``. Equal prompts get
    different scenes.

    Args:
      prompts: what to show.
      seed: where the choices come from.

    Raises:
      UserInputError: a prompt that no scene can show, such as one of more than ``world.MAX_OBJECTS`` objects; before
        any scene is made.
    """
    for prompt in prompts:
        _check(prompt)
    key = jax.random.key(seed)
    staged = [_staged(key, number, _order(prompt)) for number, prompt in enumerate(prompts)]
    return Scenes(*(jnp.asarray(np.stack(field)) for field in zip(*staged, strict=True)))


class _Order(NamedTuple):
    """What is asked of one scene, object by object; ``[O]`` but for the direction.

    Attributes:
      wanted: whether there is to be such an object.
      shape, colour: indices; -1 for any.
      first: the first object of the same description.
      one, other: the objects on either side of the relation.
      direction: ``[2]``, along which ``one`` are ahead of ``other`` on the floor.
    """

    wanted: np.ndarray
    shape: np.ndarray
    colour: np.ndarray
    first: np.ndarray
    one: np.ndarray
    other: np.ndarray
    direction: np.ndarray


def _check(prompt: TaskPrompt) -> None:
    total = sum(wanted.count for wanted in prompt.wanted)
    if not 1 <= total <= MAX_OBJECTS or any(wanted.count < 1 for wanted in prompt.wanted):
        rule = f"must ask for 1 to {MAX_OBJECTS} objects to be shown by a scene"
        raise UserInputError(f"prompt {prompt.prompt!r} of {total} objects", rule, "leave it out")
    for wanted in prompt.wanted:
        if wanted.shape is not None and wanted.shape not in SHAPES:
            raise unknown_name("shape", wanted.shape, SHAPES)
        if wanted.colour is not None and wanted.colour not in COLOURS:
            raise unknown_name("colour", wanted.colour, COLOURS)
    if prompt.relation is not None:
        if prompt.relation not in RELATIONS:
            raise unknown_name("relation", prompt.relation, RELATIONS)
        if len(prompt.wanted) < 2:
            rule = "must ask for something on either side of its relation"
            raise UserInputError(f"prompt {prompt.prompt!r}", rule, "leave it out")


def _order(prompt: TaskPrompt) -> _Order:
    groups = [number for number, wanted in enumerate(prompt.wanted) for _ in range(wanted.count)]
    entries = np.array(groups + [-1] * (MAX_OBJECTS - len(groups)))
    shapes = [-1 if wanted.shape is None else SHAPES.index(wanted.shape) for wanted in prompt.wanted]
    colours = [-1 if wanted.colour is None else list(COLOURS).index(wanted.colour) for wanted in prompt.wanted]
    direction = np.zeros(2, np.float32)
    if prompt.relation is not None:
        axis, sign = RELATIONS[prompt.relation]
        direction[axis] = sign
    return _Order(
        entries >= 0,
        np.array([*shapes, -1], np.int32)[entries],
        np.array([*colours, -1], np.int32)[entries],
        np.argmax(entries[:, None] == entries[None], axis=1).astype(np.int32),
        (entries == 0) & (prompt.relation is not None),
        (entries == 1) & (prompt.relation is not None),
        direction,
    )


def _staged(key: Key[Array, ""], number: int, order: _Order) -> list[np.ndarray]:
    """The fields of one scene; :func:`_check` saw to it that there is one."""
    attempt = 0
    while True:
        scenes, shown = _arranged(key, np.array([number, attempt], np.uint32), order)
        found = np.flatnonzero(shown)
        if len(found):
            return [np.asarray(field)[found[0]] for field in scenes]
        attempt += 1


@jax.jit
def _arranged(key: Key[Array, ""], numbers: np.ndarray | Array, order: _Order) -> tuple[Scenes, Bool[Array, " B"]]:
    """Scenes of the objects asked for, and whether each shows them all where they should be.

    ``numbers`` are those of the prompt and of the attempt, which change the key.
    """
    key = jax.random.fold_in(jax.random.fold_in(key, numbers[0]), numbers[1])

    def arrange(key: Key[Array, ""]) -> tuple[Scenes, Bool[Array, ""]]:
        thing_key, place_key, yaw_key = jax.random.split(key, 3)
        things = _things(thing_key, order)
        present, position = sampling._place(place_key, things)
        ahead = position @ order.direction
        plain = ahead[:, None] - ahead[None] > RELATION_MARGIN
        related = jnp.all(plain | ~order.one[:, None] | ~order.other[None])
        yaw = jax.random.uniform(yaw_key, (MAX_OBJECTS,), minval=world.YAW_RANGE[0], maxval=world.YAW_RANGE[1])
        scene = Scenes(present, things.shape, things.colour, things.material, position, things.size, yaw)
        return scene, related & jnp.all(present == order.wanted)

    return jax.vmap(arrange)(jax.random.split(key, _TRIES))


def _things(key: Key[Array, ""], order: _Order) -> sampling._Things:
    """The objects of one scene, with what is left open drawn as ``sample_scenes`` does."""
    keys = jax.random.split(key, 4)
    allowed = sampling._allowed_kinds()
    fitting = jnp.where(order.colour[:, None] < 0, True, allowed.T[order.colour])
    shape = jnp.where(order.shape < 0, _choice(keys[0], fitting), order.shape)
    colour = _choice(keys[1], allowed[shape])
    one_colour, one_size = jax.random.uniform(keys[2], (2,)) < jnp.asarray([_ONE_COLOUR, _ONE_SIZE])
    colour = jnp.where(one_colour & (order.shape >= 0), colour[order.first], colour)
    colour = jnp.where(order.colour < 0, colour, order.colour)
    chances = jax.random.uniform(keys[3], (2, MAX_OBJECTS))
    size = jnp.where(chances[0] < 0.5, world.SIZES[1], world.SIZES[0]).astype(jnp.float32)
    size = jnp.where(one_size, size[order.first], size)
    size = jnp.where(order.wanted.sum() >= sampling._CROWD, jnp.float32(world.SIZES[0]), size)
    material = (chances[1] < sampling._METAL).astype(jnp.int32)
    return sampling._Things(jnp.asarray(order.wanted), shape, colour, material, size)


def _choice(key: Key[Array, ""], allowed: Bool[Array, "O N"]) -> Int[Array, " O"]:
    chances: Float[Array, "O N"] = jnp.where(allowed, 0.0, -jnp.inf)
    return jax.random.categorical(key, chances).astype(jnp.int32)
