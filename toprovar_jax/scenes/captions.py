"""Captions as people write them: what stands in a scene, how many of it, and where; nothing that is not true of it."""

import bisect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import numpy as np

from toprovar_jax.scenes.world import (
    COLOURS,
    HELD_OUT_RELATIONS,
    MATERIALS,
    OPPOSITE,
    RELATION_MARGIN,
    RELATIONS,
    SHAPES,
    SIZES,
    Scenes,
)

#: What people call each shape, one and several of it; the first name is the most common one.
NOUNS = {
    "sphere": (("sphere", "spheres"), ("ball", "balls")),
    "cube": (("cube", "cubes"), ("box", "boxes"), ("block", "blocks")),
    "cylinder": (("cylinder", "cylinders"),),
    "cone": (("cone", "cones"),),
    "torus": (("torus", "tori"), ("ring", "rings"), ("donut", "donuts")),
}
ANY_SHAPE = (("object", "objects"), ("shape", "shapes"))
#: In the order of ``SIZES``.
SIZE_WORDS = (("small",), ("large", "big"))
MATERIAL_WORDS = {"matt": ("matt", "matte", "rubber"), "metal": ("metal", "shiny", "metallic")}
#: Number -> how it is written.
NUMBER_WORDS = {1: ("one", "1"), 2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4"), 5: ("five", "5")}

#: How far from the origin (world units) an object must stand before a caption says on which side it is.
SIDE_FROM = 0.5
#: How near to the origin it must stand, in x and in z, to be "in the middle".
MIDDLE_WITHIN = 0.4
#: No caption has more words; each is one token.
MAX_WORDS = 27

_PLACES = {
    "left": ("on the left", "on the left side", "to the left"),
    "right": ("on the right", "on the right side", "to the right"),
    "front": ("at the front", "in the front", "in the foreground"),
    "back": ("at the back", "in the back", "in the background"),
    "middle": ("in the middle", "in the center", "in the centre"),
}
_RELATION_PHRASES = {
    "left of": ("to the left of", "left of", "on the left of"),
    "right of": ("to the right of", "right of", "on the right of"),
    "in front of": ("in front of",),
    "behind": ("behind",),
}
#: The same, of something that was just named.
_RELATED_TO_IT = {
    "left of": ("to its left", "on its left", "to the left of it"),
    "right of": ("to its right", "on its right", "to the right of it"),
    "in front of": ("in front of it",),
    "behind": ("behind it",),
}
#: The same, where the other one is understood.
_RELATED = {"left of": "on the left", "right of": "on the right", "in front of": "in front", "behind": "behind"}
#: Relation -> the places of the two, where these are plain too.
_RELATION_PLACES = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "in front of": ("front", "back"),
    "behind": ("back", "front"),
}
_T = TypeVar("_T")


class _Choice:
    """Draws from a table by weight; ``rng.choice`` would take longer than all the rest of a caption."""

    def __init__(self, weights: Mapping[str, float]):
        self._names = tuple(weights)
        self._ends = list(itertools.accumulate(weights.values()))

    def __call__(self, draw: Callable[[], float]) -> str:
        return self._names[bisect.bisect_right(self._ends, draw() * self._ends[-1], hi=len(self._names) - 1)]


