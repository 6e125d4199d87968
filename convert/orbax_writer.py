"""Orbax checkpoints of arrays that are produced piece by piece, so that no array is ever whole in memory.

What is written is an ordinary orbax checkpoint (zarr arrays in an OCDBT store): orbax plans it and writes its metadata,
only the numbers of each array come from here. Any orbax reader restores it, also into shardings.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import errno
import functools
import math
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

Index = tuple[slice, ...]

_CHUNK_BYTES = 8 << 20
"""Small enough for the allocator to use the same memory again: fresh pages cost more than writing."""

_PENDING_BYTES = 192 << 20
"""How much may be on its way to the disk, so that reading and writing overlap."""

_MAKERS = 2
"""Threads that read, cast and transpose."""

_DATA_FILE_BYTES = 256 << 20
"""Files of a store. What goes into one is held in memory until it is complete."""

_PROCESS = "ocdbt.process_0"
"""Where the first process of an orbax run writes; orbax merges such folders into one store when all are complete."""


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedArray:
    """An array that is still to be made.

    Attributes:
      shape, dtype: of the whole.
      stacked: whether the first axis counts layers, which are produced and stored one by one.
      pieces: an index into the whole and what makes its numbers, contiguous, no more than a chunk at a time and every
        element once. They are made in several threads, a few ahead of the writing, and must not be changed afterwards.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    pieces: Callable[[], Iterator[tuple[Index, Callable[[], np.ndarray]]]]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def chunks(self) -> tuple[int, ...]:
        """Shape of the pieces it is stored in: one layer, or part of one along its first axis."""
        return chunk_shape(self.shape, self.dtype, stacked=self.stacked)


def chunk_shape(shape: tuple[int, ...], dtype: np.dtype, *, stacked: bool) -> tuple[int, ...]:
    """How an array is cut for storage: layers apart, and each into even parts of at most 8 MiB along its first axis.

    A part is never less than one row, however long that is.
    """
    rest = shape[1:] if stacked else shape
    if not rest:
        return (1,) * len(shape)
    parts = min(rest[0], math.ceil(math.prod(rest) * dtype.itemsize / _CHUNK_BYTES)) or 1
    return (*(1,) * stacked, max(1, math.ceil(rest[0] / parts)), *rest[1:])


def write_checkpoint(path: Path, arrays: Mapping[str, StreamedArray]) -> None:
    """Write a checkpoint, one array after the other.

    Args:
      path: a folder that does not exist yet.
      arrays: by dotted path; the checkpoint's tree has one level of dictionaries per part of it.

    Raises:
      OSError: the folder cannot be written or the disk is full.
    """
    registry = ocp.type_handlers.create_type_handler_registry(
        (StreamedArray, _StreamedHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer:
        try:
            checkpointer.save(path.resolve(), nested(arrays))
        except ValueError as error:
            if os.strerror(errno.ENOSPC) in str(error) or "RESOURCE_EXHAUSTED" in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
            raise


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted path as a tree of dictionaries."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def open_array(path: Path, name: str) -> ts.TensorStore:
    """The array ``name`` (a dotted path) of the checkpoint at ``path``, for reading parts of it.

    Raises:
      ValueError: no such array, or a store that cannot be read; so does reading a chunk that is damaged.
    """
    spec = {"driver": "zarr", "kvstore": _store(path, name)}
    return ts.open(spec, open=True, read=True, context=_context()).result()


def _store(folder: Path, name: str) -> dict[str, Any]:
    base = {"driver": "file", "path": f"{folder.resolve()}/"}
    return {"driver": "ocdbt", "base": base, "path": f"{name}/"}


@functools.cache
def _context() -> ts.Context:
    """Threads and caches of all stores; kept, for taking one down while its threads finish has been seen to crash."""
    return ts.Context()


class _StreamedHandler(ocp.type_handlers.TypeHandler):
    """Writes :class:`StreamedArray` leaves as orbax writes numpy arrays, which is what readers take them for."""

    def typestr(self) -> str:
        return "np.ndarray"

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        raise NotImplementedError("streamed arrays are only written")

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Sequence[Any]:
        raise NotImplementedError("streamed arrays are only written")

    async def serialize(
        self, values: Sequence[StreamedArray], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        for info in infos:
            await info.await_path_creation()
        # All at once: making an array is a commit to the disk, and these go together.
        specs = (
            _spec(value, Path(info.parent_dir) / _PROCESS, info.name) for value, info in zip(values, infos, strict=True)
        )
        arrays = await asyncio.gather(*(ts.open(spec, context=_context()) for spec in specs))
        with ThreadPoolExecutor(_MAKERS) as makers:
            async with _Pending(_PENDING_BYTES) as pending:
                for value, array in zip(values, arrays, strict=True):
                    async for index, part in _made_ahead(value, makers):
                        write = array[index].write(part, can_reference_source_data_indefinitely=True)
                        await pending.add(write, part.nbytes)
        return []  # everything is on the disk


async def _made_ahead(value: StreamedArray, makers: ThreadPoolExecutor) -> AsyncIterator[tuple[Index, np.ndarray]]:
    """The pieces in order; while one is taken, the next are being made."""
    loop, ahead = asyncio.get_running_loop(), collections.deque()
    try:
        for index, make in value.pieces():
            ahead.append((index, loop.run_in_executor(makers, make)))
            if len(ahead) > _MAKERS:
                index, made = ahead.popleft()
                yield index, await made
        while ahead:
            index, made = ahead.popleft()
            yield index, await made
    finally:
        await asyncio.gather(*(made for _, made in ahead), return_exceptions=True)


def _spec(value: StreamedArray, folder: Path, name: str) -> dict[str, Any]:
    # Uncompressed: random-looking numbers hardly shrink, and compressing them would be slower than the disk.
    metadata = {"shape": list(value.shape), "chunks": list(value.chunks), "compressor": None}
    # As orbax lays out its stores: small metadata inside the tree, one manifest.
    config = {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 100_000_000, "manifest_kind": "single"}
    store = _store(folder, name) | {"target_data_file_size": _DATA_FILE_BYTES, "config": config, "assume_config": True}
    return {
        "driver": "zarr",
        "kvstore": store,
        "dtype": value.dtype.name,
        "metadata": metadata,
        "create": True,
        # Readers of orbax take a chunk that is not there for damage, even where it would be all zeros.
        "store_data_equal_to_fill_value": True,
    }


class _Pending:
    """Writes under way, in two batches: one is written while the next is made. Few commits, bounded memory."""

    def __init__(self, limit: int):
        self._limit, self._bytes = limit // 2, 0
        self._making: list[ts.WriteFutures] = []
        self._writing: list[ts.WriteFutures] = []

    async def add(self, write: ts.WriteFutures, nbytes: int) -> None:
        self._making.append(write)
        self._bytes += nbytes
        if self._bytes >= self._limit:
            await self._next()

    async def _next(self) -> None:
        for write in self._making:
            write.commit.force()
        await asyncio.gather(*self._writing)
        self._writing, self._making, self._bytes = self._making, [], 0

    async def __aenter__(self) -> _Pending:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            await self._next()
            await self._next()
        else:  # nothing may write any more when the folder is removed
            await asyncio.gather(*self._writing, *self._making, return_exceptions=True)
