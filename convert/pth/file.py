"""Opening a ``.pth`` file: its entries, what was saved, and the tensors in it under their dotted paths."""

from __future__ import annotations

import dataclasses
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from convert.pth import unpickler
from convert.pth.archive import Entry, entries_of
from convert.pth.refusal import RESAVE, WEIGHTS_ONLY, RefusalError, shown
from convert.pth.tensors import PthTensor, Storage, typed_storage
from toprovar_jax.errors import UserInputError
from toprovar_jax.files import absence

_FROM_TORCHSCRIPT = "re-save its weights where torch is installed: torch.save(torch.jit.load(old).state_dict(), new)"
_LEGACY = bytes.fromhex("6cfc9c46f9206aa85019")
_POINTER = b"version https://git-lfs"
_DEEPEST = 64
_LONGEST_PATH = 1_000
_MOST_TENSORS = 100_000
_MOST_PARTS = 1_000_000
_PLAIN = {int, float, str, bool, type(None), bytes}


@dataclasses.dataclass(frozen=True)
class PthFile:
    """What ``torch.save`` wrote.

    Attributes:
      path: the file.
      tree: what was saved, of dict, list, tuple, int, float, str, bool, None, bytes, numpy dtypes and tensors; finite,
        at most 64 deep. Ordered dictionaries and namespaces come as dict, ``torch.Size`` as tuple, devices as text.
      tensors: every tensor of it by its path, keys and positions joined by dots; for a bare tensor the path is empty.
        Each is called to be read.
    """

    path: Path
    tree: Any
    tensors: dict[str, PthTensor]


def open_pth(path: Path | str) -> PthFile:
    """Opens a file in the zip format of ``torch.save`` (its default since 1.6) without running anything in it.

    The file stays mapped into memory, and open, for as long as one of its tensors is in use.

    Raises:
      UserInputError: no such file; one in an older format, of TorchScript, or of another kind; a damaged one; or one
        that holds anything but tensors in plain containers.
    """
    path = Path(path)
    if path.is_dir():
        raise UserInputError(f"folder {path}", "must be a .pth file", "name the file inside it")
    if not path.is_file():
        raise UserInputError(f"file {path}", absence(path), "check the path")
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise RefusalError("is empty", "fetch it again")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        _check_kind(data[:512])
        tree = _saved(data)
        return PthFile(path, tree, _tensors(tree))
    except RefusalError as error:
        raise UserInputError(f"file {path}", error.rule, error.remedy) from None
    except OSError as error:
        raise UserInputError(f"file {path}", f"cannot be read ({error.strerror})", "check its permissions") from None


def _check_kind(start: bytes) -> None:
    """Refuses the kinds of files that go by the same name, each with its own remedy."""
    if start[257:262] == b"ustar" or _LEGACY in start[:32]:
        raise RefusalError("is in the format of torch before 1.6, which is not a zip archive", RESAVE)
    if start.startswith(_POINTER):
        raise RefusalError("is a pointer that stands in for the file itself", "fetch the file: git lfs pull")
    if not start.startswith(b"PK\3\4"):
        raise RefusalError("is not a zip archive, as torch.save writes")


def _saved(data: mmap.mmap) -> Any:
    """The value in the archive ``data``."""
    entries = entries_of(data)
    pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise RefusalError(f"has {len(pickles)} entries of the name data.pkl where torch.save writes one", RESAVE)
    prefix = pickles[0].removesuffix("data.pkl")
    if prefix + "constants.pkl" in entries or any(name.startswith(prefix + "code/") for name in entries):
        raise RefusalError("is a TorchScript program", _FROM_TORCHSCRIPT)
    for name, entry in entries.items():
        if entry.compressed:
            rule = f"has the compressed zip entry {shown(name)}, which cannot be mapped into memory"
            raise RefusalError(rule, RESAVE)
    content = np.frombuffer(data, np.uint8)

    def read(entry: Entry, limit: int) -> bytes:
        return data[entry.start : min(entry.stop, entry.start + limit)]

    order = read(entries[prefix + "byteorder"], 8) if prefix + "byteorder" in entries else b"little"
    if order not in (b"little", b"big"):
        raise RefusalError(f"has numbers in an unknown order of bytes, {order!r}", RESAVE)
    storages: dict[str, Storage] = {}

    def storage_of(key: str, dtype: np.dtype | None, count: int) -> Storage:
        name = f"{prefix}data/{key}"
        if name not in entries:
            raise RefusalError(f"has no zip entry {shown(name)} for one of its tensors")
        entry = entries[name]
        storage = typed_storage(key, content[entry.start : entry.stop], dtype, count, order.decode())
        if storages.setdefault(key, storage).dtype != dtype:
            raise RefusalError(f"gives the storage {shown(key)} two types")
        return storages[key]

    return unpickler.load(read(entries[pickles[0]], unpickler.LONGEST + 1), storage_of)


def _tensors(tree: Any) -> dict[str, PthTensor]:
    """The tensors of ``tree`` by path; refuses what is in it besides tensors and plain values, and trees without end.

    Shared parts are walked as often as they occur, so that whoever walks the tree later has an end to it too.
    """
    tensors: dict[str, PthTensor] = {}
    parts = 0

    def walk(value: Any, path: tuple[str, ...], around: tuple[int, ...]) -> None:
        nonlocal parts
        if isinstance(value, PthTensor):
            name = ".".join(path)
            if name in tensors:
                raise RefusalError(f"has two tensors at the path {shown(name)}", WEIGHTS_ONLY)
            if len(name) > _LONGEST_PATH or len(tensors) == _MOST_TENSORS:
                rule = f"must have at most {_MOST_TENSORS:,} tensors, their paths at most {_LONGEST_PATH:,} characters"
                raise RefusalError(rule, WEIGHTS_ONLY)
            tensors[name] = value
        elif isinstance(value, (dict, list, tuple)):
            if id(value) in around:
                raise RefusalError(f"holds a container that holds itself, at {shown('.'.join(path))}", WEIGHTS_ONLY)
            if len(around) == _DEEPEST:
                raise RefusalError(f"holds containers more than {_DEEPEST} deep", WEIGHTS_ONLY)
            parts += len(value)
            if parts > _MOST_PARTS:
                raise RefusalError(f"holds more than {_MOST_PARTS:,} values", WEIGHTS_ONLY)
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                if type(item) not in _PLAIN:
                    walk(item, (*path, str(key)), (*around, id(value)))
        elif type(value) not in _PLAIN and not isinstance(value, np.dtype):
            rule = f"holds what is neither a tensor nor a plain value at {shown('.'.join(path))}"
            raise RefusalError(rule, WEIGHTS_ONLY)

    walk(tree, (), ())
    return tensors
