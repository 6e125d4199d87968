"""Opening whatever weights come in: one file, a folder, shards with or without their index; bare or wrapped."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from convert.pth import PthTensor, open_pth
from convert.safetensors_io import open_safetensors
from toprovar_jax.errors import UserInputError
from toprovar_jax.files import absence

SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
"""Files of weights; all but the first are what ``torch.save`` writes."""

_PLAIN = ("trainer", "gpt_fsdp", "gpt", "vae", "state_dict", "model", "module")
_AVERAGED = ("gpt_ema_fsdp", "gpt_ema", "vae_ema", "ema", "model_ema", "ema_state_dict")
"""Keys that hold the weights in files of more than weights; the second kind, their averages over training."""

_LEADING = "module."
"""What wrappers of training for several devices put before all names; inside a name it belongs to the network."""

_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
"""Elements of names that compiling, sharding and recomputing add wherever they wrap a module."""

_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})(\.[a-z]+)$")
_LARGEST_INDEX = 64 << 20


@runtime_checkable
class LazyTensor(Protocol):
    """A tensor on disk; calling it gives its numbers, as a view of the file."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102

    @property
    def dtype(self) -> np.dtype: ...  # noqa: D102

    def __call__(self) -> np.ndarray: ...  # noqa: D102


@dataclasses.dataclass(frozen=True)
class Source:
    """One network's weights as found.

    Attributes:
      label: what to call it in messages.
      files: what it is read from, in the order of its tensors.
      tensors: by name.
      wrapped_in: keys under which the tensors lay, joined by dots; empty for a bare state dict.
      averaged: whether these are averages over training.
    """

    label: str
    files: tuple[Path, ...]
    tensors: dict[str, LazyTensor]
    wrapped_in: str = ""
    averaged: bool = False


def group_sources(paths: Iterable[Path]) -> list[tuple[Path, ...]]:
    """Paths that belong to one network each: shards of one set together, everything else alone.

    Raises:
      UserInputError: a path is given twice.
    """
    groups: dict[Any, list[Path]] = {}
    seen = set()
    for path in paths:
        if (place := os.path.abspath(path)) in seen:
            raise UserInputError(f"source {path}", "is given twice", "name it once")
        seen.add(place)
        match = _SHARD.search(path.name)
        groups.setdefault((path.parent, *match.groups()) if match else path, []).append(path)
    return [tuple(group) for group in groups.values()]


def open_source(paths: Sequence[Path], *, ema: bool = False) -> Source:
    """Open a network's weights.

    Args:
      paths: one file, one index (``*.index.json``), one folder that holds one network, or all shards of a network.
      ema: take the averaged weights of a training checkpoint.

    Raises:
      UserInputError: nothing there, or files that are damaged, foreign, ambiguous or incomplete.
    """
    first = paths[0]
    if len(paths) == 1 and first.is_dir():
        return open_source(_weights_of(first), ema=ema)
    if len(paths) == 1 and first.name.endswith(".index.json"):
        return _open_index(first, ema)
    for path in paths:
        if path.suffix not in SUFFIXES:
            there = "is no file of weights" if path.is_file() else absence(path)
            raise UserInputError(f"file {path}", there, f"name a folder or a file that ends with {', '.join(SUFFIXES)}")
    if match := _SHARD.search(first.name):
        names = {path.name for path in paths}
        missing = [name for name in _shard_names(match) if name not in names]
        if missing:
            raise UserInputError(
                f"shards of {first}", f"must be given together, without {', '.join(missing)}", "name their folder"
            )
    return _merged(str(first) if len(paths) == 1 else str(first.parent), paths, ema)


def _shard_names(match: re.Match[str]) -> list[str]:
    count = min(int(match[2]), 1000)
    return [f"{match[1]}-{i:05d}-of-{match[2]}{match[3]}" for i in range(1, count + 1)]


def _weights_of(folder: Path) -> tuple[Path, ...]:
    """What leads to the weights of a folder: an index, a file or a set of shards; safetensors if both are there."""
    for indices, files in _present(folder):
        found = indices or files
        groups = group_sources(found)
        if len(groups) == 1:
            return groups[0]
        if found:
            names = ", ".join(path.name for path in found[:20])
            raise UserInputError(f"folder {folder}", f"holds several files of weights ({names})", "name one of them")
    raise UserInputError(f"folder {folder}", f"holds no file that ends with {', '.join(SUFFIXES)}", "name another one")


def sources_in(folder: Path) -> list[tuple[Path, ...]]:
    """Everything in a folder, but not below it, that :func:`open_source` takes: indices, files and sets of shards.

    Those of safetensors come first; shards beside an index of their kind are the index's.

    Raises:
      UserInputError: the folder cannot be read.
    """
    return [group for indices, files in _present(folder) for group in group_sources([*indices, *files])]


def _present(folder: Path) -> list[tuple[list[Path], list[Path]]]:
    """A folder's indices and its other files of weights, first of safetensors, then of what torch writes."""
    try:
        present = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise UserInputError(
            f"folder {folder}", f"cannot be read ({error.strerror})", "check its permissions"
        ) from None
    found = []
    for suffixes in ((".safetensors",), SUFFIXES[1:]):
        indices = [path for path in present if path.name.endswith(tuple(f"{s}.index.json" for s in suffixes))]
        files = [path for path in present if path.suffix in suffixes and not (indices and _SHARD.search(path.name))]
        found.append((indices, files))
    return found


