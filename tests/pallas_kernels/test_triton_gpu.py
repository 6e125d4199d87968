"""The Triton kernel: numerics in Triton's interpreter, machine code by its compiler, and the wrapper's rules."""

import dataclasses
import importlib
import importlib.util
import os
import pathlib
import pickle
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels.attention.block_mask import BlockMask
from pallas_kernels.attention.cases import CASES, Case, windows
from pallas_kernels.attention.float64 import attend
from pallas_kernels.attention.problem import Problem
from pallas_kernels.attention.reference import MASKED
from pallas_kernels.attention.target import Target
from pallas_kernels.attention.triton_gpu import (
    SHARED_MEMORY,
    TritonConfig,
    candidates,
    default_config,
    prepare,
    triton_attention,
    why_not,
)

from .twin import draw, relative

ROOT = pathlib.Path(pallas_kernels.__file__).parents[1]
TARGETS = {
    capability: Target("cuda", kind, capability)
    for capability, kind in {
        (8, 0): "NVIDIA A100",
        (8, 6): "NVIDIA A10",
        (8, 9): "NVIDIA L40",
        (9, 0): "NVIDIA H200",
    }.items()
}
EDGES = {case.name: case.shrunk(heads=1) for case in CASES["edges"]}
TILES = TritonConfig(64, 64)
ONE_BLOCK = BlockMask.from_array(np.ones((1, 1), bool))
BOUNDS = {"float32": (1e-5, 1e-5), "bfloat16": (4e-3, 1e-5), "float16": (6e-4, 1e-5)}
"""Largest relative errors of values, and of statistics."""


def available(*names):
    return all(importlib.util.find_spec(name) for name in names)


needs_interpreter = pytest.mark.skipif(
    not available("triton", "torch"), reason="Triton's interpreter needs the packages triton and torch"
)
needs_compiler = pytest.mark.skipif(not available("triton"), reason="the package triton is not installed")


