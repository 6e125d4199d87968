"""The batch command as a process of its own: what it imports, and how it ends when its machine is taken away."""

from __future__ import annotations

import io
import os
import pathlib
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq

ROOT = pathlib.Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples" / "batch_pod.py"
ROWS = 12


def start(cwd, *argv):
    cache = os.environ.get("TOPROVAR_TEST_CACHE", str(ROOT / ".cache" / "xla"))
    return subprocess.Popen(
        [sys.executable, str(EXAMPLE), *argv],
        cwd=cwd,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": cache},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(cwd, *argv):
    return start(cwd, "--prompts", "p.txt", "--out", "out", "--chunk", "4", "--batch-size", "2", *argv)


def committed(cwd):
    """Batches of the first picture on."""
    return len([*cwd.glob("out/.work/batches/*/*.json"), *cwd.glob("out/manifest/*.parquet")])


def begun(process, cwd):
    """Returns when something is committed."""
    deadline = time.monotonic() + 120
    while not committed(cwd):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_help_lists_the_options_and_imports_no_jax(tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(EXAMPLE), "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "--max-failures N" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert imported.isdisjoint({"jax", "jaxlib", "numpy", "flax", "pyarrow"})


def test_terminated_and_killed_runs_are_finished_by_the_next(tmp_path):
    (tmp_path / "p.txt").write_text("".join(f"a red sphere, number {k}\n" for k in range(ROWS)))
    process = command(tmp_path)
    begun(process, tmp_path)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    first = int(line.split()[2])
    assert line == f"error: terminated; {first} pictures committed now in out; the same command goes on from there"
    assert 0 < first < ROWS
    process = command(tmp_path)
    deadline, before = time.monotonic() + 120, committed(tmp_path)
    while committed(tmp_path) == before and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.communicate()
    process = command(tmp_path, "--quiet", "--json")
    told, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (0, "")
    assert f'"rows": {ROWS}' in told
    rows = pq.read_table(io.BytesIO((tmp_path / "out" / "manifest.parquet").read_bytes())).to_pylist()
    assert [(row["row"], row["status"]) for row in rows] == [(k, "made") for k in range(ROWS)]
