"""The engine behind the rule tables: official tensor names on one side, module parameters on the other.

A table (one per model: :mod:`convert.infinity`, :mod:`convert.image_tokenizer`, :mod:`convert.t5`) is a list of
:class:`Rule`. The same table reads a checkpoint (:func:`fill_module`) and writes one (:func:`official_state_dict`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from convert.copying import copy_into, is_finite
from toprovar_jax.errors import UserInputError

Reader = Callable[[], np.ndarray]
"""Reads one tensor of a checkpoint, best lazily: a view of a memory map."""

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
      truncate: whether a tensor with more rows than the model has gives its first ones.
    """

    official: str
    target: str
    layout: Layout = "as_is"
    official_shape: tuple[int, ...] | None = None
    layer: int | None = None
    truncate: bool = False

    def to_ours(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """``tensor`` in our layout, a view; a tensor that cannot have ``shape`` comes back with another one."""
        if self.layout == "linear" and tensor.ndim == 2:
            tensor = tensor.T
        elif self.layout == "conv" and tensor.ndim == 4:
            tensor = tensor.transpose(2, 3, 1, 0)
        elif self.layout == "reshape" and _squeezed(tensor.shape) == _squeezed(shape):
            tensor = tensor.reshape(shape)
        return tensor[: shape[0]] if self.truncate and tensor.ndim == len(shape) else tensor

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
    tensors: Mapping[str, Reader],
    *,
    source: str,
    canonical: Callable[[str], str | None] = lambda name: name,
    dtype: Callable[[str], Any] | None = None,
    place: Callable[[np.ndarray], jax.Array | np.ndarray] = jnp.asarray,
    place_named: Callable[[str, np.ndarray], Any] | None = None,
) -> Callable[[], nnx.Module]:
    """Check that tensors under their official names fill a module built by ``nnx.eval_shape``; returns what fills it.

    Every problem of names, shapes and types is found, and all are reported, before anything is placed; the numbers are
    looked at when they are copied, which is when the result is called, so readers should be lazy (a memory map is).
    Only one parameter, with all its layers, is held on the host at a time beyond what is placed.

    Args:
      abstract: module of ``jax.ShapeDtypeStruct`` leaves.
      rules: the model's table.
      tensors: official name to a function that reads the tensor.
      source: what to call the checkpoint in messages.
      canonical: maps a name as found to the table's spelling, or to None for a buffer that carries no information.
      dtype: dtype of the parameter at a dotted path; default that of ``abstract``.
      place: puts a host array on its device, or leaves it where it is.
      place_named: instead of ``place``, told the parameter's dotted path as well; what it returns is the parameter.

    Raises:
      UserInputError: names that are unknown, missing, or given twice under two spellings, tensors of another shape or
        of a type that is not floating; and, when the module is filled, numbers that are not finite in the chosen dtype.
        All tensors are listed, those that differ in a number of their name only as one entry with its range.
    """
    graph, state = nnx.split(abstract)
    parameters = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}
    shapes = {target: tuple(variable.get_value().shape) for target, (_, variable) in parameters.items()}
    by_target = rules_by_target(rules, shapes)
    reading = match_tensors(by_target, shapes, tensors, source=source, canonical=canonical)

    def fill() -> nnx.Module:
        filled, spoilt = [], []
        for target, (path, variable) in parameters.items():
            chosen = np.dtype(dtype(target) if dtype else variable.get_value().dtype)
            array, not_finite = _read(by_target[target], reading, shapes[target], chosen)
            spoilt += not_finite
            # A spoilt checkpoint is read to its end, to name all that is wrong with it, but no longer placed.
            if not spoilt:
                placed = place_named(target, array) if place_named else place(array)
                filled.append((path, variable.replace(placed)))
        if spoilt:
            raise spoilt_checkpoint(source, spoilt)
        return nnx.merge(graph, nnx.from_flat_state(filled))

    return fill


def fill_module(
    abstract: nnx.Module, rules: Iterable[Rule], tensors: Mapping[str, Reader], **options: Any
) -> nnx.Module:
    """:func:`prepare_filling` and the filling itself, for a model of one module."""
    return prepare_filling(abstract, rules, tensors, **options)()


def rules_by_target(rules: Iterable[Rule], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Rule]]:
    """A table's rules by the parameter they fill: one, or one per layer.

    Raises:
      KeyError: ``shapes``, by path, are not those of the table's parameters.
    """
    by_target: dict[str, list[Rule]] = {}
    for rule in rules:
        by_target.setdefault(rule.target, []).append(rule)
    if shapes.keys() != by_target.keys():
        raise KeyError(f"table and module disagree about {sorted(shapes.keys() ^ by_target.keys())}")
    return by_target


