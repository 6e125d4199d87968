"""From what a caller says of devices to a mesh that the model fits on."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from toprovar_jax.acceleration.cost import state_bytes
from toprovar_jax.acceleration.dense import Dense
from toprovar_jax.acceleration.plan import GenerationPlan
from toprovar_jax.distributed.mesh import AUTO, AXES, MeshSpec, automatic_mesh, check_mesh, make_mesh, parse_mesh
from toprovar_jax.distributed.rules import ParameterShardings, gathered_over
from toprovar_jax.errors import UserInputError
from toprovar_jax.generation import make_plan
from toprovar_jax.memory import device_limit, predict
from toprovar_jax.memory_options import MemoryOptions
from toprovar_jax.memory_parts import condition_bytes, parameter_bytes, weight_bytes
from toprovar_jax.memory_phases import AttentionKind, Driver
from toprovar_jax.model_card import ModelCard
from toprovar_jax.sampling import Sampling


def mesh_for(wanted: Any, card: ModelCard, memory: MemoryOptions, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that ``wanted`` names.

    Args:
      wanted: text for :func:`toprovar_jax.distributed.mesh.parse_mesh`, ``"auto"``, sizes, or a mesh.
      card: the model, with its precision.
      memory: what stays off the devices.
      devices: default: all of all processes.

    Raises:
      UserInputError: no such mesh, or one that the model cannot be cut along or does not fit on.
    """
    if isinstance(wanted, Mesh):
        if wanted.axis_names != AXES:
            raise UserInputError(
                f"mesh with axes {', '.join(map(str, wanted.axis_names))}",
                f"must have the axes {', '.join(AXES)}",
                "make it with toprovar_jax.distributed.mesh.make_mesh",
            )
        check_mesh(MeshSpec(*(wanted.shape[axis] for axis in AXES)), card.transformer)
        return wanted
    if not isinstance(wanted, (str, MeshSpec)):
        raise UserInputError(f"mesh {wanted!r}", "must be text or a mesh", "for example data=8,tensor=4")
    devices = jax.devices() if devices is None else devices
    if isinstance(wanted, MeshSpec):
        spec = wanted
    elif wanted.strip() == AUTO:
        needed = functools.partial(bytes_per_device, card, memory)
        spec = automatic_mesh(len(devices), card.transformer.num_heads, needed, device_limit())
    else:
        spec = parse_mesh(wanted, len(devices))
    check_mesh(spec, card.transformer)
    return make_mesh(spec, devices)


def check_heads(plan: GenerationPlan, tensor: int) -> None:
    """Refuses a plan that needs all heads where each of ``tensor`` devices has some.

    Raises:
      UserInputError: it does.
    """
    if tensor > 1 and any(group.budget is not None for scale in plan.scales for group in scale.groups):
        raise UserInputError(
            f"policy {plan.policy} on a mesh with tensor={tensor}",
            "chooses among all heads, of which each device has some",
            "take data or fsdp for that axis, or another policy",
        )


def bytes_per_device(card: ModelCard, memory: MemoryOptions, tensor: int, *, pictures: int = 1) -> int:
    """What one of ``tensor`` devices that share a copy of the model needs for dense pictures of the default size."""
    plan = make_plan(
        card.schedule("1:1", None), Sampling(guidance=2.0), Dense(), num_layers=card.transformer.num_layers
    )
    found = program_bytes(card, plan, memory, MeshSpec(tensor=tensor), pictures=pictures, driver="fused")
    return max(found.values())


def program_bytes(
    card: ModelCard,
    plan: GenerationPlan,
    memory: MemoryOptions,
    spec: MeshSpec,
    *,
    pictures: int = 1,
    driver: Driver = "stepwise",
    attention: AttentionKind = "kernel",
) -> dict[str, int]:
    """What lies on one device of a mesh, program by program, at its peak.

    Parameters as they are cut. Of the rest, what the text leaves, the tokens between two blocks and what pruning keeps
    of them are on every device that shares a copy; texts and finished pictures go to these one by one, and they share
    all else.

    Args:
      card: the model with its precision.
      plan: what is run, with its alternatives.
      memory: what stays off the devices.
      spec: the mesh.
      pictures: of each copy, of which there are ``data`` times ``fsdp``.
      driver: how scales are run.
      attention: what attention is computed by.

    Returns:
      Bytes by the names of :func:`toprovar_jax.memory.predict`'s phases.
    """
    report = predict(card, plan, pictures, card.default_pixels, memory, driver=driver, attention=attention)
    whole, tensor = weight_bytes(card, memory), spec.tensor
    weights = sum(
        part
        for network, _, part, _ in parameter_parts(card, memory, spec)
        if network != "text_encoder" or memory.text_encoder == "device"
    )
    # Blocks that are streamed, and texts' parameters that are lent, are not there as a whole.
    weights -= (whole.lent + (_streamed(card, memory) if memory.stream_blocks else 0)) // spec.model_size
    text = sum(condition_bytes(card, report.together, guided=plan.guided))
    one_by_one = -(-report.together // tensor) / report.together
    found = {}
    for phase in report.phases:
        rest = max(0, phase.peak - sum(report.weights.values()) - text)
        if phase.name == "decoder" or phase.name.startswith("text"):
            found[phase.name] = weights + text + int(rest * one_by_one)
        else:
            everywhere = min(rest, _on_every_device(card, plan, phase.name, report.together))
            found[phase.name] = weights + text + everywhere + (rest - everywhere) // tensor
    return found


def _on_every_device(card: ModelCard, plan: GenerationPlan, name: str, pictures: int) -> int:
    """Bytes of a scale that all devices of a copy have: tokens of all channels, and what is kept of them for pruning.

    The compiler keeps the float32 tokens before and after a block, and both times that they are gathered; where some
    are left out, also the increments that they get instead, and their sum.
    """
    scale = int(name.split()[1]) - 1 if name.startswith("scale ") else plan.num_run - 1
    rows, step = pictures * (2 if plan.guided else 1), plan.step(scale)
    copies = 6 if any(group.kept < step.tokens for group in step.groups) else 4
    tokens = copies * 4 * rows * step.tokens * card.transformer.width
    states = (state_bytes(plan.step(number), card.transformer) for number in (max(0, scale - 1), scale))
    return tokens + pictures * max(state["increments"] + state["outputs"] + state["maps"] for state in states)


def _streamed(card: ModelCard, memory: MemoryOptions) -> int:
    """Bytes of the blocks' matrices but for the two layers that are on their way."""
    moving = weight_bytes(card, memory).moving
    return moving * card.transformer.num_layers // 2 - moving


def parameter_parts(
    card: ModelCard, memory: MemoryOptions, spec: MeshSpec
) -> Iterator[tuple[str, str, int, tuple[str, ...]]]:
    """Network, dotted path and bytes on one device of every parameter, and the mesh axes over which it is gathered."""
    mesh = AbstractMesh((spec.data, spec.fsdp, spec.tensor), AXES)
    shardings = ParameterShardings(mesh)
    for network, path, shape, size in parameter_bytes(card, memory):
        full = f"{network}.{path}"
        sharding = shardings(full, shape)
        part = size * math.prod(sharding.shard_shape(shape)) // math.prod(shape)
        yield network, path, part, gathered_over(full, shape, sharding.spec)
