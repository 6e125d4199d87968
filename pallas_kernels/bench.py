"""Every implementation on the same shapes in one run: ``python -m pallas_kernels.bench``.

Prints milliseconds (median, quartiles), TFLOP/s, the share of the device's peak, the time over that of ``cudnn``
without entropy, and what the entropy costs; writes all of it as JSON. Implementations take turns in every round. What
cannot run is listed with its reason. Exit codes: 1 a failure, or nothing ran; 2 wrong options; 130 interrupted.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.api import IMPLEMENTATIONS, attention, why_not
from pallas_kernels.attention.cases import CASES, Case
from pallas_kernels.attention.problem import Problem
from pallas_kernels.attention.target import current_target
from pallas_kernels.profiling import environment, measure, peak_tflops
from pallas_kernels.report import Parser, file_path, leave, write_report
from pallas_kernels.spectrum import entropy_spectrum_ratio

GROUPS = ("infinity", "fa3", "pruned", "tails")
SPECTRUM_MAPS = (40, 12, 12)
"""One layer's head-averaged map per layer of the largest model, at the scale where layers are judged."""

_LARGEST_DENSE = 2**31
"""Elements of the score matrix up to which the dense form is timed: several float32 copies of it are alive at once."""

_TIMERS = {
    "profiler": "the sum of a call's kernel times, without launches and gaps",
    "wall": "the host's clock around a call, launches included: not comparable with kernel times",
}


@dataclass(frozen=True)
class Record:
    """One implementation on one case.

    Attributes:
      implementation: its name.
      group: the case's group.
      case: the case's name.
      dtype: of the inputs.
      with_entropy: whether the entropy was asked for.
      milliseconds: median, or None where it did not run.
      quartiles: of the milliseconds.
      timer: ``profiler`` or ``wall``, see :class:`pallas_kernels.profiling.Timing`.
      tflops: TFLOP/s of the two products over visible keys.
      peak_share: of the device's published peak; None where that is unknown.
      ratio_to_cudnn: time over that of ``cudnn`` without entropy; None where that did not run.
      entropy_cost: time over that without entropy, minus one; None for records without entropy.
      reason: why it cannot run here.
      failure: what went wrong.
    """

    implementation: str
    group: str
    case: str
    dtype: str
    with_entropy: bool
    milliseconds: float | None = None
    quartiles: tuple[float, float] | None = None
    timer: str | None = None
    tflops: float | None = None
    peak_share: float | None = None
    ratio_to_cudnn: float | None = None
    entropy_cost: float | None = None
    reason: str | None = None
    failure: str | None = None


def bench_case(
    case: Case, group: str, implementations: Sequence[str], dtype: str, *, entropies: Sequence[bool], rounds: int
) -> list[Record]:
    """Time all implementations on one case.

    Args:
      case: shapes and scores.
      group: the case's group, for the records.
      implementations: names.
      dtype: of the inputs.
      entropies: with, without, or both.
      rounds: timed calls of each.
    """
    arrays = case.draw_on_device(dtype)
    target = current_target(*arrays[:3])
    lines: dict[tuple[str, bool], Record] = {}
    programs: dict[tuple[str, bool], Callable[[], Any]] = {}
    lowered = {}
    for name in implementations:
        for with_entropy in entropies:
            key = (name, with_entropy)
            lines[key] = Record(name, group, case.name, dtype, with_entropy)
            problem = case.problem(dtype, with_entropy=with_entropy)
            try:
                reason = _too_large(name, problem) or why_not(name, problem, target)
                if reason is None:
                    lowered[key] = jax.jit(_caller(name, case, with_entropy)).lower(*arrays)
                lines[key] = dataclasses.replace(lines[key], reason=reason)
            except Exception as error:  # One line of the table; the others still count.
                lines[key] = dataclasses.replace(lines[key], failure=_one_line(error))
    # Compilers release the interpreter lock, and compiling takes longer than all timing together.
    pool = concurrent.futures.ThreadPoolExecutor()
    try:
        compiling = {key: pool.submit(program.compile) for key, program in lowered.items()}
        concurrent.futures.wait(compiling.values())
    finally:  # An interrupt does not wait for what has not begun.
        pool.shutdown(wait=False, cancel_futures=True)
    for key, future in compiling.items():
        try:
            run = future.result()
            jax.block_until_ready(run(*arrays))
            programs[key] = lambda run=run: run(*arrays)
        except Exception as error:
            lines[key] = dataclasses.replace(lines[key], failure=_one_line(error))
    timing = measure({f"{name} {entropy}": run for (name, entropy), run in programs.items()}, rounds)
    for key in programs:
        times = timing.milliseconds[f"{key[0]} {key[1]}"]
        low, median, high = (float(x) for x in np.quantile(times, (0.25, 0.5, 0.75)))
        tflops = case.flops / median / 1e9
        peak = peak_tflops(target.kind, dtype)
        lines[key] = dataclasses.replace(
            lines[key],
            **{"milliseconds": median, "quartiles": (low, high), "timer": timing.timer},
            **{"tflops": tflops, "peak_share": peak and tflops / peak},
        )
    return [_compared(line, lines) for line in lines.values()]


