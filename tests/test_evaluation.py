"""Evaluating a model that paints what it is asked for, or not: scores, what they are set beside, and what is kept."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from toprovar_jax import evaluation as evaluation_module
from toprovar_jax.errors import UserInputError
from toprovar_jax.evaluation import CEILING, RENDERS, SHOWN, Evaluation, Setup, prompts_of
from toprovar_jax.evaluation_report import as_dict, sheet, table
from toprovar_jax.scenes.quality import JUDGE_FID, frechet_distance
from toprovar_jax.scenes.tasks import TASKS, TaskPrompt, Wanted
from toprovar_jax.similarity import psnr

from .judged_pictures import GRIDS, SIDE, PaintingPipeline, PixelJudge, painted, perfect, scenes_of


@pytest.fixture(autouse=True)
def staged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renders are painted too."""

    def rendered(self: Evaluation, _scenes: Any, batch: range) -> np.ndarray:
        return np.stack([painted(perfect(self.prompts[index])) for index in batch])

    monkeypatch.setattr(evaluation_module, "scenes_showing", lambda prompts, seed: scenes_of(prompts))
    monkeypatch.setattr(Evaluation, "_rendered", rendered)


def forget_the_first(pictures: np.ndarray, grids: tuple[tuple[int, int], ...]) -> np.ndarray:
    """A tokenizer that loses the first object of every picture."""
    assert grids == GRIDS
    return np.concatenate([pictures[:, 1:], pictures[:, :1]], axis=1)


@pytest.fixture
def evaluated():
    """``evaluated(policy="half")`` runs an evaluation of the painting model on a few prompts per task."""

    def evaluate(per_task: int = 4, world: str = "scenes", **changes: Any) -> Evaluation:
        pipeline = changes.pop("pipeline", None) or PaintingPipeline(world)
        prompts = changes.pop("prompts", None) or prompts_of(pipeline.card, per_task)
        made = Evaluation(Setup(pipeline, prompts, judge=PixelJudge(), **{"batch_size": 5, **changes}))
        assert list(made.run())[-1] == len(made.prompts)
        return made

    return evaluate


def test_a_model_that_does_what_it_is_told_has_full_marks(evaluated):
    made = evaluated(images=2, seed=7)
    assert made.names == ("dense", RENDERS)
    for name in made.names:
        assert {task.share for task in made.score(name).tasks} == {(1.0, 1.0, 1.0)}
        assert made.score(name).total == (1.0, 1.0, 1.0)
    assert [task.task for task in made.score("dense").tasks] == list(TASKS)
    calls = made.setup.pipeline.calls
    assert [seed for call in calls for seed in call["seeds"]] == list(range(7, 7 + 48))
    assert [prompt for call in calls for prompt in call["prompts"]][:3] == [made.prompts[0].prompt] * 2 + [
        made.prompts[2].prompt
    ]
    assert {len(call["prompts"]) for call in calls} == {5, 3}
    assert {call["output_type"] for call in calls} == {"np"}


def test_another_policy_is_set_beside_dense_of_the_same_seeds(evaluated):
    made = evaluated(policy="half", options={"guidance_scale": 3.0})
    assert made.names == ("half", "dense", RENDERS)
    assert made.judged["half"].right == [index % 2 == 0 for index in range(24)]
    assert made.score("half").total.value == pytest.approx(0.5)
    assert made.score("half").total.low < 0.45
    calls = made.setup.pipeline.calls
    assert [call["policy"] for call in calls[:4]] == ["dense", "half"] * 2
    assert {call["guidance_scale"] for call in calls} == {3.0}
    full = np.floor(255.0 * np.stack([painted(perfect(prompt)) for prompt in made.prompts[1::2]])) / 255.0
    np.testing.assert_allclose(made.psnr[1::2], psnr(full, np.zeros_like(full)), rtol=1e-5)
    assert set(made.psnr[::2]) == {np.inf}
    numbers = as_dict(made)["comparison"]
    assert numbers["psnr"] == pytest.approx(np.mean(made.psnr[1::2]))
    assert (numbers["against"], numbers["identical"], numbers["speedup"]) == ("dense", 12, 2.0)
    assert 0.9 < numbers["ssim"] < 1.0


