"""What only a process of its own shows: imports, exit status, closed pipes, the environment."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples" / "generate.py"


def _run(code_or_file: list[str], cwd: pathlib.Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    return subprocess.run(
        [sys.executable, *code_or_file], cwd=cwd, env={**clean, **environment}, capture_output=True, text=True
    )


def test_help_lists_the_options_and_imports_no_jax(tmp_path):
    done = _run(["-X", "importtime", str(EXAMPLE), "--help"], tmp_path)
    assert done.returncode == 0
    assert "--prompts-file FILE" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "tyro" in imported
    assert imported.isdisjoint({"jax", "jaxlib", "numpy", "flax"})


def test_the_example_runs_from_any_folder_and_exits_2_on_bad_input(tmp_path):
    done = _run([str(EXAMPLE), "--prompt", "a", "--top-p", "7"], tmp_path)
    assert done.returncode == 2
    assert done.stderr == ("error: --top-p '7': must be a number in (0, 1]; for example 0.97; 1 keeps every value\n")


def test_a_backend_that_is_not_there_is_one_line_naming_what_is(tmp_path):
    done = _run([str(EXAMPLE), "--prompt", "a", "--backend", "tpu"], tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: backend tpu: no such device here; available: cpu")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


START_ON_CPU = """
import sys
from toprovar_jax.cli.backend import start_backend
start_backend("cpu")
import jax
print(jax.config.jax_platforms, jax.default_backend(), jax.config.jax_compilation_cache_dir, sep="|")
"""


@pytest.mark.parametrize("writable", [True, False])
def test_backend_and_compilation_cache_are_set_before_jax_starts(tmp_path, writable):
    cache = tmp_path / "cache"
    if not writable:
        cache.write_text("a file, not a folder")
    done = _run(["-c", START_ON_CPU], ROOT, TOPROVAR_CACHE=str(cache))
    assert done.stderr == ""
    assert done.stdout == f"cpu|cpu|{cache / 'xla' if writable else None}\n"


CLOSED_PIPE = """
import sys
from toprovar_jax.cli import generate
class Endless:
    def resolve(self, *args, **kwargs):
        print("x" * 100_000, flush=True)
sys.exit(generate.main(["--prompt", "a", "--dry-run"], load=lambda name: Endless()))
"""


def test_a_reader_that_goes_away_ends_the_command_quietly():
    process = subprocess.Popen(
        [sys.executable, "-c", CLOSED_PIPE], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    message = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), message) == (1, b"")
