"""Compiles every GPU kernel for devices that are not there: Mosaic GPU for sm_90a, Triton for what it supports.

    python benchmarks/aot_gpu.py [--only mosaic|triton]

Prints a line per program with its registers and spilled bytes, as the assembler gives them (nothing where the same
kernel was compiled before). Exit code 0 if all compile, 1 if any does not, 2 without a compiler for CUDA.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.cases import CASES, Case, windows
from pallas_kernels.attention.gpu_topology import described_gpu
from pallas_kernels.attention.mosaic_gpu import MosaicGpuConfig, candidates, mosaic_gpu_attention, why_not
from pallas_kernels.attention.problem import Problem
from pallas_kernels.attention.target import Target

ENVIRONMENT = {
    # Nothing can be timed here.
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",
    "MOSAIC_GPU_DUMP_PTXAS": "1",
}
"""Environment of a process that only compiles; must be set before JAX starts its backends."""

LAST_SCALE = CASES["infinity"][-1]
HEAD_DIMS = (64, 72, 80, 96, 100, 104, 112, 120, 128, 160, 192, 256)
DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16}
HOPPER = Target("cuda", "NVIDIA H200", (9, 0))


@dataclass(frozen=True)
class Program:
    """Something to compile.

    Attributes:
      kernel: whose it is, for the table.
      target: what it is compiled for, such as ``sm_90``.
      case: what it is.
      build: compiles it and returns what is known of the result: ``registers``, ``spill_bytes``, ``serialised``
        where the assembler could not keep the tensor cores' instructions in flight.
    """

    kernel: str
    target: str
    case: str
    build: Callable[[], dict[str, Any]]


def why_no_cuda_compiler() -> str | None:
    """The reason and the remedy, in one line, or None where CUDA programs can be compiled."""
    found = importlib.util.find_spec("jax_plugins")
    names = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    if found is None or not any(importlib.util.find_spec(name) for name in names):
        return "the CUDA plugin of JAX is not installed: it holds the GPU compiler; run make aot-gpu"
    return None


@contextmanager
def captured() -> Iterator[Callable[[], str]]:
    """What the process writes to its standard streams, C++ included, is kept back; gives a function that reads it."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)

        def read() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            yield read
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, original in zip((1, 2), saved, strict=True):
                os.dup2(original, stream)
                os.close(original)


def assembler_facts(text: str) -> dict[str, Any]:
    """Registers, spilled bytes and warnings out of the assembler's report."""
    registers = re.findall(r"Used (\d+) registers", text)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    return {
        "registers": max(map(int, registers), default=None),
        "spill_bytes": max((int(stores) + int(loads) for stores, loads in spills), default=None),
        "serialised": "instructions are serialized" in text,
    }


def compile_mosaic(case: Case, dtype: str, with_entropy: bool, config: MosaicGpuConfig | None = None) -> dict[str, Any]:
    """Compile the Hopper kernel for one case.

    Raises:
      NotImplementedError: the kernel refuses the case.
    """
    shapes = [(case.batch, length, case.heads, case.head_dim) for length in (case.num_queries, *[case.num_keys] * 2)]
    ragged = case.key_length is not None
    problem = Problem(
        *(case.batch, case.num_queries, case.num_keys, case.heads, case.head_dim, jnp.dtype(DTYPES[dtype])),
        *(ragged, case.block_mask, with_entropy),
    )
    if reason := why_not(problem, HOPPER):
        raise NotImplementedError(reason)

    def call(q, k, v, lengths):
        return mosaic_gpu_attention(
            *(q, k, v),
            scale=case.scale,
            key_length=lengths if ragged else None,
            block_mask=case.block_mask,
            with_entropy=with_entropy,
            config=config,
        )

    with described_gpu("H200") as sharding, captured() as output:
        arguments = [jax.ShapeDtypeStruct(shape, DTYPES[dtype], sharding=sharding) for shape in shapes]
        lengths = jax.ShapeDtypeStruct((case.batch,), jnp.int32, sharding=sharding)
        compiled = jax.jit(call).trace(*arguments, lengths).lower().compile()
        facts = assembler_facts(output())
    if "mosaic_gpu" not in (compiled.as_text() or ""):
        raise RuntimeError("no Mosaic GPU kernel in the compiled program")
    return facts


