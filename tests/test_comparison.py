"""Comparing policies on a tiny model: what is measured of them, when, and with what left out."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image

from toprovar_jax import comparison_figures, lettering
from toprovar_jax.acceleration import POLICIES, ToProVAR
from toprovar_jax.comparison import SHOWN, Comparison, Setup, Times
from toprovar_jax.comparison_figures import sheet
from toprovar_jax.errors import UserInputError
from toprovar_jax.images import to_uint8
from toprovar_jax.perceptual import load_lpips
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.similarity import psnr

from .tiny_model import SCALES, SCENES_CARD, write_tiny_model

HALF = ToProVAR(
    **{"depth_rule": "fixed", "depth": 2, "alpha_min": 0.5, "alpha_max": 0.5, "bucket": 1, "region_minimum": 0.0},
    **{"guard_last": 0.5, "skip_last": 1},
)
"""Half of the tokens in layer 0 of scale 2, and no scale 3."""

PROMPTS, SEEDS = ("a red sphere", "a blue cube"), (3, 4)


class Ran(NamedTuple):
    comparison: Comparison
    pictures: list[tuple[str, int, int]]
    programs: list[int]
    clearings: list[int]
    unfinished: list[list[str]]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> InfinityPipeline:
    return InfinityPipeline.from_pretrained(write_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module", autouse=True)
def known() -> Iterator[list[int]]:
    """A policy by name; jax's caches, of which other tests live, are not cleared but counted."""
    clearings: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(POLICIES, "half", lambda: HALF)
        patch.setattr(jax, "clear_caches", lambda: clearings.append(1))
        yield clearings


@pytest.fixture(scope="module")
def ran(pipeline, known) -> Ran:
    pictures, programs, unfinished = [], [], []
    setup = Setup(pipeline, PROMPTS, SEEDS, {"guidance_scale": 3.0}, 1, lambda *told: pictures.append(told))
    comparison = Comparison(setup, ["half", "dense", "half"])
    for _ in comparison.run():
        programs.append(pipeline.drivers.num_executables)
        unfinished.append(json.loads(json.dumps(comparison.as_dict(), allow_nan=False))["unfinished"])
    return Ran(comparison, pictures, programs, list(known), unfinished)


def test_dense_comes_first_and_every_policy_once(ran):
    assert ran.comparison.names == ("dense", "half")
    assert [result.name for result in ran.comparison.results] == ["dense", "half"]
    assert ran.unfinished == [["half"], []]


def test_numbers_are_those_of_the_pictures_and_of_the_plans_they_went_by(ran, pipeline):
    config = pipeline.card.transformer
    dense = to_uint8(pipeline(list(PROMPTS), seed=list(SEEDS), guidance_scale=3.0, output_type="np").images)
    for result, policy in zip(ran.comparison.results, ("dense", HALF), strict=True):
        output = pipeline(list(PROMPTS), seed=list(SEEDS), guidance_scale=3.0, policy=policy, output_type="np")
        images = to_uint8(output.images)
        np.testing.assert_array_equal(result.images, images)
        assert result.flops.tolist() == [plan.flops(config) for plan in output.plans]
        assert result.cache_bytes.tolist() == [plan.bytes(config)["cache"] for plan in output.plans]
        assert result.scales_run.tolist() == [plan.num_run for plan in output.plans]
        bytes_as_numbers = [pictures.astype(np.float32) / 255.0 for pictures in (images, dense)]
        np.testing.assert_allclose(result.psnr, psnr(*bytes_as_numbers), rtol=1e-12)
    assert ran.comparison.results[0].identical == len(PROMPTS)
    assert ran.comparison.results[0].mean_psnr is None
    assert ran.comparison.results[1].scales_run.tolist() == [SCALES - 1] * 2
    assert ran.comparison.results[1].flops.mean() < ran.comparison.results[0].flops.mean()


def test_programs_of_a_policy_go_when_it_is_finished(ran):
    assert len(ran.clearings) == 2
    assert ran.programs == [ran.programs[0]] * 2


def test_a_policy_is_timed_by_turns_with_dense(ran):
    names = [name for name, _, _ in ran.pictures]
    assert names[:4] == ["dense"] * 4
    made, timed = names[4:6], names[6:10]
    assert made == ["half"] * 2
    assert sorted(timed[:2]) == sorted(timed[2:]) == ["dense", "half"]
    assert timed[:2] != timed[2:]
    assert [done for _, done, _ in ran.pictures] == list(range(1, 11))
    assert {total for _, _, total in ran.pictures} == {10}


