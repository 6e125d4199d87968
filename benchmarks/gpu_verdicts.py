"""What the results of ``gpu_suite.py`` mean: the promises about speed, and the package's table for the device."""

import dataclasses
import json
import pathlib
from dataclasses import dataclass

from pallas_kernels.attention import tuning

NEVER_DEFAULT = {False: ("reference",), True: ("reference", "cudnn")}
"""Not in the list that ``implementation=None`` draws from, without and with entropy: the dense form needs memory that
grows with T x S, and the entropy of cuDNN is rounded to about 1e-2 nats."""


EMPTY = {"conformance": {}, "tuning": {}, "bench": {}, "spectrum": None, "steps": {}}
"""Results before any step has run."""

NO_TIME = "no time left"
"""How a process ended that was not even started."""


@dataclass(frozen=True)
class Target:
    """A promise about speed and what was measured; ``hit`` is None where it was not."""

    name: str
    goal: str
    value: float | None
    hit: bool | None


def earlier(path: pathlib.Path) -> dict:
    """The results of earlier runs, empty if there are none.

    Raises:
      ValueError: a file that holds something else.
    """
    try:
        found = {**EMPTY, **(json.loads(path.read_text()) if path.exists() else {})}
        for section in ("conformance", "tuning", "bench", "steps"):
            found[section] = {name: dict(entry) for name, entry in found[section].items() if entry is not None}
        found["spectrum"] = dict(found["spectrum"]) if found["spectrum"] is not None else None
        return found
    except (AttributeError, OSError, RecursionError, TypeError, ValueError) as error:
        told = str(error).splitlines()[0]
        raise ValueError(
            f"{path}: are no results of an earlier run ({told}); delete it or choose another --out"
        ) from None


def judged(earlier: dict, ended: dict[str, str], written: dict[str, list | None], measured: dict) -> dict:
    """What conformance found about one implementation, and whether that proves it.

    Args:
      earlier: the same of an earlier run, or empty.
      ended: how the process of each group of cases ended.
      written: the lines that each has left, or None.
      measured: date and versions of this run.

    Returns:
      ``passed`` only if every group has ended by itself and lines, all good, are there. A group keeps earlier lines
      where there are no new ones; an earlier good end counts only if the group was not even started this time.
    """
    parts = dict(earlier.get("parts", {}))
    for group, how in ended.items():
        if how == NO_TIME and group in parts:
            continue
        lines = written[group]
        part = {"records": lines, "measured": measured} if lines else parts.get(group, {"records": []})
        parts[group] = {**part, "ended": how if lines or how != "done" else "wrote nothing"}
    ran = [line["passed"] for part in parts.values() for line in part["records"] if line["passed"] is not None]
    passed = {part["ended"] for part in parts.values()} == {"done"} and bool(ran) and all(ran)
    return {"passed": passed, "parts": parts}


def records(results: dict, group: str) -> dict[tuple[str, str, bool], dict]:
    """A group's lines by implementation, case and whether the entropy was computed."""
    lines = ((results.get("bench") or {}).get(group) or {}).get("records", [])
    return {(x["implementation"], x["case"], x["with_entropy"]): x for x in lines if x["milliseconds"] is not None}


def targets(results: dict) -> list[Target]:
    """The promises, judged by the results."""
    lines = records(results, "infinity")

    def ratio(above: tuple[str, str, bool], below: tuple[str, str, bool]) -> float | None:
        if above not in lines or below not in lines:
            return None
        return lines[above]["milliseconds"] / lines[below]["milliseconds"]

    def upto(name: str, value: float | None, most: float) -> Target:
        return Target(name, f"at most {most:g}", value, None if value is None else value <= most)

    large = "64x64"
    others = [
        ratio(("mosaic_gpu", case, True), ("cudnn", case, False))
        for case in ("20x20", "24x24", "32x32", "40x40", "48x48")
    ]
    known = [value for value in others if value is not None]
    saved = ratio(("cudnn", large, True), ("mosaic_gpu", large, True))
    spectrum_ms = (results.get("spectrum") or {}).get("milliseconds") if results["platform"] != "cpu" else None
    return [
        upto(
            "mosaic_gpu with entropy over cudnn without, 64x64",
            ratio(("mosaic_gpu", large, True), ("cudnn", large, False)),
            1.05,
        ),
        upto(
            "mosaic_gpu with entropy over itself without, 64x64",
            ratio(("mosaic_gpu", large, True), ("mosaic_gpu", large, False)),
            1.05,
        ),
        upto(
            "mosaic_gpu with entropy over cudnn without, worst of 20x20 to 48x48",
            max(known) if len(known) == len(others) else None,
            1.15,
        ),
        upto(
            "triton with entropy over cudnn without, 64x64",
            ratio(("triton", large, True), ("cudnn", large, False)),
            1.6,
        ),
        Target(
            *("cudnn with entropy over mosaic_gpu with entropy, 64x64", "at least 1.6"),
            *(saved, None if saved is None else saved >= 1.6),
        ),
        upto("spectrum ratio of 40 maps 12x12, ms", spectrum_ms, 1.0),
    ]


def _proven(results: dict, with_entropy: bool) -> list[tuning.Proven]:
    """What passed conformance, timed over the cases that all of them have run."""
    lines = records(results, "infinity")
    passed = [name for name, found in results["conformance"].items() if found["passed"]]
    passed = [name for name in passed if name not in NEVER_DEFAULT[with_entropy]]
    measured = {name: {case for other, case, own in lines if (other, own) == (name, with_entropy)} for name in passed}
    measured = {name: cases for name, cases in measured.items() if cases}
    common = set.intersection(*measured.values()) if measured else set()
    return [
        tuning.Proven(name, with_entropy, sum(lines[name, case, with_entropy]["milliseconds"] for case in common))
        for name in measured
        if common
    ]


def measured_table(results: dict) -> tuning.Table | None:
    """The package's table for this device, or None before anything was measured."""
    proven = tuple(entry for with_entropy in (True, False) for entry in _proven(results, with_entropy))
    timed = [line for found in results["tuning"].values() if found for line in found["timed"]]
    best: dict[tuple, dict] = {}
    for line in timed:
        key = tuple(line[field] for field in ("implementation", "head_dim", "dtype", "size", "with_entropy"))
        if key not in best or line["milliseconds"] < best[key]["milliseconds"]:
            best[key] = line
    if not proven and not best:
        return None
    fields = [field.name for field in dataclasses.fields(tuning.Tuned)]
    configs = tuple(tuning.Tuned(**{field: line[field] for field in fields}) for line in best.values())
    return tuning.Table(results["device"], results["date"], results["versions"], proven, configs)
