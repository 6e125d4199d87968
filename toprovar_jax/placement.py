"""Where a network's parameters go, and in which form: on the device, in host memory, as 8-bit integers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from toprovar_jax.distributed.rules import copied
from toprovar_jax.errors import UserInputError
from toprovar_jax.memory_options import MemoryOptions
from toprovar_jax.model.quantization import Int8Matrix, quantise_stack, rows_apart
from toprovar_jax.text_placement import TEXT_PATHS, host_device

Shardings = Callable[[str, tuple[int, ...]], Sharding]
"""From a parameter's dotted path, which begins with its network's name, and its shape."""

Network = TypeVar("Network", bound=nnx.Module)

HOST_MEMORY = "pinned_host"
"""Host memory that a device reads by itself."""


class Placement:
    """Puts the parameters of one network where ``memory`` says.

    Of the transformer, only the matrices of the blocks are quantised or kept on the host; they are nearly all there is.
    With a text encoder off the device, what texts alone need is in host memory: as numpy arrays, which are lent to the
    device; or, where the CPU encodes, the encoder as arrays of JAX's CPU device.

    Attributes:
      errors: of what has been quantised so far, by the path of the matrix inside a block, the largest over the layers:
        the Frobenius norm of the error over that of the matrix.

    Raises:
      UserInputError: blocks are to be streamed to a device that cannot read host memory.
    """

    def __init__(self, network: str, shardings: Shardings | None, memory: MemoryOptions):
        self.network = network
        self.errors: dict[str, float] = {}
        if network == "text_encoder" and memory.text_encoder == "host":
            cpu = SingleDeviceSharding(host_device())
            shardings = lambda path, shape: cpu
        self._shardings, self._memory = shardings, memory
        if memory.stream_blocks and shardings is None:
            _check_host_memory()

    def quantises(self, target: str) -> bool:
        """Whether the parameter at this path becomes an :class:`Int8Matrix`."""
        return self._memory.quantization == "int8" and self._is_block_matrix(target)

    def sharding(self, target: str, shape: tuple[int, ...]) -> Sharding | None:
        """Of a parameter that is not quantised; None for a numpy array."""
        if self._lends(target):
            return None
        given = self._given(target, shape)
        return given.with_memory_kind(HOST_MEMORY) if self._streams(target) else given

    def place(self, target: str, array: np.ndarray) -> Any:
        """A parameter, from the host."""
        if self.quantises(target):
            return self.quantised(target, array.shape, array)
        if self._lends(target):
            return array
        if self._shardings is None and not self._streams(target):
            return jnp.asarray(array)
        sharding = self.sharding(target, array.shape)
        return _put(columns_apart(array, self.columns(target, array.shape)), sharding)

    def columns(self, target: str, shape: tuple[int, ...]) -> tuple[int, int]:
        """``(matrices, parts)`` of :func:`columns_apart` for the parameter at this path."""
        fused = getattr(self._shardings, "fused", None)
        matrices = fused(f"{self.network}.{target}") if fused else 1
        if matrices == 1:
            return 1, 1
        cut = self._given(target, shape).shard_shape(shape)
        return matrices, shape[-1] // cut[-1]

    def described(self, target: str, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """What :meth:`place` would return for such a parameter, as descriptions; nothing is allocated."""
        if not self.quantises(target):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding(target, shape))
        values, scale = (None, None) if self._lends(target) else self._matrix_shardings(target, shape)
        return Int8Matrix(
            jax.ShapeDtypeStruct(rows_apart(shape), np.int8, sharding=values),
            jax.ShapeDtypeStruct((shape[0], shape[2]), np.float32, sharding=scale),
        )

    def quantised(self, target: str, shape: tuple[int, ...], layers: Iterable[np.ndarray]) -> Int8Matrix:
        """A stack of matrices ``[L, in, out]`` that come layer by layer, as 8-bit integers; scales stay on the device.

        No float of it reaches the device.
        """
        depth, width_in, width_out = shape
        stack, errors = quantise_stack((depth, width_in, width_out), layers)
        self.errors[target.removeprefix("layers.").removesuffix(".kernel")] = max(errors)
        if self._lends(target):
            return stack
        apart = self.columns(target, shape)
        values, scale = self._matrix_shardings(target, shape)
        return Int8Matrix(
            _put(columns_apart(stack.values, apart), values), _put(columns_apart(stack.scale, apart), scale)
        )

    def _matrix_shardings(self, target: str, shape: tuple[int, ...]) -> tuple[Sharding, Sharding]:
        values, scale = _like_matrix(self._given(target, shape))
        return (values.with_memory_kind(HOST_MEMORY) if self._streams(target) else values), scale

    def _given(self, target: str, shape: tuple[int, ...]) -> Sharding:
        if self._shardings is None:
            return SingleDeviceSharding(jax.local_devices()[0])
        return self._shardings(f"{self.network}.{target}", shape)

    def _lends(self, target: str) -> bool:
        """Whether a parameter rests as a numpy array."""
        if self.network == "text_encoder":
            return self._memory.text_encoder == "on_demand"
        off_device = self.network == "transformer" and self._memory.text_encoder != "device"
        return off_device and target.startswith(TEXT_PATHS) and not self._streams(target)

    def _streams(self, target: str) -> bool:
        return self._memory.stream_blocks and self._is_block_matrix(target)

    def _is_block_matrix(self, target: str) -> bool:
        return self.network == "transformer" and target.startswith("layers.") and target.endswith(".kernel")


def columns_apart(array: np.ndarray, apart: tuple[int, int]) -> np.ndarray:
    """The columns of matrices that lie side by side, rearranged so that equal parts hold the same share of each.

    Args:
      array: columns on the last axis.
      apart: how many matrices there are, and into how many parts the columns will be cut.
    """
    matrices, parts = apart
    if matrices == 1 or parts == 1:
        return array
    split = array.reshape(*array.shape[:-1], matrices, parts, -1)
    return split.swapaxes(-3, -2).reshape(array.shape)


def _put(array: np.ndarray, sharding: Sharding | None) -> jax.Array:
    """``array`` on the devices, of which some may be other processes'."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return copied(array, sharding)


def describe(abstract: Network, placement: Placement, dtype: Callable[[str], np.dtype]) -> Network:
    """A network as it will be loaded, for compiling programs without its parameters.

    Args:
      abstract: from ``nnx.eval_shape``.
      placement: where its parameters will go.
      dtype: of the parameter at a dotted path.
    """
    graph, state = nnx.split(abstract)
    described = []
    for path, variable in nnx.to_flat_state(state):
        target = ".".join(map(str, path))
        leaf = placement.described(target, tuple(variable.get_value().shape), dtype(target))
        described.append((path, variable.replace(leaf)))
    return nnx.merge(graph, nnx.from_flat_state(described))


def _like_matrix(sharding: Sharding) -> tuple[Sharding, Sharding]:
    """Shardings of values ``[L, in / r, r, out]`` and scales ``[L, out]`` from that of ``[L, in, out]``."""
    if not isinstance(sharding, NamedSharding):
        return sharding, sharding
    layer, width_in, width_out = (*sharding.spec, None, None, None)[:3]
    specs = PartitionSpec(layer, width_in, None, width_out), PartitionSpec(layer, width_out)
    values, scale = (NamedSharding(sharding.mesh, spec) for spec in specs)
    return values, scale


def _check_host_memory() -> None:
    device = jax.local_devices()[0]
    if HOST_MEMORY not in {memory.kind for memory in device.addressable_memories()}:
        raise UserInputError(
            f"stream_blocks on {device.device_kind}", "needs a device that can read host memory", "leave it out"
        )
