"""The engine behind the rule tables: official tensor names on one side, module parameters on the other.

A table (one per model: :mod:`convert.infinity`, :mod:`convert.image_tokenizer`, :mod:`convert.t5`) is a list of
:class:`Rule`. The same table reads a checkpoint (:func:`fill_module`) and writes one (:func:`official_state_dict`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from toprovar_jax.errors import UserInputError

Layout = Literal["as_is", "linear", "conv", "reshape"]
"""How a tensor is stored officially, relative to ours.

``as_is``: the same. ``linear``: (out, in), ours (in, out). ``conv``: (out, in, kh, kw), ours (kh, kw, in, out).
``reshape``: the same numbers in another shape, e.g. (1, N, 1, 1) or (1, 1, N, 1) for our (N,).
"""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One official tensor and where it goes.

    Attributes:
      official: its name in the state dict.
      target: dotted path of our parameter.
      layout: see :data:`Layout`.
      official_shape: for ``reshape``, the shape to write.
      layer: row of a parameter that is stacked over layers; None for one that is not.
    """

    official: str
    target: str
    layout: Layout = "as_is"
    official_shape: tuple[int, ...] | None = None
    layer: int | None = None

    def to_ours(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """``tensor`` in our layout, a view; a tensor that cannot have ``shape`` comes back with another one."""
        if self.layout == "linear" and tensor.ndim == 2:
            tensor = tensor.T
        elif self.layout == "conv" and tensor.ndim == 4:
            tensor = tensor.transpose(2, 3, 1, 0)
        elif self.layout == "reshape" and _squeezed(tensor.shape) == _squeezed(shape):
            tensor = tensor.reshape(shape)
        return tensor

    def to_official(self, array: np.ndarray) -> np.ndarray:
        """Our ``array`` (one layer of it, where stacked) in the official layout."""
        if self.layout == "linear":
            return np.ascontiguousarray(array.T)
        if self.layout == "conv":
            return np.ascontiguousarray(array.transpose(3, 2, 0, 1))
        return array.reshape(self.official_shape) if self.official_shape else array

    def expected_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The official shape of a parameter whose shape is ``shape`` with us."""
        if self.layout == "linear":
            return shape[::-1]
        if self.layout == "conv":
            return (shape[3], shape[2], *shape[:2])
        return self.official_shape or shape


def _squeezed(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def prepare_filling(
    abstract: nnx.Module,
    rules: Iterable[Rule],
    tensors: Mapping[str, Callable[[], np.ndarray]],
    *,
    source: str,
    canonical: Callable[[str], str | None] = lambda name: name,
    dtype: Callable[[str], Any] | None = None,
    place: Callable[[np.ndarray], jax.Array] = jnp.asarray,
) -> Callable[[], nnx.Module]:
    """Check that tensors under their official names fill a module built by ``nnx.eval_shape``; returns what fills it.

    Every problem is found, and all are reported, before anything is placed: shapes are looked at here, tensors are
    copied when the result is called, so readers should be lazy (a memory map is). Only one parameter, with all its
    layers, is held on the host at a time beyond what is placed.

    Args:
      abstract: module of ``jax.ShapeDtypeStruct`` leaves.
      rules: the model's table.
      tensors: official name to a function that reads the tensor.
      source: what to call the checkpoint in messages.
      canonical: maps a name as found to the table's spelling, or to None for a buffer that carries no information.
      dtype: dtype of the parameter at a dotted path; default that of ``abstract``.
      place: puts a host array on its device.

    Raises:
      UserInputError: names that are unknown, missing, or given twice under two spellings, or tensors of another
        shape; all of them are listed.
    """
    by_target: dict[str, list[Rule]] = {}
    known: set[str] = set()
    for rule in rules:
        by_target.setdefault(rule.target, []).append(rule)
        known.add(rule.official)
    found = {name: canonical(name) for name in tensors}
    reading = {ours: tensors[name] for name, ours in found.items() if ours is not None}
    spellings = Counter(ours for ours in found.values() if ours is not None)
    names = {
        "unknown": sorted(name for name, ours in found.items() if ours is not None and ours not in known),
        "missing": sorted(known - spellings.keys()),
        "given twice": sorted(name for name, ours in found.items() if ours is not None and spellings[ours] > 1),
    }
    _refuse(source, [f"{kind}: {_summary(which, ', ')}" for kind, which in names.items() if which])

    graph, state = nnx.split(abstract)
    parameters = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
    if parameters.keys() != by_target.keys():
        raise KeyError(f"table and module disagree about {sorted(parameters.keys() ^ by_target.keys())}")
    shapes = {target: tuple(variable.get_value().shape) for target, (_, variable) in parameters.items()}
    wrong = list(_mismatches(by_target, reading, shapes))
    _refuse(source, [_summary(wrong, "; ")] if wrong else [])

    def fill() -> nnx.Module:
        filled = []
        for target, (path, variable) in parameters.items():
            chosen = np.dtype(dtype(target) if dtype else variable.get_value().dtype)
            filled.append((path, variable.replace(place(_read(by_target[target], reading, shapes[target], chosen)))))
        return nnx.merge(graph, nnx.from_flat_state(filled))

    return fill


def fill_module(
    abstract: nnx.Module, rules: Iterable[Rule], tensors: Mapping[str, Callable[[], np.ndarray]], **options: Any
) -> nnx.Module:
    """:func:`prepare_filling` and the filling itself, for a model of one module."""
    return prepare_filling(abstract, rules, tensors, **options)()


def _mismatches(by_target, reading, shapes) -> Iterator[str]:
    """One sentence per tensor whose shape is not the model's, with both shapes."""
    for target, rules in by_target.items():
        for rule in rules:
            wanted = shapes[target] if rule.layer is None else shapes[target][1:]
            tensor = reading[rule.official]()
            if rule.to_ours(tensor, wanted).shape != wanted:
                yield f"{rule.official} has shape {tensor.shape}, the model needs {rule.expected_shape(wanted)}"


def _read(rules: list[Rule], reading: Mapping[str, Callable[[], np.ndarray]], shape, dtype: np.dtype) -> np.ndarray:
    """One parameter, assembled from its layers where it is stacked."""
    out = np.empty(shape, dtype)
    for rule in rules:
        part = out if rule.layer is None else out[rule.layer, ...]
        np.copyto(part, rule.to_ours(reading[rule.official](), part.shape), casting="unsafe")
    return out


_LISTED = 8
"""How many problems of a kind a message spells out, so that it stays readable when there are hundreds."""


def _summary(items: list[str], separator: str) -> str:
    more = len(items) - _LISTED
    return separator.join(items[:_LISTED]) + (f"{separator}and {more} more" if more > 0 else "")


def _refuse(source: str, problems: list[str]) -> None:
    if problems:
        raise UserInputError(
            f"checkpoint {source}", "does not fit the model: " + "; ".join(problems), "choose the matching model"
        )


def official_state_dict(
    module: nnx.Module, rules: Iterable[Rule], *, dtype: Any = ml_dtypes.bfloat16
) -> dict[str, np.ndarray]:
    """The module's parameters under their official names and layouts, cast to ``dtype``."""
    _, state = nnx.split(module)
    arrays = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
    return dict(_export(arrays, rules, np.dtype(dtype)))


def _export(arrays, rules, dtype) -> Iterator[tuple[str, np.ndarray]]:
    host: dict[str, np.ndarray] = {}
    for rule in rules:
        if rule.target not in host:
            host[rule.target] = np.asarray(arrays[rule.target].get_value())
        array = host[rule.target]
        array = array if rule.layer is None else array[rule.layer]
        yield rule.official, np.ascontiguousarray(rule.to_official(array).astype(dtype))
