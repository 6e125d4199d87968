"""Words and pictures on a page, by Pillow alone: text in lines of a given width, pictures in a size to look at."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from toprovar_jax.shapes import UInt8

NAME_SIZE, TEXT_SIZE, LINE = 16, 13, 18
"""Pixels: letters of a heading and of other text, and from line to line."""

_SMALLEST, _LARGEST = 144, 320
_BLACK, _GREY = (0, 0, 0), (90, 90, 90)


def sized(image: UInt8[np.ndarray, "h w 3"]) -> Image.Image:
    """A small picture enlarged by a whole factor, so that its pixels stay what they are; a very large one reduced."""
    side = max(image.shape[:2])
    picture = Image.fromarray(image)
    if side > _LARGEST:
        picture.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
        return picture
    factor = -(-_SMALLEST // side)
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def write(draw: ImageDraw.ImageDraw, place: tuple[int, int], lines: Sequence[str], first: str = "") -> None:
    """Lines of text from ``place`` down, below a larger one if there is a ``first``."""
    x, y = place
    if first:
        draw.text((x, y), first, _BLACK, font(NAME_SIZE))
        y += LINE + 2
    for number, line in enumerate(lines):
        draw.text((x, y + number * LINE), line, _GREY, font(TEXT_SIZE))


def wrapped(text: str, width: int, most: int, size: int = TEXT_SIZE) -> list[str]:
    """The text in at most so many lines, broken after spaces, plus signs and dashes, or where nothing else helps."""
    letters, lines, line = font(size), [], ""
    for piece in re.findall(r"[^\s+-]*[+-]|[^\s+-]+\s*|\s+", text):
        pieces = [piece] if letters.getlength(piece.rstrip()) <= width else list(piece)
        for part in pieces:
            if line and letters.getlength((line + part).rstrip()) > width:
                lines.append(line.rstrip())
                line = ""
            line += part
    lines.append(line.rstrip())
    if len(lines) > most:
        last = lines[most - 1] + "…"
        while letters.getlength(last) > width:
            last = last[:-2] + "…"
        lines = [*lines[: most - 1], last]
    return lines


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that comes with Pillow; letters that it lacks appear as boxes."""
    return ImageFont.load_default(size)
