"""Meshes: from a short text, or from what a model needs, to devices with the axes ``data``, ``fsdp`` and ``tensor``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from toprovar_jax.config import InfinityConfig
from toprovar_jax.distributed.parts import DATA, FSDP, TENSOR
from toprovar_jax.errors import UserInputError, unknown_name

AXES = (DATA, FSDP, TENSOR)
"""Outermost first: neighbours on the last axis exchange the most and lie next to each other."""

AUTO = "auto"

MEMORY_SHARE = 0.9
"""How much of a device's memory may be planned for; the rest is the runtime's and its fragments."""


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """How many devices lie along each axis.

    Attributes:
      data: copies of the model, which make pictures of their own.
      fsdp: copies that keep a part of the parameters each and gather them layer by layer as they are used.
      tensor: devices that make a picture together: each has some of the heads.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    @property
    def size(self) -> int:
        """How many devices there are in all."""
        return self.data * self.fsdp * self.tensor

    @property
    def model_size(self) -> int:
        """How many devices hold one copy of the parameters."""
        return self.fsdp * self.tensor

    def __str__(self) -> str:
        said = [f"{axis}={getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1]
        return ",".join(said) or f"{DATA}=1"


def parse_mesh(text: str, num_devices: int) -> MeshSpec:
    """A mesh from text such as ``"data=8,tensor=4"``.

    Args:
      text: axes and their sizes; those not named are 1, but for ``data``, which then takes the devices that are left.
      num_devices: how many there are.

    Raises:
      UserInputError: not such a text, or sizes that do not make up the devices.
    """
    sizes: dict[str, int] = {}
    for word in text.split(","):
        name, equals, number = (part.strip() for part in word.partition("="))
        if not equals or not re.fullmatch(r"[0-9]{1,6}", number) or int(number) < 1:
            raise UserInputError(f"mesh {text!r}", "must be axes and their sizes", "for example data=8,tensor=4")
        if name not in AXES:
            raise unknown_name("mesh axis", name, AXES)
        if name in sizes:
            raise UserInputError(f"mesh {text!r}", f"must name {name} once", "leave one out")
        sizes[name] = int(number)
    others = sizes.get(FSDP, 1) * sizes.get(TENSOR, 1)
    spec = MeshSpec(sizes.get(DATA, max(1, num_devices // others)), sizes.get(FSDP, 1), sizes.get(TENSOR, 1))
    if spec.size != num_devices:
        raise UserInputError(
            f"mesh {text!r} of {spec.size} devices",
            f"must be of {num_devices}, as there are",
            "change the sizes; data, left out, takes what the others leave, if they divide it",
        )
    return spec


def automatic_mesh(num_devices: int, num_heads: int, needed: Any, device_memory: int | None) -> MeshSpec:
    """The mesh with the most copies of the model that fits.

    Args:
      num_devices: how many there are.
      num_heads: of the transformer; what divides it is a possible size of ``tensor``.
      needed: ``(tensor) -> bytes`` on each device.
      device_memory: bytes of one device; None where unknown, which is taken as enough.

    Raises:
      UserInputError: it fits on no mesh of these devices.
    """
    sizes = [size for size in range(1, num_devices + 1) if num_devices % size == 0 and num_heads % size == 0]
    for tensor in sizes:
        if device_memory is None or needed(tensor) <= MEMORY_SHARE * device_memory:
            return MeshSpec(num_devices // tensor, 1, tensor)
    least = needed(sizes[-1]) / 1e9
    raise UserInputError(
        f"{num_devices} devices of {(device_memory or 0) / 1e9:.1f} GB",
        f"are too few: even over {sizes[-1]} of them the model takes {least:.1f} GB each",
        "take more or larger devices, a smaller batch, or int8",
    )


def make_mesh(spec: MeshSpec, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of ``spec``; on TPUs, neighbours on the mesh are neighbours on the chips' own network.

    Args:
      spec: sizes.
      devices: default: all that all processes have.

    Raises:
      UserInputError: there are more or fewer devices.
    """
    devices = jax.devices() if devices is None else devices
    if spec.size != len(devices):
        raise UserInputError(
            f"mesh {spec} of {spec.size} devices", f"must be of {len(devices)}, as there are", "change the sizes"
        )
    sizes = (spec.data, spec.fsdp, spec.tensor)
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def check_mesh(spec: MeshSpec, config: InfinityConfig) -> None:
    """Refuses a mesh that the transformer cannot be cut along.

    Raises:
      UserInputError: heads or hidden channels do not divide.
    """
    if config.num_heads % spec.tensor or config.feed_forward_width % spec.tensor:
        sizes = [size for size in range(1, config.num_heads + 1) if config.num_heads % size == 0]
        sizes = [size for size in sizes if config.feed_forward_width % size == 0]
        raise UserInputError(
            f"mesh axis tensor={spec.tensor}",
            f"must divide the model's {config.num_heads} heads and {config.feed_forward_width} hidden channels",
            f"take one of {', '.join(map(str, sizes))}",
        )
