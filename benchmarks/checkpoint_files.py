"""Small checkpoint files written without the libraries that usually write them, so that any byte can be made wrong.

``pth_pickle`` and ``archive`` make what ``torch.save`` makes: a zip archive of stored entries, a pickle among them.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype(dtype): name
    for name, dtype in {
        "FloatStorage": np.float32,
        "HalfStorage": np.float16,
        "BFloat16Storage": ml_dtypes.bfloat16,
        "DoubleStorage": np.float64,
        "LongStorage": np.int64,
        "IntStorage": np.int32,
        "ShortStorage": np.int16,
        "CharStorage": np.int8,
        "ByteStorage": np.uint8,
        "BoolStorage": np.bool_,
    }.items()
}


@dataclasses.dataclass(frozen=True)
class Call:
    """A name and the arguments that a pickle has it called with."""

    name: str
    arguments: tuple


@dataclasses.dataclass(frozen=True)
class Name:
    """A name that a pickle refers to."""

    name: str


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor as a pickle describes it, with nothing checked; ``count`` numbers in the storage ``key``."""

    key: str
    dtype: Any
    count: int
    offset: int
    shape: tuple
    strides: tuple


@dataclasses.dataclass(frozen=True)
class Raw:
    """Operations to go into a pickle as they are."""

    code: bytes


def tensor(key: str, array: np.ndarray) -> Tensor:
    """The description of a contiguous array with a storage of its own."""
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return Tensor(key, array.dtype, array.size, 0, array.shape, strides)


def pth_pickle(value: Any) -> bytes:
    """The pickle (protocol 2) of plain containers, :class:`Tensor`, :class:`Name`, :class:`Call` and :class:`Raw`."""
    return pickle.PROTO + b"\x02" + code(value) + pickle.STOP


def code(value: Any) -> bytes:
    """The operations that put ``value`` on the stack."""
    match value:
        case Raw():
            return value.code
        case Name():
            module, _, name = value.name.rpartition(".")
            return pickle.GLOBAL + f"{module}\n{name}\n".encode()
        case Call():
            return code(Name(value.name)) + code(value.arguments) + pickle.REDUCE
        case Tensor():
            kind = Name("torch." + STORAGES[np.dtype(value.dtype)])
            storage = Raw(code(("storage", kind, value.key, "cpu", value.count)) + pickle.BINPERSID)
            layout = (storage, value.offset, value.shape, value.strides, False, Call("collections.OrderedDict", ()))
            return code(Call("torch._utils._rebuild_tensor_v2", layout))
        case None:
            return pickle.NONE
        case bool():
            return pickle.NEWTRUE if value else pickle.NEWFALSE
        case int():
            length = value.bit_length() // 8 + 1
            return pickle.LONG1 + bytes([length]) + value.to_bytes(length, "little", signed=True)
        case float():
            return pickle.BINFLOAT + struct.pack(">d", value)
        case str():
            text = value.encode()
            return pickle.BINUNICODE + struct.pack("<I", len(text)) + text
        case bytes():
            return pickle.BINBYTES + struct.pack("<I", len(value)) + value
        case tuple():
            return pickle.MARK + b"".join(map(code, value)) + pickle.TUPLE
        case list():
            return pickle.EMPTY_LIST + pickle.MARK + b"".join(map(code, value)) + pickle.APPENDS
        case dict():
            items = b"".join(code(key) + code(item) for key, item in value.items())
            return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    raise TypeError(type(value))


def archive(
    entries: Mapping[str, bytes], *, align: int = 64, method: int = zipfile.ZIP_STORED, wide: bool = False
) -> bytes:
    """A zip archive whose entries begin at multiples of ``align``; ``wide``: with 64-bit sizes in the local headers."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as out:
        for name, content in entries.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            # Padding goes into an extra field, as torch has it; a wide header gets 20 more bytes.
            start = file.tell() + 30 + len(name.encode()) + 4 + 20 * wide
            info.extra = struct.pack("<HH", 0x4246, -start % align) + bytes(-start % align)
            with out.open(info, "w", force_zip64=wide) as entry:
                entry.write(content)
    return file.getvalue()


def pth(
    value: Any, storages: Mapping[str, bytes], *, prefix: str = "archive/", order: str = "little", **how: Any
) -> bytes:
    """A ``.pth`` file: the pickle of ``value`` (or ``value`` itself, where it is bytes) and the storages by key."""
    entries = {"data.pkl": value if isinstance(value, bytes) else pth_pickle(value), "byteorder": order.encode()}
    entries |= {f"data/{key}": content for key, content in storages.items()} | {"version": b"3\n"}
    return archive({prefix + name: content for name, content in entries.items()}, **how)


def pth_of(arrays: Mapping[str, np.ndarray], **how: Any) -> bytes:
    """A ``.pth`` file of a state dict."""
    keys = {name: str(number) for number, name in enumerate(arrays)}
    value = {name: tensor(keys[name], array) for name, array in arrays.items()}
    return pth(value, {keys[name]: array.tobytes() for name, array in arrays.items()}, **how)
