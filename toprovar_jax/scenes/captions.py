"""Captions as people write them for one object, and which prompts lie outside the embedded world."""

import dataclasses
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
_GREYS = ("grey", "gray")
_SHAPE_NAMED = {name: shape for shape, names in NOUNS.items() for name in names}
_SIZES_NAMED = frozenset(word for group in _SIZE_WORDS for word in group)
#: Pairs of word groups that exclude each other.
_EXCLUSIVE = ((("left",), ("right",)), (("front", "foreground"), ("back", "background")), _SIZE_WORDS)
_SIDES_NAMED = frozenset(word for pair in _EXCLUSIVE[:2] for group in pair for word in group)
#: What a colour may be said of besides the object; all of it is grey.
_SURROUNDINGS = frozenset(
    ("floor", "ground", "surface", "background", "studio", "scene", "light", "lighting", "shadow")
)
#: An adjective before one of these cannot belong to a noun behind it.
_PHRASE_ENDS = frozenset(
    ("is", "are", "of", "in", "on", "at", "to", "with", "by", "it", "its", "that", "stands", "sits", "lies")
)
#: What may follow "the cube" when the cube of before is meant, and not another one.
_PREDICATES = frozenset(
    ("is", "stands", "stand", "standing", "sits", "sitting", "lies", "lying", "should", "color", "colour")
)
#: What may stand between two names of one thing: "a cube shaped object", "an object that is a cube".
_LINKS = frozenset(("a", "an", "the", "shaped", "like", "that", "is", "of", "in", "shape"))
_LINKING = frozenset(("shaped", "like", "is", "of"))


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


@dataclasses.dataclass
class _Asked:
    """What a prompt has said so far about its object, and what lies beyond the world.

    Attributes:
      named: whether an object was named; shape: which, or None for "object" and before any.
      colours, said: the object's colours; its sizes and the sides it stands on.
      unknown: what no caption could say.
    """

    named: bool = False
    shape: str | None = None
    colours: list[str] = dataclasses.field(default_factory=list)
    said: list[str] = dataclasses.field(default_factory=list)
    unknown: list[str] = dataclasses.field(default_factory=list)

    def describe(self, adjectives: Sequence[str], surroundings: str = "") -> None:
        """Take colours and sizes for the object's, or, given a noun, for those of its surroundings."""
        colours = [word for word in adjectives if word in COLOURS or word in _GREYS]
        if surroundings:
            self.unknown += [f"{colour} {surroundings}" for colour in colours if colour not in _GREYS]
        else:
            self.colours += colours
            self.said += [word for word in adjectives if word in _SIZES_NAMED]

    def mention(self, noun: str, adjectives: Sequence[str], *, linked: bool, repeated: bool) -> None:
        """A noun with its adjectives: the object, another name of it (``linked``), itself again, or one too many."""
        shape = _SHAPE_NAMED.get(noun)
        fits = shape is None or self.shape is None
        again = (fits or shape == self.shape) and set(adjectives) <= {*self.colours, *self.said}
        if self.named and not (linked and fits) and not (repeated and again):
            self.unknown.append(" ".join([*adjectives, noun]))
            return
        self.describe(adjectives)
        self.named, self.shape = True, shape or self.shape

    def beyond(self) -> tuple[str, ...]:
        """Everything beyond the world, without repetition."""
        found = list(self.unknown)
        colours = list(dict.fromkeys(self.colours))
        first = next((colour for colour in colours if colour in COLOURS), None)
        found += [colour for colour in colours if colour != first]
        for pair in _EXCLUSIVE:
            sides = [next((word for word in self.said if word in group), None) for group in pair]
            if None not in sides:
                found.append(" and ".join(dict.fromkeys(word for word in self.said if word in sides)))
        if not found and not self.named and not colours:
            found.append("no object")
        return tuple(dict.fromkeys(found))


def unknown_to_world(prompt: str) -> tuple[str, ...]:
    """What ``prompt`` asks for beyond the embedded world; empty when the prompt lies inside.

    Unknown words are returned as they were written in lower case ("cat", "two", "cones"); a second object as its colour
    and name ("blue ball"), also when it looks like the first; a second colour of the object as that colour, and so is
    grey, which only the floor has; a colour of the surroundings with its noun ("red floor"); places or sizes that
    exclude each other as both ("left and right"). Words that name nothing to draw give "no object".
    """
    words = _words(prompt)
    asked = _Asked()
    pending: list[str] = []  # colours and sizes whose noun has not come yet
    article, last_noun, whose = "", -1, ""

    def settle() -> None:
        # The phrase is over, so its adjectives stood behind their noun ("a cube in red"), or had none.
        asked.describe(pending, whose)
        pending.clear()

    for i, word in enumerate(words):
        following = words[i + 1] if i + 1 < len(words) else ""
        if word in ("a", "an", "the"):
            settle()
            article = word
        elif word in COLOURS or word in _GREYS or word in _SIZES_NAMED:
            pending.append(word)
        elif (word in _SHAPE_NAMED or word in _ANY_SHAPE) and (word, following) != ("shape", "of"):
            between = set(words[last_noun + 1 : i]) - set(pending)
            linked = last_noun >= 0 and between <= _LINKS and (not between or bool(between & _LINKING))
            repeated = article == "the" and following in _PREDICATES
            asked.mention(word, pending, linked=linked, repeated=repeated)
            pending.clear()
            last_noun, whose = i, ""
        elif word in _SURROUNDINGS and (word != "background" or words[i - 2 : i] != ["in", "the"]):
            asked.describe(pending, word)
            pending.clear()
        elif word in _PHRASE_ENDS:
            settle()
            whose = words[i - 1] if word == "is" and i and words[i - 1] in _SURROUNDINGS else ""
        elif word in _SIDES_NAMED:
            asked.said.append(word)
        elif word not in VOCABULARY and word not in _HARMLESS:
            asked.unknown.append(word)
    settle()
    return asked.beyond() if words else ()


def _words(prompt: str) -> list[str]:
    """Lower-case words, numbers and symbols (such as emoji) of a prompt, without punctuation and possessive endings."""
    text = re.sub(r"['’]s\b", "", unicodedata.normalize("NFKC", prompt).lower().replace("_", " "))
    return [piece for piece in re.findall(r"\w+|\S", text) if unicodedata.category(piece[0])[0] in "LNS"]
