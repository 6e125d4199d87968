"""The prompt files of the benchmarks: of the world, judgeable, balanced, and calibrated on none that is scored."""

from __future__ import annotations

import collections
import pathlib

import pytest

from toprovar_jax.prompts import read_prompts
from toprovar_jax.scenes.reading import read_prompt
from toprovar_jax.scenes.world import COLOURS, SHAPES

FOLDER = pathlib.Path(__file__).resolve().parent.parent.parent / "benchmarks" / "prompts"
SIZES = {"scenes_calibration.txt": 50, "scenes_200.txt": 200}


def prompts(name: str) -> list[str]:
    return [request.prompt for request in read_prompts(FOLDER / name)]


def test_no_prompt_comes_twice_in_either_file_or_in_both():
    everything = [prompt for name in SIZES for prompt in prompts(name)]
    assert len(set(everything)) == len(everything) == sum(SIZES.values())


@pytest.mark.parametrize("name", SIZES)
def test_every_prompt_names_one_colour_and_shape_of_the_single_objects_and_all_pairs_as_often(name):
    found = collections.Counter()
    for prompt in prompts(name):
        reading = read_prompt(prompt, "scenes-single")
        assert reading.unknown == (), prompt
        (wanted,) = reading.wanted
        assert wanted.count == 1
        found[wanted.colour, wanted.shape] += 1
    assert found.keys() == {(colour, shape) for colour in COLOURS for shape in SHAPES if shape != "torus"}
    assert max(found.values()) - min(found.values()) == 1
    assert found.total() == SIZES[name]