#: What stands around the things, where these are named and no more is said.
_FRAMES = {
    "{things}": 42.0,
    "a photo of {things}": 18.0,
    "a picture of {things}": 5.0,
    "an image of {things}": 5.0,
    "an image with {things}": 3.0,
    "a 3d render of {things}": 4.0,
    "a scene with {things}": 2.0,
    "there {are} {things}": 4.0,
    "there {are} {things} on the floor": 3.0,
    "{things} on the floor": 5.0,
    "{things} on a grey floor": 3.0,
    "{things} on a gray floor": 2.0,
    "{things} {stand} on the floor": 2.0,
}
_FRAME = _Choice(_FRAMES)
_OPENING = _Choice({frame: weight for frame, weight in _FRAMES.items() if frame.endswith("{things}")})
_BARE_FRAME = _Choice({"{things}": 8.0, "{things} on the floor": 2.0, "{things} on a grey floor": 1.0})
_PLAIN_FRAME = _Choice({"{things}": 1.0, "a photo of {things}": 2.0})
#: How two things and a relation become a sentence; a form with "is" or "the" takes nothing around it.
_RELATION_FORMS = {
    "{one} {relation} {other}": 46.0,
    "{one} is {relation} {other}": 12.0,
    "{one} stands {relation} {other}": 4.0,
    "{other} with {one} {related_to_it}": 8.0,
    "{other} and {one} {related_to_it}": 5.0,
    "{relation} {other} is {one}": 4.0,
    "{relation} {other} there is {one}": 3.0,
    "{one} and {other}, the {short} is {relation} the {short_other}": 4.0,
    "{other} and {one}, the {short} is {relation} the {short_other}": 4.0,
    "{one} and {other}, the {short} is {related}": 3.0,
    "{other} and {one}, the {short} is {related}": 3.0,
    "{one} {place} and {other} {other_place}": 12.0,
    "{one} {relation} and {second_relation} {other}": 8.0,
}
_RELATION_FORM = _Choice(_RELATION_FORMS)

#: (shape, relation, shape) that no caption states, from either side.
_UNSAID = frozenset(
    triple
    for one, relation, other in HELD_OUT_RELATIONS
    for triple in ((one, relation, other), (other, OPPOSITE[relation], one))
)


class _Thing(NamedTuple):
    """One object: names of its attributes, and where it stands."""

    shape: str
    colour: str
    material: str
    size: int
    position: tuple[float, float]


class _Group(NamedTuple):
    """Objects that a caption names together: ``"two red cubes"``.

    Attributes:
      things: the objects.
      adjectives: before the noun; of these, ``colour`` is the colour's name or nothing.
      noun: for this number of things.
    """

    things: list[_Thing]
    adjectives: list[str]
    colour: str
    noun: str


def places(position: Sequence[float] | np.ndarray) -> tuple[str, ...]:
    """Which of "left", "right", "front", "back", "middle" are plainly true of a floor ``position`` (x, z)."""
    x, z = float(position[0]), float(position[1])
    found = []
    if abs(x) > SIDE_FROM:
        found.append("left" if x < 0 else "right")
    if abs(z) > SIDE_FROM:
        found.append("front" if z < 0 else "back")
    if max(abs(x), abs(z)) < MIDDLE_WITHIN:
        found.append("middle")
    return tuple(found)


def caption(scene: Scenes, rng: np.random.Generator) -> str:
    """One caption of one scene (fields without the batch axis): see :func:`captions`."""
    return captions(jax.tree.map(lambda field: np.asarray(field)[None], scene), rng)[0]


def captions(scenes: Scenes, rng: np.random.Generator) -> list[str]:
    """One caption per scene, drawn anew at each call: lower case, without a full stop, at most ``MAX_WORDS`` words.

    Everything a caption says is true, and a number is exact: "two red cubes" are all the red cubes there are. Most
    captions name all objects, those alike together; colours, shapes, sizes, materials and places may stay unsaid.
    Relations are stated where they are plain (``world.RELATION_MARGIN``), between single objects that the caption
    names; one of ``world.HELD_OUT_RELATIONS`` never is.

    Args:
      scenes: on the host or not; every scene has at least one object.
      rng: where the choice of words comes from.
    """
    return [_write(things, rng.random) for things in _things(scenes)]


def _things(scenes: Scenes) -> Iterable[list[_Thing]]:
    middle, colours = sum(SIZES) / 2.0, tuple(COLOURS)
    rows = zip(*(np.asarray(field).tolist() for field in scenes[:6]), strict=True)
    for row in rows:
        yield [
            _Thing(SHAPES[shape], colours[colour], MATERIALS[material], int(size > middle), (position[0], position[1]))
            for present, shape, colour, material, position, size in zip(*row, strict=True)
            if present
        ]


