"""Reading and writing safetensors files, lazily and with errors a person can act on."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from toprovar_jax.errors import UserInputError
from toprovar_jax.files import absence

_DTYPES = {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "BOOL": np.bool_},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8},
}
"""Weights are floating; the integers are for the buffers that files carry along. 8-bit floats are left out: they come
with scales that no rule knows of, and would load as wrong numbers."""


def open_safetensors(path: Path | str) -> dict[str, Callable[[], np.ndarray]]:
    """Tensor names of a safetensors file, each with a function that reads that tensor.

    The file is memory-mapped: only what is asked for is read.

    Raises:
      UserInputError: no such file, not a safetensors file, or one that is cut short.
    """
    path = Path(path)
    if path.is_dir():
        raise UserInputError(f"folder {path}", "must be a safetensors file", "name the file inside it")
    if not path.is_file():
        raise UserInputError(f"file {path}", absence(path), "check the model folder")
    try:
        with safetensors.safe_open(str(path), framework="np") as checked:
            checked.keys()
    except (safetensors.SafetensorError, OSError) as error:
        # The text quotes the file, which may hold anything, commands to a terminal as well.
        reason = ascii(str(error)[:300])[1:-1] or type(error).__name__
        raise UserInputError(
            f"file {path}", f"is not a readable safetensors file ({reason})", "it may be cut short: fetch it again"
        ) from None
    with path.open("rb") as file:
        (header_size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_size))
    header.pop("__metadata__", None)
    unsupported = sorted({info["dtype"] for info in header.values()} - _DTYPES.keys())
    if unsupported:
        raise UserInputError(f"file {path}", f"has tensors of type {', '.join(unsupported)}", "export it as bfloat16")
    data = np.memmap(path, np.uint8, "r", offset=8 + header_size) if header else np.zeros(0, np.uint8)

    def reader(info) -> Callable[[], np.ndarray]:
        start, stop = info["data_offsets"]
        return lambda: data[start:stop].view(_DTYPES[info["dtype"]]).reshape(info["shape"])

    return {name: reader(info) for name, info in header.items()}


def save_safetensors(path: Path | str, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically: the old one stays until the new one is complete."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        safetensors.numpy.save_file(dict(tensors), str(partial), metadata=dict(metadata))
        partial.chmod(0o644)  # the library makes files that only their owner can read
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
