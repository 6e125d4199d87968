"""Loop carries that start as constants, inside ``jax.shard_map``."""

from typing import Any

import jax
import jax.numpy as jnp


def as_varying(tree: Any, like: Any) -> Any:
    """``tree``, unchanged in value, varying over the same mesh axes as the arrays in ``like``.

    Inside ``shard_map`` a loop's carry must vary over the same axes before and after its body. A carry that starts as
    zeros varies over none, and turns varying with the first data that is added. Zeros made *of* the data carry its
    axes; adding them costs nothing, because the compiler removes a sum with zero. Elsewhere nothing happens.

    Args:
      tree: arrays of floating or integer dtype.
      like: arrays or PRNG keys of any shape; empty arrays are passed over.
    """
    zero = jnp.zeros((), jnp.float32)
    for leaf in jax.tree.leaves(like):
        data = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        if data.size:
            zero = zero + jnp.zeros_like(data[(0,) * data.ndim]).astype(jnp.float32)
    return jax.tree.map(lambda array: array + zero.astype(array.dtype), tree)
