"""Writes the README's measured tables from the JSON files in ``benchmarks/results``.

    python benchmarks/readme_tables.py [--check]

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; nothing else in the README is touched.
``--check`` changes nothing and exits with status 1 if a table is out of date. Status 2: a results file is broken.
"""

import pathlib
import re
import sys

import kernel_tables
import policy_tables
import pruning_tables
import released_tables
from kernel_tables import BrokenResults, results

from pallas_kernels.report import Parser
from toprovar_jax.hub import EMBEDDED_MODELS

ROOT = pathlib.Path(__file__).parent.parent


def scenes(folder: pathlib.Path = ROOT / "benchmarks/results") -> str:
    """Scores of the embedded models on the six tasks, a table per model that was evaluated."""
    paths = [folder / f"scenes_{model}.json" for model in EMBEDDED_MODELS]
    blocks = [_scores(path) for path in paths if path.exists()]
    return "\n\n".join(blocks) or "No model has been evaluated yet: `make scenes-report` fills this table."


def _scores(path: pathlib.Path) -> str:
    with results(path, "benchmarks/scenes_report.py") as report:
        names = list(report["scores"])
        lines = [["task", "pictures", *names]]
        for task, first in report["scores"][names[0]]["tasks"].items():
            shares = [_share(report["scores"][name]["tasks"][task]) for name in names]
            lines.append([task, str(first["images"]), *shares])
        totals = [_share(report["scores"][name]["total"]) for name in names]
        lines.append(["mean of the tasks", str(len(report["pictures"])), *totals])
        lines.insert(1, ["---"] * len(lines[0]))
        policy = report["policy"]["name"]
        return "\n".join(
            (
                *(f"| {' | '.join(line)} |" for line in lines),
                "",
                f"Model {report['model']}, guidance {_listed(report['guidance'])}, "
                f"{report['seconds_per_image'][policy]:.3f} s per picture, {report['device']}, "
                f"jax {report['versions']['jax']}, {report['date']}; 95 % intervals by bootstrap; "
                "`benchmarks/scenes_report.py`.",
            )
        )


def _listed(guidance: float | list[float]) -> str:
    return ", ".join(f"{each:g}" for each in (guidance if isinstance(guidance, list) else [guidance]))


def _share(interval: dict) -> str:
    value, low, high = (100.0 * interval[name] for name in ("value", "low", "high"))
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


TABLES = {
    "scenes": scenes,
    **kernel_tables.TABLES,
    **pruning_tables.TABLES,
    **policy_tables.TABLES,
    **released_tables.TABLES,
}


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(description="Writes the README's measured tables.")
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if a table is out of date")
    check = parser.parse_args(arguments).check
    readme = ROOT / "README.md"
    before = after = readme.read_text()
    for name, table in TABLES.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        try:
            text = table()
        except BrokenResults as error:
            print(error, file=sys.stderr)
            return 2
        after = re.sub(pattern, lambda match, text=text: f"{match[1]}{text}\n{match[2]}", after, flags=re.DOTALL)
    if check:
        return int(before != after)
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
