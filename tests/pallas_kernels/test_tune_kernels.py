"""Tuning: the fastest that is right is kept, and whatever hangs is named on disk."""

import dataclasses
import importlib
import json
import pathlib
import types

import pytest

from pallas_kernels.attention import api
from pallas_kernels.attention.cases import CASES, Case
from pallas_kernels.attention.xla_chunked import chunked_attention
from pallas_kernels.profiling import Timing

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_tuning_goes_on_behind_the_configuration_that_did_not_return(module, tmp_path):
    tune = module("tune_kernels")
    path = tmp_path / "log.json"
    what = {"case": "64x64", "head_dim": 128, "config": {"tile": 64}}
    tune.Log(path, "triton").trying(what)
    again = tune.Log(path, "triton")
    assert again.is_bad(what)
    assert not again.is_bad({**what, "config": {"tile": 128}})
    assert json.loads(path.read_text())["bad"][0]["reason"] == "did not return"


def test_compilations_beside_each_other_are_blamed_while_they_run(module, tmp_path):
    tune = module("tune_kernels")
    path = tmp_path / "log.json"
    log = tune.Log(path, "triton")
    one, two = ({"case": "64x64", "head_dim": 128, "config": {"tile": tile}} for tile in (64, 128))

    def tried():
        return json.loads(path.read_text())["trying"]

    assert log.compiled(one, lambda: log.compiled(two, tried)) == [one, two]
    assert tried() == []
    assert log.compiled(one, lambda: (log.compiled(two, tried), tried())) == ([one, two], [one])


@pytest.mark.parametrize("text", ["", "[]", '{"trying": []}', '{"trying": null}', "[" * 200_000])
def test_a_log_of_something_else_is_refused_in_one_line(module, tmp_path, capsys, text):
    (tmp_path / "log.json").write_text(text)
    with pytest.raises(SystemExit) as ended:
        module("tune_kernels").main(["triton", "--json", str(tmp_path / "log.json")])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "log.json: is no log of tuning triton" in error
    assert error.count("\n") == 1


PLAYED = ([1.0, 1.1], [2.0, 2.1], [3.0, 3.1])
"""Times of the configurations in the order in which they are tried."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    size: int
    sign: int = 1


def chunked(q, k, v, *, scale, key_length, block_mask, with_entropy, config):
    options = {"scale": scale, "key_length": key_length, "block_mask": block_mask, "with_entropy": with_entropy}
    got = chunked_attention(q, k, v, chunk=config.size, **options)
    return got._replace(out=config.sign * got.out)


@pytest.fixture
def tune(module, monkeypatch):
    script = module("tune_kernels")
    configs = (Chunk(16, sign=-1), Chunk(8), Chunk(16))
    fake = types.SimpleNamespace(
        candidates=lambda problem, target: configs, why_not=lambda problem, target: None, triton_attention=chunked
    )
    monkeypatch.setattr(api, "implementation_module", lambda name: fake)
    monkeypatch.setattr(script, "implementation_module", lambda name: fake)
    monkeypatch.setattr(script, "KEY_CASES", (("tails", "tiny"),))
    monkeypatch.setitem(CASES, "tails", (Case("tiny", 2, 5, 40, 2, 16, 0.3),))
    return script


@pytest.mark.parametrize("stage", ["lower", "compile", "time"])
def test_a_configuration_that_hangs_is_named_on_disk_in_every_stage(tune, monkeypatch, tmp_path, stage):
    path = tmp_path / "tune.json"
    named = []

    def note():
        named.append([entry["config"] for entry in json.loads(path.read_text())["trying"]])

    class Program:
        def lower(self, *arrays):
            if stage == "lower":
                note()
            return self

        def compile(self):
            if stage == "compile":
                note()
            return self

        def __call__(self, *arrays):
            return arrays[0]

    def timed(runs, rounds, tell):
        for name, run in runs.items():
            tell(name)
            run()
            if stage == "time":
                note()
        return Timing("wall", {name: [1.0] for name in runs})

    monkeypatch.setattr(tune.jax, "jit", lambda function: Program())
    monkeypatch.setattr(Case, "draw_on_device", lambda case, dtype: (1.0,))
    monkeypatch.setattr(tune, "measure", timed)
    log = tune.Log(path, "triton")
    assert path.is_file()
    tune.survey(log, "triton", CASES["tails"][0], "float32", [Chunk(8), Chunk(16)], True, 1)
    assert all(names for names in named)
    assert {config["size"] for configs in named for config in configs} == {8, 16}
    assert json.loads(path.read_text())["trying"] == []


def test_tuning_keeps_the_fastest_that_agrees_with_float64(tune, monkeypatch, tmp_path):
    arguments = ["triton", "--json", str(tmp_path / "tune.json"), "--dtype", "float32", "--rounds", "2"]
    monkeypatch.setattr(
        tune, "measure", lambda runs, rounds, tell: Timing("wall", dict(zip(runs, PLAYED, strict=False)))
    )
    assert tune.main(arguments) == 0
    state = json.loads((tmp_path / "tune.json").read_text())
    assert [entry["config"] for entry in state["good"]] == [{"size": 8, "sign": 1}]
    assert [entry["config"] for entry in state["bad"]] == [{"size": 16, "sign": -1}]
    timed = [(entry["config"]["size"], entry["with_entropy"], entry["size"]) for entry in state["timed"]]
    assert timed == [(8, True, "few queries"), (8, False, "few queries")]
    assert tune.main(arguments) == 0
    assert json.loads((tmp_path / "tune.json").read_text()) == state
