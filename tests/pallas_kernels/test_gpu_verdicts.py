"""Verdicts and tables made of the hardware suite's results."""

import importlib
import json
import pathlib

import pytest

from pallas_kernels.attention.tuning import Proven

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


def test_the_readme_tables_give_each_result_its_own_date(module, tmp_path):
    tables, verdicts = module("kernel_tables"), module("gpu_verdicts")
    report = results(GOOD)
    report["bench"]["infinity"]["measured"] = {"date": "2025-12-24T12:00:00+00:00", "versions": {"jax": "0.10.2"}}
    report["targets"] = [vars(target) for target in verdicts.targets(report)]
    (tmp_path / "kernels_nvidia_h200.json").write_text(json.dumps(report))
    for table in (tables.targets(tmp_path), tables.group("infinity", tmp_path)):
        assert "jax 0.10.2, 2025-12-24" in table


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("{", "must hold results"),
        ("[]", "must hold results"),
        ("[" * 200_000, "must hold results"),
        ('{"platform": "gpu"}', "must have the field 'targets'"),
        ('{"platform": "gpu", "targets": [], "bench": []}', "must hold results"),
    ],
    ids=["cut off", "no object", "nested", "lacking", "wrong type"],
)
def test_broken_results_end_the_readme_tables_in_one_line(module, monkeypatch, tmp_path, capsys, text, rule):
    tables, kernel_tables = module("readme_tables"), module("kernel_tables")
    path = tmp_path / "kernels_nvidia_h200.json"
    path.write_text(text)
    monkeypatch.setattr(tables, "TABLES", {"kernel_targets": lambda: kernel_tables.targets(tmp_path)})
    assert tables.main(["--check"]) == 2
    error = capsys.readouterr().err
    assert f"{path}: {rule}" in error
    assert "run " in error
    assert error.count("\n") == 1
