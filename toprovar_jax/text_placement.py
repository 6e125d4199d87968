"""Where the text encoder's parameters rest, and where they are while it encodes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

from toprovar_jax.errors import UserInputError
from toprovar_jax.text_encoder import T5Encoder


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
def borrowed(encoder: T5Encoder, sharding: jax.sharding.Sharding) -> Iterator[T5Encoder]:
    """A copy of the encoder on devices, whose memory is given back at the end whatever still refers to it."""
    # Without a copy, a "device" that is the host would be lent the very memory that is freed below.
    there = jax.block_until_ready(jax.device_put(encoder, sharding, may_alias=False))
    try:
        yield there
    finally:
        for leaf in jax.tree.leaves(there):
            leaf.delete()
