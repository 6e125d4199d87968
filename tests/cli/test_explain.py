"""The explain command end to end on a tiny model: its pages, its numbers, and how it answers mistakes."""

from __future__ import annotations

import io
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from toprovar_jax import figures
from toprovar_jax.acceleration import POLICIES, ToProVAR
from toprovar_jax.acceleration.entropy import detail_score
from toprovar_jax.cli.explain import main
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.similarity import psnr

from ..tiny_model import CARD, SCALES, write_tiny_model

PROMPT = "a $red$ sphere_1 球"
POLICY = ToProVAR(
    depth_rule="fixed", depth=2, alpha_min=0.5, alpha_max=0.5, bucket=1, region_minimum=0.0, guard_last=0.5
)
PAGES = ["1-entropy", "2-depth", "3-layers", "4-tokens", "5-compare", "6-time", "overview"]
FILES = sorted(["explain.json", *(f"{page}.png" for page in PAGES)])


class Ran(NamedTuple):
    pipeline: InfinityPipeline
    folder: pathlib.Path
    numbers: dict[str, Any]
    stdout: str


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """One run of the command on a policy that computes half of the tokens in layer 0 from scale 2 on."""
    folder = tmp_path_factory.mktemp("explain")
    pipeline = InfinityPipeline.from_pretrained(write_tiny_model(folder / "model"))
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(POLICIES, "toprovar", lambda: POLICY)
        patch.setattr(sys, "stdout", said)
        argv = ["--prompt", PROMPT, "--seed", "3", "--out", str(folder / "out")]
        assert main(argv, load=lambda _: pipeline) == 0
        yield Ran(pipeline, folder / "out", json.loads((folder / "out/explain.json").read_text()), said.getvalue())


def same(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(found, np.float64), np.asarray(expected, np.float64), rtol=0, atol=1e-5)


def test_every_page_is_written_and_named(ran):
    assert sorted(path.name for path in ran.folder.iterdir()) == FILES
    assert sorted(pathlib.Path(line).name for line in ran.stdout.splitlines()) == FILES
    for page in PAGES:
        with Image.open(ran.folder / f"{page}.png") as image:
            image.load()
            assert min(image.size) > 300
            assert len(image.getcolors(1 << 24) or ()) > 20


def test_numbers_are_those_of_the_plan_and_of_what_was_measured(ran):
    again = ran.pipeline(PROMPT, seed=3, policy=POLICY, observe=True, output_type="np")
    dense = ran.pipeline(PROMPT, seed=3, observe=True, output_type="np")
    numbers = ran.numbers
    assert (numbers["prompt"], numbers["seed"], numbers["model"]) == (PROMPT, 3, "tiny")
    assert (numbers["depth"], numbers["scales_run"]) == (2, [1, 2, 3])
    assert numbers["plan"] == json.loads(again.plans[0].to_json())
    for index, scale in enumerate(numbers["scales"]):
        kept = again.statistics[index].kept[0]
        assert scale["computed_share"] == kept.mean(axis=1).tolist()
        assert scale["computed_share"][0] == (0.5 if index else 1.0)
        assert numbers["maps"][index]["kept"] == [np.flatnonzero(layer).tolist() for layer in kept]
        same(numbers["maps"][index]["entropy"], again.statistics[index].entropy[0])
        same(scale["salient_share"]["pruned"], again.statistics[index].salient_share[0])
        same(scale["salient_share"]["dense"], dense.statistics[index].salient_share[0])
        same(scale["mean_entropy"]["dense"], dense.statistics[index].entropy[0].mean(axis=1))
    same(numbers["similarity"]["psnr"], psnr(again.images, dense.images)[0])
    # Eight pixels are fewer than the window of a structural similarity.
    assert (numbers["similarity"]["ssim"], numbers["scales"][0]["ssim_to_finished"]) == (None, None)


def test_operations_are_those_of_plans_that_observe_nothing(ran):
    config = ran.pipeline.card.transformer
    for name, policy in (("dense", "dense"), ("pruned", POLICY)):
        plan = ran.pipeline.plan_for(policy)
        assert ran.numbers["flops"][name] == pytest.approx(plan.flops(config), rel=1e-12)
        assert [scale["flops"][name] for scale in ran.numbers["scales"]] == list(plan.flops_by_scale(config))
    assert ran.numbers["flops"]["pruned"] < ran.numbers["flops"]["dense"]


