"""Tensors as ``torch.save`` describes them: a storage, and how a tensor lies in it; checked, then viewed in place."""

from __future__ import annotations

import dataclasses
import math
import sys

import ml_dtypes
import numpy as np

from convert.pth.refusal import RESAVE, WEIGHTS_ONLY, RefusalError, shown

_TYPES = {
    "float32": ("FloatStorage", np.float32),
    "float16": ("HalfStorage", np.float16),
    "bfloat16": ("BFloat16Storage", ml_dtypes.bfloat16),
    "float64": ("DoubleStorage", np.float64),
    "int64": ("LongStorage", np.int64),
    "int32": ("IntStorage", np.int32),
    "int16": ("ShortStorage", np.int16),
    "int8": ("CharStorage", np.int8),
    "uint8": ("ByteStorage", np.uint8),
    "bool": ("BoolStorage", np.bool_),
    "uint16": (None, np.uint16),
    "uint32": (None, np.uint32),
    "uint64": (None, np.uint64),
}
"""torch's name of a type, of its storage class (newer types have none), and numpy's. 8-bit floats are left out: they
come with scales that no rule knows of, and would load as wrong numbers; so are quantised and complex types."""

DTYPES = {f"torch.{name}": np.dtype(dtype) for name, (_, dtype) in _TYPES.items()}
STORAGES = {f"torch.{storage}": np.dtype(dtype) for storage, dtype in _TYPES.values() if storage}

_LARGEST = 2**48
_MOST_REPEATED = 2**20
"""Numbers in a tensor that repeats its storage, as ``expand`` makes them: more would let a small file fill memory."""


@dataclasses.dataclass(frozen=True, eq=False)
class Storage:
    """The bytes of one entry, shared by the tensors that lie in it.

    Attributes:
      key: what the file calls it.
      data: uint8, a view of the memory map.
      dtype: the type of its numbers; None where every tensor names its own.
      swapped: whether the bytes of a number come in the other order than this machine has them.
    """

    key: str
    data: np.ndarray
    dtype: np.dtype | None
    swapped: bool


@dataclasses.dataclass(frozen=True, eq=False)
class PthTensor:
    """A tensor of a ``.pth`` file that has been checked against its storage but not read; call it to read it.

    Attributes:
      storage: where its numbers lie; several tensors may share one.
      dtype: numpy's type, ``ml_dtypes.bfloat16`` among them.
      offset: of the first number in the storage, in numbers.
      shape: its shape.
      strides: steps along each axis, in numbers.
    """

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self):
        axes = (*self.shape, *self.strides)
        if len(self.shape) != len(self.strides):
            raise RefusalError(f"has a tensor with {len(self.shape)} sizes and {len(self.strides)} strides")
        if not all(0 <= number < _LARGEST for number in (self.offset, *axes)):
            raise RefusalError(f"has a tensor with a size, stride or offset that is negative or over {_LARGEST:,}")
        room = self.storage.data.size // self.dtype.itemsize
        size = math.prod(self.shape)
        reach = sum((length - 1) * stride for length, stride in zip(self.shape, self.strides, strict=True))
        if self.offset + (reach + 1 if size else 0) > room:
            rule = f"has a tensor that reaches beyond its storage {shown(self.storage.key)} of {room:,} numbers"
            raise RefusalError(rule)
        if size > max(room, _MOST_REPEATED) or math.prod(length or 1 for length in self.shape) > _LARGEST:
            rule = f"has a tensor that repeats its storage {shown(self.storage.key)} of {room:,} numbers too often"
            raise RefusalError(rule, RESAVE)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor as an array of its own."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __call__(self) -> np.ndarray:
        """The tensor as a read-only view of the memory map.

        It is a copy only where a view cannot be used: bytes in the other order than this machine's, or numbers that do
        not start at a multiple of their size, which archives that torch did not write may have.
        """
        size = self.dtype.itemsize
        strides = tuple(size * stride for stride in self.strides)
        # As plain unsigned integers first: the bytes of types that numpy does not know can then be swapped and moved.
        numbers = np.ndarray(self.shape, f"u{size}", self.storage.data, size * self.offset, strides)
        if self.storage.swapped:
            numbers = numbers.byteswap()
        elif not numbers.flags.aligned:
            numbers = numbers.copy()
        return numbers.view(self.dtype)


def typed_storage(key: str, data: np.ndarray, dtype: np.dtype | None, count: int, byteorder: str) -> Storage:
    """The storage of ``count`` numbers (bytes, where ``dtype`` is None) that ``data`` must hold exactly.

    Raises:
      RefusalError: ``data`` has another size.
    """
    size = dtype.itemsize if dtype else 1
    if count * size != data.size:
        rule = f"gives the storage {shown(key)} {count:,} numbers of {size} bytes where it has {data.size:,} bytes"
        raise RefusalError(rule)
    return Storage(key, data, dtype, byteorder != sys.byteorder)


def dtype_in(storage: Storage, dtype: np.dtype | None) -> np.dtype:
    """The type of a tensor in ``storage``: the storage's own, or ``dtype`` where it has none.

    Raises:
      RefusalError: neither says, or both do.
    """
    chosen = storage.dtype or dtype
    if chosen is None or (storage.dtype and dtype):
        raise RefusalError("has a tensor whose type is not given once", WEIGHTS_ONLY)
    return chosen
