"""The README's tables of kernel speed, from ``benchmarks/results/kernels_<device>.json``; see ``readme_tables.py``."""

import functools
import json
import pathlib

RESULTS = pathlib.Path(__file__).parent / "results"
NOTHING = "No accelerator has been measured yet: `make gpu-suite` on a machine with one fills this table."


def targets(folder: pathlib.Path = RESULTS) -> str:
    """Every promise about speed with what was measured, per device."""
    blocks = []
    for report in reports(folder):
        rows = ["| promise | goal | measured | |", "|---|---|---|---|"]
        for target in report["targets"]:
            value = "not measured" if target["value"] is None else f"{target['value']:.2f}"
            verdict = {True: "kept", False: "**missed**", None: ""}[target["hit"]]
            rows.append(f"| {target['name']} | {target['goal']} | {value} | {verdict} |")
        timed = (report["bench"].get("infinity") or {}).get("measured")
        blocks.append("\n".join((*rows, "", source(report, timed))))
    return "\n\n".join(blocks) or NOTHING


def group(name: str, folder: pathlib.Path = RESULTS) -> str:
    """Milliseconds of every implementation on a group's cases, per device."""
    blocks = []
    for report in reports(folder):
        lines = [line for line in (report["bench"].get(name) or {}).get("records", []) if line["milliseconds"]]
        if not lines:
            continue
        names = list(dict.fromkeys(line["implementation"] for line in lines))
        found = {(line["case"], line["implementation"], line["with_entropy"]): line for line in lines}
        rows = [
            "| case | " + " | ".join(f"{implementation} ms, + entropy" for implementation in names) + " |",
            "|---" * (len(names) + 1) + "|",
        ]
        for case in dict.fromkeys(line["case"] for line in lines):
            cells = [_cell(found.get((case, x, False)), found.get((case, x, True))) for x in names]
            rows.append(f"| {case} | " + " | ".join(cells) + " |")
        timed = report["bench"][name]
        timers = " and ".join(timed["timers"])
        where = source(report, timed.get("measured"))
        note = f"In brackets: time over that of cudnn without entropy. Timer: {timers}. {where}"
        blocks.append("\n".join((*rows, "", note)))
    return "\n\n".join(blocks) or NOTHING


def reports(folder: pathlib.Path) -> list[dict]:
    """All measured devices in order of their file names; smoke runs on a CPU do not count."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("kernels_*.json"))]
    return [report for report in found if report["platform"] != "cpu"]


def source(report: dict, measured: dict | None = None) -> str:
    """Where and when, with versions; ``measured`` has those of the step, which may be older than the latest run."""
    measured = measured or report
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items() if version)
    driver = f", driver {report['driver']}" if report["driver"] else ""
    return f"{report['device']}{driver}, {versions}, {measured['date'][:10]}; `benchmarks/gpu_suite.py`."


def _cell(plain: dict | None, entropy: dict | None) -> str:
    return ", ".join(_one(line) for line in (plain, entropy))


def _one(line: dict | None) -> str:
    if line is None:
        return "-"
    ratio = "" if line["ratio_to_cudnn"] is None else f" ({line['ratio_to_cudnn']:.2f})"
    return f"{line['milliseconds']:.3f}{ratio}"


TABLES = {
    "kernel_targets": targets,
    **{f"kernel_{name}": functools.partial(group, name) for name in ("infinity", "fa3", "pruned", "tails")},
}
