"""What is said of compared pictures: estimates with confidence intervals, rows, tables, figures."""

from __future__ import annotations

import datetime
import hashlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from judged import Compared, Job

import toprovar_jax
from toprovar_jax.intervals import bootstrap


def row_of(compared: Compared, dense: Compared) -> dict[str, Any]:
    """Everything worth keeping, ready for JSON. Scores are in points of 100, PSNR is of what differs from dense."""
    differs = np.isfinite(compared.psnr)
    share = compared.pictures.flops.mean() / dense.pictures.flops.mean()
    depths, counts = np.unique(compared.pictures.depth, return_counts=True)
    return {
        "name": compared.name,
        "policy": repr(compared.policy),
        "images": len(compared.right),
        "scales_run": [int(compared.pictures.scales.min()), int(compared.pictures.scales.max())],
        "depths": {str(depth or "none"): int(count) for depth, count in zip(depths, counts, strict=True)},
        "gflops": float(compared.pictures.flops.mean() / 1e9),
        "flops_share": float(share),
        "flops_speedup": float(1 / share),
        "score": bootstrap(100.0 * compared.right),
        "loss": bootstrap(100.0 * (dense.right.astype(float) - compared.right.astype(float))),
        "ssim": bootstrap(compared.ssim),
        "psnr": bootstrap(compared.psnr[differs]) if differs.any() else None,
        "identical": int((~differs).sum()),
    }


def with_seconds(rows: Sequence[dict[str, Any]], taken: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Adds measured times to rows: medians, and the median of the pictures' own speed-ups over dense."""
    for row in rows:
        for part, seconds in taken.get(row["name"], {}).items():
            ratio = np.asarray(taken["dense"][part]) / np.asarray(seconds)
            row[f"seconds_{part}"] = float(np.median(seconds))
            row[f"speedup_{part}"] = bootstrap(ratio, np.median)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lines of text, one per row; times only where they were measured."""
    head = ("policy", "scales", "FLOPs", "speed-up", "score [95 %]", "SSIM [95 %]", "PSNR dB", "same", "ms", "measured")
    lines = [head]
    for row in rows:
        low, high = row["scales_run"]
        timed = "seconds_transformer" in row
        lines.append(
            (
                row["name"],
                f"1-{high}" if low == high else f"1-{low}..{high}",
                f"{100 * row['flops_share']:.1f} %",
                f"{row['flops_speedup']:.2f}x",
                "{:.1f} [{:.1f}, {:.1f}]".format(*row["score"]),
                "{:.3f} [{:.3f}, {:.3f}]".format(*row["ssim"]),
                "-" if row["psnr"] is None else f"{row['psnr'][0]:.1f}",
                str(row["identical"]),
                f"{1000 * row['seconds_transformer']:.1f}" if timed else "",
                f"{row['speedup_transformer'][0]:.2f}x" if timed else "",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def header(job: Job) -> dict[str, Any]:
    """What a report says about itself."""
    calibration = job.pipeline.calibration
    return {
        "model": job.pipeline.model_name,
        "weights_sha256": job.weights,
        "calibrated": None if calibration is None else calibration.date,
        "grid": list(job.pipeline.plan_for("dense").schedule.grids[-1]),
        "images": len(job.prompts),
        "first_seed": job.seeds[0],
        "prompts_sha256": hashlib.sha256("\n".join(job.prompts).encode("utf-8")).hexdigest(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"{jax.devices()[0].device_kind} x{jax.device_count()}, {platform.machine()}",
        "versions": {"toprovar_jax": toprovar_jax.__version__, "jax": jax.__version__},
    }


def new_figure(title: str, panels: int) -> Any:
    """An empty figure with a row of panels."""
    from matplotlib.figure import Figure  # beside pyplot it needs no display

    figure = Figure(figsize=(6 * panels, 5), layout="constrained")
    figure.suptitle(title)
    figure.subplots(1, panels)
    return figure


def draw_points(axes: Any, label: str, places: Sequence[float], estimates: Sequence[Sequence[float]]) -> None:
    """Estimates with their intervals, joined from left to right."""
    order = np.argsort(places)
    value, low, high = np.array(estimates)[order].T
    where = np.array(places)[order]
    axes.errorbar(where, value, yerr=(value - low, high - value), fmt="o-", capsize=3, label=label)


def draw_over_flops(axes: Any, groups: Mapping[str, Sequence[Mapping[str, Any]]], quantity: str, label: str) -> None:
    """A quantity of rows over their transformer FLOPs, a colour per group."""
    for group, rows in groups.items():
        draw_points(axes, group, [100 * row["flops_share"] for row in rows], [row[quantity] for row in rows])
    finish(axes, "transformer FLOPs, % of dense", f"{label} (95 % intervals)")


def finish(axes: Any, across: str, up: str) -> None:
    """Names of the axes, grid, legend."""
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
