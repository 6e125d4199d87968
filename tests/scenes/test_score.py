"""The protocol of the six tasks against the released one on made-up detections, and free prompts taken strictly."""

import json

import numpy as np
import pytest

from toprovar_jax.errors import UserInputError
from toprovar_jax.scenes import score as score_module
from toprovar_jax.scenes.reading import read_prompt
from toprovar_jax.scenes.score import (
    SHOWN_MARGIN,
    Seen,
    check_judgeable,
    description_shown,
    judged_right,
    objects_seen,
    related,
    score,
    task_shown,
    tasks_right,
)
from toprovar_jax.scenes.tasks import TaskPrompt, Wanted, task_prompts, to_json_line
from toprovar_jax.scenes.world import COLOURS, RELATIONS, SHAPES

from ..judged_pictures import PixelJudge, detections, painted, perfect

PROMPTS = task_prompts(40, seed=3)


def a(text: str, x: float = 0.0, z: float = 0.0) -> Seen:
    """``a("red cube", 1.0)``."""
    colour, shape = text.split()
    return Seen(shape, colour, (x, z))


def released(seen: list[Seen], metadata: dict) -> bool:
    """The order of GenEval's own evaluation, clause by clause, with the places of this world."""
    by_class = {shape: [thing for thing in seen if thing.shape == shape] for shape in SHAPES}
    groups: list[list[Seen] | None] = []
    correct = True
    for clause in metadata["include"]:
        things = by_class[clause["class"]][: clause["count"]]
        matched = len(things) == clause["count"]
        if matched and "color" in clause:
            matched = [thing.colour for thing in things].count(clause["color"]) >= clause["count"]
        if matched and "position" in clause:
            relation, other = clause["position"]
            axis, sign = RELATIONS[relation]
            targets = groups[other]
            matched = targets is not None and all(
                sign * (thing.position[axis] - target.position[axis]) >= SHOWN_MARGIN
                for thing in things
                for target in targets
            )
        groups.append(things if matched else None)
        correct &= matched
    excluded = metadata.get("exclude", [])
    return correct and not any(len(by_class[clause["class"]]) >= clause["count"] for clause in excluded)


def test_verdicts_are_those_of_the_released_protocol():
    rng, verdicts = np.random.default_rng(0), []
    for _ in range(12):
        for prompt in PROMPTS:
            # Half of the objects are those asked for, so that many pictures are nearly or wholly right.
            seen = perfect(prompt)[: rng.integers(0, 9)]
            for _ in range(rng.integers(0, 3)):
                thing = Seen(
                    str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS))), tuple(rng.uniform(-1, 1, 2).tolist())
                )
                seen.insert(int(rng.integers(0, len(seen) + 1)), thing)
            verdicts.append((prompt.task, task_shown(seen, prompt)))
            assert verdicts[-1][1] == released(seen, json.loads(to_json_line(prompt))), (prompt, seen)
    for task in {task for task, _ in verdicts}:
        assert {right for name, right in verdicts if name == task} == {True, False}


def test_perfect_pictures_are_right_and_empty_ones_wrong():
    pictures = [perfect(prompt) for prompt in PROMPTS]
    assert tasks_right(detections(pictures), PROMPTS).all()
    assert not tasks_right(detections([[]] * len(PROMPTS)), PROMPTS).any()


def test_too_many_are_wrong_in_counting_alone():
    three = [a("red cube", x) for x in (-1.0, 0.0, 1.0)]
    wanted = (Wanted("cube", count=2),)
    assert task_shown(three, TaskPrompt("", wanted))
    assert not task_shown(three, TaskPrompt("", wanted, task="counting"))
    assert task_shown([*three[:2], a("red cone")], TaskPrompt("", wanted, task="counting"))


def test_only_the_most_confident_object_of_a_kind_is_asked_for_its_colour():
    prompt = TaskPrompt("", (Wanted("cube", "red"),), task="colours")
    assert task_shown([a("red cube"), a("blue cube")], prompt)
    assert not task_shown([a("blue cube"), a("red cube")], prompt)


def test_two_objects_of_one_shape_are_told_apart_by_colour():
    prompt = TaskPrompt("", (Wanted("cube", "red"), Wanted("cube", "blue")), "left of", "colour attribution")
    assert task_shown([a("blue cube", 1.0), a("red cube", -1.0)], prompt)
    assert not task_shown([a("blue cube", -1.0), a("red cube", 1.0)], prompt)
    assert not task_shown([a("red cube", 1.0), a("red cube", -1.0)], prompt)


def test_an_object_of_any_shape_may_be_what_is_left():
    prompt = TaskPrompt("", (Wanted(None, "red"), Wanted("cube")))
    assert task_shown([a("red cone"), a("green cube")], prompt)
    assert task_shown([a("green cube"), a("red cube")], prompt)
    assert not task_shown([a("red cube"), a("green cone")], prompt)


