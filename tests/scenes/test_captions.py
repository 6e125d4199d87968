"""Captions tell the truth with known words; prompts beyond the world are noticed."""

import itertools

import jax
import numpy as np
import pytest

from toprovar_jax.scenes import captions as text
from toprovar_jax.scenes.world import COLOURS, SHAPES, SIZES, sample_scenes


@pytest.fixture(scope="module")
def written() -> tuple[list[str], list[np.ndarray]]:
    scenes = sample_scenes(jax.random.key(1), 6000)
    return text.captions(scenes, np.random.default_rng(1)), [np.asarray(field) for field in scenes]


def test_captions_use_the_whole_vocabulary_and_nothing_else(written):
    used = {word for caption in written[0] for word in caption.split()}
    assert used == set(text.VOCABULARY)


def test_captions_are_short_lower_case_and_varied(written):
    assert all(caption == caption.lower().strip() for caption in written[0])
    assert max(len(caption.split()) for caption in written[0]) <= 20
    assert len(set(written[0])) > 1500


def test_captions_never_contradict_the_scene(written):
    opposite = {"left": "right", "right": "left", "front": "back", "back": "front"}
    signs = {"left": (0, -1), "right": (0, 1), "front": (1, -1), "back": (1, 1)}
    for caption, shape, colour, position, size in zip(written[0], *written[1][:4], strict=True):
        words = set(caption.split())
        assert words & set(COLOURS) <= {list(COLOURS)[colour]}
        named = {kind for kind, names in text.NOUNS.items() if words & set(names)}
        assert named <= {SHAPES[shape]}
        assert not (words & {"large", "big"} and size < np.mean(SIZES))
        assert not ("small" in words and size > np.mean(SIZES))
        for place, (axis, sign) in signs.items():
            if place in words:
                assert position[axis] * sign > text.SIDE_FROM
                assert opposite[place] not in words
        if words & {"middle", "center", "centre"}:
            assert np.abs(position).max() < text.MIDDLE_WITHIN


def test_most_captions_name_colour_and_shape_and_some_name_only_one(written):
    colours = np.array([bool(set(caption.split()) & set(COLOURS)) for caption in written[0]])
    nouns = {name for names in text.NOUNS.values() for name in names}
    shapes = np.array([bool(set(caption.split()) & nouns) for caption in written[0]])
    assert (colours | shapes).all()
    assert 0.8 < (colours & shapes).mean() < 0.9
    assert (colours & ~shapes).mean() > 0.04
    assert (shapes & ~colours).mean() > 0.04


def test_articles_fit_the_word_that_follows(written):
    for caption in written[0]:
        words = caption.split()
        for article, following in itertools.pairwise(words):
            if article in ("a", "an"):
                assert (article == "an") == (following[0] in "aeiou")


def test_the_same_generator_gives_the_same_captions():
    scenes = sample_scenes(jax.random.key(2), 8)
    first, again = (text.captions(scenes, np.random.default_rng(5)) for _ in range(2))
    assert first == again
    assert first != text.captions(scenes, np.random.default_rng(6))


def test_every_caption_lies_inside_the_world(written):
    assert [caption for caption in written[0][:2000] if text.unknown_to_world(caption)] == []


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("A Red Sphere.", ()),
        ("", ()),
        ("please, a NICE photo of the big orange box in the centre!", ()),
        ("the ball's color is red; the ball is on the left", ()),
        ("a cube that is yellow and is on the right", ()),
        ("1 blue cylinder", ()),
        ("a cat", ("cat",)),
        ("three cones", ("three", "cones")),
        ("2 red spheres", ("2", "spheres")),
        ("a red cube and a blue ball", ("blue ball",)),
        ("a red cube and a red cube", ("red cube",)),
        ("a cone, behind a small green cylinder", ("behind", "small green cylinder")),
        ("a cube that is yellow and a small black cone", ("small black cone",)),
        ("a red and blue cube", ("blue",)),
        ("a cube in red and green", ("green",)),
        ("a pink torus", ("pink", "torus")),
        ("красный шар", ("красный", "шар")),
        ("ein roter Würfel", ("ein", "roter", "würfel")),
        ("赤い球", ("赤い球",)),
        ("a red 🔴 ball", ("🔴",)),
        ("ａ ｒｅｄ ｃｕｂｅ", ()),
        ("...!?", ()),
        ("a grey sphere", ("grey",)),
        ("a cube that is gray", ("gray",)),
        ("a white cube", ("white",)),
        ("a red sphere on a grey floor", ()),
        ("a red sphere in the foreground on a plain gray background", ()),
        ("a red sphere with soft light", ()),
        ("a red sphere and an object", ("object",)),
        ("an object and a shape", ("shape",)),
        ("a sphere and the small sphere", ("small sphere",)),
        ("the red sphere and the red sphere", ("red sphere",)),
        ("the ball is red and the ball is on the left", ()),
        ("a red cube shaped object", ()),
        ("an object in the shape of a cube", ()),
        ("an object in a sphere", ("sphere",)),
        ("a large object that is a cube", ()),
        ("an object that is a cube and there is a ball", ("ball",)),
        ("a red sphere on the left and on the right", ("left and right",)),
        ("a cone at the back in the foreground", ("back and foreground",)),
        ("a big small red sphere", ("big and small",)),
        ("a large big red sphere on the left at the front", ()),
        ("a sphere on a red floor", ("red floor",)),
        ("a sphere in front of a blue background", ("blue background",)),
        ("a red sphere and the floor is grey", ()),
        ("a red sphere and the floor is green", ("green floor",)),
        ("on the floor is a red ball", ()),
        ("blue light on a red sphere", ("blue light",)),
        ("1", ("no object",)),
        ("3d", ("no object",)),
        ("scene with light", ("no object",)),
        ("a small picture on the left", ("no object",)),
        ("red", ()),
    ],
)
def test_prompts_beyond_the_world_are_noticed(prompt, unknown):
    assert text.unknown_to_world(prompt) == unknown


def test_the_description_names_every_shape_and_colour_on_one_line():
    line = text.describe_world()
    assert "\n" not in line
    assert all(name in line for name in (*SHAPES, *COLOURS))
