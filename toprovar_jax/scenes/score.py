"""Whether pictures show what their prompts ask for: GenEval's protocol for the six tasks, and free prompts strictly.

The protocol is that of GenEval (Ghosh et al., "GenEval: an object-focused framework for evaluating text-to-image
alignment", 2023; released code: ``evaluate_images.py``, ``summary_scores.py``).

Equal to GenEval:

- A picture is right or wrong. Of every kind of object that a prompt names, the most confident ``count`` detections
  are looked at: fewer make the picture wrong, and colours and places are asked of those alone. Others do no harm.
- In the counting task, more objects of the kind than asked for make the picture wrong too.
- A relation must hold between every object of one side and every object of the other.
- A task's score is the share of right pictures, the total is the mean of the tasks' scores.

Different:

- The detector and its colours are the judge of this world. An object counts from the judge's own confidence on, in all
  tasks, while GenEval asks for 0.3, and for 0.9 in counting, of a detector that reports the same object several times.
- Relations go by places on the floor and need ``world.SHOWN_MARGIN``, since the judge knows depth: "behind"
  and "in front of" stand where GenEval has "above" and "below", which it reads from the middles of boxes, less a tenth
  of their sizes and within 60 degrees of the axis. Here an object that is both behind and to the left is both.
- Where two entries name one shape, their detections are told apart by colour; GenEval never asks that.
- Scores come with 95 % intervals by bootstrap: prompts are drawn anew within each task, all pictures of one together.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from toprovar_jax.errors import UserInputError
from toprovar_jax.intervals import Interval, bootstrap_shares
from toprovar_jax.scenes.detector import WORKING_SIDE
from toprovar_jax.scenes.judge import Detections, Judge
from toprovar_jax.scenes.reading import Reading, read_prompt
from toprovar_jax.scenes.tasks import TASKS, TaskPrompt, Wanted
from toprovar_jax.scenes.world import COLOURS, RELATIONS, SHAPES, SHOWN_MARGIN
from toprovar_jax.shapes import Bool, UInt8

#: Shortest side of pictures that can be judged.
LEAST_SIDE = WORKING_SIDE // 2

_Relations = Sequence[tuple[int, str, int]]


class Seen(NamedTuple):
    """One object that the judge found: names of its shape and colour, and its place on the floor (x, z)."""

    shape: str
    colour: str
    position: tuple[float, float]


class TaskScore(NamedTuple):
    """One task's share of right pictures, of how many prompts and pictures."""

    task: str
    share: Interval
    prompts: int
    images: int


class Score(NamedTuple):
    """The scores of the tasks, in their order, and the mean of them."""

    tasks: tuple[TaskScore, ...]
    total: Interval


def objects_seen(detections: Detections) -> list[list[Seen]]:
    """The objects of each picture, the most confident first."""
    found, shape, colour, _, position, *_ = (np.asarray(field) for field in detections)
    names = list(COLOURS)
    return [
        [
            Seen(SHAPES[shape[row, slot]], names[colour[row, slot]], tuple(position[row, slot].tolist()))
            for slot in np.flatnonzero(found[row])
        ]
        for row in range(len(found))
    ]


def task_shown(seen: Sequence[Seen], prompt: TaskPrompt) -> bool:
    """Whether a picture of these objects is right, by the protocol above.

    Args:
      seen: the objects, the most confident first.
      prompt: what was asked for.
    """
    needed = collections.Counter[str | None]()
    for wanted in prompt.wanted:
        needed[wanted.shape] += wanted.count
    rest, looked_at = list(seen), []
    for shape in sorted(needed, key=lambda shape: shape is None):  # what may be anything comes last
        kind = [thing for thing in rest if shape in (None, thing.shape)]
        if len(kind) < needed[shape] or (prompt.task == "counting" and len(kind) > needed[shape]):
            return False
        for thing in kind[: needed[shape]]:
            looked_at.append(thing)
            rest.remove(thing)
    relations = () if prompt.relation is None else ((0, prompt.relation, 1),)
    return _fits(looked_at, prompt.wanted, relations)


def description_shown(seen: Sequence[Seen], reading: Reading) -> bool:
    """Whether a picture holds exactly the objects of a free prompt, no other ones, and in the places it names."""
    return _fits(seen, _apart(reading.wanted), reading.relations)


def tasks_right(detections: Detections, prompts: Sequence[TaskPrompt]) -> Bool[np.ndarray, " B"]:
    """Whether each picture is right, by the protocol above.

    Args:
      detections: what the judge sees in the pictures.
      prompts: what each was asked to show.
    """
    pairs = zip(objects_seen(detections), prompts, strict=True)
    return np.array([task_shown(seen, prompt) for seen, prompt in pairs], bool)


