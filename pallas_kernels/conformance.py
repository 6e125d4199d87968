"""Every implementation against float64, on the device at hand: ``python -m pallas_kernels.conformance``.

Prints one table, implementation x case x dtype, with the errors of values, log-sum-exp and entropy, and exits with 1 if
any is over its bound. Queries are sampled in long cases, because rows are independent and float64 is slow.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import rankdata

from pallas_kernels.attention.api import IMPLEMENTATIONS, attention, implementation_module, kernel, why_not
from pallas_kernels.attention.cases import CASES, Case
from pallas_kernels.attention.float64 import ExactAttention, attend
from pallas_kernels.attention.output import AttentionOutput
from pallas_kernels.attention.reference import MASKED
from pallas_kernels.attention.target import Target, current_target
from pallas_kernels.report import Parser, file_path, leave, write_report

DTYPES = ("float32", "bfloat16", "float16")
MAX_ROWS = 96
"""Queries that are compared per case."""

_INTERPRETED = Target("tpu", "TPU v5e")

_SPREAD = 1e-2
"""Spread of the exact entropies (nats) below which their order is not asked for."""


@dataclass(frozen=True)
class Bounds:
    """Largest errors allowed: relative to the largest magnitude or to one, whichever is larger.

    Attributes:
      out: of the values.
      log_sum_exp: of the log-sum-exp.
      entropy: of the entropy.
      rank: smallest Spearman correlation of the entropies of a head with the exact ones.
    """

    out: float
    log_sum_exp: float
    entropy: float
    rank: float = 0.999

    def hold(self, errors: Mapping[str, float]) -> bool:
        """Whether errors, as :func:`measure` names them, are within the bounds."""
        largest = all(errors[name] <= getattr(self, name) for name in ("out", "log_sum_exp", "entropy"))
        return largest and errors["rank"] >= self.rank


BOUNDS = {
    "float32": Bounds(out=1e-5, log_sum_exp=1e-5, entropy=1e-5),
    # Values and weights are rounded to 8 and 11 bits; the statistics are float32 whatever the inputs are.
    "bfloat16": Bounds(out=8e-3, log_sum_exp=1e-5, entropy=2e-5),
    "float16": Bounds(out=1e-3, log_sum_exp=1e-5, entropy=2e-5),
}
IDENTITY_BOUNDS = Bounds(out=8e-3, log_sum_exp=1e-4, entropy=2e-2)
"""Of ``cudnn``, whose entropy comes from a mean key that is rounded to the inputs' dtype."""


@dataclass(frozen=True)
class Record:
    """One line of the table. Errors are None where the implementation does not run, which ``reason`` explains."""

    implementation: str
    group: str
    case: str
    dtype: str
    out: float | None = None
    log_sum_exp: float | None = None
    entropy: float | None = None
    rank: float | None = None
    repeats: bool | None = None
    passed: bool | None = None
    reason: str | None = None


def measure(got: AttentionOutput, want: ExactAttention, rows: np.ndarray) -> dict[str, float]:
    """Errors of a result against the exact rows; ``inf`` where it is not finite or masked rows are not marked.

    Args:
      got: the result for all queries.
      want: the exact result for the queries ``rows``.
      rows: their positions.
    """
    out = np.asarray(got.out, np.float64)[:, rows]
    log_sum_exp = np.asarray(got.log_sum_exp, np.float64)[..., rows]
    seen = np.isfinite(want.log_sum_exp)
    errors = {"out": _relative(out, want.out), "log_sum_exp": _relative(log_sum_exp[seen], want.log_sum_exp[seen])}
    blind = ~seen
    if np.any(log_sum_exp[blind] != np.float32(MASKED)):
        errors["log_sum_exp"] = float("inf")
    if np.any(out.swapaxes(1, 2)[blind] != 0.0):
        errors["out"] = float("inf")
    if got.entropy is not None:
        entropy = np.asarray(got.entropy, np.float64)[..., rows]
        errors["entropy"] = _relative(entropy, want.entropy)
        if np.any(entropy < 0.0) or np.any(entropy[blind] != 0.0):
            errors["entropy"] = float("inf")
        errors["rank"] = min(
            (_rank(a, b) for a, b in zip(_heads(entropy), _heads(want.entropy), strict=True)), default=1.0
        )
    return errors


