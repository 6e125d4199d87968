"""What a training run measures of itself: a table of numbers on disk, speed, and memory."""

from __future__ import annotations

import csv
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toprovar_jax.files import replace_file

HEADER = ("kind", "step", "seconds", "name", "value")

#: Peak of bfloat16 matrix products without sparsity in FLOP/s, by the device's whole kind: variants of one name differ.
#: Sources: NVIDIA's data sheets, whose figures for sparse matrices are twice these, and Google's pages on its TPUs.
PEAK_FLOPS = {
    # L4, L40 and L40S data sheets.
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    # A100 data sheet: the same for SXM and PCIe.
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    # H100 data sheet; the first is the SXM module.
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    # H200 and GH200 data sheets.
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA GH200 120GB": 989e12,
    "NVIDIA GH200 144G HBM3e": 989e12,
    # Cloud TPU system architecture; v5 is v5p, "lite" the v5e and v6e.
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(device: Any) -> float | None:
    """What the device could compute in a second, :data:`PEAK_FLOPS`; None where that is not known, as on CPUs."""
    return PEAK_FLOPS.get(device.device_kind)


def peak_memory(device: Any) -> int:
    """Most bytes that were in use so far: of the device, or of this process where the device does not count."""
    counted = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if counted is not None:
        return int(counted)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def speed(seconds_per_step: float, *, images: int, flops: float, devices: Sequence[Any]) -> dict[str, float]:
    """Throughput and memory under the names of the table.

    Args:
      seconds_per_step: measured.
      images: per step; 0 where that means nothing.
      flops: of the model per step, forward and backward, without what is computed twice to save memory; 0: unknown.
      devices: that share the work.

    Returns:
      ``steps_per_second``, ``images_per_second``, ``gflops`` (in a second), ``utilisation`` (share of
      :data:`PEAK_FLOPS`, on devices that stand there) and ``memory_gib`` (the peak of one device).
    """
    values = {"steps_per_second": 1.0 / seconds_per_step}
    if images:
        values["images_per_second"] = images / seconds_per_step
    if flops:
        values["gflops"] = flops / seconds_per_step / 1e9
        peak = peak_flops(devices[0])
        if peak is not None:
            values["utilisation"] = flops / seconds_per_step / (peak * len(devices))
    return values | {"memory_gib": max(peak_memory(device) for device in devices) / 2**30}


class MetricsTable:
    """Long-format CSV, one row per number: columns never change, so a resumed run appends.

    Args:
      path: the file. Rows after ``start`` are removed first: they were written between the checkpoint that a run
        resumes from and its end, and will be written again.
      start: steps that are done.
    """

    def __init__(self, path: Path, start: int):
        self.path = path
        rows = [row for row in read_rows(path) if int(row[1]) <= start]
        replace_file(path, "".join(",".join(row) + "\n" for row in (HEADER, *rows)).encode())
        # Seconds of training, not of the calendar: the clock goes on where it was.
        self._begin = time.monotonic() - (float(rows[-1][2]) if rows else 0.0)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Append ``values``; nine digits tell all float32 numbers apart."""
        seconds = f"{time.monotonic() - self._begin:.1f}"
        with self.path.open("a", newline="") as file:
            file.writelines(f"{kind},{step},{seconds},{name},{value:.9g}\n" for name, value in values.items())


def read_rows(path: Path) -> list[list[str]]:
    """The whole rows of a table, without its header; none where there is no file.

    A run that was killed while it wrote leaves half a row behind, which does not count.
    """
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [row for row in csv.reader(whole.splitlines()[1:]) if len(row) == len(HEADER)]
