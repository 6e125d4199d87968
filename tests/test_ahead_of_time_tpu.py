"""The compile check of ``make aot-tpu``: what it accepts, and that it can refuse."""

import importlib
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from pallas_kernels import ahead_of_time
from pallas_kernels.ahead_of_time import (
    TPU_ENVIRONMENT,
    Program,
    compile_all,
    compile_for,
    placed,
    tpu_facts,
    tpu_mesh,
    why_no_tpu_compiler,
)
from pallas_kernels.attention import attention, mosaic_tpu
from pallas_kernels.attention.mosaic_tpu import MosaicTpuConfig, mosaic_tpu_attention
from pallas_kernels.attention.target import Target, current_target
from toprovar_jax.memory_options import MemoryOptions

from .stack_memory import check_stack_memory

COMMAND = pathlib.Path(__file__).parent.parent / "benchmarks" / "aot_tpu.py"

needs_libtpu = pytest.mark.skipif(
    why_no_tpu_compiler() is not None, reason=f"{why_no_tpu_compiler()}; make aot-tpu installs it and runs this"
)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """That of the command. An executable for a chip that is not there is written to the cache but cannot be read."""
    for name, value in TPU_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture
def command(monkeypatch):
    monkeypatch.syspath_prepend(str(COMMAND.parent))
    return importlib.import_module("aot_tpu")


def small_call(config=None, *, num_keys=8192, implementation=None):
    """A program of one call on a TPU v5e."""

    def build():
        mesh = tpu_mesh("v5e:2x2")
        q, kv = (jax.ShapeDtypeStruct((1, length, 2, 128), jnp.bfloat16) for length in (16, num_keys))

        def call(q, k, v):
            if implementation is not None:
                return attention(q, k, v, scale=1.0, implementation=implementation).out
            options = {"key_length": None, "block_mask": None, "with_entropy": True, "config": config}
            return mosaic_tpu_attention(q, k, v, scale=1.0, **options).out

        return tpu_facts(compile_for(mesh, jax.jit(call), *placed((q, kv, kv), mesh)))

    return Program("v5e", str(config or implementation), build)


@needs_libtpu
def test_the_kernel_compiles_for_a_chip_that_is_not_there():
    (done,) = compile_all([small_call(MosaicTpuConfig(16, 512, 512))])
    assert done.failure is None
    assert done.seconds > 0
    assert done.facts["code_bytes"] > 0


@needs_libtpu
def test_the_described_chip_is_the_current_target():
    mesh = tpu_mesh("v6e:2x2")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert current_target() == Target("tpu", "TPU v6 lite")


@needs_libtpu
def test_tiles_that_overflow_the_vector_memory_fail_the_command_and_the_rest_is_still_tried(
    command, monkeypatch, capsys
):
    # Past the configuration's own check, which would refuse these tiles before the compiler sees them.
    monkeypatch.setattr(MosaicTpuConfig, "check", lambda self, problem: None)
    large, good = (
        small_call(MosaicTpuConfig(16, 65536, 4096), num_keys=131072),
        small_call(MosaicTpuConfig(16, 512, 512)),
    )
    assert command.report([large, good], command.COLUMNS, "TPU") == 1
    told = capsys.readouterr().out
    assert "FAILED" in told
    assert "vmem" in told
    assert "1 of 2 programs compiled" in told
    assert command.report([good], command.COLUMNS, "TPU") == 0


@needs_libtpu
def test_a_program_that_fell_back_to_plain_xla_fails():
    (done,) = compile_all([small_call(implementation="xla")])
    assert done.failure == "0 kernels, must be at least 1"


@needs_libtpu
def test_the_vector_memory_of_a_configuration_is_what_the_compiler_gets(monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "VMEM_BUDGET", 2**20)
    monkeypatch.setattr(MosaicTpuConfig, "check", lambda self, problem: None)
    (done,) = compile_all([small_call(MosaicTpuConfig(16, 4096, 512), num_keys=131072)])
    assert done.failure is not None
    assert "vmem" in done.failure


@needs_libtpu
def test_the_command_knows_every_variant(command):
    names = [program.case for program in command.kernel_programs("v5e")]
    assert len(set(names)) == len(names)
    for part in ("bf16", "fp32", "entropy", "ragged", "masked", "head dim 104", "1x1"):
        assert any(part in name for name in names), part


def test_failures_are_collected_whatever_they_are(capsys):
    def broken():
        raise RuntimeError("no such\nthing")

    (done,) = compile_all([Program("v5e", "broken", broken)])
    assert done.failure == "RuntimeError: no such thing"


def test_without_libtpu_the_reason_and_the_remedy_are_one_line(monkeypatch):
    monkeypatch.setattr(ahead_of_time.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotImplementedError, match=r"libtpu is not installed.*pip install") as caught:
        tpu_mesh("v5e:2x2")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(why_no_tpu_compiler() is None, reason="libtpu is installed here")
def test_without_libtpu_the_command_ends_with_status_2_and_one_line():
    run = subprocess.run([sys.executable, str(COMMAND)], capture_output=True, text=True, cwd=COMMAND.parent.parent)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "pip install" in run.stderr


def test_placing_keeps_shapes_and_dtypes():
    mesh = jax.make_mesh((2,), ("chip",), axis_types=(jax.sharding.AxisType.Auto,))
    tree = {"a": np.zeros((4, 3), np.float32), "b": jax.ShapeDtypeStruct((2,), jnp.bfloat16)}
    got = placed(tree, mesh, jax.sharding.PartitionSpec("chip"))
    assert (got["a"].shape, got["a"].dtype, got["b"].dtype) == ((4, 3), np.float32, jnp.bfloat16)
    assert got["a"].sharding.shard_shape((4, 3)) == (2, 3)


@needs_libtpu
@pytest.mark.parametrize("layers", [(0, 16), (2, 9)])
@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("streamed", [False, True])
def test_stacks_are_never_converted_copied_or_fetched_as_a_whole(quantization, streamed, layers):
    memory = MemoryOptions(stream_blocks=streamed, quantization=quantization)
    check_stack_memory(tpu_mesh("v5e:2x2"), memory, layers)