def test_distances_are_those_of_the_judges_features(evaluated):
    made = evaluated(policy="half")
    features = {
        name: PixelJudge().features(
            np.floor(255.0 * np.stack([painted(things) for things in judged.seen])).astype(np.uint8)
        )
        for name, judged in made.judged.items()
    }
    pairs = [("half", RENDERS), ("dense", RENDERS), ("half", "dense")]
    expected = {f"{a} to {b}": frechet_distance(features[a], features[b]) for a, b in pairs}
    assert made.distances() == pytest.approx(expected, rel=1e-9)
    assert expected["dense to renders"] < 1e-3 < expected["half to dense"]
    assert as_dict(made)["judge_fid"]["what"] == JUDGE_FID


def test_the_ceiling_is_judged_as_the_model_is(evaluated):
    made = evaluated(coder=forget_the_first)
    assert made.names == ("dense", RENDERS, CEILING)
    assert made.score(RENDERS).total.value == 1.0
    assert made.score(CEILING).total.value == 0.0
    assert "| dense " in table(made)
    assert f"| {CEILING} " in table(made)


def test_a_world_of_one_object_is_asked_for_one_object(evaluated):
    made = evaluated(per_task=6, world="scenes-single")
    assert [(task.task, task.images) for task in made.score("dense").tasks] == [("single object", 6), ("colours", 6)]
    assert not [prompt for prompt in made.prompts if prompt.wanted[0].shape == "torus"]
    text = table(made)
    assert (
        "two objects, counting, position, colour attribution: left out; model fake knows one object at a time" in text
    )
    assert "renders: left out; the renderer draws a world that model fake does not know" in text
    assert "never showed" not in text
    assert made.distances() == {}


def test_the_report_says_everything_and_is_json(evaluated):
    made = evaluated(policy="half", images=2)
    found = json.loads(json.dumps(as_dict(made), allow_nan=False))
    assert found["scores"]["half"]["total"]["value"] == pytest.approx(0.5)
    assert found["scores"]["half"]["tasks"]["counting"].keys() == {"value", "low", "high", "prompts", "images"}
    assert (found["model"], found["world"], found["prompts"], found["images_per_prompt"]) == ("fake", "scenes", 24, 2)
    assert found["seconds_per_image"] == {"half": 0.5, "dense": 1.0}
    assert {"device", "date", "versions", "precision", "weights"} <= found.keys()
    third = found["pictures"][3]
    assert third["prompt"] == made.prompts[3].prompt
    assert (third["seed"], third["right"]) == (3, {"half": False, "dense": True, RENDERS: True})
    assert (third["seen"], len(found["pictures"])) == ([], 48)
    text = table(made)
    assert "half to dense: speed-up 2.00x, PSNR" in text
    assert "| mean of the tasks  | 24      | 48     | 50.0 % [" in text
    assert f"({JUDGE_FID})" in text


def test_held_out_prompts_have_a_share_of_their_own(evaluated):
    wanted = (Wanted("cube", "red"),)
    prompts = tuple(
        TaskPrompt(text, wanted, task="colours", held_out=held_out)
        for text, held_out in (
            ("a red cube", False),
            ("a photo of a red cube", True),
            ("a picture of a red cube", True),
        )
    )
    pipeline = PaintingPipeline()
    pipeline._asked = {prompt.prompt: prompt for prompt in prompts}
    made = evaluated(pipeline=pipeline, prompts=prompts, policy="half")
    assert made.held_out_share("half") == (0.5, 0.0, 1.0)
    assert made.held_out_share("dense") == (1.0, 1.0, 1.0)
    told = "pooled over tasks: half 50.0 % [0.0, 100.0], dense 100.0 % [100.0, 100.0]"
    assert f"of what training never showed, {told}" in table(made)
    assert as_dict(made)["scores"]["half"]["held_out_pooled_over_tasks"] == {"value": 0.5, "low": 0.0, "high": 1.0}


