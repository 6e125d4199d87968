"""What the layers hand from one scale to the next: keys and values, and what computing less needs to know."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from toprovar_jax.acceleration.step import ScaleStep
from toprovar_jax.config import InfinityConfig
from toprovar_jax.model.held_cache import HeldCache
from toprovar_jax.model.kv_cache import KVCache, empty_cache
from toprovar_jax.model.layers import compute_dtype
from toprovar_jax.model.similar_attention import SimilarMemory
from toprovar_jax.shapes import Array, Float


class GroupMemory(NamedTuple):
    """One layer group's part; L counts the group's layers.

    Attributes:
      cache: keys and values of the tokens that were computed; S is 0 once they are compressed.
      maps: entropy of every token, nats, on the grid of the scale before; T is 0 where no scale to come needs them.
      increments: what each layer added to the residual stream at the last dense scale, on its grid, compute dtype; T is
        0 where they are not needed.
      outputs: residual stream after the group at the scale before, float32; T is 0 where it is not needed.
      similar: what :class:`~toprovar_jax.acceleration.key_patterns.SimilarKeys` measured; None where it is not needed.
      held: the compressed cache; None as long as nothing is compressed.
    """

    cache: KVCache
    maps: Float[Array, "L B T"]
    increments: Float[Array, "L R T D"]
    outputs: Float[Array, "R T D"]
    similar: SimilarMemory | None = None
    held: HeldCache | None = None


LayerMemory = tuple[GroupMemory, ...]
"""One entry per layer group of the plan."""


def empty_memory(config: InfinityConfig, step: ScaleStep, batch: int) -> LayerMemory:
    """The memory before ``step``, the first one of a plan."""
    rows, dtype = batch * (2 if step.guided else 1), compute_dtype(config.precision)
    heads = config.num_heads // config.tensor_parts
    groups = []
    for group in step.groups:
        layers = group.stop - group.start
        cache = empty_cache(layers, rows, group.cache_length, heads, config.head_dim, dtype)
        maps = jnp.zeros((layers, batch, 0), jnp.float32)
        increments = jnp.zeros((layers, rows, 0, config.width), dtype)
        outputs = jnp.zeros((rows, 0, config.width), jnp.float32)
        groups.append(GroupMemory(cache, maps, increments, outputs))
    return tuple(groups)


def map_rows(function, memory: GroupMemory) -> GroupMemory:
    """``function(array, axis)`` on everything that has guidance rows, which lie on that axis; maps are per image."""

    def over(tree, axis: int):
        return jax.tree.map(lambda array: function(array, axis), tree)

    return GroupMemory(
        over(memory.cache, 1),
        memory.maps,
        over(memory.increments, 1),
        over(memory.outputs, 0),
        over(memory.similar, 1),
        over(memory.held, 1),
    )
