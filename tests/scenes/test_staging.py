"""Scenes that are made to show what prompts ask for."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toprovar_jax.errors import UserInputError
from toprovar_jax.scenes import staging
from toprovar_jax.scenes.score import Seen, task_shown
from toprovar_jax.scenes.staging import scenes_showing
from toprovar_jax.scenes.tasks import TaskPrompt, Wanted, task_prompts
from toprovar_jax.scenes.world import COLOURS, HELD_OUT_KINDS, RELATION_MARGIN, RELATIONS, SHAPES, Scenes, projected

PROMPTS = task_prompts(12)


@pytest.fixture(scope="module")
def staged() -> Scenes:
    return jax.tree.map(np.asarray, scenes_showing(PROMPTS, 5))


def objects(scenes: Scenes, row: int) -> list[Seen]:
    return [
        Seen(
            SHAPES[scenes.shape[row, slot]],
            list(COLOURS)[scenes.colour[row, slot]],
            tuple(scenes.position[row, slot].tolist()),
        )
        for slot in np.flatnonzero(scenes.present[row])
    ]


def test_every_scene_holds_exactly_what_its_prompt_asks_for(staged):
    for row, prompt in enumerate(PROMPTS):
        seen = objects(staged, row)
        assert len(seen) == sum(wanted.count for wanted in prompt.wanted)
        assert task_shown(seen, prompt)


def test_relations_are_plain_to_see(staged):
    for row, prompt in enumerate(PROMPTS):
        if prompt.relation is not None:
            axis, sign = RELATIONS[prompt.relation]
            places = {thing.shape: thing.position[axis] for thing in objects(staged, row)}
            first, second = (places[str(wanted.shape)] for wanted in prompt.wanted)
            assert sign * (first - second) > RELATION_MARGIN


def test_nothing_held_out_is_shown_that_was_not_asked_for(staged):
    for row, prompt in enumerate(PROMPTS):
        asked = {(wanted.shape, wanted.colour) for wanted in prompt.wanted}
        shown = {(thing.shape, thing.colour) for thing in objects(staged, row)}
        assert shown & set(HELD_OUT_KINDS) <= asked


def test_objects_of_one_colour_stand_apart_in_the_picture(staged):
    heights = jnp.asarray(0.7 * staged.size)
    middles, units = projected(jnp.asarray(staged.position), heights)
    radii, pairs = np.asarray(units) * staged.size, 0
    for row in range(len(PROMPTS)):
        for a, b in itertools.combinations(np.flatnonzero(staged.present[row]), 2):
            if staged.colour[row, a] == staged.colour[row, b]:
                apart = np.linalg.norm(np.asarray(middles)[row, a] - np.asarray(middles)[row, b])
                assert apart > 1.19 * (radii[row, a] + radii[row, b])
                pairs += 1
    assert pairs > 3


def test_equal_prompts_get_different_scenes_and_equal_seeds_the_same(staged):
    again = jax.tree.map(np.asarray, scenes_showing([PROMPTS[0]] * 3, 5))
    assert (
        len({position[present].tobytes() for position, present in zip(again.position, again.present, strict=True)}) == 3
    )
    np.testing.assert_array_equal(again.position[0], staged.position[0])


CROWDS = {
    "five alike": TaskPrompt("five red cubes", (Wanted("cube", "red", 5),)),
    "a row of one and four": TaskPrompt(
        "a red cube behind four red cones", (Wanted("cube", "red"), Wanted("cone", "red", 4)), "behind"
    ),
    "two groups": TaskPrompt(
        "two red cubes left of three red balls", (Wanted("cube", "red", 2), Wanted("sphere", "red", 3)), "left of"
    ),
    "anything": TaskPrompt("three objects and two blue ones", (Wanted(None, None, 3), Wanted(None, "blue", 2))),
}


@pytest.mark.parametrize("crowd", CROWDS)
def test_crowds_are_staged_however_many_are_asked_for(crowd):
    prompt = CROWDS[crowd]
    scenes = jax.tree.map(np.asarray, scenes_showing([prompt] * 12, 3))
    assert len({row.tobytes() for row in scenes.position}) == 12
    for row in range(12):
        seen = objects(scenes, row)
        assert len(seen) == 5
        assert task_shown(seen, prompt)
        assert not {(thing.shape, thing.colour) for thing in seen} & set(HELD_OUT_KINDS)


def test_scenes_are_made_until_one_fits(monkeypatch):
    """Prompts that few arrangements fit are no mistake."""
    tries: list[bool] = []
    arranged = staging._arranged

    def rarely(*arguments):
        scenes, shown = arranged(*arguments)
        tries.append(len(tries) > 20)
        return scenes, shown & tries[-1]

    monkeypatch.setattr(staging, "_arranged", rarely)
    assert scenes_showing([PROMPTS[0]], 5).present.sum() == 1
    assert len(tries) == 22


TWO = (Wanted("cube"), Wanted("cone"))
IMPOSSIBLE = {
    "six": (TaskPrompt("six cubes", (Wanted("cube", count=6),)), "'six cubes' of 6 objects: must ask for 1 to 5"),
    "none": (TaskPrompt("nothing", ()), "of 0 objects"),
    "less than none": (TaskPrompt("few", (Wanted("cube", count=-1), Wanted("cone", count=2))), "of 1 objects"),
    "a relation to nothing": (TaskPrompt("behind", TWO[:1], "behind"), "on either side of its relation"),
    "an unknown relation": (TaskPrompt("above", TWO, "above"), "relation 'above'"),
    "an unknown shape": (TaskPrompt("a cat", (Wanted("cat"),)), "shape 'cat'"),
    "an unknown colour": (TaskPrompt("pink", (Wanted("cube", "pink"),)), "colour 'pink'"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_no_scene_can_show_is_refused_before_any_is_made(case, monkeypatch):
    prompt, message = IMPOSSIBLE[case]
    monkeypatch.setattr(staging, "_arranged", None)
    with pytest.raises(UserInputError, match=message):
        scenes_showing([PROMPTS[0], prompt], 5)
