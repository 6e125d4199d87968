"""The names that a pickle of tensors may refer to, each with a function from here that stands in for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from convert.pth.refusal import RESAVE, RefusalError
from convert.pth.tensors import DTYPES, STORAGES, PthTensor, Storage, dtype_in

LONGEST_KEY = 1_000
"""Characters in the key of a dictionary, of a storage, and in the name of a device."""

_MOST_AXES = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """What stands in for something that the pickle names: ``make`` turns its arguments into a plain value."""

    make: Callable[[tuple], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class StorageType:
    """What stands in for a storage class; ``dtype`` is None for the one whose tensors name their type."""

    dtype: np.dtype | None


class Namespace(dict):
    """The attributes of an ``argparse.Namespace``."""


class MalformedError(Exception):
    """An operation or a stand-in got something that no pickle of plain values gives it."""


def _empty(kind: type[dict]) -> Callable[[tuple], dict]:
    def make(arguments: tuple) -> dict:
        if arguments:
            raise MalformedError
        return kind()

    return make


def _size(arguments: tuple) -> tuple:
    match arguments:
        case (tuple(sizes),) if len(sizes) <= _MOST_AXES and all(type(size) is int for size in sizes):
            return sizes
    raise MalformedError


def _device(arguments: tuple) -> str:
    match arguments:
        case (str(kind),):
            return kind
        case (str(kind), int(index)) if len(kind) <= LONGEST_KEY:
            return f"{kind}:{index}"
    raise MalformedError


def _bytes(arguments: tuple) -> bytes:
    """Protocol 2 has no bytes: they come as the text whose characters have their values."""
    match arguments:
        case ():
            return b""
        case (str(text), "latin1"):
            return text.encode("latin1", "replace")
    raise MalformedError


def _tensor(arguments: tuple) -> PthTensor:
    """Storage, offset, shape, strides; whether it takes gradients and its hooks mean nothing here. Then marks."""
    match arguments:
        case (Storage() as storage, offset, tuple(shape), tuple(strides), _, _, *rest):
            pass
        case _:
            raise MalformedError
    if max(len(shape), len(strides)) > _MOST_AXES:
        raise RefusalError("has a tensor of too many axes")
    dtype = rest.pop(0) if rest and isinstance(rest[0], np.dtype) else None
    if any(type(number) is not int for number in (offset, *shape, *strides)) or len(rest) > 1:
        raise MalformedError
    if rest and rest[0]:
        raise RefusalError("has a tensor that is to be negated or conjugated when it is read", RESAVE)
    return PthTensor(storage, dtype_in(storage, dtype), offset, shape, strides)


def _parameter(arguments: tuple) -> PthTensor:
    match arguments:
        case (PthTensor() as tensor, *rest) if 2 <= len(rest) <= 3:
            return tensor
    raise MalformedError


KNOWN: dict[str, Any] = {
    **DTYPES,
    **{name: StorageType(dtype) for name, dtype in STORAGES.items()},
    "torch.storage.UntypedStorage": StorageType(None),
    **{
        name: Known(make)
        for name, make in {
            "collections.OrderedDict": _empty(dict),
            "argparse.Namespace": _empty(Namespace),
            "builtins.bytes": _bytes,
            "_codecs.encode": _bytes,
            "torch.Size": _size,
            "torch.device": _device,
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch._utils._rebuild_tensor_v3": _tensor,
            "torch._utils._rebuild_parameter": _parameter,
            "torch._utils._rebuild_parameter_with_state": _parameter,
        }.items()
    },
}
