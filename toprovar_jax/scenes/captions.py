"""Captions as people write them for one object, and which prompts lie outside the embedded world."""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from toprovar_jax.scenes.world import COLOURS, SHAPES, SIZES, Scenes

#: What people call each shape; the first name is the most common one.
NOUNS = {
    "sphere": ("sphere", "ball"),
    "cube": ("cube", "box", "block"),
    "cylinder": ("cylinder",),
    "cone": ("cone",),
}
_ANY_SHAPE = ("object", "shape")
_SIZE_WORDS = (("small",), ("large", "big"))

#: How far from the origin (world units) an object must stand before a caption says on which side it is.
SIDE_FROM = 0.35
#: How near to the origin it must stand, in x and in z, to be "in the middle".
MIDDLE_WITHIN = 0.30

_PLACES = {
    "left": ("on the left", "on the left side", "to the left"),
    "right": ("on the right", "on the right side", "to the right"),
    "front": ("at the front", "in the front", "in the foreground"),
    "back": ("at the back", "in the back", "in the background"),
    "middle": ("in the middle", "in the center", "in the centre"),
}
#: Sentence -> how often it is used, relative to the others. A sentence without an article's slot names the bare thing.
_SENTENCES = {
    "{article} {thing}": 40,
    "{thing}": 14,
    "a photo of {article} {thing}": 8,
    "a picture of {article} {thing}": 5,
    "an image of {article} {thing}": 4,
    "a 3d render of {article} {thing}": 3,
    "one {thing}": 2,
    "a single {thing}": 2,
    "there is {article} {thing} on the floor": 4,
    "there is {article} {thing}": 3,
    "{article} {thing} on the floor": 5,
    "{article} {thing} on a grey floor": 3,
    "{article} {thing} on a gray floor": 2,
    "{article} {thing} stands on the floor": 2,
}
#: Words that may stand in a prompt without asking for anything.
_HARMLESS = frozenset(
    " ".join(
        (
            "a an the this that it its is are be of in on at to for with and or by as like here there",
            "one single 1 just only some",
            "i me my we our you your can could would should want please show draw make create generate give paint",
            "image picture photo photograph photography drawing illustration render rendering rendered scene view",
            "3d cgi computer graphics studio light lighting shadow soft ground surface background side part area",
            "simple plain basic nice beautiful pretty lovely good great cool very high quality highly detailed",
            "realistic photorealistic sharp hd 4k 8k color colour colored coloured hue shaped",
            "standing stands sitting sits lying lies resting placed located positioned seen",
        )
    ).split()
)


def _probabilities(weights: Sequence[float | int]) -> np.ndarray:
    return np.asarray(weights, dtype=np.float64) / float(sum(weights))


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


def caption(
    shape: int, colour: int, position: Sequence[float] | np.ndarray, size: float, rng: np.random.Generator
) -> str:
    """One caption of a scene, lower case and without a full stop; the words are all in ``VOCABULARY``.

    Everything it says is true of the scene, but it may leave out the shape (7 %) or the colour (8 %), and only a third
    say where the object is.

    Args:
      shape, colour: indices into ``SHAPES`` and ``COLOURS``.
      position: (x, z) on the floor.
      size: radius in world units.
      rng: where the choice of words comes from.
    """
    noun = str(rng.choice(NOUNS[SHAPES[shape]], p=_probabilities([3.0, 1.0, 1.0][: len(NOUNS[SHAPES[shape]])])))
    omitted = rng.random()
    if omitted < 0.07:
        noun = str(rng.choice(_ANY_SHAPE, p=_probabilities([5.0, 1.0])))
    words = [noun] if 0.07 <= omitted < 0.15 else [list(COLOURS)[colour], noun]
    if rng.random() < 0.10:
        words.insert(0, str(rng.choice(_SIZE_WORDS[int(np.abs(np.asarray(SIZES) - float(size)).argmin())])))
    article = "an" if words[0][0] in "aeiou" else "a"
    sentence = str(rng.choice(list(_SENTENCES), p=_probabilities(list(_SENTENCES.values()))))
    text = sentence.format(article=article, thing=" ".join(words))

    true_places = places(position)
    if true_places and rng.random() < 0.40:
        count = 2 if len(true_places) == 2 and rng.random() < 0.25 else 1
        for place in rng.permutation(true_places)[:count]:
            text += " " + str(rng.choice(_PLACES[str(place)], p=_probabilities([4.0, 1.0, 1.0])))
    return text