def score(right: Bool[np.ndarray, " B"], prompts: Sequence[TaskPrompt]) -> Score:
    """Scores by task, of pictures whose prompts say which task they belong to; others are left out.

    Args:
      right: verdicts.
      prompts: of each picture; those of one task that read the same are one prompt.
    """
    verdicts: dict[str, dict[str, list[bool]]] = {}
    for verdict, prompt in zip(right.tolist(), prompts, strict=True):
        if prompt.task is not None:
            verdicts.setdefault(prompt.task, {}).setdefault(prompt.prompt, []).append(verdict)
    counts = {
        task: ([sum(each) for each in verdicts[task].values()], [len(each) for each in verdicts[task].values()])
        for task in TASKS
        if task in verdicts
    }
    tasks = [
        TaskScore(task, bootstrap_shares([(hits, trials)]), len(trials), sum(trials))
        for task, (hits, trials) in counts.items()
    ]
    return Score(tuple(tasks), bootstrap_shares(list(counts.values())))


def check_judgeable(prompts: Sequence[str], side: int) -> None:
    """Refuses what :func:`judged_right` could not judge, before there are pictures.

    Raises:
      UserInputError: a prompt that asks for nothing of the world or for more than it holds, or pictures whose shorter
        side is too small.
    """
    for prompt in prompts:
        _reading(prompt)
    if side < LEAST_SIDE:
        rule = f"must be at least {LEAST_SIDE} pixels along each side to be judged"
        raise UserInputError(f"pictures of {side} pixels", rule, "make larger ones")


def judged_right(images: UInt8[np.ndarray, "B h w 3"], prompts: Sequence[str]) -> Bool[np.ndarray, " B"]:
    """Whether each picture shows exactly what its free prompt asks for, and no other object.

    Raises:
      UserInputError: a prompt that asks for nothing of the world or for more than it holds, or pictures too small.
    """
    readings = [_reading(prompt) for prompt in prompts]
    pairs = zip(objects_seen(_judge()(images)), readings, strict=True)
    return np.array([description_shown(seen, reading) for seen, reading in pairs], bool)


def related(first: Seen, relation: str, second: Seen) -> bool:
    """Whether ``first`` stands ``relation`` (a key of ``world.RELATIONS``) ``second``, by at least the margin."""
    axis, sign = RELATIONS[relation]
    return sign * (first.position[axis] - second.position[axis]) >= SHOWN_MARGIN


def _fits(seen: Sequence[Seen], wanted: Sequence[Wanted], relations: _Relations) -> bool:
    """Whether the objects can be given to the entries one to one, each to one that it agrees with."""
    owners = [entry for entry, asked in enumerate(wanted) for _ in range(asked.count)]
    if len(seen) != len(owners):
        return False
    return any(
        all(_agrees(thing, wanted[owner]) for thing, owner in zip(order, owners, strict=True))
        and all(
            related(first, relation, second)
            for left, relation, right in relations
            for first in _of(left, order, owners)
            for second in _of(right, order, owners)
        )
        for order in itertools.permutations(seen)
    )


def _apart(wanted: Sequence[Wanted]) -> list[Wanted]:
    """The entries of a reading, each without what a narrower one counts too: "a red cube and a cube" are two cubes."""
    own: dict[Wanted, int] = {}
    for broad in sorted(wanted, key=lambda asked: (asked.shape is None) + (asked.colour is None)):
        inside = (count for narrow, count in own.items() if _covers(broad, narrow))
        own[broad] = max(0, broad.count - sum(inside))
    return [dataclasses.replace(asked, count=own[asked]) for asked in wanted]


def _covers(broad: Wanted, narrow: Wanted) -> bool:
    return broad.shape in (None, narrow.shape) and broad.colour in (None, narrow.colour)


def _of(entry: int, order: Sequence[Seen], owners: Sequence[int]) -> list[Seen]:
    return [thing for thing, owner in zip(order, owners, strict=True) if owner == entry]


def _agrees(thing: Seen, asked: Wanted) -> bool:
    return asked.shape in (None, thing.shape) and asked.colour in (None, thing.colour)


def _reading(prompt: str) -> Reading:
    reading = read_prompt(prompt)
    if reading.unknown:
        raise UserInputError(
            f"prompt {prompt!r}",
            f"must ask for what the scenes world holds (not {', '.join(reading.unknown)})",
            "judge other prompts",
        )
    if not reading.wanted:
        raise UserInputError(f"prompt {prompt!r}", "must ask for an object of the scenes world", "judge other prompts")
    return reading


@functools.cache
def _judge() -> Judge:
    return Judge.load()
