"""What a free prompt asks of the embedded world: how many of what, how they stand to each other, and what lies beyond.

The parser knows the words of the captions and little grammar, but what people write about solids on a floor.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Sequence

from toprovar_jax.errors import unknown_name
from toprovar_jax.scenes.captions import ANY_SHAPE, MATERIAL_WORDS, NOUNS, NUMBER_WORDS, SIZE_WORDS, VOCABULARY
from toprovar_jax.scenes.tasks import Wanted
from toprovar_jax.scenes.world import COLOURS, MAX_OBJECTS, OPPOSITE

#: Name of each world that models are trained on -> what they know, in one line for people.
WORLDS = {
    "scenes": (
        "one to five objects on a grey floor: spheres (balls), cubes (boxes, blocks), cylinders, cones, "
        f"tori (rings, donuts); in {', '.join(COLOURS)}; small or large, matt or metal; left, right, front, back or "
        "middle; left of, right of, in front of or behind each other"
    ),
    "scenes-single": (
        "one object on a grey floor: sphere (ball), cube (box, block), cylinder, cone; "
        f"in {', '.join(COLOURS)}; small or large; left, right, front, back or middle"
    ),
}
#: The world of one object at a time has none of this shape.
_NOT_SINGLE = "torus"

#: Words that may stand in a prompt without asking for anything.
_HARMLESS = frozenset(
    " ".join(
        (
            "a an the this that these those it its is are be of in on at to for with and or by as like here there",
            "one single 1 just only some exactly",
            "i me my we our you your can could would should want please show draw make create generate give paint",
            "image picture photo photograph photography drawing illustration render rendering rendered scene view",
            "3d cgi computer graphics studio light lighting shadow soft ground surface background side hand part area",
            "simple plain basic nice beautiful pretty lovely good great cool very high quality highly detailed",
            "realistic photorealistic sharp hd 4k 8k color colour colors colours colored coloured hue shaped",
            "stand standing stands sit sitting sits lie lying lies resting placed located positioned seen made",
        )
    ).split()
)
_KNOWN = _HARMLESS | frozenset(VOCABULARY)
_GREYS = ("grey", "gray")
#: Noun -> (shape or None for any, whether it is a plural).
_NOUNS = {
    word: (shape, word == several and one != several)
    for shape, names in ((None, ANY_SHAPE), *NOUNS.items())
    for one, several in names
    for word in (one, several)
} | {"toruses": ("torus", True)}
_MATERIALS = frozenset(word for words in MATERIAL_WORDS.values() for word in words)
_ADJECTIVES = frozenset((*COLOURS, *_GREYS, *_MATERIALS, *(word for words in SIZE_WORDS for word in words)))
_COUNTS = {word: number for number, words in NUMBER_WORDS.items() for word in words} | {"single": 1, "pair": 2}
_TOO_MANY = frozenset(("six", "seven", "eight", "nine", "ten", "eleven", "twelve", "dozen", "zero", "no"))
_ARTICLES = ("a", "an", "the")
#: Pairs of word groups that exclude each other in one object.
_EXCLUSIVE = (
    (("left",), ("right",)),
    (("front", "foreground"), ("back", "background")),
    SIZE_WORDS,
    tuple(MATERIAL_WORDS.values()),
)
#: What a colour may be said of besides an object; all of it is grey.
_SURROUNDINGS = frozenset(
    ("floor", "ground", "surface", "background", "studio", "scene", "light", "lighting", "shadow")
)
#: Something stands on the left of these when it stands on the left.
_CANVAS = _SURROUNDINGS | frozenset(("image", "picture", "photo", "photograph", "render", "view", "frame"))
#: An adjective before one of these cannot belong to a noun behind it.
_PHRASE_ENDS = frozenset(
    ("is", "are", "of", "in", "on", "at", "to", "with", "by", "it", "its", "that", "there")
) | frozenset(("stand", "stands", "sit", "sits", "lie", "lies"))
#: What may follow "the cube" when the cube of before is meant, and not another one.
_PREDICATES = frozenset(
    ("is", "stands", "stand", "standing", "sits", "sitting", "lies", "lying", "should", "color", "colour")
)
#: What may follow a place that is said before its thing: "behind it is a cone".
_VERBS = _PREDICATES | {"there", "are"}
#: What may stand between two names of one thing: "a cube shaped object", "an object that is a cube".
_LINKS = frozenset(("a", "an", "the", "shaped", "like", "that", "is", "of", "in", "shape"))
_LINKING = frozenset(("shaped", "like", "is", "of"))
_MARKS = frozenset((",", ";", ".", ":"))


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a prompt asks for.

    Attributes:
      wanted: how many things of each description; "a red cube and a cube" are two cubes, one of them red.
      relations: (index into ``wanted``, key of ``world.RELATIONS``, index), one for all that was said of places.
      unknown: what lies beyond the world, in the prompt's words; empty when nothing does.
    """

    wanted: tuple[Wanted, ...]
    relations: tuple[tuple[int, str, int], ...]
    unknown: tuple[str, ...]


