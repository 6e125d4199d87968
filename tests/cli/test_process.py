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


@pytest.mark.parametrize("value", ["cuda", "rubbish", "cpu,rubbish"])
def test_a_platform_in_the_environment_that_is_not_there_is_one_line(tmp_path, value):
    done = _run([str(EXAMPLE), "--prompt", "a"], tmp_path, JAX_PLATFORMS=value)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"error: JAX_PLATFORMS {value!r}: no such device here; available: cpu; "
        "unset that variable, or choose with --backend\n"
    )


def test_without_a_home_directory_there_is_no_compilation_cache(tmp_path):
    done = _run(["-c", START_ON_CPU], ROOT, TOPROVAR_CACHE="~no-such-user")
    assert (done.stdout, done.stderr) == ("cpu|cpu|None\n", "")


PRESSED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from tests.cli.conftest import FakePipeline
from toprovar_jax.cli import generate
def press():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.sigpending()
    except KeyboardInterrupt:
        {answer}
def load(name):
    if {when} == 0:
        press()
    return pipeline
class Pressed(FakePipeline):
    def __call__(self, *args, **kwargs):
        if len(self.calls) + 1 == {when}:
            press()
        return super().__call__(*args, **kwargs)
pipeline = Pressed()
sys.exit(generate.main(["--prompt", "a", "--num-images", "4"], load=load))
"""


@pytest.mark.parametrize("answer", ["pass", "raise ImportError('no module') from None", "raise"])
@pytest.mark.parametrize(
    ("when", "kept"),
    [(0, 0), (1, 0), (3, 2)],
    ids=["while loading", "in the first call", "in a later call"],
)
def test_ctrl_c_is_one_line_whatever_a_library_makes_of_it(tmp_path, answer, when, kept):
    code = PRESSED.format(root=str(ROOT), answer=answer, when=when)
    done = _run(["-c", code], tmp_path, JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
    finished = kept + (when == 3 and answer == "pass")  # what swallows it also completes its picture
    told = f"; {finished} finished pictures kept in outputs" if finished else "; no picture was saved"
    assert (done.returncode, done.stderr) == (130, f"error: interrupted{told}\n")
    assert len(done.stdout.splitlines()) == finished


def test_ctrl_c_twice_ends_at_once(tmp_path):
    code = (
        "import os, signal, contextlib\n"
        "from toprovar_jax.cli.interrupts import Interrupts\n"
        "with Interrupts():\n"
        "    for _ in range(2):\n"
        "        with contextlib.suppress(KeyboardInterrupt):\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
    )
    done = _run(["-c", code], ROOT)
    assert (done.returncode, done.stderr) == (130, "error: interrupted again; stopped at once\n")


def test_help_carries_the_name_the_command_was_called_by(tmp_path):
    code = "import sys; sys.argv[0] = '/usr/bin/toprovar-generate'; from toprovar_jax.cli.generate import main; main()"
    assert _run(["-c", code, "--help"], ROOT).stdout.startswith("usage: toprovar-generate ")


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
