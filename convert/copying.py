"""Copying a tensor into another layout and dtype at the speed of memory."""

from __future__ import annotations

import numpy as np

from convert.dtypes import BFLOAT16

_ROWS, _PADDING = 128, 32
"""Rows moved at a time, and what separates them in the buffer: with a power of two as their distance, the elements of
one column would all compete for the same few cache lines, and a transposition would be ten times slower."""


def copy_into(out: np.ndarray, part: np.ndarray) -> None:
    """``out[...] = part`` with a cast; fast where ``part`` is a transposed view, as every linear layer's is."""
    if part.ndim != 2 or part.strides[0] != part.itemsize or min(part.shape) <= _ROWS:
        np.copyto(out, part, casting="unsafe")
        return
    lying = part.T
    buffer = np.empty((_ROWS, lying.shape[1] + _PADDING), out.dtype)
    for row in range(0, len(lying), _ROWS):
        rows = lying[row : row + _ROWS]
        held = buffer[: len(rows), : lying.shape[1]]
        np.copyto(held, rows, casting="unsafe")
        for column in range(0, lying.shape[1], _ROWS):
            out[column : column + _ROWS, row : row + _ROWS] = held[:, column : column + _ROWS].T


def is_finite(array: np.ndarray) -> bool:
    """Whether no number of a contiguous ``array`` is infinite or NaN; piece by piece, so that memory stays small."""
    flat, piece = array.reshape(-1), 1 << 16
    return all(_all_finite(flat[i : i + piece]) for i in range(0, flat.size, piece))


def _all_finite(piece: np.ndarray) -> bool:
    if piece.dtype == BFLOAT16:  # numpy's own test takes five times as long: an exponent of ones is no number
        return int((piece.view(np.uint16) & np.uint16(0x7FFF)).max()) < 0x7F80
    return bool(np.isfinite(piece).all())