def test_layers_have_their_ratio_at_the_representative_scale_and_their_scores(ran):
    dense = ran.pipeline(PROMPT, seed=3, observe=True)
    assert ran.numbers["representative_scale"] == SCALES
    assert [layer["layer"] for layer in ran.numbers["layers"]] == list(range(CARD.transformer.num_layers))
    ratios = dense.statistics[SCALES - 1].spectrum_ratio[0].astype(np.float64)
    same([layer["spectrum_ratio"] for layer in ran.numbers["layers"]], ratios)
    same([layer["score_measured"] for layer in ran.numbers["layers"]], detail_score(ratios, POLICY.beta))
    assert [layer["score_used"] for layer in ran.numbers["layers"]] == [1.0] * CARD.transformer.num_layers


def test_seconds_add_up_and_cover_every_part(ran):
    for seconds in ran.numbers["seconds"].values():
        assert len(seconds["scales"]) == SCALES
        assert min(seconds["text"], seconds["decoder"], *seconds["scales"]) > 0
        assert seconds["total"] == pytest.approx(seconds["text"] + sum(seconds["scales"]) + seconds["decoder"])


@pytest.fixture
def one_page(ran, tmp_path, monkeypatch, capsys):
    """Runs the command again, with one quick page: ``one_page(draw, *argv)`` gives status, stderr and file names."""

    def again(draw, *argv: str) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(figures, "PAGES", {"first": figures.compare_page, "second": draw})
        status = main(["--prompt", "a cube", "--out", str(tmp_path / "out"), *argv], load=lambda _: ran.pipeline)
        files = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
        return status, capsys.readouterr().err, files

    return again


def test_running_twice_keeps_the_first_files(one_page):
    assert one_page(figures.compare_page)[2] == ["explain.json", "first.png", "second.png"]
    status, _, files = one_page(figures.compare_page, "--policy", "dense")
    assert status == 0
    assert files == ["explain-2.json", "explain.json", "first-2.png", "first.png", "second-2.png", "second.png"]


def _raise(error: BaseException):
    raise error


def test_ctrl_c_keeps_finished_pages(one_page):
    status, stderr, files = one_page(lambda _: _raise(KeyboardInterrupt()))
    assert (status, files) == (130, ["explain.json", "first.png"])
    assert stderr.startswith("error: interrupted; 2 finished files kept in ")


def test_a_failure_is_one_line_and_debug_raises_it(one_page):
    status, stderr, _ = one_page(lambda _: _raise(RuntimeError("out of paint")))
    assert status == 1
    assert stderr.startswith("error: RuntimeError: out of paint; run again with --debug")
    assert stderr.count("\n") == 1
    with pytest.raises(RuntimeError, match="out of paint"):
        one_page(lambda _: _raise(RuntimeError("out of paint")), "--debug")


BAD_INPUT = {
    "nothing to draw": ([], 'no prompt: one is needed; say what to draw with --prompt "a red sphere"'),
    "blank prompt": (["--prompt", " "], "--prompt ' '"),
    "unquoted prompt": (["--prompt", "a", "cube"], "quotes"),
    "unknown option": (["--promt", "a"], "did you mean --prompt?"),
    "unknown policy": (["--prompt", "a", "--policy", "topovar"], "did you mean toprovar"),
    "seed not a number": (["--prompt", "a", "--seed", "x"], "--seed 'x'"),
    "guidance not a number": (["--prompt", "a", "--guidance", "1,x"], "--guidance '1,x'"),
    "unknown backend": (["--prompt", "a", "--backend", "gpuu"], "did you mean gpu?"),
    "blank output": (["--prompt", "a", "--out", " "], "--out ' '"),
    "output below a file": (["--prompt", "a", "--out", "/dev/null/pages"], "not a directory"),
}


def _refuses_to_load(_: str | None) -> Any:
    pytest.fail("loaded")


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_before_anything_is_loaded(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv, expected = BAD_INPUT[case]
    assert main(argv, load=_refuses_to_load) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert expected in captured.err
    assert (captured.err.count("\n"), captured.out, list(tmp_path.iterdir())) == (1, "", [])


def test_guidance_for_another_number_of_scales_is_refused_by_the_pipeline(one_page):
    status, stderr, files = one_page(figures.compare_page, "--guidance", "1,2")
    assert (status, files) == (2, [])
    assert stderr.startswith(f"error: guidance list of 2 numbers: must have one per scale ({SCALES}")


def test_without_matplotlib_the_remedy_comes_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["--prompt", "a"], load=_refuses_to_load) == 2
    assert capsys.readouterr().err == (
        "error: matplotlib: is needed to draw and is missing; install toprovar-jax[demo]\n"
    )