def check(
    implementation: str, case: Case, dtype: str, *, group: str = "", config: Any = None, interpret: bool = False
) -> Record:
    """Run one case twice and compare: with float64, with itself, and with the result without entropy.

    Args:
      implementation: one of :data:`IMPLEMENTATIONS`.
      case: shapes and scores.
      dtype: of the inputs, a name in :data:`DTYPES`.
      group: the case's group, for the record.
      config: tile sizes of a kernel; by default those that users get.
      interpret: run ``mosaic_tpu`` in the TPU interpreter, on a machine without one.
    """
    line = Record(implementation, group, case.name, dtype)
    q, k, v = (jnp.asarray(x, dtype) for x in case.draw())
    lengths = None if case.key_length is None else jnp.asarray(case.key_length, jnp.int32)
    problem = case.problem(dtype, with_entropy=True)
    interpreted = interpret and implementation == "mosaic_tpu"
    target = _INTERPRETED if interpreted else current_target(q)
    reason = why_not(implementation, problem, target)
    if reason is not None:
        return dataclasses.replace(line, reason=reason)
    if interpreted and config is None:
        config = implementation_module(implementation).default_config(problem, target)
    settings = (implementation, case.scale, case.block_mask, config, interpreted)
    compiled = [_program(attention, *settings, with_entropy) for with_entropy in (True, False)]
    try:
        with _tpu_interpreter() if interpreted else contextlib.nullcontext():
            got, again = (jax.block_until_ready(compiled[0](q, k, v, lengths)) for _ in range(2))
            plain = jax.block_until_ready(compiled[1](q, k, v, lengths))
    except Exception as error:
        # Whatever a compiler or driver throws is one line of the table; the other lines still count.
        return dataclasses.replace(
            line, passed=False, reason=": ".join((type(error).__name__, *str(error).splitlines()[:1]))
        )
    rows = sample_rows(case.num_queries)
    want = attend(q, k, v, scale=case.scale, key_length=lengths, block_mask=case.block_mask, rows=rows)
    errors = measure(got, want, rows)
    without = measure(plain, want, rows)
    errors = {name: max(error, without.get(name, error)) for name, error in errors.items()}
    repeats = all(np.array_equal(a, b) for a, b in zip(got, again, strict=True))
    bounds = IDENTITY_BOUNDS if implementation == "cudnn" else BOUNDS[dtype]
    return dataclasses.replace(line, **errors, repeats=repeats, passed=repeats and bounds.hold(errors))


def run(
    implementations: Iterable[str] = IMPLEMENTATIONS,
    groups: Sequence[str] = tuple(CASES),
    dtypes: Sequence[str] = DTYPES,
    *,
    heads: int | None = None,
    interpret: bool = False,
) -> Iterator[Record]:
    """All lines of the table, one after the other.

    Args:
      implementations: names.
      groups: keys of :data:`CASES`.
      dtypes: names in :data:`DTYPES`.
      heads: reduce every case to so many heads, for slow machines.
      interpret: see :func:`check`.
    """
    for group in groups:
        for full in CASES[group]:
            case = full if heads is None else full.shrunk(heads=heads)
            for dtype in dtypes:
                for implementation in implementations:
                    yield check(implementation, case, dtype, group=group, interpret=interpret)


