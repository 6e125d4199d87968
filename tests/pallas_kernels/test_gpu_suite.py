"""The hardware suite without hardware: a smoke run, killed steps, verdicts and tables made of results."""

import dataclasses
import importlib
import json
import os
import pathlib
import sys
import types

import pytest

from pallas_kernels.attention import api
from pallas_kernels.attention.cases import CASES, Case
from pallas_kernels.attention.tuning import Proven
from pallas_kernels.attention.xla_chunked import chunked_attention
from pallas_kernels.profiling import Timing

ROOT = pathlib.Path(__file__).parents[2]
FIELDS = {"quartiles": [0.9, 1.1], "timer": "profiler", "tflops": 500.0, "peak_share": 0.5, "reason": None}
SCALES = ("20x20", "24x24", "32x32", "40x40", "48x48", "64x64")


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def line(implementation, case, with_entropy, milliseconds, ratio=None):
    known = {"implementation": implementation, "case": case, "with_entropy": with_entropy, "dtype": "bfloat16"}
    known |= {"group": "infinity", "milliseconds": milliseconds, "ratio_to_cudnn": ratio, "entropy_cost": None}
    return {**known, **FIELDS, "failure": None}


def results(times, *, passed=("mosaic_gpu", "triton", "cudnn"), timed=()):
    lines = [line(name, case, entropy, ms) for (name, entropy), ms in times.items() for case in SCALES]
    return {
        **{"device": "NVIDIA H200", "platform": "gpu", "driver": "580.1", "date": "2026-01-31T12:00:00+00:00"},
        **{"versions": {"jax": "0.11.2", "triton": None}, "spectrum": {"milliseconds": 0.4}},
        "conformance": {name: {"passed": name in passed} for name in ("mosaic_gpu", "triton", "cudnn", "xla")},
        "bench": {"infinity": {"records": lines, "timers": ["profiler"]}},
        "tuning": {"mosaic_gpu": {"timed": list(timed)}},
    }


GOOD = {
    ("cudnn", False): 1.0,
    ("cudnn", True): 1.9,
    ("mosaic_gpu", False): 1.0,
    ("mosaic_gpu", True): 1.04,
    ("triton", True): 1.5,
}


def test_kept_promises_are_hits(module):
    judged = module("gpu_verdicts").targets(results(GOOD))
    assert [target.hit for target in judged] == [True] * 6


def test_missed_and_unmeasured_promises_are_told_apart(module):
    slow = results({("cudnn", False): 1.0, ("mosaic_gpu", True): 1.2, ("mosaic_gpu", False): 1.0})
    judged = {target.name: target for target in module("gpu_verdicts").targets({**slow, "spectrum": None})}
    assert [target.hit for target in judged.values()] == [False, False, False, None, None, None]
    assert judged["mosaic_gpu with entropy over cudnn without, 64x64"].value == pytest.approx(1.2)


def test_the_table_has_what_passed_fastest_first_and_no_default_with_rounded_entropy(module, tmp_path):
    fields = {"implementation": "mosaic_gpu", "case": "64x64", "head_dim": 128, "dtype": "bfloat16"}
    fields |= {"size": "many queries", "with_entropy": True, "timer": "profiler"}
    timed = [{**fields, "config": {"tile": tile}, "milliseconds": ms} for tile, ms in ((64, 2.0), (128, 1.5))]
    verdicts, tuning = module("gpu_verdicts"), module("pallas_kernels.attention.tuning")
    table = verdicts.measured_table(results(GOOD, timed=timed))
    tuning.write(table, tmp_path)
    kept = tuning.read("NVIDIA H200", tmp_path)
    assert [entry for entry in kept.proven if entry.with_entropy] == [
        *(Proven("mosaic_gpu", True, sum([1.04] * 6)), Proven("triton", True, 9.0))
    ]
    assert {entry.implementation for entry in kept.proven if not entry.with_entropy} == {"cudnn", "mosaic_gpu"}
    assert [entry.config for entry in kept.configs] == [{"tile": 128}]
    assert verdicts.measured_table(results({}, passed=())) is None
    failed = verdicts.measured_table(results(GOOD, passed=("triton",)))
    assert [entry.implementation for entry in failed.proven] == ["triton"]


