"""Prompts of GenEval's six tasks about the embedded world: what each asks for, in words and in numbers."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from toprovar_jax.errors import UserInputError, unknown_name
from toprovar_jax.scenes.captions import ANY_SHAPE, NOUNS, NUMBER_WORDS
from toprovar_jax.scenes.world import (
    COLOURS,
    HELD_OUT_KINDS,
    HELD_OUT_RELATIONS,
    MAX_OBJECTS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
)

TASKS: tuple[str, ...] = ("single object", "two objects", "counting", "colours", "position", "colour attribution")

#: What GenEval's files call the tasks.
_TAGS: dict[str, str] = dict(
    zip(TASKS, ("single_object", "two_object", "counting", "colors", "position", "color_attr"), strict=True)
)
_FRAMES = ("a photo of {}", "{}", "a picture of {}", "an image of {}")
_PHRASES = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "in front of": ("in front of",),
    "behind": ("behind",),
}
_CLASSES = {one: shape for shape, names in NOUNS.items() for one, _ in names} | {one: None for one, _ in ANY_SHAPE}


@dataclasses.dataclass(frozen=True)
class Wanted:
    """How many things of one description a picture should show.

    Attributes:
      shape: one of ``SHAPES``; None for any.
      colour: one of ``COLOURS``; None for any.
      count: how many; one to ``MAX_OBJECTS`` in what this module makes.
    """

    shape: str | None
    colour: str | None = None
    count: int = 1


@dataclasses.dataclass(frozen=True)
class TaskPrompt:
    """A prompt and what a picture must show to do what it says.

    Attributes:
      prompt: the words.
      wanted: all that is asked for.
      relation: key of ``world.RELATIONS`` that says ``wanted[0] RELATION wanted[1]``; None where nothing is said.
      task: one of ``TASKS``, or None.
      held_out: whether it needs a pair of shape and colour, or a relation of two shapes, that training never shows.
    """

    prompt: str
    wanted: tuple[Wanted, ...]
    relation: str | None = None
    task: str | None = None
    held_out: bool = False


def needs_held_out(wanted: Sequence[Wanted], relation: str | None = None) -> bool:
    """Whether a picture of this must show one of ``world.HELD_OUT_KINDS`` or ``HELD_OUT_RELATIONS``."""
    if any((thing.shape, thing.colour) in HELD_OUT_KINDS for thing in wanted):
        return True
    if relation is None:
        return False
    one, other = wanted[0].shape, wanted[1].shape
    return not {(one, relation, other), (other, OPPOSITE[relation], one)}.isdisjoint(HELD_OUT_RELATIONS)


def task_prompts(per_task: Any, seed: Any = 0, held_out: bool | None = None) -> tuple[TaskPrompt, ...]:
    """``per_task`` prompts of each of ``TASKS``, in GenEval's template and near variants of it.

    What is asked for comes again only after everything else of the task did, and then in other words as long as there
    are any. The same arguments always give the same prompts.

    Args:
      per_task: how many of each task, a whole number.
      seed: of the choice, a whole number.
      held_out: True for only those that need what training never shows, which leaves the tasks "colours", "position"
        and "colour attribution"; False for none of those; None for all, as often as they come up.

    Raises:
      UserInputError: ``per_task`` below one, ``seed`` below zero, or one of them no whole number.

    Source: GenEval, section 3.1, with the shapes, colours and relations of this world; counting goes on to five.
    """
    if not _is_whole(per_task) or per_task < 1:
        rule = "must be a whole number, at least 1"
        raise UserInputError(f"per_task {per_task!r}", rule, "ask for one prompt or more of each task")
    if not _is_whole(seed) or seed < 0:
        raise UserInputError(f"seed {seed!r}", "must be a whole number and not negative", "choose another")
    found: list[TaskPrompt] = []
    for number, task in enumerate(TASKS):
        rng = np.random.default_rng((seed, number))
        asked = [what for what in _combinations(task) if held_out is None or needs_held_out(*what) == held_out]
        found += itertools.islice(_prompts(task, asked, rng), per_task)
    return tuple(found)


def _is_whole(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _combinations(task: str) -> list[tuple[tuple[Wanted, ...], str | None]]:
    """Everything that a task can ask for."""
    pairs = list(itertools.permutations(SHAPES, 2))
    if task == "position":
        return [((Wanted(one), Wanted(other)), relation) for one, other in pairs for relation in RELATIONS]
    wanted: dict[str, list[tuple[Wanted, ...]]] = {
        "single object": [(Wanted(shape),) for shape in SHAPES],
        "two objects": [(Wanted(one), Wanted(other)) for one, other in pairs],
        "counting": [(Wanted(shape, None, n),) for shape in SHAPES for n in range(2, MAX_OBJECTS + 1)],
        "colours": [(Wanted(shape, colour),) for shape in SHAPES for colour in COLOURS],
        "colour attribution": [
            (Wanted(one, colour), Wanted(other, another))
            for one, other in pairs
            for colour, another in itertools.permutations(COLOURS, 2)
        ],
    }
    return [(things, None) for things in wanted[task]]


def _prompts(
    task: str, asked: Sequence[tuple[tuple[Wanted, ...], str | None]], rng: np.random.Generator
) -> Iterator[TaskPrompt]:
    """Endless rounds through ``asked`` in random order; every one in each of its wordings before any comes again."""
    wordings: dict[int, list[str]] = {}
    while asked:
        for number in rng.permutation(len(asked)).tolist():
            wanted, relation = asked[number]
            if not wordings.get(number):
                every = _wordings(wanted, relation)
                wordings[number] = [every[place] for place in rng.permutation(len(every))]
            yield TaskPrompt(wordings[number].pop(), wanted, relation, task, needs_held_out(wanted, relation))


def _wordings(wanted: Sequence[Wanted], relation: str | None) -> list[str]:
    names = [_name(thing) for thing in wanted]
    links = ("and",) if relation is None else _PHRASES[relation]
    things = [names[0]] if len(names) == 1 else [f"{names[0]} {link} {names[1]}" for link in links]
    return [frame.format(thing) for frame in _FRAMES for thing in things]


def _name(thing: Wanted) -> str:
    noun = (NOUNS[thing.shape] if thing.shape else ANY_SHAPE)[0][thing.count > 1]
    words = [thing.colour, noun] if thing.colour else [noun]
    first = ("an" if words[0][0] in "aeiou" else "a") if thing.count == 1 else NUMBER_WORDS[thing.count][0]
    return " ".join([first, *words])


def to_json_line(prompt: TaskPrompt) -> str:
    """One line of GenEval's metadata, without the end of line; :func:`read_task_prompts` reads it.

    As there, the object whose position is said comes after the one it is said of, and counting excludes one more.
    """
    number = _of_shapes(prompt.wanted)
    include: list[dict[str, Any]] = []
    for thing in prompt.wanted:
        item: dict[str, Any] = {"class": thing.shape or ANY_SHAPE[0][0], "count": thing.count}
        include.append(item if thing.colour is None else item | {"color": thing.colour})
    if prompt.relation is not None:
        include[:2] = [include[1], include[0] | {"position": [prompt.relation, 0]}]
    fields: dict[str, Any] = {} if prompt.task is None else {"tag": _TAGS[prompt.task]}
    fields["include"] = include
    if prompt.task == "counting":
        fields["exclude"] = [item | {"count": number[_CLASSES[item["class"]]] + 1} for item in include]
    return json.dumps(fields | {"prompt": prompt.prompt}, ensure_ascii=False)


def read_task_prompts(path: str | os.PathLike[str]) -> tuple[TaskPrompt, ...]:
    """Prompts from a file in GenEval's metadata form, one JSON object per line; blank lines count for nothing.

    A line must not contradict itself. Its tag needs what the task is about. Its prompt, where
    :func:`~toprovar_jax.scenes.reading.read_prompt` understands all of it, must ask for what ``include`` says. Only
    counting excludes anything, which is one more than was asked for.

    Raises:
      UserInputError: the file cannot be read, holds no prompt, or has a line that is not of that form, contradicts
        itself or asks for what the embedded world lacks; the message names the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserInputError(f"file {path}", f"cannot be read ({reason})", "give a file of task prompts") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                found.append(_from_json(line))
            except UserInputError as error:
                raise UserInputError(f"file {path}, line {number}: {error.value}", error.rule, error.remedy) from None
    if not found:
        raise UserInputError(f"file {path}", "must hold at least one prompt", "write one JSON object per line")
    return tuple(found)


