"""The compile check of ``make aot-gpu``: what it accepts, and that it can refuse."""

import importlib
import pathlib
import subprocess
import sys

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from pallas_kernels.ahead_of_time import GPU_ENVIRONMENT, GPUS, Program, compile_for, gpu_facts, gpu_mesh, placed
from pallas_kernels.attention import mosaic_gpu
from pallas_kernels.attention.cases import Case
from pallas_kernels.attention.mosaic_gpu import MosaicGpuConfig
from pallas_kernels.attention.target import current_target
from toprovar_jax.image_tokenizer.bsq import bits_to_codes, next_scale_input, tokens_to_bits
from toprovar_jax.image_tokenizer.resize import resize_bilinear
from toprovar_jax.memory_options import MemoryOptions
from toprovar_jax.schedule import ScaleSchedule

from .stack_memory import check_stack_memory

COMMAND = pathlib.Path(__file__).parent.parent / "benchmarks" / "aot_gpu.py"
SMALL = Case("small", 1, 256, 700, 2, 64, 0.1, key_length=(333,))
TOO_LARGE = MosaicGpuConfig(key_tile=256, stages=8)


@pytest.fixture
def command(monkeypatch):
    """The command as a module, with an environment that only compiles."""
    monkeypatch.syspath_prepend(str(COMMAND.parent))
    module = importlib.import_module("aot_gpu")
    for name, value in GPU_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    # An executable for a device that is not there cannot be read back from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield module
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture
def compiler(command):
    """The command, where there is a compiler for it."""
    if reason := command.why_no_gpu_compiler():
        pytest.skip(reason)
    return command


def program(compiler, name, config=None):
    variant = compiler.Variant(SMALL, "bf16", True)
    return Program("mosaic sm_90", name, lambda: compiler.compile_mosaic(variant, config))


def report(compiler, programs):
    return compiler.report(programs, compiler.COLUMNS, "CUDA")


def test_a_good_kernel_compiles_without_spills(compiler, capsys):
    good = program(compiler, "good")
    facts = good.build()
    assert facts["spill_bytes"] == 0
    assert 0 < facts["registers"] <= 255
    assert facts["failure"] is None
    assert report(compiler, [good]) == 0
    assert "1 of 1 programs compiled" in capsys.readouterr().out


def test_tiles_past_the_shared_memory_make_it_fail(compiler, capsys, monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "SHARED_MEMORY", 2**30)
    assert report(compiler, [program(compiler, "planted", TOO_LARGE), program(compiler, "good")]) == 1
    printed = capsys.readouterr().out
    assert "1 of 2 programs compiled" in printed
    assert "mosaic sm_90 planted: " in printed
    assert "mosaic sm_90 good: " not in printed


def test_the_described_device_is_the_target(compiler):
    with jax.sharding.use_abstract_mesh(gpu_mesh("H200").abstract_mesh):
        target = current_target()
    assert (target.kind, target.compute_capability) == ("NVIDIA H200", (9, 0))


@pytest.mark.parametrize("name", sorted(GPUS))
def test_every_described_device_compiles_a_plain_program(compiler, name):
    mesh = gpu_mesh(name)
    argument = placed(jax.ShapeDtypeStruct((128, 128), "float32"), mesh)
    compiled = compile_for(mesh, jax.jit(lambda x: x + x), argument)
    assert "fusion" in (compiled.as_text() or "")


def test_an_unknown_device_is_named():
    with pytest.raises(ValueError, match="RTX"):
        gpu_mesh("RTX")


def test_the_assemblers_report_is_read():
    text = (
        "ptxas info : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to\n"
        "    80 bytes stack frame, 84 bytes spill stores, 108 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 16 barriers"
    )
    failure = "the assembler serialised the tensor cores' instructions"
    assert gpu_facts(text) == {"registers": 168, "spill_bytes": 192, "failure": failure}
    assert gpu_facts("") == {"registers": None, "spill_bytes": None, "failure": None}


def test_serialised_instructions_are_a_failure(command, capsys):
    assert report(command, [Program("mosaic sm_90", "slow", lambda: gpu_facts("instructions are serialized"))]) == 1
    assert "slow: the assembler serialised" in capsys.readouterr().out


def test_without_the_plugin_it_says_what_to_do():
    code = (
        "import importlib.util, runpy, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name.startswith('jax_plugins') else find(name, *a)\n"
        f"sys.argv = ['aot_gpu.py']\nsys.path.insert(0, {str(COMMAND.parent)!r})\n"
        f"runpy.run_path({str(COMMAND)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("run make aot-gpu")
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("layers", [(0, 16), (2, 9)])
@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("streamed", [False, True])
def test_stacks_are_never_converted_copied_or_fetched_as_a_whole(compiler, quantization, streamed, layers):
    memory = MemoryOptions(stream_blocks=streamed, quantization=quantization)
    check_stack_memory(gpu_mesh("H100"), memory, layers)


@pytest.mark.parametrize("scale", [0, 10, 11])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("aspect_ratio", ["1:1", "3:4"])
def test_code_sums_of_14_channels_are_resized(compiler, aspect_ratio, batch, scale):
    """What surrounds a resize takes part: the compiler merges permutations with the products beside them."""
    schedule = ScaleSchedule.of(aspect_ratio, 13, latent_per_token=2)

    def add_scale(tokens, latents):
        codes = bits_to_codes(tokens_to_bits(tokens, schedule.grids[scale], patchify=True))
        latents = latents + resize_bilinear(codes, schedule.latent_grids[-1])
        return latents, next_scale_input(latents, schedule, scale + 1)

    height, width = schedule.grids[scale]
    tokens = jax.ShapeDtypeStruct((batch, height * width, 56), "uint8")
    latents = jax.ShapeDtypeStruct((batch, *schedule.latent_grids[-1], 14), "float32")
    mesh = gpu_mesh("H200")
    compiled = compile_for(mesh, jax.jit(add_scale, donate_argnums=1), *placed((tokens, latents), mesh))
    assert "fusion" in (compiled.as_text() or "")
