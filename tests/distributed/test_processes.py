"""Several processes on one machine, over jax.distributed, beside one device."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from ..tiny_model import write_tiny_model
from .one_process import draw

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = pathlib.Path(__file__).with_name("one_process.py")
PROMPTS = ["a red sphere", "the blue cube on the left", "a cone"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def run(jobs, processes, devices, out):
    """What every process got, by name."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    files = [out / f"{index}.npz" for index in range(processes)]
    words = [sys.executable, str(SCRIPT), str(port), str(processes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(
            [*words, str(index), str(devices), json.dumps(jobs), str(file)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index, file in enumerate(files)
    ]
    said = [process.communicate(timeout=500)[0] for process in running]
    assert [process.returncode for process in running] == [0] * processes, said
    return [dict(np.load(file)) for file in files]


@pytest.mark.parametrize(
    ("processes", "devices", "drawn"),
    [
        (2, 2, [("data=4", "fixed"), ("data=4", "adaptive"), ("data=2,fsdp=2", "dense"), ("tensor=2", "fixed")]),
        (4, 1, [("data=4", "fixed"), ("data=2,tensor=2", "dense")]),
    ],
)
def test_all_processes_get_the_pictures_of_one_device(folder, tmp_path, processes, devices, drawn):
    jobs = [
        {"model": str(folder), "mesh": mesh, "policy": policy, "precision": "exact", "prompts": PROMPTS}
        for mesh, policy in drawn
    ]
    got = run(jobs, processes, devices, tmp_path)
    for number, job in enumerate(jobs):
        wanted = draw(job, None)
        for arrays in got:
            for scale, bits in enumerate(wanted.bits):
                np.testing.assert_array_equal(arrays[f"{number}-bits-{scale}"], bits)
            if "tensor" in job["mesh"]:
                np.testing.assert_allclose(arrays[f"{number}-images"], wanted.images, atol=1e-5)
            else:
                np.testing.assert_array_equal(arrays[f"{number}-images"], wanted.images)
