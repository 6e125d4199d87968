"""Compares the library with recorded outputs of the reference implementation.

    python tests/parity.py tests/golden

runs every case below the folder (or the one case that the folder is), prints a line per array with its largest error
and its bound, and exits with 1 if any is over or missing, or if there is nothing to compare. For bits the error is the
number of values that differ. Works with or without the package installed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description="Compare the library with recorded reference outputs.")
    parser.add_argument("directory", type=Path, help="folder of cases, or one case")
    parser.add_argument("--quiet", action="store_true", help="print only what fails, and the summary")
    options = parser.parse_args(arguments)
    if not options.directory.is_dir():
        print(f"{options.directory}: is not a folder; name the folder that holds the golden cases", file=sys.stderr)
        return 2
    return compare(options.directory, quiet=options.quiet)


def compare(directory: Path, *, quiet: bool = False) -> int:
    """Run every case of ``directory``; 0 if all arrays are within their bounds, else 1."""
    if __package__:
        from . import golden_cases
    else:
        import golden_cases

    start, compared, failed = time.perf_counter(), 0, 0
    units = golden_cases.find_units(directory)
    for unit in units:
        reference = golden_cases.run_unit(unit)
        label = f"{unit.folder.name:<24} {unit.file:<18}"
        for measured in reference.measured:
            compared += 1
            failed += not measured.ok
            if quiet and measured.ok:
                continue
            verdict = f"{'ok' if measured.ok else 'FAIL':<4} {measured.note}".rstrip()
            print(f"{label} {measured.name:<39} {measured.error:>9.3g} {measured.bound:>7.3g}  {verdict}", flush=True)
        if reference.unused:
            print(label, "not compared:", ", ".join(sorted(reference.unused)))
    if not units:
        print(f"{directory}: no case found (a folder with a config.json and an npz file)")
    seconds = time.perf_counter() - start
    print(f"{len(units)} files, {compared} comparisons, {failed} over their bound, {seconds:.0f} s")
    return 1 if failed or not compared else 0


def set_up_jax() -> None:
    """CPU, full matmul precision, no silent promotion: what the bounds were made for."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")


if __name__ == "__main__":
    sys.path.insert(1, str(Path(__file__).resolve().parent.parent))
    set_up_jax()
    sys.exit(main())
