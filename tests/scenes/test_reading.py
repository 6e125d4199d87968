"""Free prompts: what they ask for, and what lies beyond each world."""

import re

import numpy as np
import pytest

from tests.scenes.arbitrary import arbitrary_scenes
from toprovar_jax.errors import UserInputError
from toprovar_jax.scenes import captions as text
from toprovar_jax.scenes.reading import WORLDS, describe_world, read_prompt
from toprovar_jax.scenes.tasks import Wanted, task_prompts
from toprovar_jax.scenes.world import COLOURS, RELATION_MARGIN, RELATIONS, SHAPES


def test_every_caption_is_understood_and_is_true_of_its_scene():
    scenes = arbitrary_scenes(2000, seed=2)
    told_apart = {word for words in (*text.SIZE_WORDS, *text.MATERIAL_WORDS.values()) for word in words}
    related = 0
    for caption, present, shape, colour, _, position in zip(
        text.captions(scenes, np.random.default_rng(2)), *scenes[:5], strict=True
    ):
        reading = read_prompt(caption)
        assert reading.unknown == (), caption
        fits = []
        for wanted in reading.wanted:
            fit = present.copy()
            if wanted.shape:
                fit &= shape == SHAPES.index(wanted.shape)
            if wanted.colour:
                fit &= colour == list(COLOURS).index(wanted.colour)
            # "Two small cubes" leave the large ones unsaid now and then.
            exact = not told_apart & set(caption.split())
            assert fit.sum() == wanted.count or (fit.sum() > wanted.count and not exact), caption
            fits.append(position[fit])
        for one, relation, other in reading.relations:
            axis, sign = RELATIONS[relation]
            differences = fits[one][:, None, axis] - fits[other][None, :, axis]
            assert (sign * differences).max() > RELATION_MARGIN, caption
            related += 1
        says_relation = re.search("(left|right|front) of|behind|its (left|right)", caption)
        alike = len(reading.wanted) < 2 or told_apart & set(caption.split())
        assert bool(reading.relations) or not says_relation or alike, caption
    assert related > 200


@pytest.mark.parametrize("prompt", task_prompts(40, seed=3), ids=lambda prompt: prompt.prompt)
def test_prompts_of_the_tasks_are_understood_as_they_were_meant(prompt):
    reading = read_prompt(prompt.prompt)
    assert reading.unknown == ()
    assert reading.wanted == prompt.wanted
    assert reading.relations == (((0, prompt.relation, 1),) if prompt.relation else ())


CUBE, BALL = Wanted("cube"), Wanted("sphere")


