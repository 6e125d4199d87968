"""Captions tell the truth with known words, in many ways, and leave out what training must not show."""

import collections
import itertools
import re

import numpy as np
import pytest

from tests.scenes.arbitrary import arbitrary_scenes, host_scenes
from toprovar_jax.scenes import captions as text
from toprovar_jax.scenes.world import (
    COLOURS,
    HELD_OUT_RELATIONS,
    MATERIALS,
    RELATION_MARGIN,
    RELATIONS,
    SHAPES,
    SIZES,
    Scenes,
)
from toprovar_jax.text_encoder import TextTokenizer, build_word_tokenizer

SINGULARS = {one: shape for shape, names in text.NOUNS.items() for one, _ in names}
PLURALS = {several: shape for shape, names in text.NOUNS.items() for _, several in names}


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return arbitrary_scenes(4000, seed=1)


@pytest.fixture(scope="module")
def written(scenes: Scenes) -> list[str]:
    return text.captions(scenes, np.random.default_rng(1))


def words_of(caption: str) -> list[str]:
    return caption.replace(",", "").split()


def scene_of(*things: tuple[str, str, tuple[float, float]], size: float = SIZES[1]) -> Scenes:
    """One scene of matt things: shape, colour, (x, z)."""
    count = len(things)
    return host_scenes(
        np.ones((1, count), bool),
        np.array([[SHAPES.index(shape) for shape, _, _ in things]], np.int32),
        np.array([[list(COLOURS).index(colour) for _, colour, _ in things]], np.int32),
        np.full((1, count), MATERIALS.index("matt"), np.int32),
        np.array([[place for _, _, place in things]], np.float32),
        np.full((1, count), size, np.float32),
        np.zeros((1, count), np.float32),
    )


def repeat(scene: Scenes, times: int) -> Scenes:
    return host_scenes(*(np.repeat(field, times, axis=0) for field in scene))


def test_captions_use_the_whole_vocabulary_and_nothing_else(written):
    assert {word for caption in written for word in words_of(caption)} == set(text.VOCABULARY)


def test_every_word_is_one_token_and_no_caption_has_more_than_28_tokens(written):
    tokenizer = TextTokenizer(build_word_tokenizer(text.VOCABULARY))
    lengths = tokenizer.encode(written, max_length=text.MAX_WORDS + 1, strict=True).lengths
    np.testing.assert_array_equal(lengths, [len(words_of(caption)) + 1 for caption in written])
    assert (text.MAX_WORDS + 1, tokenizer.vocab_size) == (28, 130)


def test_captions_are_lower_case_and_varied(written):
    assert all(re.fullmatch(r"[a-z0-9]+(,? [a-z0-9]+)*", caption) for caption in written)
    assert len(set(written)) > 2500


def test_articles_and_plurals_fit(written):
    for caption in written:
        words = words_of(caption)
        for word, following in itertools.pairwise(words):
            if word in ("a", "an"):
                assert (word == "an") == (following[0] in "aeiou"), caption
        numbers = sum(words.count(word) for n in range(2, 6) for word in (*text.NUMBER_WORDS[n],)) + words.count("pair")
        plurals = {*PLURALS, "objects", "shapes"}
        assert sum(word in plurals for word in words) == numbers, caption
        many = "two|three|four|five|[2-5]|a pair"
        assert not re.search(rf"there is ({many}) |^({many}) [a-z ]*stands |there are (a(?! pair)|one) ", caption), (
            caption
        )


def test_attributes_that_are_named_are_there(scenes, written):
    middle = np.mean(SIZES)
    for caption, *fields in zip(written, *scenes[:6], strict=True):
        present, shape, colour, material, position, size = fields
        words = set(words_of(caption))
        named = {(SINGULARS | PLURALS)[word] for word in words & (SINGULARS | PLURALS).keys()}
        assert named <= {SHAPES[index] for index in shape[present]}
        assert words & set(COLOURS) <= {list(COLOURS)[index] for index in colour[present]}
        assert not (words & {"large", "big"} and size[present].max() < middle)
        assert not ("small" in words and size[present].min() > middle)
        for index, name in enumerate(MATERIALS):
            assert not (words & set(text.MATERIAL_WORDS[name]) and index not in material[present])
        if words & {"middle", "center", "centre"}:
            assert np.abs(position[present]).max(axis=-1).min() < text.MIDDLE_WITHIN
        for words_of_side, axis, sign in ((("background", "back"), 1, 1), (("foreground",), 1, -1)):
            if words & set(words_of_side):
                assert (sign * position[present][:, axis]).max() > text.SIDE_FROM


def test_numbers_count_what_they_say(scenes, written):
    """Of plain phrases, "two red cubes": a number, perhaps a colour, a noun."""
    values = {word: number for number, words in text.NUMBER_WORDS.items() for word in words}
    pattern = re.compile(rf"\b({'|'.join(values)}) (?:({'|'.join(COLOURS)}) )?({'|'.join(PLURALS)})\b")
    counted = collections.Counter()
    for caption, present, shape, colour in zip(written, *scenes[:3], strict=True):
        for number, said, noun in pattern.findall(caption):
            like = present & (shape == SHAPES.index(PLURALS[noun]))
            if said:
                like &= colour == list(COLOURS).index(said)
            assert like.sum() == values[number], caption
            counted[values[number]] += 1
    assert min(counted[number] for number in (2, 3, 4, 5)) > 15