def _write(things: list[_Thing], draw: Callable[[], float]) -> str:
    text = _compose(things, draw, plain=draw() < 0.25)
    while text.count(" ") >= MAX_WORDS:
        text = _compose(things, draw, plain=True)
    return text


def _compose(things: list[_Thing], draw: Callable[[], float], *, plain: bool) -> str:
    """One caption; a plain one is built as benchmarks do it: common names, colours at most, whole noun phrases."""
    groups = _shuffled(_describe(things, draw, plain), draw)
    if len(groups) > 2 and draw() < 0.05:
        groups.pop()  # people do not always mention everything
    bare = not plain and draw() < 0.15
    names = _names(groups, draw, plain, bare)
    relations = _plain_relations(groups)
    if len(groups) == 2 and relations and draw() < 0.55:
        return _relate(groups, names, relations, draw, plain, bare)
    if len(groups) > 2 and relations and not plain and draw() < 0.25:
        return _list_and_relate(groups, names, relations, draw)
    frame = (_PLAIN_FRAME if plain else _BARE_FRAME if bare else _FRAME)(draw)
    if not plain:
        names, placed = _placed(groups, names, draw)
        if placed:
            frame = "{things}" if bare else _OPENING(draw)
    first_is_one, one_in_all = len(groups[0].things) == 1, len(groups) == len(groups[0].things) == 1
    text = frame.format(
        things=_joined(names, draw), are="is" if first_is_one else "are", stand="stands" if one_in_all else "stand"
    )
    if len(groups) == 1 and len(things) == 1 and not plain:
        text += _place_of_one(things[0], draw)
    return text


def _describe(things: list[_Thing], draw: Callable[[], float], plain: bool) -> list[_Group]:
    """The objects grouped by what the caption says of them; things of one shape are told apart in the same way."""
    shapes = list(dict.fromkeys(thing.shape for thing in things))
    nameless = not plain and draw() < 0.06
    everything = not plain and draw() < 0.05
    coloured = draw() < _colour_chance(things, nameless)
    groups: dict[tuple[str, str, str, int], list[_Thing]] = {}
    said: dict[str, tuple[bool, bool, bool]] = {}
    for shape in ("",) if nameless else shapes:
        own = [thing for thing in things if nameless or thing.shape == shape]
        metal = any(thing.material == "metal" for thing in own)
        other = len(shapes) > 1 and not nameless and draw() < 0.05
        said[shape] = (
            everything or coloured != other,
            everything or (not plain and draw() < (0.20 if metal else 0.06)),
            everything or (not plain and draw() < 0.11),
        )
    for thing in things:
        shape = "" if nameless else thing.shape
        colour, material, size = said[shape]
        key = (
            shape,
            thing.colour if colour else "",
            thing.material if material else "",
            thing.size if size else -1,
        )
        groups.setdefault(key, []).append(thing)
    nouns = {shape: _noun(shape, draw, plain) for shape in said}
    return [
        _Group(members, _adjectives(key, draw), key[1], nouns[key[0]][len(members) > 1])
        for key, members in groups.items()
    ]


def _colour_chance(things: list[_Thing], nameless: bool) -> float:
    """How likely colours are named. Several alike are often just counted, above all when their colours differ."""
    if len(things) == 1:
        return 1.0 if nameless else 0.91
    if nameless:
        return 0.7
    shapes = {thing.shape for thing in things}
    if len(shapes) < len(things):
        return 0.5 if len({thing.colour for thing in things}) > len(shapes) else 0.65
    return 0.74


def _noun(shape: str, draw: Callable[[], float], plain: bool) -> tuple[str, str]:
    nouns = NOUNS[shape] if shape else ANY_SHAPE
    return nouns[0] if plain or draw() < 0.7 else nouns[int(draw() * len(nouns))]


