"""Prompts of the six tasks: what they ask for, what of it training never shows, and their files."""

import collections
import json

import pytest

from toprovar_jax.errors import UserInputError
from toprovar_jax.scenes.tasks import (
    TASKS,
    TaskPrompt,
    Wanted,
    needs_held_out,
    read_task_prompts,
    task_prompts,
    to_json_line,
)
from toprovar_jax.scenes.world import COLOURS, HELD_OUT_KINDS, HELD_OUT_RELATIONS, RELATIONS, SHAPES

MANY = task_prompts(1150)


def of(task: str) -> list[TaskPrompt]:
    return [prompt for prompt in MANY if prompt.task == task]


def test_every_task_has_as_many_prompts_as_asked_for():
    assert collections.Counter(prompt.task for prompt in task_prompts(7)) == dict.fromkeys(TASKS, 7)


def test_the_seed_decides():
    assert task_prompts(5, seed=1) == task_prompts(5, seed=1)
    assert task_prompts(5, seed=1) != task_prompts(5, seed=2)
    assert task_prompts(9, seed=1)[:5] == task_prompts(5, seed=1)[:5]


def test_the_tasks_are_drawn_apart_from_each_other():
    # Both have twenty things to ask for, each in a sentence with "of" or without.
    framed = [[" of " in prompt.prompt for prompt in of(task)[:40]] for task in ("two objects", "counting")]
    assert framed[0] != framed[1]


@pytest.mark.parametrize(
    ("task", "combinations"),
    [
        ("single object", 5),
        ("two objects", 20),
        ("counting", 5 * 4),
        ("colours", 5 * 8),
        ("position", 5 * 4 * 4),
        ("colour attribution", 5 * 4 * 8 * 7),
    ],
)
def test_everything_that_can_be_asked_comes_once_before_anything_comes_twice(task, combinations):
    asked = [(prompt.wanted, prompt.relation) for prompt in of(task)[:combinations]]
    assert len(set(asked)) == combinations
    assert {(prompt.wanted, prompt.relation) for prompt in of(task)} == set(asked)


@pytest.mark.parametrize(("task", "wordings"), [("single object", 20), ("counting", 80), ("position", 480)])
def test_no_prompt_comes_twice_before_all_wordings_did(task, wordings):
    prompts = [prompt.prompt for prompt in of(task)]
    # Two of the four relations are said in two ways.
    assert len(set(prompts)) == wordings
    assert len(set(prompts[: 80 if task == "position" else wordings])) == min(80, wordings)


def test_wanted_says_what_each_task_asks():
    kinds = {
        task: {tuple((w.colour is None, w.count > 1) for w in prompt.wanted) for prompt in of(task)} for task in TASKS
    }
    plain, coloured = (True, False), (False, False)
    assert kinds == {
        "single object": {(plain,)},
        "two objects": {(plain, plain)},
        "counting": {((True, True),)},
        "colours": {(coloured,)},
        "position": {(plain, plain)},
        "colour attribution": {(coloured, coloured)},
    }
    for prompt in MANY:
        assert len({thing.shape for thing in prompt.wanted}) == len(prompt.wanted)
        assert (prompt.relation in RELATIONS) == (prompt.task == "position")
        if prompt.task == "colour attribution":
            assert prompt.wanted[0].colour != prompt.wanted[1].colour
    assert {prompt.wanted[0].count for prompt in of("counting")} == {2, 3, 4, 5}


