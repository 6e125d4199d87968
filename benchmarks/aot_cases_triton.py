"""Ahead-of-time compilation of the Triton kernel: PTX by Triton, machine code by its ptxas; no GPU and no driver.

Triton checks shared memory only when it launches, so that the cases here compare what was asked for with the device.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ahead_of_time import Facts, compile_for, gpu_facts, gpu_mesh, placed
from pallas_kernels.attention.block_mask import BlockMask
from pallas_kernels.attention.problem import Problem
from pallas_kernels.attention.target import Target
from pallas_kernels.attention.triton_gpu import (
    SHARED_MEMORY,
    TritonConfig,
    candidates,
    default_config,
    prepare,
    triton_attention,
)

Case = tuple[str, tuple[int, int], Callable[[], Facts]]

_KINDS = {(8, 0): "NVIDIA A100-SXM4-80GB", (8, 6): "NVIDIA A10", (8, 9): "NVIDIA L40", (9, 0): "NVIDIA H200"}
_POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int32": "*i32", "int16": "*i16"}
_SHORT = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_PLAIN = {"batch": 2, "num_queries": 1600, "num_keys": 3121, "heads": 16, "head_dim": 128, "with_entropy": True}


def compile_cases() -> list[Case]:
    """``(name, compute capability, thunk)`` for the defaults of many problems and all candidates of a few."""
    cases: list[Case] = []
    for capability in _KINDS:
        for name, options in _variants(full=capability in ((8, 0), (9, 0))).items():
            problem = _problem(**options)
            config = default_config(problem, _target(capability))
            cases.append((_name(name, config), capability, _thunk(problem, config, capability)))
    for capability in ((8, 0), (8, 9), (9, 0)):
        for dtype, head_dim in (("bfloat16", 128), ("float32", 128)):
            problem = _problem(dtype=dtype, head_dim=head_dim)
            for config in candidates(problem, _target(capability))[1:]:
                name = f"{_SHORT[dtype]} h{head_dim} candidate"
                cases.append((_name(name, config), capability, _thunk(problem, config, capability)))
    cases += [
        (f"bf16 h128 ragged through jax, {name}", capability, _through_jax(name))
        for name, capability in _DESCRIBED.items()
    ]
    return cases


def planted_case() -> Case:
    """Tiles too large for any device: its thunk must raise ValueError."""
    capability, config = (9, 0), TritonConfig(128, 128, 8, 5)
    return _name("planted", config), capability, _thunk(_problem(), config, capability)


def compile_kernel(
    problem: Problem, config: TritonConfig, capability: tuple[int, int], *, scale: float = 0.125
) -> Facts:
    """Compile the kernel for a device.

    Returns:
      ``registers`` per thread, ``spill_bytes`` stored and loaded per thread, ``shared_memory`` per program in bytes,
      ``seconds`` of compilation.

    Raises:
      ValueError: more shared memory than the device has, or than the configuration foresees.
    """
    # Imported here, so that the list of cases can be read without Triton.
    triton: Any = importlib.import_module("triton")
    compiler: Any = importlib.import_module("triton.compiler")
    kernel: Any = importlib.import_module("pallas_kernels.attention.triton_gpu_kernel").attention_kernel
    launch = prepare(problem, config, scale=scale)
    # The pointers of the kernel, in units of 16 bytes as XLA allocates arrays; the two numbers have no attributes.
    arrays = [problem.dtype.name] * 3 + ["int32", "int32" if launch.table is None else "int16", "int32"]
    signature = dict.fromkeys(launch.constants, "constexpr")
    names = [name for name in kernel.arg_names if name not in signature]
    kinds = [*(_POINTERS[x] for x in arrays), "i32", "i32", _POINTERS[problem.dtype.name], "*fp32", "*fp32"]
    signature |= dict(zip(names, kinds, strict=True))
    aligned = {(at,): [["tt.divisibility", 16]] for at, kind in enumerate(kinds) if kind.startswith("*")}
    source = compiler.ASTSource(kernel, signature=signature, constexprs=launch.constants, attrs=aligned)
    target = importlib.import_module("triton.backends.compiler").GPUTarget(
        "cuda", 10 * capability[0] + capability[1], 32
    )
    options = {"num_warps": config.warps, "num_stages": config.stages}
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        # A folder of its own: a cached kernel takes no time, and importing jax-triton leaves Triton without one.
        triton.knobs.cache.dir = folder
        start = time.perf_counter()
        compiled = triton.compile(source, target=target, options=options)
        seconds = time.perf_counter() - start
    shared, foreseen = compiled.metadata.shared, config.shared_bytes(problem, capability)
    if shared > SHARED_MEMORY[capability]:
        raise ValueError(
            f"{shared} bytes of shared memory: must be at most {SHARED_MEMORY[capability]}; use smaller tiles"
        )
    if shared > foreseen:
        raise ValueError(f"{shared} bytes of shared memory: must be at most the foreseen {foreseen}; mend shared_bytes")
    registers, spills = _resources(compiled.asm["ptx"], triton.knobs.nvidia.ptxas.path)
    return {"registers": registers, "spill_bytes": spills, "shared_memory": shared, "seconds": round(seconds, 2)}


def _resources(ptx: str, ptxas: str) -> tuple[int, int]:
    architecture = re.search(r"\.target (sm_\w+)", ptx)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", f"--gpu-name={architecture[1] if architecture else ''}", "-o", "/dev/null", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    facts = gpu_facts(report)
    if facts["registers"] is None or facts["spill_bytes"] is None:
        raise ValueError(f"report of ptxas {report!r}: must name registers and spills; has its form changed?")
    return facts["registers"], facts["spill_bytes"]


def _variants(*, full: bool) -> dict[str, dict]:
    pattern = np.random.default_rng(0).random((13, 25)) < 0.4
    variants = {
        "bf16 h128 entropy": {},
        "bf16 h128": {"with_entropy": False},
        "bf16 h64 entropy": {"head_dim": 64},
        "bf16 h128 mask entropy": {"block_mask": BlockMask.from_array(pattern)},
        "f32 h128 entropy": {"dtype": "float32"},
    }
    if full:
        variants |= {f"bf16 h{width} entropy": {"head_dim": width} for width in (96, 112, 160, 256)}
        variants |= {f"bf16 t{length} entropy": {"num_queries": length} for length in (1, 36, 576)}
        variants |= {f"f32 h{width} entropy": {"dtype": "float32", "head_dim": width} for width in (64, 256)}
        variants["f16 h128 entropy"] = {"dtype": "float16"}
    return variants


_DESCRIBED = {"H200": (9, 0), "A100": (8, 0), "L40": (8, 9)}


def _through_jax(name: str) -> Callable[[], Facts]:
    """The wrapper, with its packages and its custom call, compiled by XLA for a described device."""

    def compile_call() -> Facts:
        start = time.perf_counter()
        mesh = gpu_mesh(name)

        def array(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

        def call(q, k, v, lengths):
            options = {"scale": 0.125, "block_mask": None, "with_entropy": True}
            return triton_attention(q, k, v, key_length=lengths, **options)

        keys = array(2, 3121, 16, 128)
        arguments = (array(2, 1600, 16, 128), keys, keys, array(2, dtype="int32"))
        compiled = compile_for(mesh, jax.jit(call), *placed(arguments, mesh))
        text = compiled.as_text() or ""
        if "triton" not in text:
            raise ValueError("compiled program: must hold the Triton call; was it optimised away?")
        return {"seconds": round(time.perf_counter() - start, 2)}

    return compile_call


def _problem(**options) -> Problem:
    settings = {**_PLAIN, "dtype": "bfloat16", **options}
    return Problem(**{**settings, "dtype": np.dtype(jnp.dtype(settings["dtype"]))})


def _target(capability: tuple[int, int]) -> Target:
    return Target("cuda", _KINDS[capability], capability)


def _name(name: str, config: TritonConfig) -> str:
    return f"{name} {config.query_tile}x{config.key_tile} {config.warps}w {config.stages}s"


def _thunk(problem: Problem, config: TritonConfig, capability: tuple[int, int]) -> Callable[[], Facts]:
    return lambda: compile_kernel(problem, config, capability)
