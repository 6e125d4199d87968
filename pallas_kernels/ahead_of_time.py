"""Compiling for TPUs and GPUs that are not there: a compiler needs only a description of the chips.

That for TPUs comes with ``libtpu``, that for GPUs with the CUDA plugin of JAX. What compiles here has passed everything
short of running: Mosaic's and XLA's layout rules, and the memories of the chip. Numbers and speed it does not show.
"""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TPU_CUSTOM_CALL = "tpu_custom_call"
"""How a Mosaic kernel appears in a compiled program."""

TPU_ENVIRONMENT = {
    # Else libtpu asks the cloud's metadata server which machine this is.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    # Else a second process that uses libtpu fails at a lock.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
"""Environment of a process that only compiles, to be set before the first :func:`tpu_mesh`."""

TPU_SINGLE_HOST = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
"""Chip -> the topology of one small host."""

GPU_ENVIRONMENT = {
    # Nothing can be timed here.
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",
    "MOSAIC_GPU_DUMP_PTXAS": "1",
}
"""Environment of a process that only compiles; must be set before JAX starts its backends."""

Facts = dict[str, Any]
"""What is known of a compiled program, by name; ``failure`` says why it does not count although it compiled."""


@dataclass(frozen=True)
class GpuModel:
    """The numbers of a GPU that a compiler asks for.

    Attributes:
      kind: the driver's name of the device.
      capability: compute capability.
      cores: multiprocessors.
      shared_memory: bytes of shared memory a block may ask for.
      shared_memory_per_core: bytes of shared memory of a multiprocessor.
      threads_per_core: threads a multiprocessor holds.
      fpus_per_core: float32 units of a multiprocessor.
      bandwidth: bytes per second of device memory.
      l2_cache: bytes of level-2 cache.
      memory: bytes of device memory.
      clock: GHz.
    """

    kind: str
    capability: tuple[int, int]
    cores: int
    shared_memory: int
    shared_memory_per_core: int
    threads_per_core: int
    fpus_per_core: int
    bandwidth: int
    l2_cache: int
    memory: int
    clock: float

    @property
    def target_config(self) -> str:
        """As the text form of XLA's ``GpuTargetConfigProto``."""
        major, minor = self.capability
        return f"""gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
          shared_memory_per_core: {self.shared_memory_per_core} threads_per_core_limit: {self.threads_per_core}
          core_count: {self.cores} fpus_per_core: {self.fpus_per_core}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2_cache} clock_rate_ghz: {self.clock}
          device_memory_size: {self.memory} shared_memory_per_block_optin: {self.shared_memory}
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} runtime_version {{ major: 13 minor: 0 }}
        device_description_str: "{self.kind}" """


_HOPPER = ((9, 0), 132, 232448, 233472, 2048, 128)
_ADA = ((8, 9), 142, 101376, 102400, 1536, 128)
GPUS = {
    "H100": GpuModel("NVIDIA H100 80GB HBM3", *_HOPPER, 3352320000000, 52428800, 84929347584, 1.98),
    "H200": GpuModel("NVIDIA H200", *_HOPPER, 4800000000000, 52428800, 150121545728, 1.98),
    "A100": GpuModel(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 166912, 167936, 2048, 64, 2039000000000, 41943040, 85100003328, 1.41
    ),
    "L40": GpuModel("NVIDIA L40", *_ADA, 864000000000, 100663296, 47000000000, 2.49),
}
"""Devices by product name, from the vendor's data sheets."""


@dataclass(frozen=True)
class Program:
    """Something to compile.

    Attributes:
      target: what it is compiled for, for the table.
      case: what it is, for the table.
      build: compiles it and returns what is known of the result.
    """

    target: str
    case: str
    build: Callable[[], Facts]


@dataclass(frozen=True)
class Compilation:
    """How a compilation went.

    Attributes:
      target: of the :class:`Program`.
      case: of the :class:`Program`.
      seconds: tracing, lowering and compiling.
      facts: what is known of the result.
      failure: the beginning of the error, or None.
    """

    target: str
    case: str
    seconds: float
    facts: Facts
    failure: str | None = None


def why_no_tpu_compiler() -> str | None:
    """The reason and the remedy, in one line, or None where TPU programs can be compiled."""
    if importlib.util.find_spec("libtpu") is None:
        return 'libtpu is not installed: it holds the TPU compiler; pip install "jax[tpu]"'
    return None


def why_no_gpu_compiler() -> str | None:
    """The reason and the remedy, in one line, or None where CUDA programs can be compiled."""
    found = importlib.util.find_spec("jax_plugins")
    names = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    if found is None or not any(importlib.util.find_spec(name) for name in names):
        return "the CUDA plugin of JAX is not installed: it holds the GPU compiler; run make aot-gpu"
    return None


def tpu_mesh(topology: str, shape: tuple[int, ...] = (1,), axes: tuple[str, ...] = ("chip",)) -> Mesh:
    """A mesh of TPU chips that are only described.

    Args:
      topology: such as ``v5e:4x4``; see :data:`TPU_SINGLE_HOST`.
      shape: chips along each axis, as many as the topology has or fewer.
      axes: their names.

    Raises:
      NotImplementedError: no TPU compiler is installed.
    """
    reason = why_no_tpu_compiler()
    if reason is not None:
        raise NotImplementedError(reason)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(np.array(devices[: int(np.prod(shape))]).reshape(shape), axes)


def gpu_mesh(name: str) -> Mesh:
    """A mesh of one GPU that is only described; :data:`GPU_ENVIRONMENT` must be set.

    Args:
      name: of :data:`GPUS`.

    Raises:
      ValueError: an unknown name.
      RuntimeError: the CUDA plugin is not installed.
    """
    if name not in GPUS:
        raise ValueError(f"GPU {name!r}: must be one of {sorted(GPUS)}; add it to GPUS")
    config = GPUS[name].target_config
    devices = topologies.get_topology_desc(platform="cuda", target_config=config, topology="1x1x1").devices
    return Mesh(np.array(devices), ("chip",))


def placed(tree: Any, mesh: Mesh, spec: PartitionSpec | None = None) -> Any:
    """Arrays or their descriptions as descriptions of arrays on a mesh, replicated unless a spec is given."""
    sharding = NamedSharding(mesh, PartitionSpec() if spec is None else spec)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def compile_for(mesh: Mesh, function: jax.stages.Wrapped, *arguments: Any, **static: Any) -> jax.stages.Compiled:
    """Compile a function of described arrays; inside, the mesh's chip is the current target.

    Args:
      mesh: from :func:`tpu_mesh` or :func:`gpu_mesh`.
      function: what ``jax.jit`` returned.
      *arguments: trees of descriptions, see :func:`placed`.
      **static: its static arguments.
    """
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return function.trace(*arguments, **static).lower().compile()


def tpu_facts(compiled: jax.stages.Compiled, *, kernels: int = 1) -> Facts:
    """``temporary_bytes`` of main memory beside arguments and results, and ``code_bytes``, the size of the program.

    Args:
      compiled: a program for a TPU.
      kernels: how many kernels it must hold at least, so that a silent fallback to plain XLA is a failure.
    """
    found = (compiled.as_text() or "").count(f'custom_call_target="{TPU_CUSTOM_CALL}"')
    failure = None if found >= kernels else f"{found} kernels, must be at least {kernels}"
    memory = compiled.memory_analysis()
    sizes = (0, 0) if memory is None else (memory.temp_size_in_bytes, memory.generated_code_size_in_bytes)
    return {"temporary_bytes": sizes[0], "code_bytes": sizes[1], "failure": failure}


def gpu_facts(report: str) -> Facts:
    """``registers`` and ``spill_bytes`` out of the assembler's report, None where it does not tell.

    Where the assembler could not keep the tensor cores' instructions in flight, that is a failure.
    """
    registers = re.findall(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    serialised = "instructions are serialized" in report
    return {
        "registers": max(map(int, registers), default=None),
        "spill_bytes": max((int(stores) + int(loads) for stores, loads in spills), default=None),
        "failure": "the assembler serialised the tensor cores' instructions" if serialised else None,
    }


def compile_all(programs: Iterable[Program]) -> Iterator[Compilation]:
    """Compile one program after the other; a failure is reported and the next one tried."""
    for program in programs:
        start = time.perf_counter()
        try:
            facts = dict(program.build())
        except Exception as error:
            # Whatever a compiler throws is one line of the table; the other lines still count.
            facts = {"failure": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        failure = facts.pop("failure", None)
        yield Compilation(program.target, program.case, time.perf_counter() - start, facts, failure)