def test_seconds_are_medians_of_turns_and_speedups_are_over_dense_of_the_same_turns(pipeline, monkeypatch):
    # The first of each is the picture's making, which is not timed.
    transformer = {"dense": iter([50.0, 5.0, 5.0, 5.0, 6.0, 6.0, 6.0]), "toprovar-fast": iter([90.0, 2.0, 9.0, 3.0])}
    whole = InfinityPipeline.__call__

    def call(self: InfinityPipeline, *args: Any, policy: Any, **options: Any) -> Any:
        output = whole(self, *args, policy=policy, **options)
        spent = next(transformer[policy.name])
        return dataclasses.replace(
            output, timings=dataclasses.replace(output.timings, text=1.0, transformer=spent, decoder=1.0)
        )

    monkeypatch.setattr(InfinityPipeline, "__call__", call)
    comparison = Comparison(Setup(pipeline, PROMPTS[:1], SEEDS[:1], repeats=3), ["half"])
    dense, half = (result.times for result in comparison.run())
    assert isinstance(dense, Times)
    assert isinstance(half, Times)
    assert (dense.seconds, dense.speedup, dense.speedup_transformer) == ((1.0, 5.0, 1.0), 1.0, 1.0)
    assert (half.seconds, half.speedup, half.speedup_transformer) == ((1.0, 3.0, 1.0), 8.0 / 5.0, 2.0)


def test_without_repeats_nothing_is_timed(pipeline):
    comparison = Comparison(Setup(pipeline, PROMPTS[:1], SEEDS[:1], repeats=0), [])
    assert [result.times for result in comparison.run()] == [None]
    assert comparison.as_dict()["policies"][0]["seconds"] is None
    assert "speed-up" not in comparison.table()
    assert "speed-up" not in sheet_text(comparison)


def sheet_text(comparison: Comparison) -> str:
    return " ".join(" ".join(comparison_figures._label(comparison, result)) for result in comparison.results)


def test_what_cannot_be_measured_is_left_out_and_said(ran):
    assert set(ran.comparison.left_out) == {"SSIM", "LPIPS", "judge"}
    head, rule, *rows = ran.comparison.table().splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == [
        *("policy", "scales", "MFLOP", "of dense", "cache MB", "text ms", "transformer ms", "decoder ms", "speed-up"),
        "PSNR dB",
    ]
    assert set(rule) == {"|", "-"}
    assert len({len(line) for line in (head, rule, *rows[:2])}) == 1
    assert rows[0].startswith("| dense ")
    assert "equal" in rows[0]
    assert rows[2] == ""
    assert rows[3] == "SSIM: left out; it needs pictures of at least 11 pixels along each side"
    row = ran.comparison.as_dict()["policies"][1]
    assert (row["ssim"], row["lpips"], row["judge"]) == (None, None, None)
    assert row["seconds"]["all"] == pytest.approx(
        sum(row["seconds"][part] for part in ("text", "transformer", "decoder"))
    )


def test_everything_is_refused_before_anything_is_run(pipeline):
    pictures: list[Any] = []

    def compare(policies: list[str], prompts: tuple[str, ...] = PROMPTS, **options: Any) -> None:
        Comparison(Setup(pipeline, prompts, SEEDS, options, 1, lambda *told: pictures.append(told)), policies)

    with pytest.raises(UserInputError, match="needs at least one prompt"):
        compare(["half"], ())
    with pytest.raises(UserInputError, match="must be one of"):
        compare(["half", "hlaf"])
    with pytest.raises(UserInputError, match="guidance list of 2 numbers"):
        compare(["half"], guidance_scale=[1.0, 2.0])
    assert pictures == []


def test_prompts_that_cannot_be_judged_have_no_score(tmp_path):
    pipeline = InfinityPipeline.from_pretrained(write_tiny_model(tmp_path, SCENES_CARD))
    comparison = Comparison(Setup(pipeline, ("a cat",), (0,)), [])
    assert comparison.left_out["judge"].startswith("cannot answer (prompt 'a cat' must ask for what the scenes world")
    assert len(comparison.warnings) == len(set(comparison.warnings))


