"""Which processes share a model, and the batch command of several processes that do."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import pyarrow.parquet as pq
import pytest

from toprovar_jax.cli.main import main
from toprovar_jax.distributed.groups import devices_for
from toprovar_jax.distributed.mesh import MeshSpec
from toprovar_jax.errors import UserInputError
from toprovar_jax.memory_options import ON_DEVICE
from toprovar_jax.presets import PRESETS

from ..tiny_model import write_tiny_model

CARD = PRESETS["infinity-2b"]
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def cluster(monkeypatch):
    """Eight devices, of which this process has the first four."""
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:4])


@pytest.mark.parametrize(
    ("wanted", "mesh", "devices", "shared"),
    [
        ("data=8", MeshSpec(4, 1, 1), 4, False),
        ("tensor=4", MeshSpec(1, 1, 4), 4, False),
        ("tensor=2", MeshSpec(2, 1, 2), 4, False),
        ("data=2,fsdp=2,tensor=2", MeshSpec(1, 2, 2), 4, False),
        ("tensor=8", MeshSpec(1, 1, 8), 8, True),
        ("auto", MeshSpec(4, 1, 1), 4, False),
    ],
)
def test_a_copy_of_the_model_stays_within_a_process_if_it_can(cluster, wanted, mesh, devices, shared):
    found = devices_for(wanted, CARD, ON_DEVICE)
    assert (found.mesh, len(found.devices), found.shared) == (mesh, devices, shared)
    assert found.leader
    assert found.made().devices.size == devices


def test_a_mesh_of_other_devices_than_the_clusters_is_refused(cluster):
    with pytest.raises(UserInputError, match=r"of 4 devices: must be of 8"):
        devices_for("data=4", CARD, ON_DEVICE)


def batch(folder, out, prompts):
    return ["--model", str(folder), "--prompts", str(prompts), "--out", str(out), "--batch-size", "2", "--quiet"]


def test_processes_that_share_a_model_make_its_pictures_together(tmp_path):
    folder = write_tiny_model(tmp_path / "tiny")
    prompts = tmp_path / "p.txt"
    prompts.write_text("a red sphere\nthe blue cube\na cone on the left\n")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    out = tmp_path / "together"
    words = [sys.executable, "-m", "toprovar_jax.cli.main", "batch", *batch(folder, out, prompts), "--mesh", "tensor=2"]
    words += ["--distributed", "--coordinator", f"localhost:{port}", "--num-processes", "2"]
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    running = [
        subprocess.Popen([*words, "--process-id", str(index)], env=environment, stderr=subprocess.PIPE, text=True)
        for index in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    made = pq.read_table(out / "manifest.parquet").to_pylist()
    assert [row["status"] for row in made] == ["made"] * 3
    assert json.loads((out / "job.json").read_text())["tensor_parts"] == 2

    assert main(["batch", *batch(folder, tmp_path / "alone", prompts), "--mesh", "data=8"]) == 0
    alone = pq.read_table(tmp_path / "alone" / "manifest.parquet").to_pylist()
    assert [row["sha256"] for row in alone] == [row["sha256"] for row in made]