def bench_spectrum(rounds: int) -> dict[str, Any]:
    """Milliseconds of the spectrum ratio of :data:`SPECTRUM_MAPS` maps, and its error against float64."""
    maps = jax.random.uniform(jax.random.key(0), SPECTRUM_MAPS, jnp.float32, 1.0, 6.0)
    run = jax.jit(entropy_spectrum_ratio)
    timing = measure({"spectrum": lambda: run(maps)}, rounds)
    low, median, high = (float(x) for x in np.quantile(timing.milliseconds["spectrum"], (0.25, 0.5, 0.75)))
    first, second, *_ = np.linalg.svd(np.asarray(maps, np.float64), compute_uv=False).T
    error = float(np.max(np.abs(np.asarray(run(maps)) * second / first - 1.0)))
    known = {"maps": SPECTRUM_MAPS, "timer": timing.timer, "relative_error": error}
    return {**known, "milliseconds": median, "quartiles": (low, high)}


def reduced(case: Case, heads: int | None, max_queries: int | None, max_keys: int | None) -> Case:
    """The case with fewer heads and shorter; a block mask does not survive shortening."""
    if heads is not None:
        case = case.shrunk(heads=heads)
    queries = min(case.num_queries, max_queries or case.num_queries)
    keys = min(case.num_keys, max_keys or case.num_keys)
    if (queries, keys) == (case.num_queries, case.num_keys):
        return case
    lengths = None if case.key_length is None else tuple(min(length, keys) for length in case.key_length)
    return dataclasses.replace(case, num_queries=queries, num_keys=keys, key_length=lengths, block_mask=None)


def _caller(name: str, case: Case, with_entropy: bool):
    options = {"scale": case.scale, "block_mask": case.block_mask, "with_entropy": with_entropy}
    return lambda q, k, v, lengths: attention(q, k, v, key_length=lengths, implementation=name, **options)


def _too_large(name: str, problem: Problem) -> str | None:
    scores = problem.batch * problem.heads * problem.num_queries * problem.num_keys
    if name == "reference" and scores > _LARGEST_DENSE:
        return f"{scores} scores: the dense form is timed up to {_LARGEST_DENSE}"
    return None


def _compared(line: Record, lines: dict[tuple[str, bool], Record]) -> Record:
    def over(other: Record | None) -> float | None:
        above, below = line.milliseconds, None if other is None else other.milliseconds
        return above / below if above and below else None

    plain = over(lines.get((line.implementation, False))) if line.with_entropy else None
    cost = None if plain is None else plain - 1.0
    return dataclasses.replace(line, ratio_to_cudnn=over(lines.get(("cudnn", False))), entropy_cost=cost)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}"


def _text(line: Record) -> str:
    kind = "entropy" if line.with_entropy else "plain"
    name = f"{line.implementation:<11} {line.group + '/' + line.case:<22} {kind:<8}"
    if line.milliseconds is None or line.quartiles is None:
        return f"{name} " + (f"FAILED: {line.failure}" if line.failure else f"not run: {line.reason}")
    spread = "{:.4f} to {:.4f}".format(*line.quartiles)
    parts = [f"{name} {line.milliseconds:9.4f} ms ({spread}) {line.tflops:7.1f} TFLOP/s"]
    if line.peak_share is not None:
        parts.append(f"{100 * line.peak_share:4.1f} % of peak")
    if line.ratio_to_cudnn is not None:
        parts.append(f"{line.ratio_to_cudnn:5.2f} x cudnn")
    if line.entropy_cost is not None:
        parts.append(f"entropy {100 * line.entropy_cost:+.1f} %")
    return "  ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for name in ("rounds", "heads", "max_queries", "max_keys"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: must be at least 1")
    try:
        return _run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    head = environment()
    print(f"on {head['device']}, driver {head['driver']}, jax {head['versions']['jax']}, {head['date']}", flush=True)
    report: dict[str, Any] = {**head, "dtype": options.dtype, "rounds": options.rounds, "timers": [], "records": []}
    report["reduced"] = {name: getattr(options, name) for name in ("heads", "max_queries", "max_keys")}
    failed = ran = False
    entropies = {"both": (False, True), "with": (True,), "without": (False,)}[options.entropy]
    for group, full in ((name, case) for name in options.cases for case in CASES[name]):
        case = reduced(full, options.heads, options.max_queries, options.max_keys)
        lines = bench_case(
            case, group, options.implementations, options.dtype, entropies=entropies, rounds=options.rounds
        )
        for timer in {line.timer for line in lines if line.timer} - set(report["timers"]):
            print(f"timer: {timer} ({_TIMERS[timer]})")
            report["timers"].append(timer)
        for line in lines:
            print(_text(line), flush=True)
            failed |= line.failure is not None
            ran |= line.milliseconds is not None
            report["records"].append(dataclasses.asdict(line))
        write_report(options.json, report)
    if options.spectrum:
        report["spectrum"] = bench_spectrum(options.rounds)
        milliseconds, error = (report["spectrum"][name] for name in ("milliseconds", "relative_error"))
        print(f"spectrum ratio of {SPECTRUM_MAPS} maps: {milliseconds:.4f} ms, relative error {error:.1e}")
        ran, failed = True, failed or not error < 1e-3
        write_report(options.json, report)
    print("" if ran else "nothing ran\n", end="")
    return int(failed or not ran)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m pallas_kernels.bench", description="Times every attention implementation on the same shapes."
    )
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--cases", nargs="*", choices=GROUPS, default=list(GROUPS), help="groups of cases")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--entropy", choices=("both", "with", "without"), default="both")
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each implementation (default 10)")
    parser.add_argument("--heads", type=int, help="reduce every case to so many heads (slow machines)")
    parser.add_argument("--max-queries", type=int, help="shorten every case (slow machines)")
    parser.add_argument("--max-keys", type=int, help="shorten every case (slow machines)")
    parser.add_argument("--spectrum", action="store_true", help="also time the spectrum ratio")
    parser.add_argument("--json", type=file_path, help="also write everything here, after every case")
    return parser


if __name__ == "__main__":
    leave(main())