_FORM = 'write {"tag": "colors", "include": [{"class": "cube", "count": 1, "color": "red"}], "prompt": "a red cube"}'


def _from_json(line: str) -> TaskPrompt:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        raise UserInputError("text", "must be a JSON object", _FORM) from None
    if not isinstance(fields, dict):
        raise UserInputError(f"{fields!r}", "must be a JSON object", _FORM)
    _only(fields, ("tag", "include", "exclude", "prompt"))
    prompt, include = fields.get("prompt"), fields.get("include")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserInputError(f"prompt {prompt!r}", "must be text", _FORM)
    if not isinstance(include, list) or not include:
        raise UserInputError(f"include {include!r}", "must be a list of at least one object", _FORM)
    tasks = {tag: task for task, tag in _TAGS.items()}
    tag = fields.get("tag")
    if tag is not None and (not isinstance(tag, str) or tag not in tasks):
        raise unknown_name("tag", tag, tasks)
    wanted = [_wanted(item) for item in include]
    total = sum(thing.count for thing in wanted)
    if total > MAX_OBJECTS:
        raise UserInputError(f"include of {total} objects", f"must be at most {MAX_OBJECTS} in all", "ask for fewer")
    _check_exclude(fields.get("exclude", []), wanted, tag)
    relation = None
    for place, item in enumerate(include):
        if "position" in item:
            relation, other = _position(item["position"], place, include, relation)
            rest = [thing for number, thing in enumerate(wanted) if number not in (place, other)]
            wanted = [wanted[place], wanted[other], *rest]
    if tag is not None:
        _check_tag(tag, wanted, relation)
    _check_words(prompt, wanted, relation)
    return TaskPrompt(
        prompt, tuple(wanted), relation, None if tag is None else tasks[tag], needs_held_out(wanted, relation)
    )


