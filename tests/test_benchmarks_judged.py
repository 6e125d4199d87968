"""The arithmetic of the benchmarks on judged pictures, and that pictures which are there are not made again."""

import importlib
import json
import pathlib
import sys
import types

import numpy as np
import pytest

from toprovar_jax.acceleration import Dense, ToProVAR
from toprovar_jax.scenes.score import check_judgeable
from toprovar_jax.scenes.world import COLOURS, SHAPES
from toprovar_jax.schedule import ScaleSchedule
from toprovar_jax.timings import Timings

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks"
SCHEDULE = ScaleSchedule.of("1:1", 6)
PROMPTS = tuple(f"a {colour} {shape}" for shape in SHAPES[:3] for colour in COLOURS)


@pytest.fixture(scope="module", autouse=True)
def benchmarks_can_be_imported():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def module(name: str):
    return importlib.import_module(name)


class FakePipeline:
    """Pictures of a colour that the prompt's place and the policy fix; counts what it is asked for."""

    card = types.SimpleNamespace(transformer=None)

    def __init__(self, stop_after: int = 1000):
        self.drawn: list[str] = []
        self.compiles = {"dense": 2.0, "toprovar": 1.0}
        self.stop_after = stop_after

    def __call__(self, prompt, *, seed, policy, output_type):
        assert output_type == "np"
        if isinstance(prompt, str):
            self.compiles[policy.name] -= 1.0
            compiling, transformer = max(0.0, self.compiles[policy.name] + 1.0), 2.0 if policy.name == "dense" else 1.0
            return types.SimpleNamespace(timings=Timings(compile=compiling, transformer=transformer, total=3.0))
        if len(self.drawn) + len(prompt) > self.stop_after:
            raise KeyboardInterrupt
        self.drawn += prompt
        level = (64.25 if policy.name == "dense" else 128.25) + np.array(seed)
        images = np.broadcast_to(level[:, None, None, None] / 255, (len(prompt), 16, 16, 3))
        plan = types.SimpleNamespace(flops=lambda config: 3e9, depth=None, num_run=7)
        return types.SimpleNamespace(images=images, plans=[plan] * len(prompt))


def a_job(tmp_path, pipeline, prompts=PROMPTS, first_seed=0):
    seeds = tuple(range(first_seed, first_seed + len(prompts)))
    return module("judged").Job(pipeline, "weights", prompts, seeds, tmp_path)


def a_row(name="all", **changes):
    row = {
        **{"name": name, "scales_run": [5, 7], "flops_share": 0.25, "flops_speedup": 4.0, "identical": 3},
        **{"score": (90.0, 85.0, 95.0), "ssim": (0.9, 0.8, 1.0), "psnr": None, "loss": (0.5, -1.0, 2.0)},
    }
    return row | changes


def test_every_prompt_of_the_files_can_be_judged():
    for name in ("scenes_200.txt", "scenes_calibration.txt"):
        lines = (FOLDER / "prompts" / name).read_text(encoding="utf-8").splitlines()
        check_judgeable([line for line in lines if not line.startswith("#")], 64)