def match_tensors(
    by_target: Mapping[str, list[Rule]],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Reader],
    *,
    source: str,
    canonical: Callable[[str], str | None],
) -> dict[str, Reader]:
    """The tensors that a model needs, by their official names.

    Args:
      by_target: the table, by the path of the parameter.
      shapes: of the parameters.
      tensors, source, canonical: see :func:`prepare_filling`.

    Raises:
      UserInputError: see :func:`prepare_filling`.
    """
    found = {name: canonical(name) for name in tensors}
    reading = {ours: tensors[name] for name, ours in found.items() if ours is not None}
    known = {rule.official for rules in by_target.values() for rule in rules}
    spellings = Counter(ours for ours in found.values() if ours is not None)
    names = {
        "unknown": sorted(name for name, ours in found.items() if ours is not None and ours not in known),
        "missing": sorted(known - spellings.keys()),
        "given twice": sorted(name for name, ours in found.items() if ours is not None and spellings[ours] > 1),
    }
    problems = [f"{kind}: {_collapsed(which)}" for kind, which in names.items() if which]
    problems += _mismatches(by_target, reading, shapes)
    if problems:
        rule = f"does not fit the model: {'; '.join(problems)}"
        raise UserInputError(f"checkpoint {source}", rule, "choose the matching model")
    return reading


def spoilt_checkpoint(source: str, names: Iterable[str]) -> UserInputError:
    """The error for tensors with numbers that are not finite."""
    rule = f"has numbers that are not finite in {_collapsed(names)}"
    return UserInputError(f"checkpoint {source}", rule, "fetch it again or take another one")


def _mismatches(by_target, reading, shapes) -> Iterator[str]:
    """One sentence per way in which tensors differ from the model's, with what they have and what it needs."""
    groups: dict[str, list[str]] = {}
    for target, rules in by_target.items():
        for rule in rules:
            if rule.official not in reading:
                continue
            wanted = shapes[target] if rule.layer is None else shapes[target][1:]
            tensor = reading[rule.official]()
            if rule.to_ours(tensor, wanted).shape != wanted:
                difference = f"shape {tensor.shape}, the model needs {rule.expected_shape(wanted)}"
                groups.setdefault(difference, []).append(rule.official)
            if not jnp.issubdtype(tensor.dtype, jnp.floating):
                difference = f"type {tensor.dtype}, the model needs floating-point numbers"
                groups.setdefault(difference, []).append(rule.official)
    for difference, names in groups.items():
        yield f"{_collapsed(names)} {'have' if len(names) > 1 else 'has'} {difference}"


def _read(
    rules: list[Rule], reading: Mapping[str, Reader], shape: tuple[int, ...], dtype: np.dtype
) -> tuple[np.ndarray, list[str]]:
    """One parameter, assembled from its layers where it is stacked, and the tensors that are not finite in it."""
    out, spoilt = np.empty(shape, dtype), []
    for rule in rules:
        part = out if rule.layer is None else out[rule.layer, ...]
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found below, by its name
            copy_into(part, rule.to_ours(reading[rule.official](), part.shape))
        if not is_finite(part):
            spoilt.append(rule.official)
    return out, spoilt


def _collapsed(names: Iterable[str]) -> str:
    """All ``names`` in one line: those that differ only in numbers between dots become one, with the ranges.

    ``a.0.w, a.1.w, a.2.w, b`` gives ``a.{0..2}.w (3 tensors), b``. Nothing is lost: an entry stands for every
    combination of its ranges, and a group of names that is no such product becomes several entries.
    """
    groups: dict[tuple[str, ...], list[tuple[tuple[int, ...], ...]]] = {}
    for name in names:
        fixed = tuple(_NUMBER.split(name))
        groups.setdefault(fixed, []).append(tuple((int(number),) for number in _NUMBER.findall(name)))
    entries = []
    for fixed, boxes in groups.items():
        for axis in reversed(range(len(fixed) - 1)):
            merged: dict[tuple[tuple[int, ...], ...], list[int]] = {}
            for box in boxes:
                merged.setdefault(box[:axis] + box[axis + 1 :], []).extend(box[axis])
            boxes = [(*rest[:axis], tuple(sorted(found)), *rest[axis:]) for rest, found in merged.items()]
        for box in boxes:
            count = math.prod(map(len, box))
            name = "".join(text for pair in zip(fixed, map(_range, box), strict=False) for text in pair) + fixed[-1]
            entries.append(f"{name} ({count} tensors)" if count > 1 else name)
    return ", ".join(entries)


_NUMBER = re.compile(r"(?<=\.)(?:0|[1-9][0-9]*)(?=\.)")


def _range(numbers: tuple[int, ...]) -> str:
    """``{0..3,7}`` for 0, 1, 2, 3, 7; a single number as it is."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"


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