def _wanted(item: Any) -> Wanted:
    if not isinstance(item, dict):
        raise UserInputError(f"object {item!r}", "must be a JSON object", _FORM)
    _only(item, ("class", "count", "color", "position"))
    name, count, colour = item.get("class"), item.get("count", 1), item.get("color")
    if not isinstance(name, str) or name not in _CLASSES:
        raise unknown_name("class", name, _CLASSES)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_OBJECTS:
        raise UserInputError(f"count {count!r}", f"must be 1 to {MAX_OBJECTS}", "correct the number")
    if colour is not None and (not isinstance(colour, str) or colour not in COLOURS):
        raise unknown_name("color", colour, COLOURS)
    return Wanted(_CLASSES[name], colour, count)


def _position(value: Any, place: int, include: Sequence[Any], relation: str | None) -> tuple[str, int]:
    if relation is not None:
        raise UserInputError("two positions", "must be at most one", "make two prompts of it")
    if not isinstance(value, list) or len(value) != 2:
        raise UserInputError(f"position {value!r}", "must be a relation and an index", 'write ["left of", 0]')
    name, other = value
    if not isinstance(name, str) or name not in RELATIONS:
        raise unknown_name("position", name, RELATIONS)
    valid = isinstance(other, int) and not isinstance(other, bool) and 0 <= other < len(include) and other != place
    if not valid:
        raise UserInputError(f"position index {other!r}", "must be another object of include", "count from 0")
    return name, other


