"""Writes the README's measured tables from the JSON files in ``benchmarks/results``.

    python benchmarks/readme_tables.py [--check]

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; nothing else in the README is touched.
``--check`` changes nothing and exits with status 1 if a table is out of date.
"""

import json
import pathlib
import re
import sys

import kernel_tables

ROOT = pathlib.Path(__file__).parent.parent


def scenes_prompts() -> str:
    """The embedded model on plain prompts."""
    report = json.loads((ROOT / "benchmarks/results/scenes_prompts.json").read_text())
    count = report["images"]
    return "\n".join(
        (
            "| prompts | colour right | shape right | both right | seconds per image | first call, compiling |",
            "|---|---|---|---|---|---|",
            f"| {count} | {report['colour_right']} of {count} | {report['shape_right']} of {count} "
            f"| {report['both_right']} of {count} | {report['seconds_per_image']:.2f} "
            f"| {report['seconds_first_call']:.1f} s |",
            "",
            f"Model {report['model']}, guidance {report['guidance']:g}, tau {report['tau']:g}, {report['device']}, "
            f"jax {report['versions']['jax']}, {report['date']}; `benchmarks/scenes_prompts.py`.",
        )
    )


TABLES = {"scenes_prompts": scenes_prompts, **kernel_tables.TABLES}


def main() -> int:
    readme = ROOT / "README.md"
    before = after = readme.read_text()
    for name, table in TABLES.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text = table()
        after = re.sub(pattern, lambda match, text=text: f"{match[1]}{text}\n{match[2]}", after, flags=re.DOTALL)
    if "--check" in sys.argv:
        return int(before != after)
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
