"""One program for all devices of a mesh: what each of them gets of every argument and result.

Pieces of a generation run under ``jax.shard_map``: each device computes its own pictures, with its own heads where the
mesh has an axis for them, and runs kernels as on one device. What is exchanged is written down where it happens
(:mod:`toprovar_jax.distributed.parts`); nothing is left to the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from toprovar_jax.distributed.parts import TENSOR
from toprovar_jax.distributed.rules import LOGICAL_AXES, Cut, cut_of
from toprovar_jax.generation import InfinityModel, State
from toprovar_jax.image_tokenizer import ImageTokenizer
from toprovar_jax.model import Infinity
from toprovar_jax.model.kv_cache import KVCache, head_by_head
from toprovar_jax.model.layer_memory import GroupMemory
from toprovar_jax.model.similar_attention import SimilarMemory
from toprovar_jax.model.text_conditioning import TextCondition
from toprovar_jax.sampling import ScaleSampling
from toprovar_jax.text_encoder import T5Encoder

_BATCH = LOGICAL_AXES["batch"]


def over_mesh(function: Callable[..., Any], arguments: tuple[Any, ...], mesh: Mesh) -> Callable[..., Any]:
    """``function`` of whole arrays, computed in parts by the devices of ``mesh``.

    Args:
      function: what one device computes, of its parts of the arguments; may use the collectives of
        :mod:`toprovar_jax.distributed.parts`. Results have the batch on the axis that their type has it on.
      arguments: networks, conditions, states and arrays, or their descriptions.
      mesh: with the axes ``data``, ``fsdp`` and ``tensor``.
    """
    cuts = tuple(_cuts(argument) for argument in arguments)

    def local(*parts: Any) -> Any:
        return function(*(_told(part, cut) for part, cut in zip(parts, cuts, strict=True)))

    def mapped(out_specs: Any) -> Callable[..., Any]:
        in_specs = tuple(specs_of(argument) for argument in arguments)
        # What is the same on all devices of an axis is so by construction: gathered or summed over it.
        return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    return mapped(specs_of(jax.eval_shape(mapped(PartitionSpec()), *arguments)))


def specs_of(tree: Any) -> Any:
    """Along which mesh axes the axes of arrays lie; a prefix of ``tree``, which may hold descriptions of arrays."""
    rows, per_layer = PartitionSpec(_BATCH), PartitionSpec(None, _BATCH)
    match tree:
        case nnx.Module():
            return jax.tree.map(_own_spec, tree)
        case InfinityModel():
            return _like(tree, *map(specs_of, tree))
        case ScaleSampling():
            return PartitionSpec()
        case TextCondition():
            layered = ("keys", "values")
            return _like(tree, *(per_layer if name in layered else rows for name in tree._fields))
        case KVCache():
            axes = (None, _BATCH, TENSOR) if head_by_head() else (None, _BATCH, None, TENSOR)
            return _like(tree, PartitionSpec(*axes), PartitionSpec(*axes))
        case SimilarMemory():
            return _like(tree, PartitionSpec(None, _BATCH, TENSOR), PartitionSpec(None, _BATCH, None, TENSOR))
        case GroupMemory():
            similar = None if tree.similar is None else specs_of(tree.similar)
            held = None if tree.held is None else per_layer
            return _like(tree, specs_of(tree.cache), per_layer, per_layer, rows, similar, held)
        case State():
            return _like(tree, tuple(map(specs_of, tree.memory)), rows, rows, rows)
        case tuple() if hasattr(tree, "_fields"):
            return _like(tree, *map(specs_of, tree))
        case tuple():
            return tuple(map(specs_of, tree))
        case None:
            return None
    return rows if tree.ndim else PartitionSpec()


def shardings_of(tree: Any, mesh: Mesh) -> Any:
    """The descriptions of arrays in ``tree``, each with its sharding by :func:`specs_of`."""
    specs = specs_of(tree)

    def described(spec: PartitionSpec, subtree: Any) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), subtree)

    return jax.tree.map(described, specs, tree, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


def _like(tree: tuple, *fields: Any) -> Any:
    """A tuple of the same kind, of what stands for its fields."""
    return type(tree)(*fields)


def _own_spec(leaf: Any) -> PartitionSpec:
    sharding = getattr(leaf, "sharding", None)
    return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()


_NETWORKS = {Infinity: "transformer", ImageTokenizer: "image_tokenizer", T5Encoder: "text_encoder"}


def _cuts(tree: Any) -> Any:
    """How the parameters of networks are cut for storage, in the structure of ``tree``; None for other arguments."""
    if isinstance(tree, InfinityModel):
        return _like(tree, *map(_cuts, tree))
    if not isinstance(tree, nnx.Module):
        return None
    name = _name_of(tree)
    graph, state = nnx.split(tree)
    found = []
    for path, variable in nnx.to_flat_state(state):
        dotted = ".".join((name, *map(str, path)))
        cuts = jax.tree.map(lambda leaf, at=dotted: cut_of(at, leaf), variable.get_value())
        found.append((path, variable.replace(cuts)))
    return nnx.merge(graph, nnx.from_flat_state(found))


def _name_of(network: nnx.Module) -> str:
    for kind, name in _NETWORKS.items():
        if isinstance(network, kind):
            return name
    raise TypeError(f"{type(network).__name__} is none of {', '.join(_NETWORKS.values())}")


def _told(part: Any, cuts: Any) -> Any:
    """A device's part of an argument, in which parameters in parts know that they are."""
    if isinstance(part, InfinityModel):
        return _like(part, *map(_told, part, cuts))
    if cuts is None:
        return part
    return jax.tree.map(lambda cut, leaf: cut.applied(leaf), cuts, part, is_leaf=lambda leaf: isinstance(leaf, Cut))
