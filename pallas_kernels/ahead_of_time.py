"""Compiling for TPUs that are not there: the compiler comes with ``libtpu`` and needs only a description of the chips.

What compiles here has passed everything short of running: Mosaic's and XLA's layout rules, and the vector and main
memory of the chip. Numbers and speed it does not show.
"""

from __future__ import annotations

import importlib.util
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


@dataclass(frozen=True)
class Program:
    """Something to compile.

    Attributes:
      target: what it is compiled for, for the table.
      case: what it is, for the table.
      build: compiles it.
      kernels: how many kernels the compiled program must hold at least, so that a silent fallback to plain XLA fails.
    """

    target: str
    case: str
    build: Callable[[], jax.stages.Compiled]
    kernels: int = 1


@dataclass(frozen=True)
class Compilation:
    """How a compilation went.

    Attributes:
      target: of the :class:`Program`.
      case: of the :class:`Program`.
      seconds: tracing, lowering and compiling.
      temporary_bytes: main memory of the device beside arguments and results.
      code_bytes: size of the program.
      failure: the beginning of the error, or None.
    """

    target: str
    case: str
    seconds: float
    temporary_bytes: int = 0
    code_bytes: int = 0
    failure: str | None = None


def why_no_tpu_compiler() -> str | None:
    """The reason and the remedy, in one line, or None where TPU programs can be compiled."""
    if importlib.util.find_spec("libtpu") is None:
        return 'libtpu is not installed: it holds the TPU compiler; pip install "jax[tpu]"'
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


def placed(tree: Any, mesh: Mesh, spec: PartitionSpec | None = None) -> Any:
    """Arrays or their descriptions as descriptions of arrays on a mesh, replicated unless a spec is given."""
    sharding = NamedSharding(mesh, PartitionSpec() if spec is None else spec)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def compile_for(mesh: Mesh, function: jax.stages.Wrapped, *arguments: Any, **static: Any) -> jax.stages.Compiled:
    """Compile a function of described arrays; inside, the mesh's chip is the current target.

    Args:
      mesh: from :func:`tpu_mesh`.
      function: what ``jax.jit`` returned.
      *arguments: trees of descriptions, see :func:`placed`.
      **static: its static arguments.
    """
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return function.trace(*arguments, **static).lower().compile()


def compile_all(programs: Iterable[Program]) -> Iterator[Compilation]:
    """Compile one program after the other; a failure is reported and the next one tried."""
    for program in programs:
        start = time.perf_counter()
        try:
            compiled = program.build()
            text, memory = compiled.as_text(), compiled.memory_analysis()
        except Exception as error:
            # Whatever a compiler throws is one line of the table; the other lines still count.
            message = " ".join(str(error).split())[:300]
            seconds = time.perf_counter() - start
            yield Compilation(program.target, program.case, seconds, failure=f"{type(error).__name__}: {message}")
            continue
        seconds = time.perf_counter() - start
        found = (text or "").count(f'custom_call_target="{TPU_CUSTOM_CALL}"')
        failure = None if found >= program.kernels else f"{found} kernels, must be at least {program.kernels}"
        sizes = (0, 0) if memory is None else (memory.temp_size_in_bytes, memory.generated_code_size_in_bytes)
        yield Compilation(program.target, program.case, seconds, *sizes, failure=failure)
