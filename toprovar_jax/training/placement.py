"""Where a training step runs: batches spread over the devices of a mesh, the state copied or spread as well."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from toprovar_jax.errors import UserInputError

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and what it is used for. Static and hashable.

    The batch is spread over all axes of the mesh. Parameters and optimiser are whole on every device, except along
    the axis ``shard_state`` if there is one: there each device keeps a part, and parts are gathered as they are used.

    Results do not depend on the number of devices but for the order of sums: random numbers are drawn for the whole
    batch, whoever computes it.
    """

    mesh: Mesh
    shard_state: str | None = None

    @classmethod
    def over(cls, devices: Sequence[Any] | None = None, *, state_parts: int = 1) -> Placement:
        """A mesh of ``devices`` (default: all), the state in ``state_parts`` parts.

        Raises:
          UserInputError: the devices cannot be divided so.
        """
        devices = jax.devices() if devices is None else devices
        if state_parts < 1 or len(devices) % state_parts:
            raise UserInputError(
                f"{state_parts} parts of the state", f"must divide {len(devices)} devices", "choose another number"
            )
        if state_parts == 1:
            return cls(Mesh(np.array(devices), ("data",)))
        return cls(Mesh(np.array(devices).reshape(-1, state_parts), ("data", "state")), "state")

    @property
    def devices(self) -> int:
        """How many there are."""
        return self.mesh.size

    @property
    def _batch(self) -> PartitionSpec:
        return PartitionSpec(self.mesh.axis_names)

    def check_batch(self, batch: int) -> None:
        """Refuse batches that do not divide evenly.

        Raises:
          UserInputError: ``batch`` is not a multiple of the number of devices.
        """
        if batch % self.devices:
            raise UserInputError(f"batch {batch}", f"must be a multiple of {self.devices} devices", "change it")

    def put_state(self, state: Tree) -> Tree:
        """The state on the devices."""
        return jax.device_put(state, self._state_sharding(state))

    def put_everywhere(self, tree: Tree) -> Tree:
        """A whole copy on every device, however the state is spread."""
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def put_batch(self, batch: Tree) -> Tree:
        """Arrays whose first axis is the batch, each device with its part."""
        return jax.device_put(batch, NamedSharding(self.mesh, self._batch))

    def on_each(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """``function`` of a batch, computed by every device for its own part; for loops over the batch inside."""
        if self.devices == 1:
            return function
        # Nothing is exchanged between devices, so there is nothing that varies without being known to.
        return jax.shard_map(function, mesh=self.mesh, in_specs=self._batch, out_specs=self._batch, check_vma=False)

    def compile(self, step: Callable[..., tuple[Any, Any]], state: Any) -> Callable[..., tuple[Any, Any]]:
        """One program of ``step(state, ...) -> (state, metrics)``; the old state is donated.

        Args:
          step: traceable.
          state: as :meth:`put_state` places it, or its shapes.
        """
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        # Fixed, so that the second step finds the state as the first one did and is the same program.
        return jax.jit(step, donate_argnums=0, out_shardings=(self._state_sharding(state), everywhere))

    def _state_sharding(self, state: Any) -> Any:
        return jax.tree.map(lambda leaf: NamedSharding(self.mesh, self._spec(leaf.shape)), state)

    def _spec(self, shape: tuple[int, ...]) -> PartitionSpec:
        if self.shard_state is None:
            return PartitionSpec()
        parts = self.mesh.shape[self.shard_state]
        # The largest axis that divides; vectors are too small to be worth it.
        axes = [axis for axis, size in enumerate(shape) if size % parts == 0] if len(shape) > 1 else []
        if not axes:
            return PartitionSpec()
        largest = max(axes, key=lambda axis: shape[axis])
        return PartitionSpec(*(self.shard_state if axis == largest else None for axis in range(len(shape))))