def test_held_out_prompts_are_those_that_need_a_held_out_kind_or_relation():
    only = task_prompts(60, held_out=True)
    assert {prompt.task for prompt in only} == {"colours", "position", "colour attribution"}
    assert all(prompt.held_out for prompt in only)
    kinds = {(prompt.wanted[0].shape, prompt.wanted[0].colour) for prompt in only if prompt.task == "colours"}
    assert kinds == set(HELD_OUT_KINDS)
    relations = {(p.wanted[0].shape, p.relation, p.wanted[1].shape) for p in only if p.task == "position"}
    assert len(relations) == 2 * len(HELD_OUT_RELATIONS)
    assert relations > set(HELD_OUT_RELATIONS)
    seen = task_prompts(200, held_out=False)
    assert collections.Counter(prompt.task for prompt in seen) == dict.fromkeys(TASKS, 200)
    assert not any(prompt.held_out for prompt in seen)
    share = sum(prompt.held_out for prompt in of("position")) / len(of("position"))
    assert share == pytest.approx(8 / 80)


def test_a_relation_is_held_out_from_either_side():
    cone, cube = Wanted("cone", "red"), Wanted("cube", "red")
    assert needs_held_out((cone, cube), "left of")
    assert needs_held_out((cube, cone), "right of")
    assert not needs_held_out((cube, cone), "left of")
    assert not needs_held_out((cone, cube))


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ((0,), "per_task 0"),
        ((1.5,), "per_task 1.5"),
        (("3",), "per_task '3'"),
        ((True,), "per_task True"),
        ((1, -1), "seed -1"),
        ((1, 0.5), "seed 0.5"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(arguments, value):
    with pytest.raises(UserInputError, match=value):
        task_prompts(*arguments)


def test_prompts_come_back_from_their_file(tmp_path):
    prompts = (
        *task_prompts(30, seed=4),
        TaskPrompt("three objects and a red object", (Wanted(None, None, 3), Wanted(None, "red"))),
        TaskPrompt("a red cube and two cubes", (Wanted("cube", "red"), Wanted("cube", None, 2)), task="counting"),
        TaskPrompt("a cube, right of a ball", (Wanted("sphere"), Wanted("cube")), "left of", "position"),
        TaskPrompt("a cube behind a cube", (Wanted("cube"), Wanted("cube")), "behind", "position"),
        TaskPrompt("a cube that sparkles", (Wanted("cube"),), task="single object"),
    )
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join(map(to_json_line, prompts)) + "\n", encoding="utf-8")
    assert read_task_prompts(path) == prompts


def test_lines_have_the_form_of_genevals_files():
    position = TaskPrompt("a cube left of a cone", (Wanted("cube"), Wanted("cone")), "left of", "position")
    assert json.loads(to_json_line(position)) == {
        "tag": "position",
        "include": [{"class": "cone", "count": 1}, {"class": "cube", "count": 1, "position": ["left of", 0]}],
        "prompt": "a cube left of a cone",
    }
    counting = TaskPrompt("two red cubes", (Wanted("cube", "red", 2),), task="counting")
    assert json.loads(to_json_line(counting)) == {
        "tag": "counting",
        "include": [{"class": "cube", "count": 2, "color": "red"}],
        "exclude": [{"class": "cube", "count": 3, "color": "red"}],
        "prompt": "two red cubes",
    }


def line(**changes: object) -> str:
    cube = {"class": "cube", "count": 1}
    return json.dumps(
        {"tag": "two_object", "include": [cube, {"class": "ball"}], "prompt": "a cube and a ball"} | changes
    )