def _adjectives(key: tuple[str, str, str, int], draw: Callable[[], float]) -> list[str]:
    _, colour, material, size = key
    words = [_pick(SIZE_WORDS[size], draw)] if size >= 0 else []
    if not material:
        return [*words, colour] if colour else words
    word = _pick(MATERIAL_WORDS[material], draw)
    described = [word, colour] if word in ("shiny", "matt", "matte") or draw() < 0.4 else [colour, word]
    return words + [part for part in described if part]


def _names(groups: Sequence[_Group], draw: Callable[[], float], plain: bool, bare: bool) -> list[str]:
    """Every group with its article or number; ``bare``: single things have none."""
    several = any(len(group.things) > 1 for group in groups)
    single = "" if bare else "a"
    if not (plain or bare) and draw() < (0.12 if several else 0.06):
        single = "one" if several or draw() < 0.5 else "a single"
    digits = not plain and draw() < 0.08
    names = []
    for group in groups:
        number = len(group.things)
        words = [*group.adjectives, group.noun]
        if number > 1:
            pair = number == 2 and not plain and draw() < 0.04
            words.insert(0, "a pair of" if pair else NUMBER_WORDS[number][digits])
        elif single == "a":
            words.insert(0, "an" if words[0][0] in "aeiou" else "a")
        elif single:
            words.insert(0, "1" if digits and single == "one" else single)
        names.append(" ".join(words))
    return names


def _joined(names: Sequence[str], draw: Callable[[], float]) -> str:
    if len(names) == 1:
        return names[0]
    style = draw()
    if style < 0.12:
        return " and ".join(names)
    if len(names) == 2 and style < 0.17:
        return " with ".join(names)
    comma = ", " if len(names) > 2 and style < 0.4 else " "
    return ", ".join(names[:-1]) + comma + "and " + names[-1]


def _plain_relations(groups: Sequence[_Group]) -> list[tuple[int, str, int]]:
    """(group, relation, group) for all pairs of single objects whose relation is plain and may be stated."""
    singles = [number for number, group in enumerate(groups) if len(group.things) == 1]
    found = []
    for one, other in itertools.permutations(singles, 2):
        first, second = groups[one].things[0], groups[other].things[0]
        for relation, (axis, sign) in RELATIONS.items():
            plain = sign * (first.position[axis] - second.position[axis]) > RELATION_MARGIN
            if plain and (first.shape, relation, second.shape) not in _UNSAID:
                found.append((one, relation, other))
    return found


def _relate(
    groups: Sequence[_Group],
    names: Sequence[str],
    relations: Sequence[tuple[int, str, int]],
    draw: Callable[[], float],
    plain: bool,
    bare: bool,
) -> str:
    """Two single objects and how they stand to each other."""
    one, relation, other = relations[int(draw() * len(relations))]
    form = "{one} {relation} {other}" if plain else _RELATION_FORM(draw)
    place, other_place = _RELATION_PLACES[relation]
    at, other_at = (places(groups[number].things[0].position) for number in (one, other))
    seconds = [second for first, second, _ in relations if first == one and (second, relation) in _SEPARATE]
    impossible = (
        ("{place}" in form and not (place in at and other_place in other_at))
        or ("{related}" in form and relation in ("left of", "right of") and place not in at)
        or ("{second_relation}" in form and not seconds)
    )
    if impossible:
        form = "{one} {relation} {other}"
    text = form.format(
        one=names[one],
        other=names[other],
        relation=_RELATION_PHRASES[relation][0] if plain and draw() < 0.5 else _pick(_RELATION_PHRASES[relation], draw),
        second_relation=_pick(_RELATION_PHRASES[seconds[0]], draw) if seconds else "",
        related_to_it=_pick(_RELATED_TO_IT[relation], draw),
        related=_RELATED[relation],
        place=_pick(_PLACES[place], draw),
        other_place=_pick(_PLACES[other_place], draw),
        short=_short(groups, one),
        short_other=_short(groups, other),
    )
    if plain:
        return _PLAIN_FRAME(draw).format(things=text)
    is_sentence = " is " in form or " stands " in form
    return text if is_sentence or bare else _OPENING(draw).format(things=text, are="is")