@pytest.mark.parametrize(
    ("prompt", "wanted", "relations"),
    [
        ("", (), ()),
        ("red", (Wanted(None, "red"),), ()),
        ("A Red Sphere.", (Wanted("sphere", "red"),), ()),
        ("three red balls", (Wanted("sphere", "red", 3),), ()),
        ("a pair of toruses", (Wanted("torus", None, 2),), ()),
        ("exactly 2 donuts and a single box", (Wanted("torus", None, 2), CUBE), ()),
        ("a red cube and a cube", (Wanted("cube", "red"), Wanted("cube", None, 2)), ()),
        ("a red cube and a red cube", (Wanted("cube", "red", 2),), ()),
        ("a red and a blue cube", (Wanted("cube", "red"), Wanted("cube", "blue")), ()),
        ("two red and three blue cubes", (Wanted("cube", "red", 2), Wanted("cube", "blue", 3)), ()),
        (
            "one red, two blue and one green cube",
            (Wanted("cube", "red"), Wanted("cube", "blue", 2), Wanted("cube", "green")),
            (),
        ),
        ("three objects, small and shiny", (Wanted(None, None, 3),), ()),
        ("an object that is a cube", (CUBE,), ()),
        ("a cube in red and a ball", (Wanted("cube", "red"), BALL), ()),
        ("a red shiny cube, a matt ball", (Wanted("cube", "red"), BALL), ()),
        ("the ball is red and the ball is on the left", (Wanted("sphere", "red"),), ()),
        ("a red object, blue object, and black object", tuple(Wanted(None, c) for c in ("red", "blue", "black")), ()),
        ("a cube left of a ball", (CUBE, BALL), ((0, "left of", 1),)),
        ("a cube to the left side of a ball", (CUBE, BALL), ((0, "left of", 1),)),
        ("a cube is on the right-hand side of a ball", (CUBE, BALL), ((0, "right of", 1),)),
        ("a cube stands behind the ball", (CUBE, BALL), ((0, "behind", 1),)),
        ("the cube is in the front of the ball", (CUBE, BALL), ((0, "in front of", 1),)),
        ("behind the ball there is a cube", (BALL, CUBE), ((1, "behind", 0),)),
        ("to the left of a ball is a cube", (BALL, CUBE), ((1, "left of", 0),)),
        ("a ball with a cube to its left", (BALL, CUBE), ((1, "left of", 0),)),
        ("a ball and a cube in front of it", (BALL, CUBE), ((1, "in front of", 0),)),
        ("a ball and behind it a cube", (BALL, CUBE), ((1, "behind", 0),)),
        ("a ball, to its right there is a cube", (BALL, CUBE), ((1, "right of", 0),)),
        ("a cube and a ball, the cube is behind", (CUBE, BALL), ((0, "behind", 1),)),
        ("a cube and a ball. The ball is in front!", (CUBE, BALL), ((1, "in front of", 0),)),
        ("a cube and a ball, the ball is right of the cube", (CUBE, BALL), ((1, "right of", 0),)),
        ("a cube behind and to the left of a ball", (CUBE, BALL), ((0, "behind", 1), (0, "left of", 1))),
        (
            "a cube left of a ball and behind a cone",
            (CUBE, BALL, Wanted("cone")),
            ((0, "left of", 1), (0, "behind", 2)),
        ),
        (
            "a cube left of a ball behind a cone",
            (CUBE, BALL, Wanted("cone")),
            ((0, "left of", 1), (1, "behind", 2)),
        ),
        (
            "a red cube left of a blue cube, with the blue cube behind a cone",
            (Wanted("cube", "red"), Wanted("cube", "blue"), Wanted("cone")),
            ((0, "left of", 1), (1, "behind", 2)),
        ),
        ("a ball on the left and a cube on the right", (BALL, CUBE), ()),
        ("on the left a ball, and on the right a cube", (BALL, CUBE), ()),
        ("a ball on the left side of the picture", (BALL,), ()),
        ("a ball in front", (BALL,), ()),
    ],
)
def test_prompts_of_the_world_are_understood(prompt, wanted, relations):
    reading = read_prompt(prompt)
    assert (reading.wanted, reading.relations, reading.unknown) == (wanted, relations, ())


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a cat", ("cat",)),
        ("seven cubes", ("seven cubes",)),
        ("12 red cubes", ("12 cubes",)),
        ("no cubes", ("no cubes",)),
        ("-1 cubes", ("-1 cubes",)),
        ("a photo of −2 red cubes", ("−2 cubes",)),
        ("1.5 cubes", ("1.5 cubes",)),
        ("0 cubes", ("0 cubes",)),
        ("cubes and balls", ("cubes", "balls")),
        ("three cubes and three balls", ("6 objects",)),
        ("a cube on top of a ball", ("top",)),
        ("a cube behind a cat", ("cat",)),
        ("a cube behind", ("behind",)),
        ("a cube behind it", ("behind",)),
        ("a cube left of a ball, the cube is right of the ball", ("right of and left of",)),
        ("a cube behind a ball, the ball is behind the cube", ("behind and in front of",)),
        ("a metal rubber cube", ("metal and rubber",)),
        ("a cube on a metal floor", ("metal floor",)),
        ("a red and blue cube", ("blue",)),
        ("two cubes, one red and one pink", ("pink",)),
        ("a ball on the left and a ball on the left and on the right", ("left and right",)),
        ("a pink torus", ("pink",)),
        ("1", ("no object",)),
    ],
)
def test_what_lies_beyond_the_world_is_noticed(prompt, unknown):
    assert read_prompt(prompt).unknown == unknown


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
        ("three cones", ("three cones",)),
        ("2 red spheres", ("2 red spheres",)),
        ("a red cube and a blue ball", ("blue ball",)),
        ("a red cube and a red cube", ("red cube",)),
        ("a cone, behind a small green cylinder", ("behind", "small green cylinder")),
        ("a cube that is yellow and a small black cone", ("small black cone",)),
        ("a red and blue cube", ("blue",)),
        ("a cube in red and green", ("green",)),
        ("a pink torus", ("pink", "torus")),
        ("a metal cube", ("metal",)),
        ("a shiny red donut", ("shiny", "donut")),
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
def test_prompts_beyond_the_world_of_single_objects_are_noticed(prompt, unknown):
    assert read_prompt(prompt, "scenes-single").unknown == unknown


@pytest.mark.parametrize("world", WORLDS)
def test_the_description_names_every_colour_on_one_line(world):
    line = describe_world(world)
    assert "\n" not in line
    assert all(colour in line for colour in COLOURS)
    assert ("tori" in line) == (world == "scenes")


def test_an_unknown_world_is_refused():
    with pytest.raises(UserInputError, match="scenes-single"):
        read_prompt("a cube", "moon")
