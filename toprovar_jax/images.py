"""Pictures as files: PNG with the recipe inside, atomic and never over an existing file; contact sheets."""

from __future__ import annotations

import io
import json
import math
import pathlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from toprovar_jax.errors import UserInputError
from toprovar_jax.files import write_new
from toprovar_jax.shapes import Float, UInt8

RECIPE_CHUNK = "toprovar"
"""Name of the PNG text chunk that holds the whole recipe as JSON."""

_SLUG_LENGTH = 48


def to_uint8(image: Float[np.ndarray, "*B h w 3"]) -> UInt8[np.ndarray, "*B h w 3"]:
    """Pixels in [0, 1] as bytes: ``floor(255 x)``, clipped, which truncates as the original does (MODEL_SPEC 6)."""
    return np.floor(np.clip(image, 0.0, 1.0) * 255.0).astype(np.uint8)


def file_stem(index: int, prompt: str, seed: int) -> str:
    """The file name of a picture without its ending: ``0003-a-red-sphere-s7``; ASCII whatever the prompt."""
    ascii_prompt = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_prompt)[:_SLUG_LENGTH].strip("-") or "image"
    return f"{index:04d}-{slug}-s{seed}"


def save_png(
    image: UInt8[np.ndarray, "h w 3"],
    directory: str | pathlib.Path,
    stem: str,
    recipe: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Writes a picture as ``directory/stem.png``, or ``stem-2.png`` and so on if that name is taken.

    The file appears complete or not at all, and no existing file is touched, also with several writers at once.

    Args:
      image: pixels, RGB.
      directory: where; created if it is missing.
      stem: the file name without ``.png``.
      recipe: how the picture was made, JSON values by name; kept as one text chunk per entry and, exactly, as JSON
        in the chunk ``toprovar``. None: no text chunks at all.

    Returns:
      The path that was written.

    Raises:
      OSError: the directory cannot be written or the disk is full; nothing is left behind.
    """
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, format="PNG", pnginfo=text_chunks(recipe))
    return write_new(directory, stem, ".png", encoded.getbuffer())


def read_recipe(path: str | pathlib.Path) -> dict[str, Any]:
    """The recipe that :func:`save_png` put into a picture.

    Raises:
      UserInputError: not a readable PNG, or one without a recipe.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            text = image.info.get(RECIPE_CHUNK)
    except OSError as error:
        raise UserInputError(f"{path}", f"must be a readable PNG ({error})", "check the path") from None
    if text is None:
        raise UserInputError(f"{path}", "carries no recipe", "generate without --no-metadata to have one")
    return json.loads(text)


def make_grid(images: Sequence[UInt8[np.ndarray, "_ _ 3"]], columns: int | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """A contact sheet, row by row, on white with a gap of two pixels.

    Args:
      images: one or more pictures; smaller ones are centred in cells of the largest height and width.
      columns: pictures per row; default: as square as possible.

    Raises:
      UserInputError: no pictures, or fewer than one column.
    """
    if not images:
        raise UserInputError("grid of 0 images", "needs at least one image", "give it one")
    if columns is not None and columns < 1:
        raise UserInputError(f"grid of {columns} columns", "needs at least one column", "leave columns out")
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    rows = math.ceil(len(images) / columns)
    gap = 2
    cell_height = max(image.shape[0] for image in images)
    cell_width = max(image.shape[1] for image in images)
    sheet = np.full((rows * (cell_height + gap) - gap, columns * (cell_width + gap) - gap, 3), 255, np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        height, width = image.shape[:2]
        top = row * (cell_height + gap) + (cell_height - height) // 2
        left = column * (cell_width + gap) + (cell_width - width) // 2
        sheet[top : top + height, left : left + width] = image
    return sheet


def text_chunks(recipe: Mapping[str, Any] | None) -> PngInfo | None:
    """A recipe as the text chunks of a PNG: one per entry that says something, and all of them as JSON."""
    if recipe is None:
        return None
    chunks = PngInfo()
    for key, value in recipe.items():
        if value is not None:
            chunks.add_text(key, value if isinstance(value, str) else json.dumps(value))
    chunks.add_text(RECIPE_CHUNK, json.dumps(dict(recipe)))
    return chunks