def describe_world(world: str = "scenes") -> str:
    """What a model of ``world`` knows, in one line for people.

    Raises:
      UserInputError: no such world.
    """
    if world not in WORLDS:
        raise unknown_name("world", world, WORLDS)
    return WORLDS[world]


def read_prompt(prompt: str, world: str = "scenes") -> Reading:
    """What ``prompt`` asks for, and what of it lies beyond ``world``.

    Unknown words are returned as they were written in lower case ("cat", "seven cubes", "white"); a second colour of an
    object as that colour, and so is grey, which only the floor has; a colour of the surroundings with its noun ("red
    floor"); places, sizes, materials or relations that exclude each other as both ("left and right"); several things
    without a number as the plural ("cubes"); more objects than fit as their number ("6 objects"). Words that name
    nothing to draw give "no object". In the world of single objects further objects are unknown ("blue ball"), and so
    are numbers ("two cubes"), relations ("behind"), materials ("metal") and the torus.

    Args:
      prompt: free text.
      world: a key of ``WORLDS``.

    Raises:
      UserInputError: no such world.
    """
    describe_world(world)
    return _Reader(_words(prompt)).result(single=world == "scenes-single")


@dataclasses.dataclass(eq=False)
class _Mention:
    """One or several like things of a prompt.

    Attributes:
      noun, shape, count: as it was named; the shape is None for "object".
      text: the words of the prompt that named it.
      colours, said: its colours; its sizes, materials and the sides where it stands.
    """

    noun: str
    shape: str | None
    count: int
    text: str
    colours: list[str] = dataclasses.field(default_factory=list)
    said: list[str] = dataclasses.field(default_factory=list)

    def describe(self, adjectives: Sequence[str]) -> None:
        self.colours += [word for word in adjectives if word in COLOURS or word in _GREYS]
        self.said += [word for word in adjectives if word not in COLOURS and word not in _GREYS]

    @property
    def described(self) -> set[str]:
        return {*self.colours, *self.said}

    @property
    def kind(self) -> tuple[str | None, str | None]:
        return self.shape, self.colour

    @property
    def colour(self) -> str | None:
        return next((colour for colour in self.colours if colour in COLOURS), None)

    def contradictions(self) -> list[str]:
        """Colours too many, and what excludes each other."""
        found = [colour for colour in dict.fromkeys(self.colours) if colour != self.colour]
        for pair in _EXCLUSIVE:
            sides = [next((word for word in self.said if word in group), None) for group in pair]
            if None not in sides:
                found.append(" and ".join(dict.fromkeys(word for word in self.said if word in sides)))
        return found


