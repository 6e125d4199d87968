"""What only texts need of a model: where it rests, and where it is while a text is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np

from toprovar_jax.errors import UserInputError

Network = TypeVar("Network")

TEXT_PATHS = (
    *("text.", "shared_modulation.", "head.modulation."),
    *("layers.cross_attention.key_value.", "layers.cross_attention.value_bias"),
)
"""How paths of those parameters of the transformer begin that are read for texts alone, not at every scale."""


def host_device() -> Any:
    """The CPU as a device.

    Raises:
      UserInputError: JAX runs without it.
    """
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        raise UserInputError(
            'text_encoder "host"', "needs JAX's CPU backend", 'add cpu to JAX_PLATFORMS, or take "on_demand"'
        ) from None


def home(network: Any) -> jax.sharding.Sharding:
    """Where a network's devices take an array whole: on its device, or a copy on each of its mesh."""
    sharding = jax.tree.leaves(network)[0].sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return sharding


@contextmanager
def borrowed(network: Network, sharding: jax.sharding.Sharding) -> Iterator[Network]:
    """The network with copies of its numpy arrays on devices.

    Their memory is given back at the end, whatever still refers to them.
    """
    leaves, tree = jax.tree.flatten(network)
    # Without a copy, a "device" that is the host would be lent the very memory that is freed below.
    lent = {i: jax.device_put(leaf, sharding, may_alias=False) for i, leaf in enumerate(leaves) if _rests(leaf)}
    jax.block_until_ready(lent)
    try:
        yield jax.tree.unflatten(tree, [lent.get(i, leaf) for i, leaf in enumerate(leaves)])
    finally:
        for leaf in lent.values():
            leaf.delete()


def described_borrowed(network: Network, sharding: jax.sharding.Sharding) -> Network:
    """What :func:`borrowed` gives, for compiling: numpy arrays as descriptions of arrays on devices."""

    def described(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding) if _rests(leaf) else leaf

    return jax.tree.map(described, network)


def _rests(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray)
