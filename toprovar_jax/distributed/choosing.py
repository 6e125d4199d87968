"""From what a caller says of devices to a mesh that the model fits on."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from toprovar_jax.acceleration.dense import Dense
from toprovar_jax.distributed.mesh import AUTO, AXES, MeshSpec, automatic_mesh, check_mesh, make_mesh, parse_mesh
from toprovar_jax.distributed.parts import TENSOR
from toprovar_jax.distributed.rules import LOGICAL_AXES, logical_axes
from toprovar_jax.errors import UserInputError
from toprovar_jax.generation import make_plan
from toprovar_jax.memory import device_limit, predict
from toprovar_jax.memory_options import MemoryOptions
from toprovar_jax.memory_parts import condition_bytes, parameter_bytes, weight_bytes
from toprovar_jax.model_card import ModelCard
from toprovar_jax.sampling import Sampling


def mesh_for(
    wanted: str | MeshSpec | Mesh, card: ModelCard, memory: MemoryOptions, devices: Sequence[Any] | None = None
) -> Mesh:
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


def bytes_per_device(card: ModelCard, memory: MemoryOptions, tensor: int, *, pictures: int = 1) -> int:
    """What one of ``tensor`` devices that share a copy of the model needs for dense pictures of the default size.

    Parameters as they are cut. Of the rest, what the text leaves is on every device, and all else is shared.
    """
    plan = make_plan(
        card.schedule("1:1", None), Sampling(guidance=2.0), Dense(), num_layers=card.transformer.num_layers
    )
    report = predict(card, plan, pictures, card.default_pixels, memory)
    weights, whole = 0, weight_bytes(card, memory)
    for network, path, shape, size in parameter_bytes(card, memory):
        if network != "text_encoder" or memory.text_encoder == "device":
            weights += size // _cut(f"{network}.{path}", shape, tensor)
    # Blocks that are streamed, and texts' parameters that are lent, are not there as a whole.
    weights -= (whole.lent + (_streamed(card, memory) if memory.stream_blocks else 0)) // tensor
    text = sum(condition_bytes(card, report.together, guided=True))
    rest = max(0, report.peak - sum(report.weights.values()) - text)
    return weights + text + rest // tensor


def _streamed(card: ModelCard, memory: MemoryOptions) -> int:
    """Bytes of the blocks' matrices but for the two layers that are on their way."""
    moving = weight_bytes(card, memory).moving
    return moving * card.transformer.num_layers // 2 - moving


def _cut(path: str, shape: tuple[int, ...], tensor: int) -> int:
    """Into how many parts a parameter is cut over the axis ``tensor``."""
    names = logical_axes(path, shape)
    lengths = [size for name, size in zip(names, shape, strict=True) if TENSOR in LOGICAL_AXES.get(name or "", ())]
    return math.gcd(tensor, lengths[0]) if lengths else 1