class _Reader:
    """Reads words from left to right and keeps what they said.

    Attributes:
      mentions, relations, unknown: what was found so far; the relations as (one, name, other).
      lone: relations to whatever else there is ("the cube is behind").
      opened: (name, one) of relations whose other thing is named next; ``inverse`` (name, other) of those whose first
        thing is. ``forward``: sides of the thing that is named next. ``loose``: what was said before any noun.
      pending: adjectives whose noun has not come yet; ``article`` and ``number`` those of that noun; ``apart`` what
        shares a noun to come: "a red and a blue cube".
      subject: whom predicates are about, the thing that was named last; ``noun_place`` where that was.
      whose: surroundings that an "is" speaks of.
    """

    def __init__(self, words: list[str]):
        self.words = words
        self.mentions: list[_Mention] = []
        self.relations: list[tuple[_Mention, str, _Mention]] = []
        self.unknown: list[str] = []
        self.lone: list[tuple[_Mention, str]] = []
        self.opened: list[tuple[str, _Mention | None]] = []
        self.inverse: list[tuple[str, _Mention]] = []
        self.forward: list[str] = []
        self.loose = _Mention("", None, 1, "")
        self.subject: _Mention | None = None
        self.noun_place = -1
        self.whose = ""
        self.clear()
        for place in range(len(words)):
            self.take(place)
        self.settle()

    def at(self, place: int) -> str:
        """The word there; nothing outside the prompt."""
        return self.words[place] if 0 <= place < len(self.words) else ""

    def take(self, place: int) -> None:
        """Takes in one word."""
        word = self.at(place)
        if word.startswith("<@"):
            self.side(word[2:-1], place)
        elif word.startswith("<"):
            self.relation(word[1:-1], place)
        elif _is_determiner(word):
            self.determiner(word, place)
        elif word in _ADJECTIVES:
            self.pending.append(word)
        elif word in _NOUNS and (word, self.at(place + 1)) != ("shape", "of"):
            self.noun(word, place)
        elif word in _CANVAS:
            self.canvas(word)
        elif word in _PHRASE_ENDS:
            self.settle()
            self.whose = self.at(place - 1) if word == "is" and self.at(place - 1) in _SURROUNDINGS else ""
        elif word not in _KNOWN and word not in _MARKS:
            self.unknown.append(word)

    def clear(self) -> None:
        """Forgets the phrase before a noun."""
        self.pending: list[str] = []
        self.apart: list[tuple[str, list[str]]] = []
        self.article = self.number = ""

    def settle(self) -> None:
        """The phrase is over, so its adjectives stood behind their noun ("a cube in red"), or had none."""
        adjectives = [word for _, words in self.apart for word in words] + self.pending
        if self.whose:
            self.paint(self.whose, adjectives)
        else:
            (self.subject or self.loose).describe(adjectives)
        self.clear()

    def paint(self, surroundings: str, adjectives: Sequence[str]) -> None:
        """Colours and materials that only objects have."""
        self.unknown += [f"{word} {surroundings}" for word in adjectives if word in COLOURS or word in _MATERIALS]

    def determiner(self, word: str, place: int) -> None:
        """An article or a number."""
        if self.pending and self.at(place - 1) in ("and", ",") and (self.article or self.number):
            self.apart.append((self.number, self.pending))
            self.pending, self.article, self.number = [], "", ""
        elif self.pending:
            self.settle()
        if word in _ARTICLES:
            self.article = word
        else:
            self.number = word

    def noun(self, word: str, place: int) -> None:
        """A thing, or another name of one that was named before."""
        shape, plural = _NOUNS[word]
        count = self.count(self.number, word, plural)
        mention = self.same(shape, count, place)
        if mention is None:
            for number, adjectives in self.apart:
                self.add(
                    _Mention(word, shape, self.count(number, word, False), " ".join([*adjectives, word])), adjectives
                )
            number = [self.number] if count > 1 and self.number else []
            mention = _Mention(word, shape, count, " ".join([*number, *self.pending, word]), said=self.forward)
            self.add(mention, self.pending)
            self.forward = []
        else:
            mention.describe([adjective for adjective in self.pending if adjective not in mention.described])
            if shape is not None:
                mention.noun, mention.shape = word, shape
        self.clear()
        self.whose = ""
        self.relate(mention)
        self.subject, self.noun_place = mention, place

    def add(self, mention: _Mention, adjectives: Sequence[str]) -> None:
        if not self.mentions:
            mention.describe([*self.loose.colours, *self.loose.said])
        mention.describe(adjectives)
        self.mentions.append(mention)

    def count(self, number: str, noun: str, plural: bool) -> int:
        """How many; several without a number, or with one that the world lacks, are unknown."""
        if number in _COUNTS:
            return _COUNTS[number]
        if number or plural:
            self.unknown.append(f"{number} {noun}".strip())
        return 1

    def same(self, shape: str | None, count: int, place: int) -> _Mention | None:
        """The thing that this noun names again, if it does."""
        between = [word for word in self.words[self.noun_place + 1 : place] if word not in _ADJECTIVES]
        linked = set(between) <= _LINKS and (not between or not _LINKING.isdisjoint(between))
        if self.subject is not None and linked and not self.inverse and None in (shape, self.subject.shape):
            return self.subject
        following = self.at(place + 1)
        if self.article != "the" or not (following in _PREDICATES or following.startswith("<") or self.opened):
            return None
        subjects = [one for _, one in self.opened]
        fitting = [
            mention
            for mention in self.mentions
            if (shape is None or mention.shape in (None, shape))
            and mention.count == count
            and set(self.pending) <= mention.described
            and mention not in subjects
        ]
        return fitting[-1] if fitting else None

    def relate(self, mention: _Mention) -> None:
        """Completes the relations that waited for this thing."""
        if not self.opened:
            self.relations += [(mention, name, other) for name, other in self.inverse]
            self.inverse = []
        for name, one in self.opened:
            if one is None:
                self.inverse.append((name, mention))
            else:
                self.relations.append((one, name, mention))
        self.opened = []

    def relation(self, name: str, place: int) -> None:
        """Words such as "to the left of"."""
        self.settle()
        before, behind = self.at(place - 1), self.at(place + 1)
        one = None if before in (".", ";") else self.subject
        if name.endswith(" it"):
            self.relation_to_it(name.removesuffix(" it"), before, behind)
        elif _opens_phrase(behind) or behind in _CANVAS or (behind == "and" and self.at(place + 2).startswith("<")):
            if before == "and" and self.opened:
                one = self.opened[-1][1]
            elif before == "and" and self.relations and self.relations[-1][2] is self.subject:
                one = self.relations[-1][0]
            self.opened.append((name, one))
        elif self.subject is not None:
            self.lone.append((self.subject, name))

    def relation_to_it(self, name: str, before: str, behind: str) -> None:
        """Either "a cube, and behind it a cone" or "a cube with a cone behind it"."""
        others = [mention for mention in self.mentions if mention is not self.subject]
        names_next = before in ("and", "with", *_MARKS) and (_opens_phrase(behind) or behind in _VERBS)
        if self.subject is not None and names_next:
            self.inverse.append((name, self.subject))
        elif self.subject is not None and others:
            self.relations.append((self.subject, name, others[-1]))
        else:
            self.unknown.append(name)

    def side(self, word: str, place: int) -> None:
        """A place on the floor: mostly of the thing before, or of one that is only named behind it."""
        opens = self.at(place - 1) in ("", "and", *_MARKS)
        names_next = _opens_phrase(self.at(place + 1)) or self.at(place + 1) in _VERBS
        self.settle()
        if self.subject is None or (opens and names_next):
            self.forward = [*self.forward, word]
        else:
            self.subject.said.append(word)

    def canvas(self, word: str) -> None:
        """The picture or its surroundings; what is in front of or behind them is nothing special."""
        self.paint(word, self.pending)
        self.clear()
        for name, one in self.opened:
            if name in ("left of", "right of"):
                (one or self.loose).said.append(name.split()[0])
        self.opened = []

    def result(self, single: bool) -> Reading:
        """All of it, for the world of single objects or of several."""
        unknown = list(self.unknown)
        lone = [name for _, name in self.lone if name != "in front of" or len(self.mentions) > 1]
        if single:
            unknown += [name for _, name, _ in self.relations] + lone + [name for name, _ in self.opened]
            unknown += [word for mention in self.mentions[:1] for word in mention.said if word in _MATERIALS]
            unknown += [
                mention.noun for mention in self.mentions[:1] if mention.count == 1 and mention.shape == _NOT_SINGLE
            ]
            unknown += [mention.text for number, mention in enumerate(self.mentions) if number or mention.count > 1]
        elif lone and len(self.mentions) == 1:
            unknown += lone
        for mention in self.mentions or [self.loose]:
            unknown += mention.contradictions()
        wanted, relations = self.wanted()
        unknown += [
            f"{name} and {OPPOSITE[name]}"
            for number, (one, name, other) in enumerate(relations)
            if not {(one, OPPOSITE[name], other), (other, name, one)}.isdisjoint(relations[:number])
        ]
        total = sum(mention.count for mention in self.mentions)
        if total > MAX_OBJECTS and not single:
            unknown.append(f"{total} objects")
        if not unknown and not wanted and any(word not in _MARKS for word in self.words):
            unknown.append("no object")
        return Reading(wanted, relations, tuple(dict.fromkeys(unknown)))

    def wanted(self) -> tuple[tuple[Wanted, ...], tuple[tuple[int, str, int], ...]]:
        """Mentions of one shape and colour together, with all others that they describe too."""
        if not self.mentions:
            return ((Wanted(None, self.loose.colour),) if self.loose.colour else ()), ()
        kinds = list(dict.fromkeys(mention.kind for mention in self.mentions))
        wanted = tuple(
            Wanted(
                shape,
                colour,
                sum(
                    mention.count
                    for mention in self.mentions
                    if shape in (None, mention.shape) and colour in (None, mention.colour)
                ),
            )
            for shape, colour in kinds
        )
        relations = list(self.relations)
        if len(self.mentions) == 2:
            first, second = self.mentions
            relations += [(one, name, second if one is first else first) for one, name in self.lone]
        indices = [(kinds.index(one.kind), name, kinds.index(other.kind)) for one, name, other in relations]
        return wanted, tuple(dict.fromkeys(entry for entry in indices if entry[0] != entry[2]))


