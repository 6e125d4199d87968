"""Bad input to the generate command: status 2, one line, nothing written, and no model asked."""

from __future__ import annotations

import pytest

from toprovar_jax.cli.generate import main

BAD_INPUT = {
    "nothing to draw": ([], "--prompts-file FILE"),
    "empty prompt": (["--prompt", ""], "--prompt ''"),
    "blank prompt": (["--prompt", "  "], "must be text that says something"),
    "undecodable prompt": (["--prompt", "a \udcff"], "must be text"),
    "unquoted prompt": (["--prompt", "a", "red"], "quotes"),
    "unknown option": (["--promt", "a"], "did you mean --prompt?"),
    "strange option": (["--prompt", "a", "-v"], "see --help"),
    "value to a flag": (["--prompt", "a", "--json=yes"], "'yes'"),
    "option without value": (["--prompt"], "--prompt: needs a value"),
    "option before option": (["--prompt", "--json"], "--prompt=VALUE"),
    "unknown backend": (["--prompt", "a", "--backend", "gpuu"], "did you mean gpu?"),
    "absent backend": (["--prompt", "a", "--backend", "gpu"], "available: cpu;"),
    "unknown policy": (["--prompt", "a", "--policy", "denser"], "--policy: policy 'denser': must be one of dense"),
    "empty policy": (["--prompt", "a", "--policy", ""], "--policy ''"),
    "unknown aspect ratio": (["--prompt", "a", "--aspect-ratio", "5:1"], "the nearest are 3:1 and 5:2"),
    "aspect ratio of nothing": (["--prompt", "a", "--aspect-ratio", "0:1"], "must be"),
    "guidance of wrong length": (["--prompt", "a", "--guidance", "3,3"], "must have 3"),
    "guidance not a number": (["--prompt", "a", "--guidance", "3,x,1"], "--guidance '3,x,1'"),
    "guidance not finite": (["--prompt", "a", "--guidance", "nan"], "--guidance 'nan'"),
    "guidance negative": (["--prompt", "a", "--guidance", "-1"], ">= 0"),
    "tau zero": (["--prompt", "a", "--tau", "0"], "--tau '0': must be a finite number > 0"),
    "tau list with zero": (["--prompt", "a", "--tau", "1,0,1"], "--tau '1,0,1'"),
    "top-p zero": (["--prompt", "a", "--top-p", "0"], "(0, 1]"),
    "top-p above one": (["--prompt", "a", "--top-p", "1.5"], "--top-p '1.5'"),
    "top-k negative": (["--prompt", "a", "--top-k", "-1"], "--top-k '-1'"),
    "seed negative": (["--prompt", "a", "--seed", "-1"], "--seed '-1'"),
    "seed too large": (["--prompt", "a", "--seed", str(2**32)], "4294967295"),
    "seed not a number": (["--prompt", "a", "--seed", "x"], "--seed 'x'"),
    "no images": (["--prompt", "a", "--num-images", "0"], "--num-images '0'"),
    "batch of none": (["--prompt", "a", "--batch-size", "0"], "--batch-size '0'"),
    "batch not a number": (["--prompt", "a", "--batch-size", "two"], "--batch-size 'two'"),
    "unknown place": (["--prompt", "a", "--text-encoder-on", "on_demand"], "did you mean on-demand?"),
    "strips of nothing": (["--prompt", "a", "--decoder-strips", "0"], "--decoder-strips '0'"),
    "strips not a number": (["--prompt", "a", "--low-memory", "--decoder-strips", "x"], "--decoder-strips 'x'"),
    "stop before the first scale": (["--prompt", "a", "--stop-after-scale", "0"], "--stop-after-scale '0'"),
    "absent prompts file": (["--prompts-file", "nowhere.txt"], "no such file"),
    "blank output": (["--prompt", "a", "--out", ""], "--out ''"),
    "a warning when strict": (
        ["--prompt", "a cat", "--strict"],
        "--strict: refuses a warning (the fake model knows no",
    ),
    "output below a file": (["--prompt", "a", "--out", "/dev/null/pictures"], "not a directory"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(case, command):
    argv, expected = BAD_INPUT[case]
    ran = command(*argv)
    assert ran.status == 2
    assert ran.stdout == ""
    assert ran.stderr.startswith("error: ")
    assert ran.stderr.count("\n") == 1
    assert expected in ran.stderr
    assert ran.pipeline.calls == []
    assert list(ran.folder.iterdir()) == []


def test_a_policy_is_refused_before_any_weights_are_loaded(command, tmp_path, capsys):
    def load(_model):
        pytest.fail("loaded")

    (tmp_path / "list.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "policy": "denser"}\n')
    assert main(["--prompts-file", "list.jsonl"], load=load) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: list.jsonl line 2: policy: policy 'denser': must be one of dense")
    assert message.count("\n") == 1


def test_a_line_the_pipeline_refuses_is_named(command, tmp_path):
    (tmp_path / "list.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "guidance": [1, 2]}\n')
    ran = command("--prompts-file", "list.jsonl")
    assert ran.status == 2
    assert ran.stderr.startswith("error: list.jsonl line 2: guidance of 2 values: must have 3")
    assert ran.files == ["list.jsonl"]


def test_strict_names_the_line_of_a_warning(command, tmp_path):
    (tmp_path / "list.txt").write_text("a cube\na cat\n")
    ran = command("--prompts-file", "list.txt", "--strict", "--dry-run")
    assert (ran.status, ran.stdout) == (2, "")
    assert ran.stderr == (
        "error: list.txt line 2: --strict: refuses a warning (the fake model knows no cats); "
        "change it, or leave --strict out\n"
    )