_SEPARATE = frozenset(
    (one, other) for one in RELATIONS for other in RELATIONS if RELATIONS[one][0] != RELATIONS[other][0]
)


def _list_and_relate(
    groups: Sequence[_Group],
    names: Sequence[str],
    relations: Sequence[tuple[int, str, int]],
    draw: Callable[[], float],
) -> str:
    """All objects, then how two of them stand to each other: inside the list it would be unclear who is meant."""
    one, relation, other = relations[int(draw() * len(relations))]
    link = ", the {} is {} the {}" if draw() < 0.6 else " with the {} {} the {}"
    clause = link.format(_short(groups, one), _pick(_RELATION_PHRASES[relation], draw), _short(groups, other))
    return _joined(names, draw) + clause


def _short(groups: Sequence[_Group], number: int) -> str:
    """What tells a group from the caption's others: its noun, with its colour, or with all that was said of it."""
    group = groups[number]
    rivals = [rival for rival in groups if rival is not group and rival.things[0].shape == group.things[0].shape]
    if group.noun in (ANY_SHAPE[0][0], ANY_SHAPE[1][0]):
        rivals = [rival for rival in groups if rival is not group]
    if not rivals:
        return group.noun
    if group.colour and all(rival.colour != group.colour for rival in rivals):
        return f"{group.colour} {group.noun}"
    return " ".join([*group.adjectives, group.noun])


def _placed(groups: Sequence[_Group], names: list[str], draw: Callable[[], float]) -> tuple[list[str], bool]:
    """Says where the first of several stands, now and then."""
    first = groups[0].things
    there = places(first[0].position)
    if len(groups) == 1 or len(first) > 1 or not there or draw() > 0.12:
        return names, False
    return [f"{names[0]} {_pick(_PLACES[_pick(there, draw)], draw)}", *names[1:]], True


def _place_of_one(thing: _Thing, draw: Callable[[], float]) -> str:
    """Where the only object stands: of two true places one, or now and then both."""
    there = _shuffled(places(thing.position), draw)
    if not there or draw() > 0.38:
        return ""
    kept = there if draw() < 0.25 else there[:1]
    return "".join(" " + _pick(_PLACES[place], draw) for place in kept)


def _pick(words: Sequence[str], draw: Callable[[], float]) -> str:
    """One of ``words``, the first most often."""
    return words[0] if draw() < 0.5 else words[int(draw() * len(words))]


def _shuffled(items: Sequence[_T], draw: Callable[[], float]) -> list[_T]:
    return sorted(items, key=lambda _: draw())


def _collect_words() -> tuple[str, ...]:
    templates = [*_FRAMES, *_RELATION_FORMS]
    texts = [" ".join(part.split("}")[-1] for part in template.split("{")) for template in templates]
    texts += [*COLOURS, "a", "an", "a single", "a pair of", "is", "are", "stand", "stands", *_RELATED.values()]
    tables: list[Iterable[str]] = [*SIZE_WORDS, *MATERIAL_WORDS.values(), *NUMBER_WORDS.values(), *_PLACES.values()]
    tables += [*_RELATION_PHRASES.values(), *_RELATED_TO_IT.values(), *ANY_SHAPE]
    tables += itertools.chain.from_iterable(NOUNS.values())
    texts += itertools.chain.from_iterable(tables)
    return tuple(sorted({word for text in texts for word in text.replace(",", " ").split()}))


#: Every word that a caption can contain, sorted.
VOCABULARY: tuple[str, ...] = _collect_words()