def _open_index(path: Path, ema: bool) -> Source:
    placed = _read_index(path)
    shards = [path.parent / name for name in dict.fromkeys(placed.values())]
    for shard in shards:
        if not shard.is_file():
            raise UserInputError(f"file {shard}", f"is missing, and {path.name} names it", "fetch it too")
    return _merged(str(path.parent), shards, ema, placed)


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name to shard name."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
            raise UserInputError(f"index {path}", f"gives {_some(twice)} twice", "fetch it again")
        return found

    try:
        if not path.is_file():  # reading a pipe or a device might never end
            raise UserInputError(f"index {path}", "must be a file", "check the path")
        if path.stat().st_size > _LARGEST_INDEX:
            raise UserInputError(f"index {path}", f"must be under {_LARGEST_INDEX >> 20} MiB", "fetch it again")
        index = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=once)
    except UserInputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "not JSON"
        raise UserInputError(f"index {path}", f"cannot be read ({reason})", "fetch it again") from None
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not placed:
        raise UserInputError(f"index {path}", "must have a weight_map of tensors and their files", "fetch it again")
    for shard in placed.values():
        if (
            not isinstance(shard, str)
            or not re.fullmatch(r"\w[\w.+-]{0,199}", shard)
            or Path(shard).suffix not in SUFFIXES
        ):
            raise UserInputError(
                f"index {path} with file {str(shard)[:80]!a}",
                "must name files of weights that lie beside it",
                "use the index as it was published",
            )
    return placed


def _merged(label: str, paths: Sequence[Path], ema: bool, placed: Mapping[str, str] | None = None) -> Source:
    """The tensors of all files; ``placed`` says which file each must come from."""
    tensors: dict[str, LazyTensor] = {}
    wrapped, averaged, origin = "", False, {}
    for path in paths:
        found, wrapped, averaged = _open_file(path, ema)
        for name in found:
            if name in tensors:
                raise UserInputError(
                    f"file {path}", f"has tensor {name[:80]!a}, and so has {origin[name]}", "keep the right one"
                )
            if placed is not None and placed.get(name) != path.name:
                raise UserInputError(f"file {path}", f"has tensor {name[:80]!a}, not so the index", "fetch both again")
            origin[name] = path.name
        tensors |= found
    if not tensors:
        raise UserInputError(f"checkpoint {label}", "has no tensors", "name another file")
    missing = sorted((placed or {}).keys() - tensors.keys())
    if missing:
        raise UserInputError(
            f"index of {label}", f"names tensors that its shards lack ({_some(missing)})", "fetch all files again"
        )
    return Source(label, tuple(paths), _without_wrappers(label, tensors), wrapped, averaged)


def _without_wrappers(label: str, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors under the names that they have in a network that nothing wraps."""
    plain = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in tensors}
    while all(name.startswith(_LEADING) for name in plain.values()):
        plain = {name: shorter.removeprefix(_LEADING) for name, shorter in plain.items()}
    twice = [name for name, count in Counter(plain.values()).items() if count > 1]
    if twice:
        rule = f"has {_some(twice)} twice, once with and once without the names of wrappers"
        raise UserInputError(f"checkpoint {label}", rule, "keep the right one")
    return {plain[name]: tensor for name, tensor in tensors.items()}


@dataclasses.dataclass(frozen=True)
class _Viewed:
    """A tensor whose view costs nothing to make."""

    read: Callable[[], np.ndarray]
    shape: tuple[int, ...]
    dtype: np.dtype

    def __call__(self) -> np.ndarray:
        return self.read()


def _open_file(path: Path, ema: bool) -> tuple[dict[str, LazyTensor], str, bool]:
    if path.suffix != ".safetensors":
        return _unwrapped(path, open_pth(path).tree, ema)
    if ema:
        raise _no_averages(path)
    readers = open_safetensors(path)
    return {name: _Viewed(read, read().shape, read().dtype) for name, read in readers.items()}, "", False


def _unwrapped(path: Path, tree: Any, ema: bool) -> tuple[dict[str, LazyTensor], str, bool]:
    """The state dict in what a file holds, the keys that lead to it, and whether it is of averages."""
    keys: list[str] = []
    order = (*_AVERAGED, *_PLAIN) if ema else (*_PLAIN, *_AVERAGED)
    while isinstance(tree, Mapping):
        key = next((key for key in order if isinstance(tree.get(key), Mapping) and tree[key]), None)
        if key is None:
            break
        keys.append(key)
        tree = tree[key]
    where = f"file {path}" + f" under {'.'.join(keys)}" * bool(keys)
    if not isinstance(tree, Mapping):
        raise UserInputError(where, f"holds a {type(tree).__name__}, not tensors by name", "name another file")
    tensors = {name: tensor for name, tensor in tree.items() if isinstance(tensor, PthTensor)}
    if not tensors:
        raise UserInputError(where, "holds no tensors" + (f" but {_some(tree)}" if tree else ""), "name another file")
    if not all(isinstance(name, str) for name in tensors):
        raise UserInputError(where, "holds tensors whose names are not text", "name another file")
    averaged = any(key in _AVERAGED for key in keys)
    if ema and not averaged:
        raise _no_averages(path)
    return dict(tensors), ".".join(keys), averaged


def _no_averages(path: Path) -> UserInputError:
    return UserInputError(f"file {path}", "has no averaged weights", "leave out --ema")


def _some(names: Iterable[Any]) -> str:
    """The first few names, short."""
    shown = [f"{str(name)[:60]!a}" for name in list(names)[:6]]
    return ", ".join(shown[:5]) + ", ..." * (len(shown) > 5)
