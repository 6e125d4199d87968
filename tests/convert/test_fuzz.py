"""A short run of the fuzzer, and that it would notice what it looks out for."""

import importlib
import pathlib
import warnings

import pytest

from toprovar_jax.cli.convert import main

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def fuzz(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("fuzz_checkpoints")


def test_damaged_and_malicious_files_do_no_harm(fuzz):
    report = fuzz.run(seed=0, first=0, count=200)
    assert report["violations"] == []
    assert sum(report["outcomes"].values()) == 200
    seen = {(kind, outcome) for kind, mutation, outcome in report["outcomes"] if mutation}
    assert seen == {(kind, outcome) for kind in fuzz.fuzz_cases.KINDS for outcome in ("read", "refused")}


@pytest.mark.parametrize(
    ("reader", "ended"),
    [
        ("os.system('true')", "ended with 97"),
        ("open(paths[0].parent / 'canary', 'w')", "ended with 97"),
        ("open('/etc/passwd')", "ended with 97"),
        ("exec('1')", "ended with 97"),
        ("faulthandler._sigsegv()", "ended with -11"),
        ("bytearray(2 * 10**9)", "MemoryError"),
        ("[][0]", "IndexError"),
        ("exec_loop()", "ended with -27"),
    ],
)
def test_a_reader_that_does_harm_is_found_out(fuzz, monkeypatch, tmp_path, reader, ended):
    """The reader does harm in the second case: after eight readings of the valid files, to warm up, and the first."""
    body = f"""
import faulthandler, os, sys
sys.path[:0] = [{str(FOLDER)!r}]
import fuzz_checkpoints
from toprovar_jax.errors import UserInputError
fuzz_checkpoints.SECONDS = 0.2
rounds = []
def exec_loop():
    while True:
        pass
def harmful(paths):
    rounds.append(paths)
    if len(rounds) > 9:
        {reader}
    raise UserInputError("a", "b", "c")
fuzz_checkpoints.open_source = harmful
raise SystemExit(fuzz_checkpoints.main())
"""
    worker = tmp_path / "worker.py"
    worker.write_text(body)
    monkeypatch.setattr(fuzz, "__file__", str(worker))
    report = fuzz.run(seed=0, first=100, count=2)
    assert [(found["case"], found["outcome"].split(":")[0]) for found in report["violations"]] == [(101, ended)]


def test_the_command_answers_damaged_files_with_one_line(fuzz, tmp_path, capsys):
    """None of these tensors are a model's, so whatever can be read is refused as well."""
    for number in range(60):
        case = fuzz.fuzz_cases.make_case(1, number)
        folder = tmp_path / str(number)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Duplicate name")  # archives with a name given twice are made on purpose
            target = case.write(folder)
        present = sorted(folder.iterdir())
        assert main([str(target), "--out", str(tmp_path / "out")]) == 2, (number, case.mutation)
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("error: ")
        assert said.err.endswith("\n")
        assert said.err[:-1].isprintable(), (number, case.mutation)
        assert sorted(folder.iterdir()) == present
        assert not list(tmp_path.glob("*out*"))
