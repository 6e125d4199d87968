"""The plan-pod command."""

from __future__ import annotations

import json

import pytest

from toprovar_jax.cli.main import main

SMALL = ["plan-pod", "--model", "infinity-layer12", "--topology", "v5e-16", "--predict-only"]


def test_prints_mesh_memory_speed_and_hours(capsys):
    assert main([*SMALL, "--images", "5000"]) == 0
    printed = capsys.readouterr().out
    for words in ("mesh data=16", "scale 1 (1x1)", "decoder", "pictures per second", "hours for 5,000", "an estimate"):
        assert words in printed


def test_json_holds_what_the_page_says(capsys):
    assert main([*SMALL, "--json", "--mesh", "tensor=4", "--batch-size", "2", "--utilisation", "0.5"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["mesh"] == {"data": 4, "fsdp": 1, "tensor": 4}
    assert (told["batch"], told["utilisation"], told["estimate"]) == (8, 0.5, True)
    (way,) = told["ways"]
    assert way["seconds_per_batch"] == pytest.approx(sum(each["total"] for each in way["programs"].values()))
    assert way["hours"] == pytest.approx(125_000 * way["seconds_per_batch"] / 3600)
    assert way["programs"]["scale 1 (1x1)"]["sent"] > 0


def test_what_does_not_fit_is_exit_code_2_and_one_line(capsys):
    assert main(["plan-pod", "--model", "8b", "--topology", "v5e-1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "v5e-4 with mesh tensor=4 fits" in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no --topology"),
        (["--topology", "v5e-17"], "v5e-17"),
        (["--topology", "v5x-16"], "v5x"),
        (["--topology", "v5e-16", "--model", "3b"], "3b"),
        (["--topology", "v5e-16", "--mesh", "data=3"], "data=3"),
        (["--topology", "v5e-16", "--mesh", "heads=4"], "heads"),
        (["--topology", "v5e-16", "--model", "8b", "--mesh", "tensor=8"], "28 heads"),
        (["--topology", "v5e-16", "--batch-size", "0"], "--batch-size '0'"),
        (["--topology", "v5e-16", "--images", "many"], "--images 'many'"),
        (["--topology", "v5e-16", "--utilisation", "40%"], "--utilisation '40%'"),
        (["--topology", "v5e-16", "--utilisation", "nan"], "--utilisation 'nan'"),
        (["--topology", "v5e-16", "--attention", "magic"], "--attention 'magic'"),
        (["--topology", "v5e-16", "--policy", "fastest"], "fastest"),
        (["--topology", "v5e-16", "--pixels", "9M"], "9M"),
        (["--topology", "v5e-16", "--text-encoder-on", "nowhere"], "--text-encoder-on 'nowhere'"),
    ],
)
def test_mistakes_are_one_line(capsys, words, said):
    assert main(["plan-pod", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
