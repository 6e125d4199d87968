"""Which axis of which array lies along which axis of a mesh: one table, and the shardings that follow from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from toprovar_jax.distributed.parts import DATA, FSDP, TENSOR, Split

LOGICAL_AXES: Mapping[str, tuple[str, ...]] = {
    "batch": (DATA, FSDP),
    "heads": (TENSOR,),
    "hidden": (TENSOR,),
    "width": (FSDP,),
    "rest": (FSDP, TENSOR),
}
"""Axes of arrays by what they are, and the mesh axes that they are cut along.

``batch``: pictures and their rows. ``heads``: self-attention's heads, in its weights and in the key-value cache.
``hidden``: the feed-forward's inner channels. ``width``: of matrices that all devices of ``tensor`` use whole or by
heads, the axis that is cut for storage. ``rest``: the same for what is used once per picture (text encoder, what the
transformer computes of texts alone, decoder), where ``tensor`` is free for storage, too.
"""

GATHERED = ("width", "rest")
"""Cut for storage alone: parts are gathered before they are used."""

_TRANSFORMER: Mapping[str, tuple[str | None, ...]] = {
    "layers.self_attention.qkv.kernel": (None, "width", "heads"),
    "layers.self_attention.query_bias": (None, "heads"),
    "layers.self_attention.value_bias": (None, "heads"),
    "layers.self_attention.log_scale": (None, "heads"),
    "layers.self_attention.out.kernel": (None, "heads", "width"),
    "layers.cross_attention.query.kernel": (None, "width", None),
    "layers.cross_attention.out.kernel": (None, "width", None),
    "layers.cross_attention.key_value.kernel": (None, "rest", None),
    "layers.feed_forward.up.kernel": (None, "width", "hidden"),
    "layers.feed_forward.up.bias": (None, "hidden"),
    "layers.feed_forward.down.kernel": (None, "hidden", "width"),
    "word_embedding.kernel": (None, None),
    "head.scores.kernel": (None, None),
}
"""Parameters of the transformer by path. Of others, those of :data:`_MATRICES` are ``rest``; the rest is not cut."""

_MATRICES: Mapping[str, tuple[str, ...]] = {
    "transformer": (".kernel",),
    "image_tokenizer": (".kernel",),
    "text_encoder": ("embedding", ".query", ".key", ".value", ".output", ".gate", ".up", ".down"),
}
"""How paths of parameters end that are gathered where they are used."""

_FUSED = {"layers.self_attention.qkv.kernel": 3}
"""Matrices whose columns are several matrices' side by side: each of them is cut along ``heads``."""


@dataclasses.dataclass(frozen=True)
class ParameterShardings:
    """Where each parameter goes on a mesh with the axes ``data``, ``fsdp`` and ``tensor``.

    A :data:`toprovar_jax.placement.Shardings`. Axes whose length does not divide stay whole.
    """

    mesh: Mesh | AbstractMesh

    def __call__(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        """The sharding of the parameter at a dotted path that begins with its network's name."""
        return NamedSharding(self.mesh, self._spec(path, shape))

    def fused(self, path: str) -> int:
        """How many matrices lie side by side in this one and are cut apart; 1 where it is cut as it is."""
        return _FUSED.get(path.removeprefix("transformer."), 1) if self.mesh.shape[TENSOR] > 1 else 1

    def _spec(self, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        entries = [self._along(name, size) for name, size in zip(logical_axes(path, shape), shape, strict=True)]
        return PartitionSpec(*entries)

    def _along(self, name: str | None, size: int) -> tuple[str, ...] | None:
        axes = tuple(axis for axis in LOGICAL_AXES.get(name or "", ()) if self.mesh.shape[axis] > 1)
        while axes and size % math.prod(self.mesh.shape[axis] for axis in axes):
            axes = axes[:-1]
        return axes or None


def logical_axes(path: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """What the axes of a parameter are, by the names of :data:`LOGICAL_AXES`; None where they are never cut."""
    network, _, own = path.partition(".")
    if network == "transformer" and own in _TRANSFORMER:
        return _TRANSFORMER[own]
    stacked = own.startswith("layers.")
    if len(shape) < (3 if stacked else 2) or not own.endswith(_MATRICES[network]):
        return (None,) * len(shape)
    # Convolutions [3, 3, in, out] by their output channels, matrices by their rows.
    cut = len(shape) - 1 if len(shape) == 4 else int(stacked)
    return tuple("rest" if axis == cut else None for axis in range(len(shape)))


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a parameter is cut for storage: ``axis`` from the end and ``over`` as in :class:`Split`; None: it is not."""

    axis: int | None = None
    over: tuple[str, ...] = ()

    def applied(self, part: Any) -> Any:
        """This device's part, told what it is."""
        return part if self.axis is None else Split(part, self.axis, self.over)


def cut_of(path: str, array: Any) -> Cut:
    """How an array that has been placed by :class:`ParameterShardings` is cut for storage.

    Args:
      path: as there.
      array: the parameter, or one array of a quantised one, whose leading axes are the parameter's.
    """
    if not isinstance(getattr(array, "sharding", None), NamedSharding):
        return Cut()
    spec = array.sharding.spec
    names = logical_axes(path, array.shape)
    if len(array.shape) == len(names) + 1:  # 8-bit integers, rows in groups
        names = (*names[:2], None, names[2])
    elif len(array.shape) == len(names) - 1:  # their scales
        names = (names[0], names[2])
    for axis, (name, entry) in enumerate(zip(names, (*spec, *(None,) * len(names)), strict=False)):
        if name in GATHERED and entry is not None:
            return Cut(axis - len(names), entry if isinstance(entry, tuple) else (entry,))
    return Cut()


def gathered_over(path: str, shape: tuple[int, ...], spec: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes over which a parameter is gathered before it is used; none where it is not cut for storage."""
    for name, entry in zip(logical_axes(path, shape), spec, strict=True):
        if name in GATHERED and entry is not None:
            return entry if isinstance(entry, tuple) else (entry,)
    return ()


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts a batch is cut."""
    return math.prod(mesh.shape[axis] for axis in LOGICAL_AXES["batch"])


def copied(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """A host array on the devices of a sharding, which may belong to other processes as well."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