class Tensor(NamedTuple):
    array: np.ndarray

    def item(self) -> float:
        return float(self.array)


@pytest.fixture
def learned(monkeypatch) -> list[tuple[np.ndarray, np.ndarray]]:
    """Modules in the place of torch and lpips; the list receives what the network is asked about."""
    asked: list[tuple[np.ndarray, np.ndarray]] = []

    class Network:
        def __init__(self, net: str, verbose: bool):
            assert (net, verbose) == ("alex", False)

        def eval(self) -> Network:
            return self

        def __call__(self, a: Tensor, b: Tensor) -> Tensor:
            asked.append((a.array, b.array))
            return Tensor(np.abs(a.array - b.array).mean())

    torch = types.SimpleNamespace(from_numpy=Tensor, no_grad=contextlib.nullcontext)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Network))
    return asked


def test_lpips_sees_pictures_one_by_one_from_minus_one_to_one(learned):
    a, b = np.zeros((2, 32, 40, 3), np.float32), np.zeros((2, 32, 40, 3), np.float32)
    a[1, ..., 2] = 1.0
    np.testing.assert_allclose(load_lpips()(a, b), [0.0, 2.0 / 3.0], rtol=1e-6)
    assert [pair[0].shape for pair in learned] == [(1, 3, 32, 40)] * 2
    assert (learned[1][0].min(), learned[1][0].max(), learned[1][0].dtype) == (-1.0, 1.0, np.float32)
    assert (learned[1][0][0, 2] == 1.0).all()


def test_lpips_without_its_packages_or_weights_says_what_is_missing(learned, monkeypatch):
    def offline(net: str, verbose: bool) -> None:
        raise OSError("no\nnetwork")

    monkeypatch.setattr(sys.modules["lpips"], "LPIPS", offline)
    with pytest.raises(UserInputError, match="needs AlexNet's weights \\(no network\\)"):
        load_lpips()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserInputError, match="install toprovar-jax\\[eval\\]"):
        load_lpips()


def opened(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image)


def test_the_sheet_has_a_row_per_policy_and_a_column_per_picture(ran):
    page, results = opened(sheet(ran.comparison)), ran.comparison.results
    size = 8 * 18
    for number, result in enumerate(results):
        for column, image in enumerate(result.images):
            cell = image.repeat(18, axis=0).repeat(18, axis=1)
            x = page.shape[1] - (len(PROMPTS) - column) * (size + 6)
            y = page.shape[0] - (len(results) - number) * (size + 6)
            np.testing.assert_array_equal(page[y : y + size, x : x + size], cell)
        label = page[y : y + size, : page.shape[1] - 2 * (size + 6)]
        assert (label < 128).any(axis=-1).sum() > 200
    assert f"{results[1].mean_psnr:.1f} dB" in sheet_text(ran.comparison)
    assert f"{results[1].times.speedup:.2f}x" in sheet_text(ran.comparison)


def test_large_pictures_are_reduced_and_only_the_first_are_shown(ran):
    comparison = object.__new__(Comparison)
    comparison.setup = dataclasses.replace(ran.comparison.setup, prompts=PROMPTS * 10, seeds=SEEDS * 10)
    wide = np.full((SHOWN, 300, 640, 3), 77, np.uint8)
    comparison.results = [dataclasses.replace(result, images=wide) for result in ran.comparison.results[:1]]
    page = opened(sheet(comparison))
    assert page.shape[1] == 212 + SHOWN * (320 + 6)
    assert (page[-20, 212:532] == 77).all()
    assert comparison_figures._corner(20)[1] == f"of which the first {SHOWN} are shown"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a red sphere", ["a red sphere"]),
        ("toprovar+stagevar-guidance", ["toprovar+stagevar-", "guidance"]),
        ("a picture of something large " * 4, ["a picture of", "something large a", "picture of…"]),
    ],
)
def test_long_texts_are_broken_where_words_end_and_cut(text, lines):
    assert lettering.wrapped(text, 120, 3) == lines


def test_a_word_without_end_is_broken_all_the_same():
    font = lettering.font(13)
    made = lettering.wrapped("x" * 100, 120, 9)
    assert "".join(made) == "x" * 100
    assert max(map(font.getlength, made)) <= 120
