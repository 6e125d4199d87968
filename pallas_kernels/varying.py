"""Loop carries that start as constants, inside ``jax.shard_map``."""

from typing import Any

import jax


def as_varying(tree: Any, like: Any) -> Any:
    """``tree``, unchanged in value, varying over the same mesh axes as the arrays in ``like``.

    Inside ``shard_map`` a loop's carry must vary over the same axes before and after its body. A carry that starts as
    zeros varies over none, and turns varying with the first data that is added. Elsewhere nothing happens.

    Args:
      tree: arrays.
      like: arrays or PRNG keys of any shape.
    """
    axes = frozenset().union(*(_axes(leaf) for leaf in jax.tree.leaves(like)))

    def cast(array: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - _axes(array), key=str))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(cast, tree)


def _axes(array: Any) -> frozenset:
    return frozenset(jax.typeof(array).manual_axis_type.varying)
