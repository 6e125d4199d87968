"""One generation on several devices: inside ``jax.shard_map``, what each of them has and what they exchange.

Parameters may lie in parts that are gathered matrix by matrix, just before their product (:class:`Split`); the result
is the same number for number. Self-attention's heads and the feed-forward's hidden channels may be computed in parts,
one per device of the mesh axis :data:`TENSOR` (:class:`TensorParts`): then the tokens of a block are spread between its
two such maps, so that a block exchanges twice: sums are scattered over the tokens and tokens gathered again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from toprovar_jax.shapes import Array, Float

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
"""Axes of a mesh: copies of the model; copies that keep their parameters in parts; devices that share the work on one
picture."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Split:
    """A parameter of which each device of some mesh axes holds a part.

    Attributes:
      part: what this device holds.
      axis: which axis is cut, counted from the end, so that leading layer axes may come and go.
      over: the mesh axes, outermost first.
    """

    part: Any
    axis: int = dataclasses.field(metadata={"static": True})
    over: tuple[str, ...] = dataclasses.field(metadata={"static": True})


def whole(parameter: Any) -> Any:
    """A parameter as one array; gathered, if it is in parts."""
    if not isinstance(parameter, Split):
        return parameter
    axis = parameter.part.ndim + parameter.axis
    return jax.lax.all_gather(parameter.part, parameter.over, axis=axis, tiled=True)


def all_whole(tree: Any) -> Any:
    """``tree`` with every parameter whole."""
    return jax.tree.map(whole, tree, is_leaf=lambda leaf: isinstance(leaf, Split))


@dataclasses.dataclass(frozen=True)
class TensorParts:
    """Devices that compute parts of the same blocks. Static and hashable; with one part nothing is exchanged.

    Attributes:
      count: how many; the size of the mesh axis :data:`TENSOR`.
    """

    count: int = 1

    def scattered_sum(self, partial: Float[Array, "R T W"]) -> Float[Array, "R part_T W"]:
        """The sum over the devices, of which each gets its share of the tokens."""
        if self.count == 1:
            return partial
        return jax.lax.psum_scatter(self._padded(partial), TENSOR, scatter_dimension=1, tiled=True)

    def own_tokens(self, tokens: Float[Array, "R T W"]) -> Float[Array, "R part_T W"]:
        """This device's share of tokens that all have; the last shares are filled up with zeros."""
        if self.count == 1:
            return tokens
        padded = self._padded(tokens)
        share = padded.shape[1] // self.count
        return jax.lax.dynamic_slice_in_dim(padded, jax.lax.axis_index(TENSOR) * share, share, axis=1)

    def all_tokens(self, share: Float[Array, "R part_T W"], length: int) -> Float[Array, "R T W"]:
        """All ``length`` tokens, from every device's share."""
        if self.count == 1:
            return share
        return jax.lax.all_gather(share, TENSOR, axis=1, tiled=True)[:, :length]

    def mean(self, values: Float[Array, ...]) -> Float[Array, ...]:
        """The mean over the devices."""
        return values if self.count == 1 else jax.lax.pmean(values, TENSOR)

    def _padded(self, tokens: Array) -> Array:
        return jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % self.count), (0, 0)))


def spread_over_tensor(function, rows: Any, count: int) -> Any:
    """``function`` of a batch, each device of :data:`TENSOR` computing some of its rows; all get all results.

    Args:
      function: of arrays whose first axis is the batch, to such arrays; each row on its own.
      rows: its argument, the same on all devices.
      count: how many devices.
    """
    if count == 1:
        return function(rows)
    batch = jax.tree.leaves(rows)[0].shape[0]
    share = -(-batch // count)
    # Beyond the batch its last row is computed again: zeros might be slow or no legal input.
    picked = jnp.minimum(jax.lax.axis_index(TENSOR) * share + jnp.arange(share), batch - 1)
    computed = function(jax.tree.map(lambda array: array[picked], rows))
    gathered = jax.tree.map(lambda array: jax.lax.all_gather(array, TENSOR, axis=0, tiled=True), computed)
    return jax.tree.map(lambda array: array[:batch], gathered)
