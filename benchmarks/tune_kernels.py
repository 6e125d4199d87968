"""Times the configurations of one kernel at the key cases and keeps the fastest that agrees with float64.

    python benchmarks/tune_kernels.py mosaic_gpu --json F [--heads 1]

A step of ``gpu_suite.py``, in a process of its own because a wrong configuration may hang. F is written before and
after a configuration is lowered, compiled, run and timed, and names those that are being tried; run again with the
same F, the command leaves out what did not return.
"""

import argparse
import concurrent.futures
import json
import pathlib
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from pallas_kernels.attention.api import IMPLEMENTATIONS, implementation_module, kernel, why_not
from pallas_kernels.attention.cases import CASES, Case
from pallas_kernels.attention.target import current_target
from pallas_kernels.attention.tuning import as_fields, size_class
from pallas_kernels.conformance import check
from pallas_kernels.profiling import measure
from pallas_kernels.report import Parser, file_path, write_report

KEY_CASES = (("infinity", "64x64"), ("infinity", "32x32"), ("infinity", "8x8"), ("fa3", "4096-h64"))
"""One for every size class at the width of the models, and the narrow heads."""


MOST_WITHOUT_ENTROPY = 8
"""How many of the configurations that are fastest with entropy are timed without."""


class Log:
    """What was tried and how it went, on disk; several threads may compile at once.

    Raises:
      ValueError: a file that is not such a log.
    """

    def __init__(self, path: pathlib.Path, implementation: str):
        self.path = path
        self.lock = threading.RLock()
        fresh = {"implementation": implementation, "trying": [], "bad": [], "good": [], "timed": []}
        try:
            self.state = json.loads(path.read_text()) if path.is_file() else fresh
            lost = list(self.state["trying"])
            if self.state["implementation"] != implementation or set(self.state) != set(fresh):
                raise KeyError
        except (KeyError, OSError, TypeError, ValueError, RecursionError):
            raise ValueError(f"--json {path}: is no log of tuning {implementation}; choose another file") from None
        self.save()
        for what in lost:
            self.bad(what, "did not return")

    def save(self) -> None:
        write_report(self.path, self.state)

    def trying(self, *these: dict) -> None:
        """Say what will be blamed if nothing returns; nothing with no argument."""
        with self.lock:
            self.state["trying"] = list(these)
            self.save()

    def compiled(self, what: dict, program: Callable[[], Any]) -> Any:
        """What ``program`` returns, called beside others; blamed while it runs."""
        with self.lock:
            self.trying(*self.state["trying"], what)
        try:
            return program()
        finally:
            with self.lock:
                self.trying(*(other for other in self.state["trying"] if other != what))

    def bad(self, what: dict, reason: str) -> None:
        print(f"{what['case']} {what['config']}: {reason}", flush=True)
        self.state["bad"].append({**what, "reason": reason})
        self.trying()

    def is_bad(self, what: dict) -> bool:
        return any({name: entry[name] for name in what} == what for entry in self.state["bad"])


def survey(log: Log, name: str, case: Case, dtype: str, configs: Sequence, with_entropy: bool, rounds: int) -> list:
    """``(milliseconds, configuration, timer)`` of all that compile and return, fastest first."""
    arrays = case.draw_on_device(dtype)
    options = {"scale": case.scale, "block_mask": case.block_mask, "with_entropy": with_entropy}

    def attempt(config, step):
        if isinstance(step, Exception):
            return step
        try:
            return log.compiled(label(case, config), step)
        except Exception as error:  # Too much shared memory and the like: a reason to leave it out, not to stop.
            return error

    hopeful = [config for config in configs if not log.is_bad(label(case, config))]
    functions = [jax.jit(kernel(name, config=config, **options)) for config in hopeful]
    lowered = [
        attempt(config, lambda function=function: function.lower(*arrays))
        for config, function in zip(hopeful, functions, strict=True)
    ]
    steps = [program if isinstance(program, Exception) else program.compile for program in lowered]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = list(pool.map(attempt, hopeful, steps))
    running = {}
    for config, program in zip(hopeful, programs, strict=True):
        what = label(case, config)
        log.trying(what)
        try:
            if isinstance(program, Exception):
                raise program
            jax.block_until_ready(program(*arrays))
        except Exception as error:
            log.bad(what, f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:200]}")
            continue
        running[str(len(running))] = (config, lambda program=program: program(*arrays))
    runs = {key: run for key, (_, run) in running.items()}
    timing = measure(runs, rounds, lambda key: log.trying(label(case, running[key][0])))
    log.trying()
    ranked = [(float(np.median(timing.milliseconds[key])), config) for key, (config, _) in running.items()]
    return [(time, config, timing.timer) for time, config in sorted(ranked, key=lambda pair: pair[0])]


def sound(log: Log, name: str, case: Case, dtype: str, config) -> bool:
    """Whether a configuration agrees with float64, on one head of one batch row of the case."""
    what = label(case, config)
    if what in log.state["good"]:
        return True
    if log.is_bad(what):
        return False
    log.trying(what)
    record = check(name, case.shrunk(heads=1, batch=1), dtype, config=config)
    if not record.passed:
        log.bad(what, record.reason or f"wrong: out {record.out}, entropy {record.entropy}")
        return False
    log.state["good"].append(what)
    log.trying()
    return True


def label(case: Case, config) -> dict:
    return {"case": case.name, "head_dim": case.head_dim, "config": as_fields(config)}


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "implementation", choices=[name for name in IMPLEMENTATIONS if name not in ("reference", "xla")]
    )
    parser.add_argument("--json", type=file_path, required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--heads", type=int, help="reduce every case to so many heads (slow machines)")
    options = parser.parse_args(arguments)
    name = options.implementation
    try:
        log = Log(options.json, name)
    except ValueError as error:
        parser.error(str(error))
    target = current_target()
    for group, wanted in KEY_CASES:
        case = next(case for case in CASES[group] if case.name == wanted)
        case = case if options.heads is None else case.shrunk(heads=options.heads)
        problem = case.problem(options.dtype, with_entropy=True)
        reason = why_not(name, problem, target)
        if reason is not None or case.name in [
            entry["case"] for entry in log.state["timed"] if not entry["with_entropy"]
        ]:
            print(f"{case.name}: {reason or 'timed before'}")
            continue
        configs = implementation_module(name).candidates(problem, target)
        for with_entropy in (True, False):
            ranked = survey(log, name, case, options.dtype, configs, with_entropy, options.rounds)
            best = next((entry for entry in ranked if sound(log, name, case, options.dtype, entry[1])), None)
            if best is not None:
                timed = {"implementation": name, "dtype": options.dtype, "size": size_class(problem)}
                timed |= {**label(case, best[1]), "with_entropy": with_entropy, "milliseconds": best[0]}
                log.state["timed"].append({**timed, "timer": best[2], "tried": len(ranked)})
                print(f"{case.name} {'entropy' if with_entropy else 'plain'}: {best[0]:.4f} ms {best[1]}", flush=True)
            configs = [config for _, config, _ in ranked[:MOST_WITHOUT_ENTROPY]]
        log.save()
    log.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())
