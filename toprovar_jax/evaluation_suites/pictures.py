"""Making a suite's picture files: what is whole stays, what is missing is made in the batches of an unbroken run."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
from PIL import Image

from toprovar_jax.evaluation_suites.suite import PictureFile, SuitePrompt, seed_of
from toprovar_jax.files import replace_file
from toprovar_jax.shapes import UInt8

FORMATS = {".png": "PNG", ".jpg": "JPEG"}
_ENDS = {".png": b"IEND\xaeB`\x82", ".jpg": b"\xff\xd9"}
JPEG_QUALITY = 95
"""That of the pictures behind Infinity's published HPSv2.1 scores: what cv2.imwrite does unasked."""

Draw = Callable[[list[SuitePrompt], list[int]], Sequence[UInt8[np.ndarray, "h w 3"]]]
"""Pictures of some prompts with these seeds, in one call."""


def file_size(file: PictureFile, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a file of pictures of this height and width."""
    rows = 2 if len(file.images) == 4 else 1
    return size[0] * rows, size[1] * rows


def is_whole(path: pathlib.Path, size: tuple[int, int]) -> bool:
    """Whether a file is a picture of this height and width, in the format its name says, down to its last pixel."""
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content), formats=[FORMATS[path.suffix]]) as image:
            image.verify()  # the checksums, which loading passes over
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            told = (image.height, image.width, image.mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
    return told == (*size, "RGB") and content.endswith(_ENDS[path.suffix])


def missing_files(
    files: Sequence[PictureFile], folder: pathlib.Path, size: tuple[int, int]
) -> tuple[set[str], list[str]]:
    """Paths of what has to be made, and of those among them whose files are there but not whole.

    Args:
      files: all files of the suite.
      folder: where they lie.
      size: height and width of one picture.
    """
    missing, broken = set(), []
    for file in files:
        path = folder / file.path
        if not path.is_file():
            missing.add(file.path)
        elif not is_whole(path, file_size(file, size)):
            missing.add(file.path)
            broken.append(file.path)
    return missing, broken


def make_pictures(
    files: Sequence[PictureFile],
    missing: Collection[str],
    folder: pathlib.Path,
    draw: Draw,
    *,
    seed: int,
    batch_size: int,
) -> Iterator[PictureFile]:
    """Makes the missing files; yields each once it is complete on disk.

    Batches are cut from the list of all pictures, and one of which anything is missing is drawn as a whole: where a
    device rounds differently in other company, a run that was stopped ends with the same bytes as one that was not.

    Args:
      files: all files of the suite, in its order.
      missing: paths of those to make.
      folder: where they go.
      draw: makes pictures.
      seed: of the run; see :func:`seed_of`.
      batch_size: pictures per call of ``draw``.

    Raises:
      OSError: a file could not be written.
    """
    wanted = [(file, image) for file in files for image in file.images]
    made: dict[str, list[UInt8[np.ndarray, "h w 3"]]] = {}
    for start in range(0, len(wanted), batch_size):
        batch = wanted[start : start + batch_size]
        if not any(file.path in missing for file, _ in batch):
            continue
        seeds = [seed_of(seed, file.prompt, image) for file, image in batch]
        pictures = draw([file.prompt for file, _ in batch], seeds)
        for (file, _), picture in zip(batch, pictures, strict=True):
            if file.path not in missing:
                continue
            made.setdefault(file.path, []).append(picture)
            if len(made[file.path]) == len(file.images):
                replace_file(folder / file.path, encode(made.pop(file.path), pathlib.PurePath(file.path).suffix))
                yield file


def encode(pictures: Sequence[UInt8[np.ndarray, "h w 3"]], suffix: str) -> memoryview:
    """One picture as a file, or four as a sheet of 2 x 2, row by row without gaps."""
    sheet = pictures[0] if len(pictures) == 1 else _sheet(pictures)
    content = io.BytesIO()
    quality = {"quality": JPEG_QUALITY} if suffix == ".jpg" else {}
    Image.fromarray(sheet).save(content, format=FORMATS[suffix], **quality)
    return content.getbuffer()


def _sheet(pictures: Sequence[UInt8[np.ndarray, "h w 3"]]) -> UInt8[np.ndarray, "H W 3"]:
    first, second, third, fourth = pictures
    return np.concatenate([np.concatenate([first, second], axis=1), np.concatenate([third, fourth], axis=1)], axis=0)
