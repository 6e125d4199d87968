"""What the layers hand from one scale to the next: keys and values, entropy maps, increments."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from toprovar_jax.acceleration.step import ScaleStep
from toprovar_jax.config import InfinityConfig
from toprovar_jax.model.kv_cache import KVCache, empty_cache
from toprovar_jax.model.layers import compute_dtype
from toprovar_jax.shapes import Array, Float


class GroupMemory(NamedTuple):
    """One layer group's part; L counts the group's layers.

    Attributes:
      cache: keys and values of the tokens that were computed.
      maps: entropy of every token, nats, on the grid of the scale before; T is 0 where no scale to come needs them.
      increments: what each layer added to the residual stream at the last dense scale, on its grid, compute dtype; T is
        0 where they are not needed.
    """

    cache: KVCache
    maps: Float[Array, "L B T"]
    increments: Float[Array, "L R T D"]


LayerMemory = tuple[GroupMemory, ...]
"""One entry per layer group of the plan."""


def empty_memory(config: InfinityConfig, step: ScaleStep, batch: int) -> LayerMemory:
    """The memory before ``step``, the first one of a plan."""
    rows, dtype = batch * (2 if step.guided else 1), compute_dtype(config.precision)
    groups = []
    for group in step.groups:
        layers = group.stop - group.start
        cache = empty_cache(layers, rows, group.cache_length, config.num_heads, config.head_dim, dtype)
        maps = jnp.zeros((layers, batch, 0), jnp.float32)
        groups.append(GroupMemory(cache, maps, jnp.zeros((layers, rows, 0, config.width), dtype)))
    return tuple(groups)
