"""DPG-Bench (github.com/TencentQQGYLab/ELLA, dpg_bench): one sheet of four pictures per prompt, named as its file."""

from __future__ import annotations

import pathlib

from toprovar_jax.evaluation_suites.reading import distinct, file_part, prompt_text, refuse
from toprovar_jax.evaluation_suites.suite import Suite, SuitePrompt
from toprovar_jax.prompts import read_text


def read(path: pathlib.Path) -> list[SuitePrompt]:
    """The prompts of the folder ``dpg_bench/prompts``, a text file each, in the order of their names.

    Raises:
      UserInputError: the folder is not what it should be.
    """
    prompts = []
    for number, file in enumerate(files(path)):
        # The scorer cuts a picture's name at its first dot to find its questions.
        if "." in file_part(file.stem, f"{path.name}: file"):
            refuse(f"{path.name}: file {file.name!r}", "must have no dot in its name but that of .txt")
        text = prompt_text(read_text(file).lstrip("\ufeff").strip(), file.name)
        prompts.append(SuitePrompt(number, text, file.stem))
    return distinct(prompts, path)


def files(path: pathlib.Path) -> list[pathlib.Path]:
    """The text files of the folder, in the order of their names.

    Raises:
      UserInputError: ``path`` is no folder.
    """
    if not path.is_dir():
        refuse(f"prompts {path}", "must be the folder dpg_bench/prompts, with a .txt file per prompt")
    return sorted((file for file in path.iterdir() if file.suffix == ".txt"), key=lambda file: file.name)


DPG = Suite(
    name="dpg",
    read=read,
    files_of=files,
    images_per_prompt=4,
    file_name=lambda prompt, _image: prompt.name,
    legal_images=(1, 4),
    tiled=True,
    square=True,
    scorer="PIC_NUM={images} bash dpg_bench/dist_eval.sh {out}/images {side}",
)
"""The scorer takes every file of the folder and crops squares of a resolution that it is told, row by row."""