def test_relations_between_shapes_are_plain_and_never_held_out(scenes, written):
    phrases = {phrase: name for name, phrases in text._RELATION_PHRASES.items() for phrase in phrases}
    thing = rf"(?:(?:a|an|the|one|{'|'.join(COLOURS)}) )*({'|'.join(SINGULARS)})"
    pattern = re.compile(rf"\b{thing} (?:is |stands )?({'|'.join(phrases)}) {thing}\b")
    stated = collections.Counter()
    for caption, present, shape, _, _, position in zip(written, *scenes[:5], strict=True):
        for one, phrase, other in pattern.findall(caption):
            triple = SINGULARS[one], phrases[phrase], SINGULARS[other]
            axis, sign = RELATIONS[triple[1]]
            first, second = (position[present & (shape == SHAPES.index(name))][:, axis] for name in triple[::2])
            assert (sign * (first[:, None] - second[None]) > RELATION_MARGIN).any(), caption
            assert triple not in HELD_OUT_RELATIONS, caption
            stated[triple[1]] += 1
    assert min(stated[name] for name in RELATIONS) > 30


@pytest.mark.parametrize(("one", "relation", "other"), HELD_OUT_RELATIONS)
def test_a_held_out_relation_is_stated_from_neither_side(one, relation, other):
    axis, sign = RELATIONS[relation]
    there, origin = [0.0, 0.0], (0.0, 0.0)
    there[axis] = 1.2 * sign
    scene = repeat(scene_of((one, "red", (there[0], there[1])), (other, "yellow", origin)), 400)
    opposite = ["behind", "in front of", "in front"] if axis else ["left of", "its left", "right of", "its right"]
    for caption in text.captions(scene, np.random.default_rng(0)):
        assert not any(phrase in caption for phrase in opposite), caption
    swapped = repeat(scene_of((other, "red", (there[0], there[1])), (one, "yellow", origin)), 400)
    assert any(phrase in caption for caption in text.captions(swapped, np.random.default_rng(0)) for phrase in opposite)


def test_objects_that_nearly_touch_the_margin_have_no_relation():
    scene = repeat(scene_of(("cube", "red", (-0.29, 0.29)), ("sphere", "blue", (0.29, -0.29))), 300)
    words = {word for caption in text.captions(scene, np.random.default_rng(0)) for word in words_of(caption)}
    assert not words & {"left", "right", "front", "behind"}


def test_most_captions_of_two_kinds_name_both_and_half_of_the_plain_relations_are_stated(scenes, written):
    chosen = [
        (caption, shape[present])
        for caption, present, shape in zip(written, *scenes[:2], strict=True)
        if present.sum() == 2 and len(set(shape[present])) == 2
    ]
    both = [{SHAPES[i] for i in shape} == {SINGULARS.get(word) for word in words_of(c)} - {None} for c, shape in chosen]
    related = [any(name in caption for name in ("left of", "right of", "front of", "behind")) for caption, _ in chosen]
    assert np.mean(both) > 0.9
    assert 0.35 < np.mean(related) < 0.6


def test_most_captions_of_single_objects_name_colour_and_shape_and_some_only_one(scenes, written):
    alone = [caption for caption, present in zip(written, scenes.present, strict=True) if present.sum() == 1]
    colours = np.array([bool(set(words_of(caption)) & set(COLOURS)) for caption in alone])
    shapes = np.array([bool(set(words_of(caption)) & SINGULARS.keys()) for caption in alone])
    assert (colours | shapes).all()
    assert 0.8 < (colours & shapes).mean() < 0.93
    assert (colours & ~shapes).mean() > 0.02
    assert (shapes & ~colours).mean() > 0.04


@pytest.mark.parametrize(
    "plain",
    ["a photo of a cone and a cube", "a photo of a red cone and a blue cube", "a red cone behind a blue cube"],
)
def test_benchmarks_sentences_come_up(plain):
    scene = repeat(scene_of(("cone", "red", (0.9, 0.9)), ("cube", "blue", (-0.9, -0.9))), 600)
    assert plain in text.captions(scene, np.random.default_rng(0))


def test_things_of_one_name_are_told_apart_by_colour():
    scene = repeat(scene_of(("cube", "red", (1.0, 1.0)), ("cube", "blue", (-1.0, -1.0)), ("cone", "red", (0, 0))), 600)
    written = text.captions(scene, np.random.default_rng(0))
    clauses = [re.search(r"(?:, | with )(the .*)", caption) for caption in written]
    references = [clause[1] for clause in clauses if clause and "cubes" not in clause.string]
    assert references
    assert not any(re.search(r"the (cube|box|block)\b", reference) for reference in references)


def test_one_scene_has_captions_too_and_the_same_generator_gives_the_same(scenes):
    few = host_scenes(*(field[:8] for field in scenes))
    first, again = (text.captions(few, np.random.default_rng(5)) for _ in range(2))
    assert first == again
    assert first != text.captions(few, np.random.default_rng(6))
    assert text.caption(host_scenes(*(field[0] for field in scenes)), np.random.default_rng(5)) == first[0]


def test_places_are_those_that_are_plain():
    assert text.places((-0.6, 0.2)) == ("left",)
    assert text.places((0.6, -0.6)) == ("right", "front")
    assert text.places((0.0, 0.6)) == ("back",)
    assert text.places((0.3, -0.3)) == ("middle",)
    assert text.places((0.45, 0.0)) == ()
