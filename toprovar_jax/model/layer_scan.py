"""Running a range of stacked layers with ``lax.scan``: compile time does not grow with depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from pallas_kernels.attention.target import current_target
from pallas_kernels.varying import as_varying
from toprovar_jax.shapes import Array, Int


def scan_layers(
    body: Callable[[Any, Any, Int[Array, ""], Any], tuple[Any, Any]],
    carry: Any,
    stacked: Any,
    start: int,
    stop: int,
    depth: int,
    *,
    own: Any = (),
    data: Any = (),
    remat: bool = False,
    unroll: bool = False,
) -> tuple[Any, Any]:
    """``carry, output = body(carry, layer, index, own)`` for the layers ``start`` to ``stop - 1``.

    Args:
      body: one layer.
      carry: what is handed on.
      stacked: pytree of arrays (or modules) with a leading axis of length ``depth``.
      start, stop: static range of layers.
      depth: how many there are in all.
      own: pytree of arrays with a leading axis of length ``stop - start``: what only these layers have.
      data: what else the body reads that may differ between devices inside ``shard_map``.
      remat: for gradients, keep nothing of a layer but its input and compute the rest anew on the way back.
      unroll: compile the layers one after the other instead of a loop over the whole stack.

    Returns:
      The last carry, and the outputs stacked over the layers of the range.

    The whole stack is scanned as such, which differentiates well. A part of it is indexed instead of sliced: a slice
    of stacked weights would be copied first.
    """
    carry = as_varying(carry, (carry, data))
    if remat:
        # A loop keeps the compiler from merging the two computations of a layer; no barrier is needed for that.
        body = jax.checkpoint(body, prevent_cse=unroll)
    if (start, stop) == (0, depth):

        def whole(carry, item):
            layer, index, own = item
            return body(carry, layer, index, own)

        return jax.lax.scan(whole, carry, (stacked, jnp.arange(depth), own), unroll=unroll)

    def part(carry, item):
        index, own = item
        layer = jax.tree.map(lambda x: _as_stored(jax.lax.dynamic_index_in_dim(x, index, keepdims=False)), stacked)
        return body(carry, layer, index, own)

    return jax.lax.scan(part, carry, (jnp.arange(start, stop), own))


def _as_stored(array: jax.Array) -> jax.Array:
    """``array`` in the layout that it has in memory, on TPUs.

    Where a product would have its matrix the other way round, the compiler else turns the whole stack around first.
    """
    if current_target().platform != "tpu" or array.ndim < 2:
        return array
    return with_layout_constraint(array, Layout(tuple(range(array.ndim))))