def captions(scenes: Scenes, rng: np.random.Generator) -> list[str]:
    """One caption per scene, drawn anew at each call. The scenes' arrays are brought to the host."""
    shape, colour, position, size = (np.asarray(field) for field in scenes[:4])
    return [caption(int(shape[i]), int(colour[i]), position[i], float(size[i]), rng) for i in range(len(shape))]


def _collect_words() -> tuple[str, ...]:
    texts = [re.sub(r"{\w+}", " ", sentence) for sentence in _SENTENCES]
    texts += [*COLOURS, *_ANY_SHAPE, "a", "an"]
    texts += [phrase for group in (*NOUNS.values(), *_SIZE_WORDS, *_PLACES.values()) for phrase in group]
    return tuple(sorted({word for text in texts for word in text.split()}))


#: Every word that a caption can contain, sorted.
VOCABULARY: tuple[str, ...] = _collect_words()


def describe_world() -> str:
    """What the embedded model knows, in one line for people."""
    shapes = [names[0] + (f" ({', '.join(names[1:])})" if names[1:] else "") for names in NOUNS.values()]
    return (
        f"one object on a grey floor: {', '.join(shapes)}; "
        f"in {', '.join(COLOURS)}; small or large; left, right, front, back or middle"
    )


def unknown_to_world(prompt: str) -> tuple[str, ...]:
    """What ``prompt`` asks for beyond the embedded world, in its order; empty when the prompt lies inside.

    Unknown words are returned as they were written in lower case ("cat", "two", "cones"); a second object as its colour
    and name ("blue ball"), a second colour of one object as that colour.
    """
    nouns = {name: shape for shape, names in NOUNS.items() for name in names}
    sizes = {word for group in _SIZE_WORDS for word in group}
    unknown: list[str] = []
    own_shape: str | None = None
    own_colours: list[str] = []
    pending: list[str] = []
    article = ""
    for word in _words(prompt):
        if word in ("a", "an", "the"):
            article = word
            if own_shape is not None:  # "a cube that is red and a ...": what came before belongs to the first object
                own_colours += [modifier for modifier in pending if modifier in COLOURS]
                pending = []
        elif word in COLOURS or word in sizes:
            pending.append(word)
        elif word in nouns:
            colours = [modifier for modifier in pending if modifier in COLOURS]
            if own_shape is None:
                own_shape, own_colours = nouns[word], colours
            elif article != "the" or nouns[word] != own_shape or not set(colours) <= set(own_colours):
                unknown.append(" ".join([*pending, word]))
            pending = []
        elif word not in VOCABULARY and word not in _HARMLESS:
            unknown.append(word)
    # What follows the last noun ("a cube in red"), or all of it when there is no noun, describes the object.
    own_colours += [modifier for modifier in pending if modifier in COLOURS]
    return tuple(dict.fromkeys([*unknown, *list(dict.fromkeys(own_colours))[1:]]))


def _words(prompt: str) -> list[str]:
    """Lower-case words, numbers and symbols (such as emoji) of a prompt, without punctuation and possessive endings."""
    text = re.sub(r"['’]s\b", "", unicodedata.normalize("NFKC", prompt).lower().replace("_", " "))
    return [piece for piece in re.findall(r"\w+|\S", text) if unicodedata.category(piece[0])[0] in "LNS"]