def test_finished_pictures_are_read_and_not_made_again(tmp_path):
    first = FakePipeline()
    made = a_job(tmp_path, first).pictures(Dense())
    assert first.drawn == list(PROMPTS)
    again = FakePipeline()
    read = a_job(tmp_path, again).pictures(Dense())
    assert again.drawn == []
    for ours, theirs in zip(made, read, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert made.images.shape == (len(PROMPTS), 16, 16, 3)
    np.testing.assert_array_equal(made.images[:, 0, 0, 0], 64 + np.arange(len(PROMPTS)))
    assert set(made.depth) == {0}


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        a_job(tmp_path, FakePipeline(stop_after=15)).pictures(Dense())
    rest = FakePipeline()
    assert len(a_job(tmp_path, rest).pictures(Dense()).flops) == len(PROMPTS)
    assert rest.drawn == list(PROMPTS[10:])


@pytest.mark.parametrize(
    "change",
    [
        {"policy": ToProVAR(alpha_max=0.5)},
        {"policy": ToProVAR()},
        {"first_seed": 1},
        {"prompts": PROMPTS[1:] + PROMPTS[:1]},
    ],
)
def test_other_policies_seeds_and_prompts_have_pictures_of_their_own(tmp_path, change):
    a_job(tmp_path, FakePipeline()).pictures(Dense())
    a_job(tmp_path, FakePipeline()).pictures(ToProVAR(alpha_max=0.7))
    other = FakePipeline()
    policy = change.pop("policy", Dense())
    a_job(tmp_path, other, **change).pictures(policy)
    assert len(other.drawn) == len(PROMPTS)


def test_the_calibration_is_no_part_of_the_weights(tmp_path):
    digest = module("judged").weights_sha256
    (tmp_path / "model.json").write_text("{}")
    (tmp_path / "a.safetensors").write_bytes(b"1")
    before = digest(tmp_path)
    (tmp_path / "calibration.json").write_text("{}")
    assert digest(tmp_path) == before
    (tmp_path / "a.safetensors").write_bytes(b"2")
    assert digest(tmp_path) != before


def test_only_warm_calls_are_timed(tmp_path):
    pipeline = FakePipeline()
    taken = a_job(tmp_path, pipeline).seconds({"dense": Dense(), "toprovar": ToProVAR()}, 4)
    assert taken["dense"] == {"transformer": [2.0] * 4, "all": [3.0] * 4}
    assert taken["toprovar"]["transformer"] == [1.0] * 4
    rows = [a_row("dense"), a_row("toprovar"), a_row("never timed")]
    module("judged_report").with_seconds(rows, taken)
    assert rows[1]["speedup_transformer"] == (2.0, 2.0, 2.0)
    assert rows[1]["seconds_all"] == 3.0
    assert "seconds_all" not in rows[2]


def test_a_row_says_what_differs_from_dense():
    judged, report = module("judged"), module("judged_report")
    dense = judged.Pictures(np.zeros((4, 1, 1, 3), np.uint8), np.full(4, 8e9), np.zeros(4, int), np.full(4, 7))
    pruned = dense._replace(flops=np.array([8e9, 2e9, 2e9, 4e9]), depth=np.array([0, 5, 5, 6]))
    right, worse = np.array([True, True, True, False]), np.array([True, True, False, False])
    similar, decibels = np.array([1.0, 0.9, 0.8, 0.9]), np.array([np.inf, 30.0, 20.0, 25.0])
    base = judged.Compared("dense", Dense(), dense, right, np.ones(4), np.full(4, np.inf))
    row = report.row_of(judged.Compared("all", ToProVAR(), pruned, worse, similar, decibels), base)
    assert row["flops_share"] == 0.5
    assert row["flops_speedup"] == 2.0
    assert row["depths"] == {"none": 1, "5": 2, "6": 1}
    assert row["score"][0] == 50.0
    assert row["loss"][0] == 25.0
    assert row["psnr"][0] == 25.0
    assert row["identical"] == 1
    assert report.row_of(base, base)["psnr"] is None
    assert json.loads(json.dumps(row))["ssim"][0] == pytest.approx(0.9)


def test_the_table_has_a_line_per_row_and_times_only_where_taken():
    timed = a_row("timed", seconds_transformer=0.5, speedup_transformer=(1.5, 1.4, 1.6), psnr=(31.25, 30.0, 32.0))
    text = module("judged_report").table([a_row("dense", scales_run=[7, 7]), timed])
    head, dense, last = text.splitlines()
    assert "SSIM" in head
    assert "1-7 " in dense
    assert "1.50x" not in dense
    for part in ("1-5..7", "25.0 %", "4.00x", "90.0 [85.0, 95.0]", "31.2", "500.0", "1.50x"):
        assert part in last


def test_points_are_joined_from_left_to_right_with_their_intervals():
    pytest.importorskip("matplotlib")
    report = module("judged_report")
    axes = report.new_figure("title", 1).axes[0]
    rows = [a_row(flops_share=0.5, score=(90.0, 85.0, 95.0)), a_row(flops_share=0.2, score=(70.0, 60.0, 75.0))]
    report.draw_over_flops(axes, {"series": rows}, "score", "judge score")
    (line, _, (bars,)), *_ = axes.containers
    np.testing.assert_allclose(line.get_xydata(), [[20.0, 70.0], [50.0, 90.0]])
    np.testing.assert_allclose([segment[:, 1] for segment in bars.get_segments()], [[60.0, 75.0], [85.0, 95.0]])
    assert "FLOPs" in axes.get_xlabel()
    assert axes.get_ylabel().startswith("judge score")


def test_the_largest_speedup_is_that_of_the_cheapest_row_that_loses_little():
    rows = [
        a_row("dense", flops_share=1.0, loss=(0.0, 0.0, 0.0), scales_run=[7, 7]),
        a_row("good", flops_share=0.4, loss=(1.0, 0.0, 2.0), scales_run=[7, 7]),
        a_row("short", flops_share=0.3, loss=(0.5, 0.0, 2.0), scales_run=[6, 7]),
        a_row("bad", flops_share=0.2, loss=(1.5, 0.5, 2.5), scales_run=[7, 7]),
    ]
    largest = module("pruning_curve").largest_speedups
    assert [row["name"] for row in largest(rows).values()] == ["short", "good"]
    assert [row["name"] for row in largest(rows[2:]).values()] == ["short"]
    assert largest(rows[3:]) == {}


def test_strengths_keep_the_proportion_of_the_two_ratios():
    changed = module("pruning_curve").with_strength(ToProVAR(alpha_min=0.2, alpha_max=0.8), 0.4)
    assert (changed.alpha_min, changed.alpha_max) == (0.1, 0.4)
    nothing = module("pruning_curve").with_strength(ToProVAR(alpha_min=0.0, alpha_max=0.0), 0.4)
    assert (nothing.alpha_min, nothing.alpha_max) == (0.0, 0.4)


def test_the_curve_varies_one_thing_at_a_time():
    options = types.SimpleNamespace(strengths=[0.4, 0.8], depths=None, skips=[1, 6], compared=[0.8])
    series = module("pruning_curve").curve_policies(ToProVAR(), options, 6)
    assert list(series) == ["calibrated depth", "depth 4", "depth 5", "depth 6", "last 1 left out"]
    names = [name for policies in series.values() for name in policies]
    assert len(set(names)) == len(names)
    assert {policy.plan(SCHEDULE, num_layers=4).depth for policy in series["depth 5"].values()} == {5}
    shorter = [policy.plan(SCHEDULE, num_layers=4) for policy in series["last 1 left out"].values()]
    assert {plan.num_run for plan in shorter} == {5}


def test_choices_differ_in_nothing_but_tokens_and_restoration():
    plans = {
        name: policy.plan(SCHEDULE, num_layers=4)
        for name, policy in module("pruning_curve").choices(ToProVAR(depth=5), 0.95).items()
    }
    assert len({plan.scales for plan in plans.values()}) == 1
    assert {name: plan.restoration for name, plan in plans.items() if plan.restoration != "cached"} == {
        "entropy, identity": "identity"
    }
    assert {plan.selection.importance for plan in plans.values()} == {"entropy", "distance", "random"}
    assert all(plan.depth == 5 for plan in plans.values())


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ([(0.02, 0.01, 0.03), (0.04, 0.03, 0.05)], "beats random by +0.0300"),
        ([(-0.02, -0.03, -0.01)], "loses to random by -0.0200"),
        ([(0.01, -0.01, 0.03)], "is not told apart from random by"),
        ([(0.02, 0.01, 0.03), (-0.02, -0.03, -0.01)], "beats at 1 and loses at 1 of 2 strengths: random"),
    ],
)
def test_the_verdict_goes_by_the_intervals(gains, words):
    given = [(0.5, {"random": gain, "distance": (0.1, 0.05, 0.15)}) for gain in gains]
    line = module("pruning_curve").verdict(given)
    assert words in line
    assert "beats distance by +0.1000" in line


