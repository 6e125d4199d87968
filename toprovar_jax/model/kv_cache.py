"""The key-value cache of self-attention: preallocated, written in place, read as a static prefix.

It lies as the device's attention reads it: head by head on a TPU, token by token elsewhere. The other way round, a
compiler turns the whole cache around at every scale, which takes its size in memory once more.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention.target import current_target
from toprovar_jax.shapes import Array, Float, Int

_TILE = 16
"""Rows that a TPU pads arrays to. Room for whole tiles of tokens makes it keep them on the last axis but one; else it
takes the heads, where they fit better."""


class KVCache(NamedTuple):
    """Rotated keys and values of all layers, ``[L, R, S, N, H]``, or ``[L, R, N, S, H]`` where :func:`head_by_head`.

    S covers every scale but the last.
    """

    keys: Float[Array, "L R _ _ H"]
    values: Float[Array, "L R _ _ H"]


def head_by_head() -> bool:
    """Whether the device that is computed on wants the cache so."""
    return current_target().platform == "tpu"


def empty_cache(layers: int, rows: int, length: int, heads: int, head_dim: int, dtype) -> KVCache:
    """A zeroed cache with room for ``length`` tokens."""
    inner = (heads, -(-length // _TILE) * _TILE) if head_by_head() else (length, heads)
    shape = (layers, rows, *inner, head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def emptied(cache: KVCache) -> KVCache:
    """The cache without its tokens."""
    return jax.tree.map(lambda array: array[:, :, :, :0] if head_by_head() else array[:, :, :0], cache)


def extend(
    cache: KVCache,
    layer: Int[Array, ""],
    offset: int,
    key: Float[Array, "R T N H"],
    value: Float[Array, "R T N H"],
    *,
    write: bool,
) -> tuple[KVCache, Float[Array, "R S N H"], Float[Array, "R S N H"]]:
    """The keys and values that a scale's queries see in one layer, and the cache with the new ones written.

    Args:
      cache: all layers' cache; updated in place when its buffer is donated or carried.
      layer: which layer.
      offset: tokens of the scales before; a Python integer, so that what is read is a static slice.
      key, value: the scale's own.
      write: False for the last scale, after which nothing is read.
    """
    key, value = key.astype(cache.keys.dtype), value.astype(cache.values.dtype)
    if not write:
        if not offset:
            return cache, key, value
        past_keys, past_values = written_prefix(cache, layer, offset)
        return cache, jnp.concatenate([past_keys, key], axis=1), jnp.concatenate([past_values, value], axis=1)
    cache = KVCache(_written(cache.keys, layer, offset, key), _written(cache.values, layer, offset, value))
    if not offset:
        return cache, key, value
    return cache, *written_prefix(cache, layer, offset + key.shape[1])


def written_prefix(
    cache: KVCache, layer: Int[Array, ""], length: int
) -> tuple[Float[Array, "R S N H"], Float[Array, "R S N H"]]:
    """One layer's first ``length`` keys and values."""
    return _prefix(cache.keys, layer, length), _prefix(cache.values, layer, length)


def _prefix(array: Array, layer: Array, length: int) -> Float[Array, "R S N H"]:
    sizes = [1, *array.shape[1:]]
    sizes[3 if head_by_head() else 2] = length
    found = jax.lax.dynamic_slice(array, (layer, 0, 0, 0, 0), sizes)[0]
    return found.swapaxes(1, 2) if head_by_head() else found


def _written(array: Array, layer: Array, offset: int, new: Float[Array, "R T N H"]) -> Array:
    if not head_by_head():
        return jax.lax.dynamic_update_slice(array, new[None], (layer, 0, offset, 0, 0))
    if not offset:
        # A first scale's single token is written with zeros behind it, in whose place the next scale's tokens come: for
        # one token alone a compiler would choose another layout, and turn the cache around for the next scale.
        spare = max(0, min(array.shape[3], _TILE) - new.shape[1])
        new = jnp.pad(new, ((0, 0), (0, spare), (0, 0), (0, 0)))
    return jax.lax.dynamic_update_slice(array, new.swapaxes(1, 2)[None], (layer, 0, 0, offset, 0))
