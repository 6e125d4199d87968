"""What a public benchmark consists of, as far as making its pictures goes: prompts, and where its scorer looks.

Nothing in this package but :mod:`~toprovar_jax.evaluation_suites.pictures` imports numpy, and nothing imports jax.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

from toprovar_jax.errors import UserInputError
from toprovar_jax.settings import MAX_SEED

MAX_IMAGES = 1000
"""Pictures per prompt, at most; as many seeds lie between the first pictures of neighbouring prompts."""


@dataclasses.dataclass(frozen=True)
class SuitePrompt:
    """One prompt of a suite.

    Attributes:
      number: its place in the suite's order, from 0; its seeds hang on it.
      text: the words, as the scorer knows them.
      name: what its files are called after: a number, an id, or a folder and an id.
      record: its line of the suite's own file, where the scorer reads that again.
    """

    number: int
    text: str
    name: str
    record: str = ""


@dataclasses.dataclass(frozen=True)
class PictureFile:
    """One file that a scorer opens.

    Attributes:
      path: below the folder that the scorer is given, with ``/``.
      prompt: what it shows.
      images: numbers of the pictures in it, from 0 per prompt: one, or those of a 2 x 2 sheet.
    """

    path: str
    prompt: SuitePrompt
    images: tuple[int, ...]


def _itself(path: pathlib.Path) -> list[pathlib.Path]:
    return [path]


def _no_companions(_prompts: Sequence[SuitePrompt], _images: int) -> dict[str, str]:
    return {}


@dataclasses.dataclass(frozen=True)
class Suite:
    """A benchmark.

    Attributes:
      name: as it is asked for.
      read: the prompts of the suite's own file or folder, all of them, in the suite's order.
      images_per_prompt: how many pictures the suite wants of each.
      file_name: of a prompt's picture of some number, without its ending.
      files_of: the files that ``read`` reads.
      suffix: ``.png``, or ``.jpg`` where the scorer opens nothing else.
      legal_images: the numbers of pictures per prompt that its layout has a place for; empty for any.
      tiled: whether four pictures of one prompt are one file, a sheet of 2 x 2 without gaps.
      square: whether the scorer takes pictures to be square.
      companions: text files that the scorer reads as well, by path below the export's folder.
      scorer: how the pictures are scored, as a line for a shell, with ``{out}`` for the export's folder, which comes
        quoted, ``{side}`` for a picture's side and ``{images}`` for the number of pictures per prompt.
    """

    name: str
    read: Callable[[pathlib.Path], list[SuitePrompt]]
    images_per_prompt: int
    file_name: Callable[[SuitePrompt, int], str]
    scorer: str
    files_of: Callable[[pathlib.Path], list[pathlib.Path]] = _itself
    suffix: str = ".png"
    legal_images: tuple[int, ...] = ()
    tiled: bool = False
    square: bool = False
    companions: Callable[[Sequence[SuitePrompt], int], Mapping[str, str]] = _no_companions

    def check_images(self, images: int) -> None:
        """Refuses a number of pictures per prompt that the layout has no place for.

        Raises:
          UserInputError: such a number.
        """
        legal = " or ".join(map(str, self.legal_images)) or f"from 1 to {MAX_IMAGES}"
        if images not in (self.legal_images or range(1, MAX_IMAGES + 1)):
            raise UserInputError(
                f"--images-per-prompt {images}",
                f"must be {legal}: the layout of {self.name} has no place for another number",
                f"the suite's own is {self.images_per_prompt}",
            )

    def files(self, prompts: Sequence[SuitePrompt], images: int) -> list[PictureFile]:
        """Every picture file of these prompts, in the order in which they are made."""
        together = images if self.tiled else 1
        return [
            PictureFile(self.file_name(prompt, first) + self.suffix, prompt, tuple(range(first, first + together)))
            for prompt in prompts
            for first in range(0, images, together)
        ]


def seed_of(seed: int, prompt: SuitePrompt, image: int) -> int:
    """The seed of one picture: ``seed + 1000 * prompt number + image number``, modulo 2**32."""
    return (seed + MAX_IMAGES * prompt.number + image) % (MAX_SEED + 1)
