"""Curves of a run's table of metrics."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

from toprovar_jax.files import replace_file
from toprovar_jax.training.metrics import read_rows

_COLUMNS = 4


def can_draw() -> bool:
    """Whether matplotlib is there; it is an optional dependency."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_curves(table: Path, picture: Path) -> None:
    """Every number of ``table`` over the steps, one panel each; training and evaluation share it.

    Nothing is drawn of an empty table.
    """
    from matplotlib.figure import Figure  # beside pyplot it needs no display

    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for kind, step, _, name, value in read_rows(table):
        curves.setdefault(name, {}).setdefault(kind, []).append((int(step), float(value)))
    if not curves:
        return
    rows = -(-len(curves) // _COLUMNS)
    figure = Figure(figsize=(3.2 * _COLUMNS, 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for panel, (name, kinds) in zip(panels, sorted(curves.items()), strict=False):
        for kind, points in kinds.items():
            panel.plot(*zip(*points, strict=True), label=kind, linewidth=0.8, marker="." if len(points) < 30 else None)
        panel.set_title(name, fontsize=9)
        panel.tick_params(labelsize=7)
        if len(kinds) > 1:
            panel.legend(fontsize=7)
    for panel in panels[len(curves) :]:
        panel.set_visible(False)
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", dpi=80)
    replace_file(picture, encoded.getbuffer())