def test_other_names_of_a_shape_and_left_out_numbers_are_understood(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(line(), encoding="utf-8")
    assert read_task_prompts(path)[0].wanted == (Wanted("cube"), Wanted("sphere"))


def test_a_mark_of_byte_order_is_no_part_of_the_prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(line(), encoding="utf-8-sig")
    assert read_task_prompts(path)[0].prompt == "a cube and a ball"


def test_counting_may_exclude_one_more_of_its_shape(tmp_path):
    path = tmp_path / "prompts.jsonl"
    cubes = [{"class": "cube", "count": 2}]
    more = {"tag": "counting", "include": cubes, "prompt": "two cubes"}
    path.write_text(line(**more, exclude=[{"class": "box", "count": 3}]), encoding="utf-8")
    assert read_task_prompts(path)[0].wanted == (Wanted("cube", None, 2),)


BALL = {"class": "ball"}
CUBE = {"class": "cube"}
TWO_CUBES = {"tag": "counting", "include": [CUBE | {"count": 2}], "prompt": "two cubes"}


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ("{", "JSON"),
        ("[]", "JSON object"),
        (line(prompt=" "), "prompt"),
        (line(include=[]), "include"),
        (line(include=["cube"]), "object 'cube'"),
        (line(include=[{"class": "bench"}]), "bench"),
        (line(include=[{"class": "ball", "count": 6}]), "count 6"),
        (line(include=[{"class": "ball", "count": True}]), "count True"),
        (line(include=[{"class": "ball", "color": "white"}]), "white"),
        (line(include=[BALL, BALL | {"position": ["above", 0]}]), "above"),
        (line(include=[BALL, BALL | {"position": ["behind", 1]}]), "position index 1"),
        (line(include=[BALL, BALL | {"position": "behind"}]), "position 'behind'"),
        (line(include=[BALL | {"position": ["behind", 1]}, BALL | {"position": ["behind", 0]}]), "two positions"),
        (line(include=[{"class": "ball", "size": 1}]), "size"),
        (line(exclude=[{"class": "cube", "count": 4}]), "exclude"),
        (line(exclude=[{"class": "cone", "count": 1}]), "exclude"),
        (line(exclude=[{"class": "cube", "count": 2}]), "exclude .*of the tag counting; leave it out"),
        (line(**TWO_CUBES, exclude=[{"class": "cube", "count": 4}]), "exclude"),
        (line(include=[CUBE | {"count": 3}, BALL | {"count": 3}]), "include of 6 objects: must be at most 5"),
        (line(tag="position"), "tag 'position': must include an object with a position"),
        (line(include=[CUBE, BALL | {"position": ["behind", 0]}]), "tag 'two_object': must not include a position"),
        (line(tag="colors"), "tag 'colors': must include an object with a color"),
        (line(tag="color_attr", include=[CUBE | {"color": "red"}, BALL]), "must include two objects with colors"),
        (line(tag="single_object", include=[CUBE | {"count": 2}], prompt="two cubes"), "must include one object"),
        (line(include=[CUBE]), "tag 'two_object': must include two objects"),
        (line(prompt="a cube and a cone"), "asks for 1 cube, 1 cone; correct either"),
        (line(prompt="a cube and two balls"), "asks for 1 cube, 2 sphere"),
        (line(prompt="a red cube and a ball"), "asks for 1 red cube, 1 sphere"),
        (line(prompt="a cube"), "asks for 1 cube;"),
        (line(prompt="..."), "asks for nothing"),
        (line(prompt="a cube left of a ball"), "says a position"),
        (line(tag="position", include=[CUBE, BALL | {"position": ["behind", 0]}]), "than 'behind', or none"),
        (
            line(
                tag="position",
                include=[CUBE, BALL | {"position": ["behind", 0]}],
                prompt="a ball in front of a cube",
            ),
            "than 'behind', or none",
        ),
        (line(tag="spelling"), "spelling"),
        (line(weight=2), "weight"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(bad, named, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f"{line()}\n{bad}\n", encoding="utf-8")
    with pytest.raises(UserInputError, match=f"line 2: .*{named}"):
        read_task_prompts(path)


def test_files_without_prompts_are_refused(tmp_path):
    with pytest.raises(UserInputError, match="cannot be read"):
        read_task_prompts(tmp_path / "missing.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(UserInputError, match="at least one prompt"):
        read_task_prompts(empty)


def test_all_shapes_and_colours_are_asked_for():
    assert {thing.shape for prompt in MANY for thing in prompt.wanted} == set(SHAPES)
    assert {thing.colour for prompt in MANY for thing in prompt.wanted} == {None, *COLOURS}
