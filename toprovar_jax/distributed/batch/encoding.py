"""Pictures as PNG bytes that depend on the pixels and the recipe alone, made by many threads at once.

Written here and not by the imaging library, which holds the interpreter's lock while it compresses, and whose
compressor may give other bytes on another processor.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from toprovar_jax.images import text_chunks, to_uint8
from toprovar_jax.shapes import Float, UInt8

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SUB, _UP = 1, 2


def encode_picture(image: Float[np.ndarray, "h w 3"], recipe: Mapping[str, Any]) -> bytes:
    """A picture as a PNG file with its recipe inside.

    Args:
      image: pixels in [0, 1].
      recipe: see :func:`toprovar_jax.recipes.recipe_of`.

    Raises:
      ValueError: a pixel is not finite; the message says how many.
    """
    finite = np.isfinite(image)
    if not finite.all():
        raise ValueError(f"{int(finite.size - finite.sum())} of {finite.size} values of the picture are not finite")
    return encode_png(to_uint8(image), recipe)


def encode_png(image: UInt8[np.ndarray, "h w 3"], recipe: Mapping[str, Any]) -> bytes:
    """8-bit RGB pixels as a PNG file; each row by the better of two filters (PNG specification, section 9)."""
    height, width = image.shape[:2]
    described = text_chunks(recipe)
    chunks = [] if described is None else [(chunk[0], chunk[1]) for chunk in described.chunks]
    return b"".join(
        [
            _SIGNATURE,
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
            *(_chunk(name, content) for name, content in chunks),
            _chunk(b"IDAT", _compressed(_filtered(image))),
            _chunk(b"IEND", b""),
        ]
    )


def _filtered(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Rows as differences to the left or to the row above, whichever are smaller in sum, as signed bytes."""
    height = image.shape[0]
    left, above = image.copy(), image.copy()
    left[:, 1:] -= image[:, :-1]
    above[1:] -= image[:-1]
    left, above = left.reshape(height, -1), above.reshape(height, -1)
    by_left = _cost(left) < _cost(above)
    rows = np.empty((height, 1 + left.shape[1]), np.uint8)
    rows[:, 0] = np.where(by_left, _SUB, _UP)
    rows[:, 1:] = np.where(by_left[:, None], left, above)
    return rows.tobytes()


def _compressed(content: bytes) -> bytes:
    """By runs and Huffman codes alone: of photographs, four times as fast as searching for repetitions, and smaller."""
    compressor = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    return compressor.compress(content) + compressor.flush()


def _cost(differences: UInt8[np.ndarray, "h n"]) -> Any:
    return np.abs(differences.view(np.int8).astype(np.int16)).sum(axis=1, dtype=np.int64)


def _chunk(name: bytes, content: bytes) -> bytes:
    return b"".join(
        [struct.pack(">I", len(content)), name, content, struct.pack(">I", zlib.crc32(content, zlib.crc32(name)))]
    )