def _of_shapes(wanted: Sequence[Wanted]) -> collections.Counter[str | None]:
    """How many are asked for of each shape."""
    number: collections.Counter[str | None] = collections.Counter()
    for thing in wanted:
        number[thing.shape] += thing.count
    return number


def _check_exclude(exclude: Any, wanted: Sequence[Wanted], tag: str | None) -> None:
    """Numbers are exact in the counting task alone, where all that can be excluded is one more of a shape."""
    number = _of_shapes(wanted)
    implied = [
        {"class": name, "color": thing.colour, "count": number[thing.shape] + 1}
        for thing in wanted
        for name, shape in _CLASSES.items()
        if shape == thing.shape
    ]
    for item in exclude if isinstance(exclude, list) else [exclude]:
        if tag != _TAGS["counting"] or not isinstance(item, dict) or {"color": None, **item} not in implied:
            raise UserInputError(
                f"exclude {item!r}",
                "may only be one more of an object that is included, and of the tag counting",
                "leave it out",
            )


def _check_tag(tag: str, wanted: Sequence[Wanted], relation: str | None) -> None:
    """Whether a task is about what is asked for."""
    total, coloured = sum(thing.count for thing in wanted), sum(thing.colour is not None for thing in wanted)
    fits, rule = {
        "single object": (total == 1, "one object"),
        "two objects": (total == 2, "two objects"),
        "counting": (True, "objects"),
        "colours": (coloured > 0, "an object with a color"),
        "position": (relation is not None, "an object with a position"),
        "colour attribution": (coloured > 1, "two objects with colors"),
    }[next(task for task, name in _TAGS.items() if name == tag)]
    if not fits:
        raise UserInputError(f"tag {tag!r}", f"must include {rule}", "correct the tag or what is included")
    if relation is not None and tag != _TAGS["position"]:
        raise UserInputError(f"tag {tag!r}", "must not include a position", "write the tag position")


def _check_words(prompt: str, wanted: Sequence[Wanted], relation: str | None) -> None:
    """Whether a prompt asks for what is included, as far as it can be understood."""
    from toprovar_jax.scenes.reading import read_prompt  # which imports this file

    reading = read_prompt(prompt)
    if reading.unknown:
        return
    read = [(thing.shape, thing.colour) for thing in reading.wanted]
    # A reading counts the narrower with the broader: "a red cube and a cube" are two cubes.
    included = {
        (shape, colour): sum(
            other.count for other in wanted if shape in (None, other.shape) and colour in (None, other.colour)
        )
        for shape, colour in ((thing.shape, thing.colour) for thing in wanted)
    }
    if included != {kind: thing.count for kind, thing in zip(read, reading.wanted, strict=True)}:
        asked = ", ".join(" ".join(filter(None, (str(w.count), w.colour, w.shape or "any"))) for w in reading.wanted)
        raise UserInputError(
            f"prompt {prompt!r}", f"must ask for what is included, but asks for {asked or 'nothing'}", "correct either"
        )
    said = {(read[one], name, read[other]) for one, name, other in reading.relations}
    said |= {(other, OPPOSITE[name], one) for one, name, other in said}
    stated = None if relation is None else ((thing.shape, thing.colour) for thing in wanted[:2])
    if stated is None:
        fits = not said
    else:
        one, other = stated
        fits = one == other or (one, relation, other) in said  # nothing is read of the places of two things alike
    if not fits:
        told = "a position" if relation is None else f"another position than {relation!r}, or none"
        raise UserInputError(
            f"prompt {prompt!r}", f"must say the position that is included, but says {told}", "correct either"
        )


def _only(fields: dict[str, Any], names: Sequence[str]) -> None:
    for name in fields:
        if name not in names:
            raise unknown_name("field", name, names)
