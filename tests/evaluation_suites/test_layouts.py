"""Every suite's folder, read as its scorer reads it: each prompt and each picture once, and nothing else in the way."""

from __future__ import annotations

import json

import numpy as np
import pytest

from toprovar_jax.evaluation_suites import SUITES
from toprovar_jax.evaluation_suites.suite import SuitePrompt, seed_of

from .conftest import SIDE, colour
from .suite_files import IMAGES, SCAN, TEXTS


@pytest.mark.parametrize("suite", sorted(SUITES))
def test_the_scorer_finds_every_picture_of_every_prompt_once(export, suite):
    ran = export(suite, "--seed", "7", "--batch-size", "3")
    assert (ran.status, ran.stdout) == (0, "out/images\n")
    seen = SCAN[suite](ran.out, ran.prompts, SIDE)
    numbers = {prompt.text: prompt.number for prompt in SUITES[suite].read(ran.prompts)}
    assert numbers.keys() == seen.keys() == set(TEXTS)
    for text, pictures in seen.items():
        assert {picture.size for picture in pictures} == {(SIDE, SIDE)}
        found = sorted(picture.getpixel((SIDE // 2, SIDE // 2)) for picture in pictures)
        wanted = sorted(colour(text, 7 + 1000 * numbers[text] + image) for image in range(IMAGES[suite]))
        np.testing.assert_allclose(found, wanted, atol=3 if suite == "hpsv2" else 0)


@pytest.mark.parametrize("suite", ["dpg", "imagereward"])
def test_pictures_are_numbered_in_the_order_of_their_seeds(export, suite):
    ran = export(suite)
    for text, pictures in SCAN[suite](ran.out, ran.prompts, SIDE).items():
        seeds = [blue * 256 + green for _, green, blue in (picture.getpixel((8, 8)) for picture in pictures)]
        assert seeds == list(range(seeds[0], seeds[0] + IMAGES[suite])), text


@pytest.mark.parametrize(
    ("suite", "first", "last"),
    [
        ("geneval", "00000/samples/0000.png", "00004/samples/0003.png"),
        ("dpg", "10.png", "whoops0.png"),
        ("hpsv2", "anime/00000.jpg", "photo/00000.jpg"),
        ("imagereward", "000-00_0.png", "004-04_9.png"),
        ("mjhq", "people/0f0a.png", "people/4f0a.png"),
    ],
)
def test_names_are_as_wide_as_each_suite_writes_them(export, suite, first, last):
    ran = export(suite)
    pictures = [file.path for file in SUITES[suite].files(SUITES[suite].read(ran.prompts), IMAGES[suite])]
    assert (pictures[0], pictures[-1]) == (first, last)
    assert {f"images/{path}" for path in pictures} <= ran.files.keys()


def test_the_line_of_a_geneval_prompt_is_beside_its_pictures_as_it_was_written(export):
    ran = export("geneval", "--limit", "2")
    lines = ran.prompts.read_text().splitlines()
    assert ran.files["images/00001/metadata.jsonl"].decode() == lines[1] + "\n"
    assert "images/00002/metadata.jsonl" not in ran.files


@pytest.mark.parametrize("suite", sorted(SUITES))
def test_what_no_scorer_reads_lies_outside_the_folder_that_scorers_are_given(export, suite):
    ran = export(suite)
    companions = SUITES[suite].companions(SUITES[suite].read(ran.prompts), IMAGES[suite])
    pictures = [f"images/{f.path}" for f in SUITES[suite].files(SUITES[suite].read(ran.prompts), IMAGES[suite])]
    assert ran.files.keys() == {"export.json", *companions, *pictures}


def test_seeds_wrap_at_the_largest_and_do_not_depend_on_how_many_pictures_there_are():
    prompt = SuitePrompt(3, "a cone", "3")
    assert [seed_of(5, prompt, image) for image in (0, 999)] == [3005, 4004]
    assert seed_of(2**32 - 1, prompt, 0) == 2999


def test_one_picture_per_prompt_is_no_sheet(export):
    ran = export("dpg", "--images-per-prompt", "1")
    assert ran.status == 0
    assert len(ran.pipeline.seeds) == len(TEXTS)
    assert "PIC_NUM=1 bash dpg_bench/dist_eval.sh" in ran.stderr
    assert json.loads(ran.files["export.json"])["made"]["images_per_prompt"] == 1
