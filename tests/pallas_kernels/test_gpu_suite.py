"""The hardware suite without hardware: a smoke run, killed and interrupted steps, what a later run keeps."""

import importlib
import json
import os
import pathlib
import signal
import sys
import tempfile

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def module(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return importlib.import_module


def test_commands_that_hang_fail_or_stand_still_are_ended_and_told(module, tmp_path, monkeypatch):
    suite = module("gpu_processes")
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


ENVIRONMENT = {"device": "NVIDIA H200", "platform": "gpu", "driver": "580.1", "date": "2026-02-02T12:00:00+00:00"}
ENVIRONMENT |= {"versions": {"jax": "0.11.2"}}
LATER = {**ENVIRONMENT, "date": "2026-03-03T12:00:00+00:00", "versions": {"jax": "0.12.0"}}


class Processes:
    """Stands for ``end_by``: writes what each process would have left, and tells how it ended."""

    def __init__(self, how="done", wrote=lambda command: None):
        self.how, self.wrote, self.commands = how, wrote, {}

    def __call__(self, commands, logs, environment, limit, watched=None):
        self.commands |= commands
        for name, command in commands.items():
            logs[name].write_text("")
            content = self.wrote(command)
            if content is not None:
                pathlib.Path(command[command.index("--json") + 1]).write_text(json.dumps(content))
        return {name: self.how if isinstance(self.how, str) else self.how(name) for name in commands}


@pytest.fixture
def suite(module, monkeypatch, tmp_path):
    """The module, and its ``main`` on a machine whose processes are played."""
    script = module("gpu_suite")

    def run(*steps, processes, environment=ENVIRONMENT):
        monkeypatch.setattr(script, "probe", lambda platform: environment)
        monkeypatch.setattr(script, "end_by", processes)
        code = script.main(["--steps", *steps, "--out", str(tmp_path), "--tuned", str(tmp_path / "tuned")])
        return code, json.loads((tmp_path / "kernels_nvidia_h200.json").read_text())

    return run


def checked(command, passed=True):
    return [{"implementation": command[command.index("--implementations") + 1], "passed": passed}]


def test_conformance_covers_the_shapes_that_are_timed(suite):
    processes = Processes(wrote=checked)
    code, report = suite("conformance", processes=processes)
    assert code == 0
    assert {name: found["passed"] for name, found in report["conformance"].items()} == dict.fromkeys(
        ("mosaic_gpu", "triton", "cudnn", "xla"), True
    )
    groups = {command[command.index("--cases") + 1]: command for command in processes.commands.values()}
    assert set(groups) == {"edges", "tails", "infinity", "pruned"}
    for group in ("infinity", "pruned"):
        assert groups[group][groups[group].index("--dtypes") + 1] == "bfloat16"
        assert groups[group][groups[group].index("--heads") + 1] == "1"


@pytest.mark.parametrize(
    ("processes", "passed"),
    [
        (Processes("timed out after 150 s", checked), False),
        (Processes(lambda name: "exit 1" if name.endswith("pruned") else "done", checked), False),
        (Processes("done", lambda command: checked(command, None)), False),
        (Processes("done", lambda command: []), False),
        (Processes("done"), False),
        (Processes("done", lambda command: checked(command, "edges" not in command)), False),
        (Processes("done", checked), True),
    ],
    ids=["killed", "one killed", "nothing ran", "no lines", "no file", "one failed", "good"],
)
def test_proven_is_what_ended_ran_and_passed_in_every_group(suite, processes, passed):
    code, report = suite("conformance", processes=processes)
    assert {found["passed"] for found in report["conformance"].values()} == {passed}
    assert code == (0 if processes.how == "done" else 1)


def test_a_group_that_is_killed_loses_no_other(suite):
    kills = Processes(
        lambda name: "timed out after 150 s" if name.endswith("infinity") else "done",
        lambda command: None if "infinity" in command else checked(command),
    )
    code, report = suite("conformance", processes=kills)
    parts = report["conformance"]["triton"]["parts"]
    assert code == 1
    assert {group: len(part["records"]) for group, part in parts.items()} == {
        **dict.fromkeys(("edges", "tails", "pruned"), 1),
        "infinity": 0,
    }
    assert parts["infinity"]["ended"] == "timed out after 150 s"


def test_only_what_is_proven_is_tuned_and_timed_beside_the_yardstick(suite):
    suite("conformance", processes=Processes(wrote=lambda command: checked(command, "mosaic_gpu" not in command)))
    processes = Processes()
    suite("tune", "bench:infinity", "bench:tails", processes=processes)
    assert processes.commands["triton"][2:3] == ["triton"]
    assert "mosaic_gpu" not in processes.commands
    timed = processes.commands[""]
    assert timed[timed.index("--implementations") + 1 :] == ["triton", "cudnn"]
    unproven = Processes()
    suite("conformance", "bench:infinity", processes=unproven)
    timed = unproven.commands[""]
    assert timed[timed.index("--implementations") + 1 :] == ["cudnn"]


def everything(command):
    """What each step leaves when all goes well."""
    if "pallas_kernels.conformance" in command:
        return checked(command)
    if "pallas_kernels.bench" in command:
        return {"spectrum": {"milliseconds": 0.5}, "records": [], "timers": ["profiler"]}
    return {"trying": [], "timed": [TIMED]}


TIMED = {"implementation": "triton", "case": "64x64", "head_dim": 128, "dtype": "bfloat16", "size": "many queries"}
TIMED |= {"with_entropy": True, "config": {"tile": 64}, "milliseconds": 2.0}


@pytest.mark.parametrize("how", ["no time left", "exit 1"])
def test_a_step_that_writes_nothing_keeps_what_an_earlier_run_found(suite, how):
    steps = ("conformance", "tune", "bench:infinity", "spectrum")
    code, before = suite(*steps, processes=Processes(wrote=everything))
    assert code == 0
    nothing = Processes(how, lambda command: {"trying": [], "timed": []} if "tune" in command[1] else None)
    code, after = suite(*steps, processes=nothing, environment=LATER)
    assert code == 1
    assert (after["date"], after["versions"]) == (LATER["date"], LATER["versions"])
    own = {"date": ENVIRONMENT["date"], "versions": ENVIRONMENT["versions"]}
    for section in ("bench", "spectrum", "tuning"):
        assert after[section] == before[section]
    assert after["spectrum"]["measured"] == after["bench"]["infinity"]["measured"] == own
    assert after["tuning"]["triton"]["measured"] == own
    part = after["conformance"]["triton"]["parts"]["edges"]
    assert part["measured"] == own
    assert part["records"] == before["conformance"]["triton"]["parts"]["edges"]["records"]
    assert after["conformance"]["triton"]["passed"] == (how == "no time left")
    assert after["steps"]["spectrum"]["measured"]["date"] == LATER["date"]


def test_a_new_result_replaces_the_earlier_one_and_its_date(suite):
    suite("spectrum", processes=Processes(wrote=everything))
    _, report = suite("spectrum", processes=Processes(wrote=everything), environment=LATER)
    assert report["spectrum"]["measured"]["date"] == LATER["date"]


def test_failures_of_earlier_runs_are_not_those_of_this_one(suite):
    assert suite("tune", "spectrum", processes=Processes("exit 3"))[0] == 1
    assert suite("spectrum", processes=Processes(wrote=everything))[0] == 0


def test_tuning_is_run_again_only_if_it_knows_what_hung(suite):
    suite("conformance", processes=Processes(wrote=checked))
    ends = []

    def run(trying):
        def stuck(name):
            ends.append(name)
            return "stood still for 60 s" if len(ends) < 4 else "done"

        ends.clear()
        suite("tune", processes=Processes(stuck, lambda command: {"trying": trying, "timed": []}))
        return ends.count("triton")

    assert run([]) == 1
    assert run([{"case": "64x64"}]) == 4


def test_whoever_interrupts_the_suite_ends_its_processes(module, monkeypatch, tmp_path):
    processes = module("gpu_processes")
    started = []
    popen = processes.subprocess.Popen
    monkeypatch.setattr(
        processes.subprocess, "Popen", lambda *args, **options: started.append(popen(*args, **options)) or started[-1]
    )

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(processes.time, "sleep", interrupted)
    logs = {name: tmp_path / name for name in "ab"}
    with pytest.raises(KeyboardInterrupt):
        processes.end_by({name: ["sleep", "60"] for name in logs}, logs, dict(os.environ), 30.0)
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2


def test_being_told_to_end_unwinds_the_suite(module, monkeypatch):
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    module("gpu_processes").stop_on_signals()
    for number in (signal.SIGTERM, signal.SIGHUP):
        with pytest.raises(SystemExit) as ended:
            handlers[number](number, None)
        assert ended.value.code == 128 + number


def test_an_interrupt_ends_the_suite_with_status_130(module, monkeypatch, tmp_path, capsys):
    def interrupted(*given):
        raise KeyboardInterrupt

    script = module("gpu_suite")
    monkeypatch.setattr(script, "probe", lambda platform: ENVIRONMENT)
    monkeypatch.setattr(script, "end_by", interrupted)
    assert script.main(["--steps", "spectrum", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.startswith("interrupted")


@pytest.mark.parametrize("text", ["[]", '{"bench": {"infinity": ', '{"steps": 3}', '{"spectrum": 3}', "[" * 200_000])
def test_broken_earlier_results_are_told_in_one_line(module, monkeypatch, tmp_path, capsys, text):
    script = module("gpu_suite")
    monkeypatch.setattr(script, "probe", lambda platform: ENVIRONMENT)
    monkeypatch.setattr(script, "end_by", lambda *given: pytest.fail("work was begun"))
    path = tmp_path / "kernels_nvidia_h200.json"
    path.write_text(text)
    assert script.main(["--out", str(tmp_path), "--tuned", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert error.count("\n") == 1
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("option", "value"),
    [("--budget-s", "nan"), ("--budget-s", "0"), ("--budget-s", "-5"), ("--out", "file"), ("--tuned", "file/deep")],
)
def test_options_that_cannot_work_are_refused_in_one_line_before_any_work(
    module, monkeypatch, tmp_path, capsys, option, value
):
    script = module("gpu_suite")
    monkeypatch.setattr(script, "probe", lambda platform: pytest.fail("work was begun"))
    (tmp_path / "file").write_text("")
    value = str(tmp_path / value) if "file" in value else value
    with pytest.raises(SystemExit) as ended:
        script.main([f"{option}={value}"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert value in error
    assert error.count("\n") == 1
