import csv
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toprovar_jax.errors import UserInputError
from toprovar_jax.training import loop, plots
from toprovar_jax.training.loop import LoopConfig, Stopped, run
from toprovar_jax.training.metrics import MetricsTable, peak_flops, read_rows, speed
from toprovar_jax.training.progress import Progress, duration

PROGRAM = Path(__file__).with_name("counting_run.py")


def start_state():
    return {"weights": jnp.zeros(4), "step": jnp.zeros((), jnp.int32)}


@pytest.fixture(scope="module")
def update():
    return runpy.run_path(str(PROGRAM))["update"]


def config(directory, steps, **changes):
    options = {"checkpoint_minutes": 1e9, "log_every": 1, "evaluate_every": 10_000} | changes
    return LoopConfig(directory, steps, **options)


def losses(directory):
    with (directory / "metrics.csv").open() as file:
        return [(row["step"], row["value"]) for row in csv.DictReader(file) if row["name"] == "loss"]


def started(directory, steps, pause):
    command = [sys.executable, str(PROGRAM), str(directory), str(steps), str(pause)]
    root = str(PROGRAM.parents[2])
    environment = os.environ | {"PYTHONPATH": root}  # the same compiler options as here, for the same bits
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def wait_for_rows(directory, count):
    deadline = time.monotonic() + 60
    while len(read_rows(directory / "metrics.csv")) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_killed_at_a_random_moment_leaves_the_table_and_state_of_an_undisturbed_one(update, tmp_path):
    steps = 60
    process = started(tmp_path / "killed", steps, 0.02)
    wait_for_rows(tmp_path / "killed", 12)
    time.sleep(random.random() / 4)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    reached = len(losses(tmp_path / "killed"))
    assert 2 < reached < steps

    lines = []
    resumed = run(start_state(), update, config(tmp_path / "killed", steps), report=lines.append)
    undisturbed = run(start_state(), update, config(tmp_path / "whole", steps), report=lambda _: None)
    assert lines[0].startswith("resumed at step")
    np.testing.assert_array_equal(resumed["weights"], undisturbed["weights"])
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == steps


def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path):
    process = started(tmp_path, 100_000, 0.01)
    wait_for_rows(tmp_path, 8)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    last = losses(tmp_path)[-1][0]
    assert f"stopped by SIGTERM after step {last};" in output
    assert "Traceback" not in output
    assert (tmp_path / "checkpoints" / last).is_dir()


def test_handlers_are_given_back_and_the_loop_stops_in_this_process_too(update, tmp_path):
    before = signal.getsignal(signal.SIGINT)

    def interrupted(state, number):
        if number == 2:
            signal.raise_signal(signal.SIGINT)
        return update(state, number)

    with pytest.raises(Stopped) as stopped:
        run(start_state(), interrupted, config(tmp_path, 9), report=lambda _: None)
    assert stopped.value.code == 128 + signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before
    assert [step for step, _ in losses(tmp_path)] == ["1", "2", "3"]


def test_rows_after_the_checkpoint_and_half_a_row_are_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("kind,step,seconds,name,value\ntrain,1,2.5,loss,3\ntrain,2,5.0,loss,2\ntrain,3,7.0,lo")
    table = MetricsTable(path, 1)
    table.write("train", 2, {"loss": 1 / 3})
    kept, new = read_rows(path)
    assert kept == ["train", "1", "2.5", "loss", "3"]
    assert float(new[2]) >= 2.5
    assert np.float32(new[4]) == np.float32(1 / 3)


def test_checkpoints_of_another_recipe_are_refused_with_the_field_that_differs(update, tmp_path):
    def attempt(steps=2, **recipe):
        run(start_state(), update, config(tmp_path, steps, recipe=recipe), report=lambda _: None)

    attempt(width={"inner": 64}, seed=0)
    attempt(width={"inner": 64}, seed=0)
    with pytest.raises(UserInputError, match=r"recipe\.width\.inner=64 \(asked for: 32\)"):
        attempt(width={"inner": 32}, seed=0)
    with pytest.raises(UserInputError, match=r"num_steps=2 \(asked for: 5\)"):
        attempt(5, width={"inner": 64}, seed=0)


