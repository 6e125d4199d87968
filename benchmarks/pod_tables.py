"""The table of compiled pods in docs/pods.md, from ``benchmarks/results/aot_pods.json``.

    python benchmarks/pod_tables.py [--check]

It stands between ``<!-- table: pods -->`` and ``<!-- end -->``; nothing else there is touched. ``--check`` changes
nothing and exits with status 1 if the table is out of date. Status 2: the results are broken.
"""

import pathlib
import re
import sys

from kernel_tables import RESULTS, BrokenResults, results

from pallas_kernels.report import Parser

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "pods.md"
SCRIPT = "benchmarks/aot_pods.py"


def pods(folder: pathlib.Path = RESULTS) -> str:
    """A line per slice, model, mesh and policy: memory by program, and what the largest scale exchanges."""
    with results(folder / "aot_pods.json", SCRIPT) as report:
        rows: dict[tuple[str, ...], dict[str, dict]] = {}
        for key, found in report.items():
            setting, _, program = key.partition(": ")
            topology, model, mesh, _, batch, policy = setting.split(" ", 5)
            rows.setdefault((topology, model, mesh, batch, policy), {})[program] = found
        shared = {key[:4]: found for key, found in rows.items() if key[4] == "any policy"}
        lines = [
            "| slice | model | mesh | per copy | policy | text | largest scales | decoder | of | collectives, block |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [_line(key, found, shared.get(key[:4], {})) for key, found in rows.items() if key[4] != "any policy"]
        programs = [found for found in report.values() if found.get("peak")]
        off = max(abs(found["predicted"] / found["peak"] - 1) for found in programs)
        failed = sum(found["failure"] is not None for found in report.values())
    return "\n".join(
        (
            *lines,
            "",
            f"GB on each chip while the program runs, compiled ahead of time and not run; `{SCRIPT}`. {len(report)} "
            f"programs, of which {failed} fail; `toprovar plan-pod` predicts their memory within {100 * off:.0f} %.",
        )
    )


def _line(key: tuple[str, ...], found: dict[str, dict], shared: dict[str, dict]) -> str:
    scales = {name: facts for name, facts in found.items() if name.startswith("scale")}
    sizes = ", ".join(f"{_size(facts)} ({name.split('(')[1]}" for name, facts in scales.items())
    limit = next((facts["limit"] / 1e9 for facts in scales.values() if "limit" in facts), None)
    loops = {_kinds(loop) for facts in scales.values() if "collectives" in facts for loop in _loops(facts)}
    cells = (*key, _size(shared.get("text")), sizes, _size(shared.get("decoder")))
    return f"| {' | '.join(cells)} | {'' if limit is None else f'{limit:.1f}'} | {'; '.join(sorted(loops)) or 'none'} |"


def _loops(facts: dict) -> list[dict[str, int]]:
    outside = facts["collectives"]["outside"]
    return [*facts["collectives"]["loops"], *([outside] if outside else [])]


def _kinds(loop: dict[str, int]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in sorted(loop.items()))


def _size(facts: dict | None) -> str:
    if facts is None:
        return "–"
    return f"{facts['peak'] / 1e9:.1f}" if facts.get("peak") else "failed"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(description="Writes the table of compiled pods.")
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if the table is out of date")
    check = parser.parse_args(arguments).check
    try:
        before, text = PAGE.read_text(), pods()
    except OSError as error:
        print(f"{PAGE}: must be there ({error.strerror})", file=sys.stderr)
        return 2
    except BrokenResults as error:
        print(error, file=sys.stderr)
        return 2
    pattern = r"(<!-- table: pods -->\n).*?(<!-- end -->)"
    after = re.sub(pattern, lambda match: f"{match[1]}{text}\n{match[2]}", before, flags=re.DOTALL)
    if check:
        return int(before != after)
    PAGE.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