def test_commands_that_hang_fail_or_stand_still_are_ended_and_told(module, tmp_path, monkeypatch):
    suite = module("gpu_suite")
    monkeypatch.setattr(suite, "STILL", 0.5)
    python = [sys.executable, "-c"]
    commands = {"good": [*python, ""], "bad": [*python, "raise SystemExit(3)"], "hangs": ["sleep", "60"]}
    logs = {name: tmp_path / f"{name}.log" for name in (*commands, "stuck")}
    ended = suite.end_by(commands, {name: logs[name] for name in commands}, dict(os.environ), 2.0)
    assert ended == {"good": "done", "bad": "exit 3", "hangs": "timed out after 2 s"}
    stuck = suite.end_by(
        {"stuck": ["sleep", "60"]}, {"stuck": logs["stuck"]}, dict(os.environ), 30.0, tmp_path / "none"
    )
    assert stuck["stuck"].startswith("stood still")
    assert suite.end_by({"late": ["sleep", "60"]}, {"late": logs["bad"]}, {}, 0.0) == {"late": "no time left"}


def test_tuning_goes_on_behind_the_configuration_that_did_not_return(module, tmp_path):
    tune = module("tune_kernels")
    path = tmp_path / "log.json"
    what = {"case": "64x64", "head_dim": 128, "config": {"tile": 64}}
    tune.Log(path, "triton").trying(what)
    again = tune.Log(path, "triton")
    assert again.is_bad(what)
    assert not again.is_bad({**what, "config": {"tile": 128}})
    assert json.loads(path.read_text())["bad"][0]["reason"] == "did not return"


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


def test_tuning_keeps_the_fastest_that_agrees_with_float64(module, monkeypatch, tmp_path):
    tune = module("tune_kernels")
    configs = (Chunk(16, sign=-1), Chunk(8), Chunk(16))
    fake = types.SimpleNamespace(
        candidates=lambda problem, target: configs, why_not=lambda problem, target: None, triton_attention=chunked
    )
    monkeypatch.setattr(api, "implementation_module", lambda name: fake)
    monkeypatch.setattr(tune, "implementation_module", lambda name: fake)
    monkeypatch.setattr(tune, "KEY_CASES", (("tails", "tiny"),))
    monkeypatch.setitem(CASES, "tails", (Case("tiny", 2, 5, 40, 2, 16, 0.3),))
    arguments = ["triton", "--json", str(tmp_path / "tune.json"), "--dtype", "float32", "--rounds", "2"]
    monkeypatch.setattr(tune, "measure", lambda runs, rounds: Timing("wall", dict(zip(runs, PLAYED, strict=False))))
    assert tune.main(arguments) == 0
    state = json.loads((tmp_path / "tune.json").read_text())
    assert [entry["config"] for entry in state["good"]] == [{"size": 8, "sign": 1}]
    assert [entry["config"] for entry in state["bad"]] == [{"size": 16, "sign": -1}]
    timed = [(entry["config"]["size"], entry["with_entropy"], entry["size"]) for entry in state["timed"]]
    assert timed == [(8, True, "few queries"), (8, False, "few queries")]
    assert tune.main(arguments) == 0
    assert json.loads((tmp_path / "tune.json").read_text()) == state


def test_a_smoke_run_leaves_results_and_no_table(module, tmp_path, capsys):
    suite = module("gpu_suite")
    arguments = ["--platform", "cpu", "--smoke", "--steps", "spectrum", "--out", str(tmp_path / "out")]
    assert suite.main([*arguments, "--tuned", str(tmp_path / "tuned")]) == 0
    report = json.loads((tmp_path / "out" / "kernels_cpu.json").read_text())
    assert report["spectrum"]["milliseconds"] > 0
    assert report["steps"]["spectrum"]["ended"] == "done"
    assert [target["hit"] for target in report["targets"]] == [None] * 6
    assert not (tmp_path / "tuned").exists()
    assert "not measured" in capsys.readouterr().out


def test_a_machine_without_a_device_is_told_so_in_one_line(module, monkeypatch, capsys):
    suite = module("gpu_suite")
    monkeypatch.setattr(suite, "probe", lambda platform: {"platform": "cpu", "device": "cpu"})
    assert suite.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as ended:
        suite.main(["--smoke"])
    assert ended.value.code == 2


def test_the_readme_tables_show_measured_devices_only(module, tmp_path):
    tables, verdicts = module("kernel_tables"), module("gpu_verdicts")
    assert tables.targets(tmp_path) == tables.group("fa3", tmp_path) == tables.NOTHING
    report = results(GOOD)
    report["targets"] = [vars(target) for target in verdicts.targets(report)]
    (tmp_path / "kernels_nvidia_h200.json").write_text(json.dumps(report))
    (tmp_path / "kernels_cpu.json").write_text(json.dumps({**report, "platform": "cpu", "device": "none"}))
    assert tables.targets(tmp_path).count("kept") == 6
    shown = tables.group("infinity", tmp_path)
    assert "| 64x64 | 1.000, 1.900 | 1.000, 1.040 | -, 1.500 |" in shown
    assert "NVIDIA H200, driver 580.1, jax 0.11.2, 2026-01-31" in shown
    assert "none" not in shown