def sample_rows(num_queries: int, most: int = MAX_ROWS) -> np.ndarray:
    """Which queries are compared: both ends, both sides of the tile edges, and random ones between."""
    if num_queries <= most:
        return np.arange(num_queries)
    edges = [at for edge in range(0, num_queries, 64) for at in (edge - 1, edge) if 0 <= at < num_queries]
    random = np.random.default_rng(num_queries)
    chosen = {0, num_queries - 1, *random.choice(edges, min(len(edges), most // 2), replace=False).tolist()}
    rest = random.permutation(num_queries).tolist()
    while len(chosen) < most:
        chosen.add(rest.pop())
    return np.array(sorted(chosen))


@functools.lru_cache(maxsize=64)
def _program(
    run: Callable,
    implementation: str,
    scale: float,
    block_mask: Any,
    config: Any,
    interpreted: bool,
    with_entropy: bool,
):
    """``(q, k, v, lengths) -> output``, compiled once for all cases that differ in nothing but numbers."""
    options = {"scale": scale, "block_mask": block_mask, "with_entropy": with_entropy}
    if config is not None:
        call = kernel(implementation, config=config, **options)
    else:
        call = lambda q, k, v, lengths: run(q, k, v, key_length=lengths, implementation=implementation, **options)
    # The interpreter is a large program that runs for a moment: compiling it dominates.
    return jax.jit(call, compiler_options={"xla_backend_optimization_level": 0} if interpreted else None)


def _tpu_interpreter() -> contextlib.AbstractContextManager:
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.force_tpu_interpret_mode(pltpu.InterpretParams())


def _relative(got: np.ndarray, want: np.ndarray) -> float:
    if not np.all(np.isfinite(got)):
        return float("inf")
    return float(np.max(np.abs(got - want), initial=0.0) / max(1.0, np.max(np.abs(want), initial=0.0)))


def _heads(entropy: np.ndarray) -> np.ndarray:
    return entropy.reshape(-1, entropy.shape[-1])


def _rank(got: np.ndarray, want: np.ndarray) -> float:
    if len(want) < 8 or np.ptp(want) < _SPREAD:
        return 1.0
    return float(np.corrcoef(rankdata(got), rankdata(want))[0, 1]) if np.ptp(got) > 0 else 0.0


def _text(line: Record) -> str:
    name = f"{line.implementation:<11} {line.group + '/' + line.case:<24} {line.dtype:<9}"
    if line.out is None:
        return f"{name} {'FAILED' if line.passed is False else 'not run'}: {line.reason}"
    return (
        f"{name} out {line.out:.1e}  lse {line.log_sum_exp:.1e}  entropy {line.entropy:.1e}  rank {line.rank:.5f}  "
        f"{'repeats' if line.repeats else 'DIFFERS'}  {'ok' if line.passed else 'FAILED'}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(prog="python -m pallas_kernels.conformance", description="Holds every implementation to float64.")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--heads", type=int, help="reduce every case to so many heads (slow machines)")
    parser.add_argument("--interpret", action="store_true", help="run mosaic_tpu in the TPU interpreter")
    parser.add_argument("--json", type=file_path, help="also write the table here, after every line")
    options = parser.parse_args(arguments)
    if options.heads is not None and options.heads < 1:
        parser.error(f"--heads {options.heads}: must be at least 1; leave it out for the full cases")
    if options.interpret and "mosaic_tpu" not in options.implementations:
        parser.error("--interpret: must come with --implementations mosaic_tpu, the only one it is for; add it")
    try:
        return _run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    print(f"on {current_target()}, jax {jax.__version__}")
    records = []
    for line in run(
        options.implementations, options.cases, options.dtypes, heads=options.heads, interpret=options.interpret
    ):
        print(_text(line), flush=True)
        records.append(line)
        write_report(options.json, [dataclasses.asdict(record) for record in records])
    failed = [line for line in records if line.passed is False]
    passed = [line for line in records if line.passed]
    print(f"{len(passed)} passed, {len(failed)} failed, of {len(records)}")
    if not passed and not failed:
        print("nothing ran: see the reasons above", file=sys.stderr)
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    leave(main())
