"""The README's tables of kernel speed, from ``benchmarks/results/kernels_<device>.json``; see ``readme_tables.py``."""

import contextlib
import functools
import json
import pathlib
from collections.abc import Callable, Iterator

RESULTS = pathlib.Path(__file__).parent / "results"
NOTHING = "No accelerator has been measured yet: `make gpu-suite` on a machine with one fills this table."


class BrokenResults(ValueError):
    """A results file that no table can be made of; one line."""


@contextlib.contextmanager
def results(path: pathlib.Path, remedy: str) -> Iterator[dict]:
    """The results in a file. Whatever is found to be wrong with them inside is told of the file.

    Args:
      path: a JSON file.
      remedy: the command that writes it.

    Raises:
      BrokenResults: not JSON, or fields are missing or of the wrong type.
    """
    try:
        yield json.loads(path.read_text())
    except KeyError as error:
        raise BrokenResults(f"{path}: must have the field {error}; run {remedy} again") from error
    except OSError as error:
        raise BrokenResults(f"{path}: must be readable ({error.strerror}); run {remedy}") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        told = str(error).splitlines()[0]
        raise BrokenResults(f"{path}: must hold results as {remedy} writes them ({told}); run it again") from error


def targets(folder: pathlib.Path = RESULTS) -> str:
    """Every promise about speed with what was measured, per device."""
    return blocks(_targets, folder)


def group(name: str, folder: pathlib.Path = RESULTS) -> str:
    """Milliseconds of every implementation on a group's cases, per device."""
    return blocks(functools.partial(_group, name), folder)


def blocks(table: Callable[[dict], str | None], folder: pathlib.Path) -> str:
    """A table per device, in order of the file names; smoke runs on a CPU do not count.

    Raises:
      BrokenResults: see :func:`results`.
    """
    made = []
    for path in sorted(folder.glob("kernels_*.json")):
        with results(path, "benchmarks/gpu_suite.py") as report:
            made.append(None if report["platform"] == "cpu" else table(report))
    return "\n\n".join(block for block in made if block) or NOTHING


def _targets(report: dict) -> str:
    rows = ["| promise | goal | measured | |", "|---|---|---|---|"]
    for target in report["targets"]:
        value = "not measured" if target["value"] is None else f"{target['value']:.2f}"
        verdict = {True: "kept", False: "**missed**", None: ""}[target["hit"]]
        rows.append(f"| {target['name']} | {target['goal']} | {value} | {verdict} |")
    timed = (report["bench"].get("infinity") or {}).get("measured")
    return "\n".join((*rows, "", source(report, timed)))


def _group(name: str, report: dict) -> str | None:
    lines = [line for line in (report["bench"].get(name) or {}).get("records", []) if line["milliseconds"]]
    if not lines:
        return None
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
    return "\n".join((*rows, "", f"In brackets: time over that of cudnn without entropy. Timer: {timers}. {where}"))


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
