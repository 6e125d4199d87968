"""The programs of a pod's plan compiled for its chips, which need not be there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax.experimental import topologies
from jax.sharding import Mesh

from toprovar_jax.distributed.chips import Topology
from toprovar_jax.distributed.mesh import MeshSpec, make_mesh
from toprovar_jax.distributed.pod_plan import PodPlan
from toprovar_jax.distributed.pod_programs import PodPrograms, ProgramFacts
from toprovar_jax.errors import UserInputError

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


def described_mesh(topology: Topology, spec: MeshSpec) -> Mesh:
    """A mesh of TPU chips that are only described; the environment that libtpu reads must be set.

    Raises:
      ValueError: they are not TPUs.
    """
    if topology.compiled_for is None:
        raise ValueError(f"topology {topology.name}: must be of TPUs")
    # The compiler takes hosts to have several chips, unless told.
    alone: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if topology.count == 1 else {}
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology.compiled_for, **alone)
    return make_mesh(spec, found.devices)


def compile_plan(plan: PodPlan, say: Callable[[str], None]) -> dict[str, ProgramFacts]:
    """Compile :func:`chosen_programs` of the slowest way.

    Args:
      plan: for TPUs.
      say: is told of each program before it is compiled, which takes a minute or so.

    Raises:
      UserInputError: a program does not fit the chip.
    """
    request = plan.request
    card = request.card.with_attention("mosaic_tpu" if request.attention == "kernel" else "xla")
    mesh = described_mesh(request.topology, plan.spec)
    say(f"tracing the programs for {request.topology.compiled_for}")
    programs = PodPrograms(card, plan.ways[0].plan, mesh, batch=plan.batch, memory=request.memory)
    found = {}
    for name in chosen_programs(programs.names, plan.memory):
        say(f"compiling {name}")
        try:
            found[name] = programs.facts(name)
            peak, limit = found[name].peak, request.topology.chip.memory
            failure = None if peak <= limit else f"takes {peak / 1e9:.2f} GB of each chip's {limit / 1e9:.2f}"
        except Exception as error:
            if OUT_OF_MEMORY not in str(error):
                raise
            failure = f"is refused by the compiler ({' '.join(str(error).split())[:200]})"
        if failure is not None:
            remedy = f"--batch-size {plan.batch // 2}" if plan.batch > 1 else "take a mesh with more chips to a copy"
            raise UserInputError(f"{request.card.name} on {request.topology.name}, {name}", failure, remedy)
    return found


def chosen_programs(names: tuple[str, ...], predicted: dict[str, int]) -> tuple[str, ...]:
    """Of all programs those that decide: where the text is read, the last scale, and whichever takes most memory.

    The decoder, which takes compilers many minutes, is among them only if that is the one.
    """
    *_, last = (name for name in names if name.startswith("scale "))
    heaviest = max((name for name in names if name in predicted), key=lambda name: predicted[name])
    return tuple(name for name in names if name in (last, heaviest) or name.startswith("text"))