def mosaic_programs() -> Iterator[Program]:
    """All flags and all configurations at the last scale, all head dims, all scales, awkward lengths."""
    pattern = windows(LAST_SCALE.num_queries, LAST_SCALE.num_keys)

    def program(case: Case, dtype: str, with_entropy: bool, config: MosaicGpuConfig | None = None) -> Program:
        name = f"{case.name} {dtype}{' entropy' if with_entropy else ''}"
        return Program("mosaic", "sm_90", name, lambda: compile_mosaic(case, dtype, with_entropy, config))

    for dtype, entropy, ragged, masked in itertools.product(DTYPES, (False, True), (False, True), (False, True)):
        case = dataclasses.replace(
            LAST_SCALE,
            name=f"64x64{' ragged' if ragged else ''}{' masked' if masked else ''}",
            key_length=(10521, 6425) if ragged else None,
            block_mask=pattern if masked else None,
        )
        yield program(case, dtype, entropy)
    for width, entropy in itertools.product(HEAD_DIMS, (False, True)):
        case = Case(f"head dim {width}", 2, 1600, 3121, 16, width, 0.1, key_length=(3121, 77))
        yield program(case, "bf16", entropy)
    for case in (*CASES["infinity"][:-1], *CASES["tails"], *CASES["edges"]):
        yield program(case, "bf16", True)
    for width in (64, 128, 256):
        case = dataclasses.replace(LAST_SCALE, head_dim=width)
        problem = Problem(2, case.num_queries, case.num_keys, case.heads, width, jnp.dtype("bfloat16"))
        for config in candidates(problem, HOPPER):
            tiles = f"{config.compute_warpgroups}x{config.query_tile}x{config.key_tile}x{config.stages}"
            name = f"h{width} {tiles} {config.schedule}{' persistent' if config.persistent else ''}"
            yield program(dataclasses.replace(case, name=name), "bf16", True, config)


def triton_programs() -> Iterator[Program]:
    """The programs of the Triton kernel; where its compiler is missing, one program that says so."""
    try:
        from aot_cases_triton import compile_cases  # pyright: ignore[reportMissingImports]

        cases = compile_cases()
    except ImportError as error:
        reason = f"{error}; run make aot-gpu"

        def missing() -> dict[str, Any]:
            raise NotImplementedError(reason)

        yield Program("triton", "", "all", missing)
        return
    for name, capability, thunk in cases:
        digits = "".join(map(str, capability)) if isinstance(capability, tuple) else str(capability)
        yield Program("triton", f"sm_{digits}", name, thunk)


def report(programs: Iterable[Program]) -> int:
    """Compile one program after the other, print the table, return the exit code."""
    print(f"{'kernel':<8}{'target':<8}{'program':<52}{'seconds':>8}{'registers':>10}{'spilled bytes':>15}")
    total, failures = 0, []
    for program in programs:
        total += 1
        start, facts, failure = time.perf_counter(), {}, None
        try:
            facts = program.build()
        except Exception as error:
            # Whatever a compiler throws is one line of the table; the other lines still count.
            failure = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if facts.get("serialised"):
            failure = "the assembler serialised the tensor cores' instructions"
        line = f"{program.kernel:<8}{program.target:<8}{program.case:<52}{time.perf_counter() - start:8.1f}"
        numbers = "".join(f"{'' if facts.get(key) is None else facts[key]:>{width}}" for key, width in COLUMNS)
        print(f"{line}{numbers if failure is None else '  FAILED'}", flush=True)
        if failure is not None:
            failures.append(f"{program.kernel} {program.target} {program.case}: {failure}")
    for failure in failures:
        print(failure)
    print(f"{total - len(failures)} of {total} programs compiled for CUDA; jax {jax.__version__}")
    return 1 if failures else 0


COLUMNS = (("registers", 10), ("spill_bytes", 15))
"""Numbers of the table and their widths."""


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description="Compile every GPU kernel without a GPU.")
    parser.add_argument("--only", choices=("mosaic", "triton"))
    only = parser.parse_args(arguments).only
    reason = why_no_cuda_compiler()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    os.environ.update(ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    # A program out of the cache has no assembler's report.
    jax.config.update("jax_enable_compilation_cache", False)
    groups = {"mosaic": mosaic_programs, "triton": triton_programs}
    return report(itertools.chain.from_iterable(groups[name]() for name in groups if only in (None, name)))


if __name__ == "__main__":
    sys.exit(main())
