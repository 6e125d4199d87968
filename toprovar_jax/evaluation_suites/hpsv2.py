"""HPSv2 (github.com/tgxs002/HPSv2): a folder per style, one JPEG per prompt."""

from __future__ import annotations

import pathlib

from toprovar_jax.evaluation_suites.reading import checked, distinct, prompt_text, read_json, refuse
from toprovar_jax.evaluation_suites.suite import Suite, SuitePrompt

STYLES = ("anime", "concept-art", "paintings", "photo")


def files(path: pathlib.Path) -> list[pathlib.Path]:
    """The prompt files: ``STYLE.json`` of all four styles in a folder, or the one that ``path`` is.

    Raises:
      UserInputError: it is neither.
    """
    if path.is_dir():
        return [path / f"{style}.json" for style in STYLES]
    if path.name not in [f"{style}.json" for style in STYLES]:
        named = ", ".join(f"{style}.json" for style in STYLES)
        refuse(f"prompts {path}", f"must be the folder with {named}, or one of them")
    return [path]


def read(path: pathlib.Path) -> list[SuitePrompt]:
    """The benchmark prompts, style by style; each is named after its style and its number there.

    Raises:
      UserInputError: a file is missing or not what it should be.
    """
    prompts: list[SuitePrompt] = []
    for file in files(path):
        for index, text in enumerate(checked(read_json(file), list, file.name)):
            origin = f"{file.name} entry {index}"
            name = f"{file.stem}/{index:05d}"
            prompts.append(SuitePrompt(len(prompts), prompt_text(text, origin), name))
    return distinct(prompts, path)


HPSV2 = Suite(
    name="hpsv2",
    read=read,
    files_of=files,
    images_per_prompt=1,
    file_name=lambda prompt, _image: prompt.name,
    suffix=".jpg",
    legal_images=(1,),
    scorer="python -c \"import hpsv2, sys; hpsv2.evaluate(sys.argv[1], hps_version='v2.1')\" {out}/images",
)
"""The scorer takes every entry of the folder for a style, and opens ``STYLE/DIGITS.jpg`` for the prompts it has."""
