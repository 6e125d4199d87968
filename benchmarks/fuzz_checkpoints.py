"""Gives damaged, lying and malicious checkpoint files to the readers, and sees that none of them does any harm.

    python benchmarks/fuzz_checkpoints.py [--count 10000] [--seed 0] [--first 0]

Every file must be read, with the numbers that were written where nothing was changed, or refused with one line
(``UserInputError``). Files are opened in a worker process, which has, for each, 5 seconds of processor time, 2 minutes
in all, and 1 GB of memory beyond what it had when it began. An audit hook ends it when anything is run, anything but
reading is asked of the file system, or a file is opened that is not in the folder given. Linux only.

Prints how often what came of which kind and mutation, and every violation with the number that ``--first`` takes to
repeat it alone. Status 1 if there was one.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from typing import Any

import fuzz_cases
import numpy as np

from convert.sources import open_source
from toprovar_jax.errors import UserInputError

SECONDS, PATIENCE, MEMORY = 5, 120, 10**9
HARMLESS = {"object.__getattr__", "object.__setattr__", "mmap.__new__", "os.scandir", "os.listdir", "pathlib.Path.glob"}
HARMLESS |= {"sys._getframe", "builtins.id", "os.fspath", "code.__new__", "array.__new__"}
FORBIDDEN = 97
"""Exit status of a worker whose audit hook found something."""


def main() -> int:
    """Runs the cases and prints the summary; returns the exit status."""
    parser = argparse.ArgumentParser(description="Damaged and malicious checkpoint files for the readers.")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--worker", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.worker, options.seed, options.first, options.first + options.count)
    report = run(options.seed, options.first, options.count)
    for (kind, mutation, outcome), number in sorted(report["outcomes"].items()):
        print(f"{number:6d}  {kind:20s} {mutation or 'valid':32s} {outcome}")
    print(f"{options.count} cases, at most {report['memory'] / 1e6:.0f} MB more and {report['seconds']:.2f} s each")
    for violation in report["violations"]:
        print("VIOLATION", violation)
    return 1 if report["violations"] else 0


def run(seed: int, first: int, count: int) -> dict[str, Any]:
    """Outcomes by kind and mutation, the largest memory (bytes) and time (s), and the violations, of some cases."""
    outcomes, violations, memory, seconds = Counter(), [], 0, 0.0
    number, stop = first, first + count
    with tempfile.TemporaryDirectory() as folder:
        while number < stop:
            command = [sys.executable, __file__, "--worker", folder, "--seed", str(seed)]
            command += ["--first", str(number), "--count", str(stop - number)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
                for line in worker.stdout or ():
                    found = json.loads(line)
                    outcomes[found["kind"], found["mutation"], found["outcome"].split(":")[0]] += 1
                    memory, seconds = max(memory, found["memory"]), max(seconds, found["seconds"])
                    if found["outcome"] not in ("read", "refused"):
                        violations.append({"case": number} | found)
                    number += 1
            if worker.returncode:
                case = fuzz_cases.make_case(seed, number)
                outcome = f"ended with {worker.returncode}"
                violations.append({"case": number, "kind": case.kind, "mutation": case.mutation, "outcome": outcome})
                outcomes[case.kind, case.mutation, outcome] += 1
                number += 1
        # A worker that was ended leaves the folder of its case, which is named by a number.
        left = [path.name for path in pathlib.Path(folder).iterdir() if not path.name.isdigit()]
        violations += [{"written": left}] if left else []
    return {"outcomes": outcomes, "violations": violations, "memory": memory, "seconds": seconds}


def work(folder: pathlib.Path, seed: int, first: int, stop: int) -> int:
    """Opens the cases one by one in ``folder`` and prints a line of JSON about each."""
    os.chdir(folder)
    warnings.filterwarnings("ignore", "Duplicate name")  # archives with a name given twice are made on purpose
    armed: list[pathlib.Path] = []
    sys.addaudithook(lambda event, values: _audit(event, values, armed[0]) if armed else None)
    for kind in range(len(fuzz_cases.KINDS)):  # what is imported on first use is imported here
        outcome_of(fuzz_cases.make_case(seed, kind), folder / str(kind), [])
        shutil.rmtree(folder / str(kind))
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in range(first, stop):
        case = fuzz_cases.make_case(seed, number)
        before, began = _peak(), sum(os.times()[:2])
        # Their default action ends the process, whatever it is doing.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        outcome = outcome_of(case, folder / str(number), armed)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        used = {"memory": _peak() - before, "seconds": sum(os.times()[:2]) - began}
        shutil.rmtree(folder / str(number))
        print(json.dumps({"kind": case.kind, "mutation": case.mutation, "outcome": outcome} | used), flush=True)
    return 0


def outcome_of(case: fuzz_cases.Case, folder: pathlib.Path, armed: list[pathlib.Path]) -> str:
    """``read``, ``refused``, or what went wrong; ``armed`` holds the folder while the readers are at work."""
    target = case.write(folder)
    present = sorted(path.name for path in folder.iterdir())
    armed.append(folder)
    try:
        arrays = {name: (tensor, np.array(tensor())) for name, tensor in open_source([target]).tensors.items()}
    except UserInputError as error:
        if not str(error).isprintable():
            return f"not one printable line: {str(error)!r}"
        arrays = None
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]!r}"
    finally:
        armed.clear()
    if sorted(path.name for path in folder.iterdir()) != present:
        return f"files changed: {sorted(path.name for path in folder.iterdir())}"
    if arrays is None:
        return "refused" if case.mutation else f"a valid file was refused: {error_line(target)}"
    if any((array.shape, array.dtype) != (tensor.shape, tensor.dtype) for tensor, array in arrays.values()):
        return "a shape or type that was not announced"
    if not case.mutation and {name: array.tobytes() for name, (_, array) in arrays.items()} != {
        name: array.tobytes() for name, array in case.arrays.items()
    }:
        return "other numbers than were written"
    return "read"


def error_line(target: pathlib.Path) -> str:
    """What a refused file is refused with."""
    try:
        open_source([target])
    except UserInputError as error:
        return str(error)
    return "nothing, the second time"


def _audit(event: str, values: tuple, folder: pathlib.Path) -> None:
    """Ends the process at anything that a reader of files has no business with."""
    if event in HARMLESS:
        return
    if event == "open":
        path, mode, flags = values
        writes = set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        inside = isinstance(path, int) or pathlib.Path(os.path.normpath(os.fsdecode(path))).is_relative_to(folder)
        if inside and not writes:
            return
    os.write(2, f"{folder.name}: {event} {values!r}\n".encode("utf-8", "backslashreplace")[:500])
    os._exit(FORBIDDEN)


def _peak() -> int:
    """Bytes of the largest memory the process has had so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    raise SystemExit(main())
