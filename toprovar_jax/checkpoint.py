"""Saving and restoring pytrees with orbax: numbered by step, the newest few kept; or single checkpoints of arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from convert.orbax_writer import open_array
from toprovar_jax.errors import UserInputError


class Checkpoints:
    """A folder of numbered checkpoints.

    Writing is atomic: a checkpoint exists once it is complete, and the previous one stays until then.

    Args:
      directory: where they are; created if need be.
      keep: how many of the newest to keep.
    """

    def __init__(self, directory: Path | str, *, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(Path(directory).resolve(), options=options)

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, tree: Any) -> None:
        """Write ``tree`` as the checkpoint of ``step``; returns when it is on disk."""
        self._manager.save(step, args=ocp.args.StandardSave(tree), force=True)
        self._manager.wait_until_finished()

    def restore(self, tree: Any, step: int | None = None) -> Any:
        """The checkpoint of ``step`` (default: the newest) with the structure, dtypes and shardings of ``tree``.

        Raises:
          UserInputError: there is no such checkpoint.
        """
        kept = self._manager.all_steps()
        step = self.latest_step if step is None else step
        if step is None or step not in kept:
            raise UserInputError(
                f"checkpoint {'(the newest)' if step is None else step} in {self._manager.directory}",
                f"must be one that is there ({', '.join(map(str, sorted(kept))) or 'there is none'})",
                "choose another step or folder",
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
        return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))

    def close(self) -> None:
        """Release the folder."""
        self._manager.close()


def restore_arrays(
    folder: Path,
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    *,
    columns: Callable[[str], tuple[int, int]] = lambda name: (1, 1),
) -> dict[str, jax.Array | np.ndarray]:
    """Arrays of one checkpoint, each straight into its sharding; those that are not asked for are not read.

    One array is read at a time, and of it each part that a device holds: little host memory is needed beside them.

    Args:
      folder: an orbax checkpoint of nested dictionaries, stored as zarr arrays in OCDBT.
      wanted: shape, dtype and sharding by dotted path, without a sharding for an array in host memory; what is
        stored is cast.
      columns: ``(matrices, parts)`` by dotted path, for matrices side by side whose columns are rearranged as by
        :func:`toprovar_jax.placement.columns_apart`; a part is then read from as many places as there are matrices.

    Raises:
      UserInputError: no checkpoint, a damaged one, or arrays that are missing or have another shape.
    """
    return {name: _restored(folder, name, leaf, columns(name)) for name, leaf in wanted.items()}


def restore_layers(folder: Path, name: str, wanted: jax.ShapeDtypeStruct) -> Iterator[np.ndarray]:
    """The layers of one stacked array, one after the other, on the host; see :func:`restore_arrays`.

    Args:
      folder: as there.
      name: its dotted path.
      wanted: shape with its leading layer axis, and dtype.
    """
    stored = _opened(folder, name, wanted)
    for layer in range(wanted.shape[0]):
        yield _read(folder, name, stored, (layer,)).astype(wanted.dtype, copy=False)


def _restored(folder: Path, name: str, leaf: jax.ShapeDtypeStruct, columns: tuple[int, int]) -> jax.Array | np.ndarray:
    stored = _opened(folder, name, leaf)
    parts: dict[str, np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        key = repr(index)  # devices that hold the same part share it
        if key not in parts:
            places = [index or ()] if columns == (1, 1) else _places(index or (), leaf.shape, columns)
            found = [_read(folder, name, stored, place) for place in places]
            joined = found[0] if len(found) == 1 else np.concatenate(found, axis=-1)
            parts[key] = joined.astype(leaf.dtype, copy=False)
        return parts[key]

    if leaf.sharding is None:
        return part(None)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)


def _places(index: tuple[slice, ...], shape: tuple[int, ...], columns: tuple[int, int]) -> list[tuple[slice, ...]]:
    """Where in an array with matrices side by side a part of its rearranged columns comes from."""
    matrices, parts = columns
    start, stop, _ = index[-1].indices(shape[-1])
    width = shape[-1] // parts
    if (start % width, stop - start) != (0, width):
        raise ValueError(f"columns {start} to {stop} are not one of {parts} parts")
    share = width // matrices
    first = start // matrices
    whole = shape[-1] // matrices
    return [(*index[:-1], slice(first + m * whole, first + m * whole + share)) for m in range(matrices)]


def _opened(folder: Path, name: str, leaf: jax.ShapeDtypeStruct) -> ts.TensorStore:
    try:
        stored = open_array(folder, name)
    except ValueError as error:
        raise _unreadable(folder, name, error) from None
    if stored.shape != leaf.shape:
        shapes = f"has {name} of shape {stored.shape}, the model needs {leaf.shape}"
        raise UserInputError(f"checkpoint {folder}", shapes, "convert the weights of this very model")
    return stored


def _read(folder: Path, name: str, stored: ts.TensorStore, index: tuple[slice | int, ...]) -> np.ndarray:
    try:
        return stored[index].read().result()
    except ValueError as error:
        raise _unreadable(folder, name, error) from None


def _unreadable(folder: Path, name: str, error: ValueError) -> UserInputError:
    reason = str(error).strip().splitlines()[0][:300]
    return UserInputError(
        f"checkpoint {folder}", f"cannot give {name} ({reason})", "remove that folder and convert it again"
    )