def test_a_recipe_without_checkpoints_binds_nobody(update, tmp_path):
    def fails(state, number):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        run(start_state(), fails, config(tmp_path, 2, recipe={"seed": 0}))
    run(start_state(), update, config(tmp_path, 2, recipe={"seed": 1}), report=lambda _: None)
    assert '"seed": 1' in (tmp_path / "recipe.json").read_text()


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="loss nan at step 1"):
        run(start_state(), lambda state, _: (state, {"loss": jnp.float32(np.nan)}), config(tmp_path, 3))


def test_evaluations_draw_curves_or_say_once_why_not(update, tmp_path, monkeypatch):
    def both(directory):
        lines = []
        options = {"evaluate": lambda *_: {"loss": 1.0}, "report": lines.append}
        run(start_state(), update, config(directory, 4, evaluate_every=2), **options)
        return lines

    assert not any("matplotlib" in line for line in both(tmp_path / "a"))
    assert (tmp_path / "a" / "curves.png").read_bytes()[1:4] == b"PNG"
    monkeypatch.setattr(loop, "can_draw", lambda: False)
    assert sum("matplotlib is missing" in line for line in both(tmp_path / "b")) == 1
    assert not (tmp_path / "b" / "curves.png").exists()
    assert plots.can_draw()


def test_a_terminal_sees_a_bar_with_the_loss_and_no_line_per_log(update, tmp_path, monkeypatch, capsys):
    lines = []
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    run(start_state(), update, config(tmp_path, 3, images_per_step=16), report=lines.append)
    assert lines == []
    shown = capsys.readouterr().err
    assert "/48" in shown
    assert "images/s" in shown
    assert "loss=" in shown


def test_without_a_terminal_the_lines_of_training_end_with_the_time_left(monkeypatch):
    lines, clock = [], iter([100.0, 300.0])
    monkeypatch.setattr("toprovar_jax.training.progress.time.monotonic", lambda: next(clock))
    progress = Progress(10, 60, 4, lines.append)
    progress.advance()
    progress.log("train", 11, {"loss": 2.0})
    # Four steps took 200 seconds after the first; 45 are left.
    progress.log("train", 15, {"loss": 1.0})
    progress.log("evaluate", 15, {"loss": 1.5})
    assert lines == ["train 11: loss=2", "train 15: loss=1 left 37m30s", "evaluate 15: loss=1.5"]
    assert [duration(seconds) for seconds in (8.4, 60.0, 11520.0, 3599.7)] == ["8s", "1m00s", "3h12m", "1h00m"]


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 120GB", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA GH200 144G HBM3e", 989),
        ("TPU v5", 459),
        ("TPU v5 lite", 197),
    ],
)
def test_every_device_has_its_own_peak(kind, teraflops):
    assert peak_flops(SimpleNamespace(device_kind=kind)) == teraflops * 1e12


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA L400", "NVIDIA"])
def test_parts_of_devices_and_unknown_ones_have_no_peak(kind):
    assert peak_flops(SimpleNamespace(device_kind=kind)) is None


def test_speed_knows_the_share_of_the_peak_where_the_device_is_known():
    class Device:
        device_kind = "NVIDIA H200"

        def memory_stats(self):
            return {"peak_bytes_in_use": 3 * 2**30}

    values = speed(0.5, images=32, flops=989e12, devices=[Device(), Device()])
    assert values == {
        "steps_per_second": 2.0,
        "images_per_second": 64.0,
        "gflops": 2 * 989e3,
        "utilisation": 1.0,
        "memory_gib": 3.0,
    }
    here = speed(0.5, images=0, flops=0.0, devices=jax.devices()[:1])
    assert here.keys() == {"steps_per_second", "memory_gib"}
    assert 0.01 < here["memory_gib"] < 1000
    assert peak_flops(jax.devices()[0]) is None
