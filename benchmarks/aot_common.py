"""What the commands of ``make aot-gpu`` and ``make aot-tpu`` share: the cases of the kernels, and the table."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.ahead_of_time import Facts, Program, compile_all
from pallas_kernels.attention.cases import CASES, Case, windows

LAST_SCALE = CASES["infinity"][-1]
DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16, "fp32": jnp.float32}

Column = tuple[str, int, Callable[[Facts], str]]
"""Heading, width, and the number out of what is known of a program."""


@dataclass(frozen=True)
class Variant:
    """One program of a kernel; ``dtype`` is a key of :data:`DTYPES`."""

    case: Case
    dtype: str
    with_entropy: bool

    @property
    def name(self) -> str:
        return f"{self.case.name} {self.dtype}{' entropy' if self.with_entropy else ''}"

    def describe(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """``q, k, v`` and the key lengths."""
        arrays = (jax.ShapeDtypeStruct(shape, DTYPES[self.dtype]) for shape in self.case.shapes)
        return *arrays, jax.ShapeDtypeStruct((self.case.batch,), jnp.int32)


def variants(
    dtypes: Iterable[str], head_dims: Iterable[tuple[int, str, bool]], groups: Sequence[str]
) -> Iterator[Variant]:
    """All flags at the last scale, all head dims, all other scales, awkward lengths.

    Args:
      dtypes: of the last scale.
      head_dims: widths with the dtype and whether the entropy is asked for.
      groups: keys of ``CASES`` beside ``infinity``.
    """
    pattern = windows(LAST_SCALE.num_queries, LAST_SCALE.num_keys)
    for dtype, entropy, ragged, masked in itertools.product(dtypes, (False, True), (False, True), (False, True)):
        case = dataclasses.replace(
            LAST_SCALE,
            name=f"64x64{' ragged' if ragged else ''}{' masked' if masked else ''}",
            key_length=(10521, 6425) if ragged else None,
            block_mask=pattern if masked else None,
        )
        yield Variant(case, dtype, entropy)
    for width, dtype, entropy in head_dims:
        yield Variant(Case(f"head dim {width}", 2, 1600, 3121, 16, width, 0.1, key_length=(3121, 77)), dtype, entropy)
    for case in (*CASES["infinity"][:-1], *itertools.chain.from_iterable(CASES[group] for group in groups)):
        yield Variant(case, "bf16", True)


def report(programs: Iterable[Program], columns: Sequence[Column], compiler: str) -> int:
    """Compile one program after the other, print the table, return the exit code."""
    print(f"{'target':<14}{'program':<52}{'seconds':>8}" + "".join(f"{name:>{width}}" for name, width, _ in columns))
    total, failures = 0, []
    for done in compile_all(programs):
        total += 1
        if done.failure is None:
            end = "".join(f"{number(done.facts):>{width}}" for _, width, number in columns)
        else:
            failures.append(done)
            end = "  FAILED"
        print(f"{done.target:<14}{done.case:<52}{done.seconds:8.1f}{end}", flush=True)
    for failed in failures:
        print(f"{failed.target} {failed.case}: {failed.failure}")
    print(f"{total - len(failures)} of {total} programs compiled for {compiler}; jax {jax.__version__}")
    return 1 if failures else 0


def start(reason: str | None, environment: Mapping[str, str]) -> bool:
    """Make this a process that only compiles; False, with the reason told, where there is no compiler."""
    if reason is not None:
        print(reason, file=sys.stderr)
        return False
    os.environ.update(environment)
    jax.config.update("jax_platforms", "cpu")
    # An executable for a device that is not there can be written to the cache but not read back, and a program out of
    # the cache has no assembler's report.
    jax.config.update("jax_enable_compilation_cache", False)
    return True