def test_a_relation_must_hold_of_every_object_of_either_side():
    prompt = TaskPrompt("", (Wanted("cube", None, 2), Wanted("sphere")), "left of")
    sphere = a("blue sphere", 0.0)
    assert task_shown([a("red cube", -1.0), a("green cube", -2.0), sphere], prompt)
    assert not task_shown([a("red cube", -1.0), a("green cube", 1.0), sphere], prompt)
    assert not task_shown([a("red cube", 1.0), a("green cube", -1.0), sphere], prompt)
    swapped = TaskPrompt("", (Wanted("sphere"), Wanted("cube", None, 2)), "right of")
    assert task_shown([a("red cube", -1.0), a("green cube", -2.0), sphere], swapped)
    assert not task_shown([a("red cube", -1.0), a("green cube", 1.0), sphere], swapped)


@pytest.mark.parametrize(
    ("prompt", "pictures"),
    [
        (
            "a red cube and a cube",
            {("red", "blue"): True, ("red", "red"): True, ("red",): False, ("blue", "green"): False},
        ),
        ("a red cube and two cubes", {("red", "blue", "green"): True, ("red", "blue"): False}),
        ("a red cube and a blue cube", {("blue", "red"): True, ("red", "blue", "green"): False}),
    ],
)
def test_things_that_are_named_twice_are_counted_once(prompt, pictures):
    for colours, shown in pictures.items():
        assert description_shown([a(f"{colour} cube") for colour in colours], read_prompt(prompt)) is shown, colours


def test_a_relation_to_another_of_the_same_shape_is_read_of_the_other():
    reading = read_prompt("a red cube left of a cube")
    assert description_shown([a("blue cube", 1.0), a("red cube", -1.0)], reading)
    assert not description_shown([a("blue cube", -1.0), a("red cube", 1.0)], reading)


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_relation_holds_from_half_of_the_margin_on(relation):
    axis, sign = RELATIONS[relation]
    for apart, holds in ((SHOWN_MARGIN + 1e-6, True), (SHOWN_MARGIN - 1e-6, False), (-1.0, False)):
        place = [0.7, 0.7]
        place[axis] += sign * apart
        assert related(a("red cube", *place), relation, a("red cone", 0.7, 0.7)) is holds


def test_objects_are_read_from_the_slots_that_are_taken():
    pictures = [[a("red cube", 1.0, -1.0), a("black torus", 0.5, 2.0)], []]
    assert objects_seen(detections(pictures)) == pictures


def test_the_score_is_the_mean_of_the_tasks_and_a_task_s_the_share_of_its_pictures():
    prompts = [
        TaskPrompt(text, (Wanted("cube"),), task=task)
        for text, task in zip("aabcd", ["counting"] * 3 + ["position"] * 2, strict=True)
    ]
    prompts.append(TaskPrompt("of no task", (Wanted("cube"),)))
    found = score(np.array([True, True, False, True, False, False]), prompts)
    assert [(task.task, task.prompts, task.images) for task in found.tasks] == [("counting", 2, 3), ("position", 2, 2)]
    assert [task.share.value for task in found.tasks] == pytest.approx([2 / 3, 1 / 2])
    assert found.total.value == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found.total.low < found.total.value < found.total.high


@pytest.fixture
def reads_pixels(monkeypatch):
    monkeypatch.setattr(score_module, "_judge", PixelJudge)


FREE = {
    "a red ball": ([a("red sphere")], [a("red cube")]),
    "two blue cubes": ([a("blue cube"), a("blue cube", 1.0)], [a("blue cube")]),
    "a cone": ([a("cyan cone")], [a("cyan cone"), a("cyan cone", 1.0)]),
    "a red cube and a green torus": ([a("green torus"), a("red cube")], [a("green cube"), a("red torus")]),
    "a red cube to the left of a cone": (
        [a("red cube", -1.0), a("red cone", 1.0)],
        [a("red cube", 1.0), a("red cone", -1.0)],
    ),
    "three spheres behind a cube": (
        [a("red cube", 0.0, -1.0), *(a("red sphere", x, 1.0) for x in (-1.0, 0.0, 1.0))],
        [a("red cube", 0.0, 0.9), *(a("red sphere", x, 1.0) for x in (-1.0, 0.0, 1.0))],
    ),
}


@pytest.mark.parametrize("prompt", FREE)
def test_a_free_prompt_is_shown_by_exactly_its_objects(prompt, reads_pixels):
    right, wrong = FREE[prompt]
    pictures = [right, wrong, [*right, a("black cone", 1.5, 1.5)]]
    images = np.floor(255.0 * np.stack([painted(picture) for picture in pictures])).astype(np.uint8)
    assert judged_right(images, [prompt] * 3).tolist() == [True, False, False]


def test_what_cannot_be_judged_is_refused_before_there_are_pictures(reads_pixels):
    check_judgeable(["a red ball", "two blue boxes"], 32)
    with pytest.raises(UserInputError, match=r"'a red cat': must ask for what the scenes world holds .not .*cat"):
        check_judgeable(["a red ball", "a red cat"], 32)
    with pytest.raises(UserInputError, match="'a red cat'"):
        judged_right(np.zeros((1, 32, 32, 3), np.uint8), ["a red cat"])
    with pytest.raises(UserInputError, match="pictures of 31 pixels"):
        check_judgeable(["a red ball"], 31)