def test_the_readme_shows_the_scores_of_every_model_that_was_evaluated(tmp_path):
    scenes = module("readme_tables").scenes
    assert scenes(tmp_path).startswith("No model has been evaluated yet")
    share = {"value": 0.5, "low": 0.25, "high": 0.755}
    row = {"tasks": {"counting": {**share, "prompts": 2, "images": 4}}, "total": share}
    report = {
        **{"scores": {"dense": row, "renders": row}, "pictures": [{}] * 4, "policy": {"name": "dense"}},
        **{"model": "scenes-small", "guidance": 2.0, "seconds_per_image": {"dense": 0.03}, "device": "cpu"},
        **{"versions": {"jax": "1"}, "date": "today"},
    }
    (tmp_path / "scenes_scenes-small.json").write_text(json.dumps(report))
    lines = scenes(tmp_path).splitlines()
    assert lines[0] == "| task | pictures | dense | renders |"
    assert lines[2] == "| counting | 4 | 50.0 % [25.0, 75.5] | 50.0 % [25.0, 75.5] |"
    assert lines[3].startswith("| mean of the tasks | 4 | 50.0 %")
    assert "Model scenes-small, guidance 2, 0.030 s per picture" in lines[-1]
    (tmp_path / "scenes_scenes-small.json").write_text("{}")
    with pytest.raises(module("kernel_tables").BrokenResults, match=r"scenes_report\.py"):
        scenes(tmp_path)
