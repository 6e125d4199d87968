"""Compiles every GPU kernel for devices that are not there: Mosaic GPU for sm_90a, Triton for what it supports.

    python benchmarks/aot_gpu.py [--only mosaic|triton]

Prints a line per program with its registers and spilled bytes, as the assembler gives them (nothing where the same
kernel was compiled before). Exit code 0 if all compile, 1 if any does not, 2 without a compiler for CUDA.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from aot_common import DTYPES, LAST_SCALE, Variant, report, start, variants

from pallas_kernels.ahead_of_time import (
    GPU_ENVIRONMENT,
    Facts,
    Program,
    compile_for,
    gpu_facts,
    gpu_mesh,
    placed,
    why_no_gpu_compiler,
)
from pallas_kernels.attention.mosaic_gpu import MosaicGpuConfig, candidates, mosaic_gpu_attention, why_not
from pallas_kernels.attention.target import Target
from pallas_kernels.report import Parser

HEAD_DIMS = (64, 72, 80, 96, 100, 104, 112, 120, 128, 160, 192, 256)
HOPPER = Target("cuda", "NVIDIA H200", (9, 0))


def _number(name: str, facts: Facts) -> str:
    return "" if facts.get(name) is None else str(facts[name])


COLUMNS = (
    ("registers", 10, functools.partial(_number, "registers")),
    ("spilled bytes", 15, functools.partial(_number, "spill_bytes")),
)


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


def compile_mosaic(variant: Variant, config: MosaicGpuConfig | None = None) -> Facts:
    """Compile the Hopper kernel for one case.

    Raises:
      NotImplementedError: the kernel refuses the case.
    """
    case = variant.case
    if reason := why_not(case.problem(DTYPES[variant.dtype], with_entropy=variant.with_entropy), HOPPER):
        raise NotImplementedError(reason)

    def call(q, k, v, lengths):
        return mosaic_gpu_attention(
            *(q, k, v),
            scale=case.scale,
            key_length=None if case.key_length is None else lengths,
            block_mask=case.block_mask,
            with_entropy=variant.with_entropy,
            config=config,
        )

    mesh = gpu_mesh("H200")
    with captured() as output:
        compiled = compile_for(mesh, jax.jit(call), *placed(variant.describe(), mesh))
        facts = gpu_facts(output())
    if "mosaic_gpu" not in (compiled.as_text() or ""):
        raise RuntimeError("no Mosaic GPU kernel in the compiled program")
    return facts


def mosaic_programs() -> Iterator[Program]:
    """All flags and all configurations at the last scale, all head dims, all scales, awkward lengths."""

    def program(name: str, variant: Variant, config: MosaicGpuConfig | None = None) -> Program:
        return Program("mosaic sm_90", name, lambda: compile_mosaic(variant, config))

    head_dims = itertools.product(HEAD_DIMS, ("bf16",), (False, True))
    for variant in variants(("bf16", "fp16"), head_dims, ("tails", "edges")):
        yield program(variant.name, variant)
    for width in (64, 128, 256):
        case = dataclasses.replace(LAST_SCALE, head_dim=width)
        for config in candidates(case.problem(DTYPES["bf16"]), HOPPER):
            tiles = f"{config.compute_warpgroups}x{config.query_tile}x{config.key_tile}x{config.stages}"
            name = f"h{width} {tiles} {config.schedule}{' persistent' if config.persistent else ''} bf16 entropy"
            yield program(name, Variant(case, "bf16", True), config)


def triton_programs() -> Iterator[Program]:
    """The programs of the Triton kernel; where its compiler is missing, one program that says so."""
    try:
        from aot_cases_triton import compile_cases

        cases = compile_cases()
    except ImportError as error:
        reason = f"{error}; run make aot-gpu"

        def missing() -> Facts:
            raise NotImplementedError(reason)

        yield Program("triton", "all", missing)
        return
    for name, (major, minor), thunk in cases:
        yield Program(f"triton sm_{major}{minor}", name, thunk)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(description="Compile every GPU kernel without a GPU.")
    parser.add_argument("--only", choices=("mosaic", "triton"))
    only = parser.parse_args(arguments).only
    if not start(why_no_gpu_compiler(), GPU_ENVIRONMENT):
        return 2
    groups = {"mosaic": mosaic_programs, "triton": triton_programs}
    programs = itertools.chain.from_iterable(groups[name]() for name in groups if only in (None, name))
    return report(programs, COLUMNS, "CUDA")


if __name__ == "__main__":
    sys.exit(main())
