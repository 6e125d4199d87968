"""CUDA devices that are only described: enough for a compiler, no device needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax
from jax.experimental import topologies


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


def topology(name: str) -> topologies.TopologyDescription:
    """A compile-only topology of one GPU.

    Needs the CUDA plugin of JAX, no GPU and no driver; ``XLA_FLAGS=--xla_gpu_autotune_level=0`` must be set before JAX
    starts, since nothing can be timed.

    Raises:
      ValueError: an unknown name.
      RuntimeError: the CUDA plugin is not installed.
    """
    if name not in GPUS:
        raise ValueError(f"GPU {name!r}: must be one of {sorted(GPUS)}; add it to GPUS")
    return topologies.get_topology_desc(platform="cuda", target_config=GPUS[name].target_config, topology="1x1x1")


@contextmanager
def described_gpu(name: str) -> Iterator[jax.sharding.NamedSharding]:
    """Inside, kernels lower for this GPU; gives the sharding that arguments must carry."""
    mesh = topologies.make_mesh(topology(name), (1,), ("x",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