@pytest.fixture(scope="module")
def interpret():
    """``triton_interpreter.interpret`` in a process of its own."""
    script = pathlib.Path(__file__).with_name("triton_interpreter.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        [sys.executable, "-W", "error", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(q, k, v, **options):
            pickle.dump({"q": q, "k": k, "v": v, **options}, process.stdin)
            process.stdin.flush()
            return pickle.load(process.stdout)

        yield ask
        process.stdin.close()


def agrees(interpret, case, dtype, config=TILES):
    q, k, v = (x.astype(jnp.dtype(dtype)) for x in case.draw())
    options = {"scale": case.scale, "key_length": case.key_length, "block_mask": case.block_mask}
    want = attend(q, k, v, **options)
    for row, length in enumerate(case.key_length or ()):
        k[row, length:] = v[row, length:] = np.nan
    got = interpret(q, k, v, config=config, **options)
    seen = np.isfinite(want.log_sum_exp)
    values, statistics = BOUNDS[dtype]
    assert relative(got.out, want.out) < values
    assert relative(got.log_sum_exp[seen], want.log_sum_exp[seen]) < statistics
    assert relative(got.entropy, want.entropy) < statistics
    assert np.all(got.entropy >= 0.0)
    assert np.all(got.log_sum_exp[~seen] == np.float32(MASKED))
    assert np.all(got.entropy[~seen] == 0.0)
    assert np.all(got.out.swapaxes(1, 2)[~seen] == 0.0)


@needs_interpreter
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", EDGES)
def test_hard_cases_agree_with_float64(interpret, name, dtype):
    agrees(interpret, EDGES[name], dtype)


@needs_interpreter
@pytest.mark.parametrize(
    ("length", "num_keys"), [(1, 1), (1, 200), (17, 33), (64, 64), (65, 63), (63, 65), (5, 129)], ids=str
)
def test_any_lengths_agree_with_float64(interpret, length, num_keys):
    agrees(interpret, Case("lengths", 2, length, num_keys, 2, 64, 0.125), "float32")


@needs_interpreter
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("width", [8, 64, 80, 96, 104, 112, 120, 128, 160, 256])
def test_any_head_dim_agrees_with_float64(interpret, width, dtype):
    agrees(interpret, Case("width", 1, 70, 150, 2, width, width**-0.5), dtype)


@needs_interpreter
@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize(("length", "dtype"), [(3, "bfloat16"), (40, "bfloat16"), (300, "bfloat16"), (300, "float32")])
def test_default_tiles_agree_with_float64(interpret, length, dtype, capability):
    case = Case("defaults", 1, length, 300, 1, 64, 0.125)
    config = default_config(problem(num_queries=length, head_dim=64, dtype=dtype), TARGETS[capability])
    agrees(interpret, case, dtype, config)


@needs_interpreter
def test_without_entropy_the_other_results_are_the_same_bit_for_bit(interpret):
    arrays = draw(0, 1, 70, 150, 2, 64, spread=3.0)
    with_entropy, without = (
        interpret(*arrays, scale=1.0, config=TILES, with_entropy=wanted) for wanted in (True, False)
    )
    assert without.entropy is None
    np.testing.assert_array_equal(without.out, with_entropy.out)
    np.testing.assert_array_equal(without.log_sum_exp, with_entropy.log_sum_exp)


@needs_interpreter
def test_results_repeat_bit_for_bit(interpret):
    arrays = draw(0, 2, 70, 150, 2, 64, spread=3.0)
    first, second = (interpret(*arrays, scale=1.0, key_length=(150, 77), config=TILES) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@needs_interpreter
def test_lengths_outside_the_array_are_clipped(interpret):
    q, k, v = draw(0, 2, 20, 30, 1, 64)
    got = interpret(q, k, v, scale=1.0, key_length=(-3, 99), config=TILES)
    want = interpret(q, k, v, scale=1.0, key_length=(0, 30), config=TILES)
    np.testing.assert_array_equal(got.out, want.out)


@needs_interpreter
def test_nan_among_the_visible_keys_is_not_hidden(interpret):
    q, k, v = draw(0, 1, 20, 90, 1, 64)
    k[0, 70] = np.nan
    got = interpret(q, k, v, scale=1.0, config=TILES)
    assert all(np.isnan(x).all() for x in got)


def problem(**options):
    settings = {"batch": 2, "num_queries": 1600, "num_keys": 3121, "heads": 16, "head_dim": 128, **options}
    return Problem(**{**settings, "dtype": np.dtype(jnp.dtype(settings.get("dtype", "bfloat16")))})


def aot_cases():
    # Triton compiles the source of the kernel's functions; the tests' import hook, which wraps every function of the
    # package to check its types, must not be between. Nothing else imports that module in this process.
    hooks = [finder for finder in sys.meta_path if type(finder).__module__.startswith("jaxtyping")]
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder not in hooks]
    try:
        importlib.import_module("pallas_kernels.attention.triton_gpu_kernel")
    finally:
        sys.meta_path[:0] = hooks
    spec = importlib.util.spec_from_file_location("aot_cases_triton", ROOT / "benchmarks" / "aot_cases_triton.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_compiler
@pytest.mark.parametrize("block_mask", [None, windows(1600, 3121)], ids=["dense", "windows"])
@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize("capability", TARGETS)
def test_default_tiles_at_head_dim_128_spill_no_registers(capability, with_entropy, block_mask):
    posed = problem(with_entropy=with_entropy, block_mask=block_mask)
    facts = aot_cases().compile_kernel(posed, default_config(posed, TARGETS[capability]), capability)
    assert facts["spill_bytes"] == 0
    assert facts["shared_memory"] <= SHARED_MEMORY[capability]


@needs_compiler
def test_tiles_beyond_the_shared_memory_do_not_compile():
    _, _, compile_planted = aot_cases().planted_case()
    with pytest.raises(ValueError, match="bytes of shared memory: must be at most 232448"):
        compile_planted()


def every_problem():
    for dtype in ("bfloat16", "float32"):
        for head_dim in (64, 80, 128, 160, 256):
            for num_queries in (1, 36, 576, 4096):
                yield problem(dtype=dtype, head_dim=head_dim, num_queries=num_queries)


@pytest.mark.parametrize("capability", TARGETS)
def test_default_and_candidates_fit_every_device(capability):
    for posed in every_problem():
        posed = dataclasses.replace(posed, block_mask=windows(posed.num_queries, posed.num_keys))
        found = candidates(posed, TARGETS[capability])
        assert found[0] == default_config(posed, TARGETS[capability])
        assert len(found) == len(set(found))
        for config in found:
            config.check(posed, capability)


def test_a_few_queries_get_small_tiles():
    assert default_config(problem(num_queries=1), TARGETS[9, 0]).query_tile == 16
    assert default_config(problem(num_queries=4096), TARGETS[9, 0]).query_tile == 128


def test_a_launch_covers_every_query_of_every_head():
    launch = prepare(problem(num_queries=129), TritonConfig(64, 64), scale=1.0)
    assert launch.grid == (2 * 16 * 3,)
    assert launch.table is None


def test_a_pattern_becomes_a_table_of_tiles():
    mask = BlockMask.from_array(np.array([[True, False], [False, True]]))
    launch = prepare(problem(num_queries=200, num_keys=250, block_mask=mask), TritonConfig(128, 64), scale=1.0)
    assert launch.table is not None
    indices, counts = launch.table
    np.testing.assert_array_equal(indices, [[0, 1], [2, 3]])
    np.testing.assert_array_equal(counts, [2, 2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_tile": 96}, "query_tile 96: must be a power of two from 16 to 128"),
        ({"key_tile": 8}, "key_tile 8: must be a power of two from 16 to 128"),
        ({"warps": 32}, "warps 32: must be a power of two from 1 to 16"),
        ({"stages": 0}, "stages 0: must be from 1 to 5"),
    ],
)
def test_impossible_tiles_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TritonConfig(**options)


def test_tiles_too_large_for_a_device_are_refused():
    config = TritonConfig(128, 128, 8, 3)
    config.check(problem(head_dim=64), (9, 0))
    with pytest.raises(ValueError, match="bytes of shared memory at head dim 128 must be at most 101376"):
        config.check(problem(), (8, 9))


@pytest.mark.parametrize(
    ("options", "target", "message"),
    [
        ({}, Target("cpu", "cpu"), "device cpu: must be an NVIDIA GPU"),
        ({}, Target("cuda", "NVIDIA V100", (7, 0)), "of compute capability 7.0: must be 8.0 to 9.0"),
        ({}, Target("cuda", "mystery"), "of compute capability unknown"),
        ({"dtype": "float64"}, TARGETS[8, 0], "dtype float64: must be one of bfloat16, float16, float32"),
        ({"head_dim": 264}, TARGETS[8, 0], "head dim 264: must be at most 256"),
        ({"num_keys": 2**21}, TARGETS[8, 0], "elements per batch row: must be at most 2147483647"),
        ({"num_keys": 600_000, "block_mask": ONE_BLOCK}, TARGETS[8, 0], "must be at most 524288, 2^15 tiles of 16"),
    ],
)
def test_what_the_kernel_cannot_run_is_said(options, target, message):
    reason = why_not(problem(**options), target)
    assert reason is not None
    assert message in reason


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    reason = why_not(problem(), TARGETS[9, 0])
    assert reason is not None
    assert reason.startswith("module triton cannot be imported")
    assert reason.endswith('pip install "toprovar-jax[gpu]"')


def test_a_call_on_another_device_is_refused():
    q, k, v = (jnp.asarray(x) for x in draw(0, 1, 4, 4, 1, 64))
    with pytest.raises(NotImplementedError, match="must be an NVIDIA GPU"):
        triton_attention(q, k, v, scale=1.0, key_length=None, block_mask=None, with_entropy=True)


def test_importing_the_wrapper_imports_no_triton():
    program = (
        "import sys, pallas_kernels.attention.triton_gpu; print('triton' in sys.modules, 'jax_triton' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.split() == ["False", "False"]