def test_the_sheet_has_a_row_per_task_and_frames_what_is_wrong(evaluated):
    made = evaluated(per_task=SHOWN + 2, policy="half")
    assert len(made.shown) == SHOWN * len(TASKS)
    image = np.asarray(Image.open(io.BytesIO(sheet(made))).convert("RGB"))
    red = (image == (214, 30, 30)).all(axis=-1)
    side, frame, gap, label = 5 * SIDE, 4, 8, 150
    assert side >= 144
    assert image.shape[1] == label + SHOWN * (side + 2 * gap)
    for column in range(SHOWN):
        x = label + column * (side + 2 * gap)
        assert red[gap + side // 2, x - frame] == (column % 2 == 1)
    wrong = sum(not made.judged["half"].right[index] for index in made.shown)
    assert red.sum() == wrong * ((side + 2 * frame) ** 2 - side**2)


def test_an_interrupted_evaluation_goes_on_where_it_was(evaluated, tmp_path):
    kept = {"kept": tmp_path / "kept", "weights": "a", "policy": "half"}
    with pytest.raises(KeyboardInterrupt):
        evaluated(pipeline=PaintingPipeline(stop_after=22), **kept)
    assert len(list((tmp_path / "kept").iterdir())) == 4
    rest = PaintingPipeline()
    made = evaluated(pipeline=rest, **kept)
    assert sum(len(call["prompts"]) for call in rest.calls) == 48 - 20
    whole = evaluated(policy="half")
    assert as_dict(made)["pictures"] == as_dict(whole)["pictures"]
    assert as_dict(made)["seconds_per_image"] == as_dict(whole)["seconds_per_image"]
    made.forget()
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("change", [{"weights": "b"}, {"seed": 1}, {"options": {"guidance_scale": 3.0}}])
def test_what_was_kept_is_read_by_the_same_evaluation_only(evaluated, tmp_path, change):
    same = {"kept": tmp_path / "kept", "weights": "a"}
    evaluated(**same)
    other = PaintingPipeline()
    evaluated(pipeline=other, **{**same, **change})
    assert sum(len(call["prompts"]) for call in other.calls) == 24


PROMPT = TaskPrompt("a red cube", (Wanted("cube", "red"),), task="colours")
REFUSED = {
    "no prompts": (PaintingPipeline(), {"prompts": ()}, "0 prompts: needs at least one"),
    "a prompt of no task": (
        PaintingPipeline(),
        {"prompts": (dataclasses.replace(PROMPT, task=None),)},
        "'a red cube': must belong to a task",
    ),
    "a model of everything": (PaintingPipeline(None), {}, "model fake: must be a model of the world scenes or"),
    "two objects of a world of one": (
        PaintingPipeline("scenes-single"),
        {"prompts": (TaskPrompt("a cube and a cone", (Wanted("cube"), Wanted("cone")), task="two objects"),)},
        "'two objects': is more than model fake knows; ask it for single object and colours only",
    ),
    "a ring in a world without": (
        PaintingPipeline("scenes-single"),
        {"prompts": (TaskPrompt("a red torus", (Wanted("torus", "red"),), task="colours"),)},
        "'a red torus' of task 'colours': is more than",
    ),
    "a ceiling without a renderer": (
        PaintingPipeline("scenes-single"),
        {"coder": forget_the_first},
        "ceiling for model fake",
    ),
    "unknown policy": (PaintingPipeline(), {"policy": "haalf"}, "did you mean half"),
    "unknown other policy": (PaintingPipeline(), {"against": "haalf"}, "did you mean half"),
    "guidance of another length": (PaintingPipeline(), {"options": {"guidance_scale": [1.0, 2.0]}}, "must have 3"),
    "no pictures": (PaintingPipeline(), {"images": 0}, "0 images per prompt: must be at least 1"),
    "batches of nothing": (PaintingPipeline(), {"batch_size": 0}, "0 pictures per batch: must be at least 1"),
    "small pictures": (PaintingPipeline(side=31), {}, "pictures of 31 pixels: must be at least 32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_before_a_picture_is_begun(case):
    pipeline, changes, message = REFUSED[case]
    with pytest.raises(UserInputError, match=message):
        Evaluation(Setup(pipeline, **{"prompts": (PROMPT,), "judge": PixelJudge(), **changes}))
    assert pipeline.calls == []


def test_scenes_are_staged_before_a_picture_is_begun(monkeypatch):
    def refuse(prompts: Any, seed: int) -> None:
        raise UserInputError("prompt", "must ask for what one scene can show", "leave it out")

    monkeypatch.setattr(evaluation_module, "scenes_showing", refuse)
    pipeline = PaintingPipeline()
    with pytest.raises(UserInputError, match="what one scene can show"):
        Evaluation(Setup(pipeline, (PROMPT,), judge=PixelJudge()))
    assert pipeline.calls == []


def test_tasks_may_be_chosen():
    card = PaintingPipeline().card
    prompts = prompts_of(card, 3, ("position", "counting"), seed=2)
    assert [prompt.task for prompt in prompts] == ["counting"] * 3 + ["position"] * 3
    with pytest.raises(UserInputError, match=r"task 'countin': must be one of .*did you mean counting"):
        prompts_of(card, 3, ("countin",))
    with pytest.raises(UserInputError, match="task 'counting': is more than model fake knows"):
        prompts_of(PaintingPipeline("scenes-single").card, 3, ("counting",))