#: What is below one or broken stays one word, and is no count that the world has.
_NUMBER = r"[-−]?\d+(?:\.\d+)?"


def _is_determiner(word: str) -> bool:
    return word in _ARTICLES or word in _COUNTS or word in _TOO_MANY or re.fullmatch(_NUMBER, word) is not None


def _opens_phrase(word: str) -> bool:
    """Whether a noun phrase can begin with ``word``."""
    return _is_determiner(word) or word in _ADJECTIVES or word in _NOUNS


_AT = r"(?:\b(?:to|on|at|in) )?(?:the )?"
#: Phrases of several words -> the one word that the reader takes them for.
_PHRASES = (
    (r"\ba pair of\b", "pair"),
    (r"\b(?:a|the) (single|one)\b", r"\1"),
    (rf"{_AT}\b(left|right)(?: hand)?(?: side)? of( it)?\b", r"<\1 of\2>"),
    (r"\b(?:to|on|at) its (left|right)(?: hand)?(?: side)?\b", r"<\1 of it>"),
    (rf"{_AT}\bfront of( it)?\b", r"<in front of\1>"),
    (r"\bin front\b", "<in front of>"),
    (r"\bbehind( it)?\b", r"<behind\1>"),
    (r"\bin the (background)\b", r"<@\1>"),
    (rf"{_AT}\b(left|right|front|back|foreground)\b(?: hand)?(?: side)?\b", r"<@\1>"),
)


def _words(prompt: str) -> list[str]:
    """Lower-case words, numbers, symbols (such as emoji) and marks of a prompt; a phrase of place is one ``<word>``."""
    text = re.sub(r"['’]s\b", "", unicodedata.normalize("NFKC", prompt).lower().replace("_", " "))
    pieces = re.findall(rf"(?<!\w){_NUMBER}(?!\w)|\w+|[^\w\s<>]", text)
    text = " ".join(
        piece for piece in pieces if piece in _MARKS or unicodedata.category(piece[0])[0] in "LNS" or len(piece) > 1
    )
    for phrase, word in _PHRASES:
        # Underscores keep later phrases from matching inside a word that is made here.
        text = re.sub(phrase, lambda match, word=word: match.expand(word).replace(" ", "_"), text)
    return [word.replace("_", " ") for word in text.split()]
