"""Which processes of a cluster share one model, and how they agree on what to do next."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from toprovar_jax.distributed.choosing import mesh_for
from toprovar_jax.distributed.mesh import AUTO, MeshSpec, make_mesh, parse_mesh
from toprovar_jax.errors import UserInputError
from toprovar_jax.memory_options import MemoryOptions
from toprovar_jax.model_card import ModelCard


@dataclasses.dataclass(frozen=True)
class Devices:
    """What a process makes pictures with.

    Attributes:
      mesh: sizes of the mesh over ``devices``.
      devices: of this process, or of all that share the model.
      shared: whether processes share the model, and so make the same calls in the same order.
    """

    mesh: MeshSpec
    devices: tuple[Any, ...]
    shared: bool

    @property
    def leader(self) -> bool:
        """Whether this process decides for those that share the model."""
        return not self.shared or jax.process_index() == 0

    def made(self) -> Mesh:
        """The mesh itself."""
        return make_mesh(self.mesh, self.devices)


def devices_for(wanted: str, card: ModelCard, memory: MemoryOptions) -> Devices:
    """The devices for a mesh of the whole cluster.

    A copy of the model stays within a process if it can: then every process has copies of its own and works on its
    own, and one that dies stops no other. Otherwise all processes run one program.

    Args:
      wanted: text for :func:`toprovar_jax.distributed.mesh.parse_mesh` about all devices of all processes, or
        ``"auto"``.
      card: the model, with its precision.
      memory: what stays off the devices.

    Raises:
      UserInputError: no such mesh, or one that the model does not fit on.
    """
    own, everything = jax.local_devices(), jax.devices()
    if wanted.strip() == AUTO:
        try:
            spec = _sizes(mesh_for(wanted, card, memory, own))
        except UserInputError:
            if len(own) == len(everything):
                raise
            spec = _sizes(mesh_for(wanted, card, memory, everything))
            return Devices(spec, tuple(everything), True)
        return Devices(spec, tuple(own), False)
    spec = parse_mesh(wanted, len(everything))
    if len(own) % spec.model_size == 0:
        copies = len(own) // spec.model_size
        return Devices(dataclasses.replace(spec, data=copies), tuple(own), False)
    return Devices(spec, tuple(everything), len(own) < len(everything))


def _sizes(mesh: Mesh) -> MeshSpec:
    return MeshSpec(*mesh.devices.shape)


class AllProcesses:
    """All processes of the cluster as one group; the first one leads.

    Attributes:
      leader: whether this process is it.
    """

    def __init__(self) -> None:
        self.leader = jax.process_index() == 0

    def agree(self, message: bytes | None) -> bytes:
        """The leader's message, on every process; the others pass None. All processes call it equally often."""
        if self.leader != (message is not None):
            raise ValueError("the leader of a group has the message, and nobody else")
        length = _broadcast(np.asarray([len(message or b"")], np.int32))
        padded = np.zeros(int(length[0]), np.uint8)
        if message is not None:
            padded[:] = np.frombuffer(message, np.uint8)
        return _broadcast(padded).tobytes()


def _broadcast(array: np.ndarray) -> np.ndarray:
    return np.asarray(multihost_utils.broadcast_one_to_all(array)).astype(array.dtype)
