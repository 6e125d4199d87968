"""MJHQ-30K (huggingface.co/datasets/playgroundai/MJHQ-30K): a folder per category, one picture per prompt, for FID."""

from __future__ import annotations

import pathlib

from toprovar_jax.evaluation_suites.reading import checked, distinct, field, file_part, prompt_text, read_json
from toprovar_jax.evaluation_suites.suite import Suite, SuitePrompt


def read(path: pathlib.Path) -> list[SuitePrompt]:
    """The prompts of ``meta_data.json``; each is named after its category and its id.

    Raises:
      UserInputError: the file is not what it should be.
    """
    prompts = []
    for number, (name, entry) in enumerate(checked(read_json(path), dict, path.name).items()):
        origin = f"{path.name} entry {name[:60]!r}"
        record = checked(entry, dict, origin)
        category = file_part(field(record, "category", str, origin), f"{origin}: category")
        text = prompt_text(field(record, "prompt", str, origin), f"{origin}: prompt")
        prompts.append(SuitePrompt(number, text, f"{category}/{file_part(name, origin)}"))
    return distinct(prompts, path)


MJHQ = Suite(
    name="mjhq",
    read=read,
    images_per_prompt=1,
    file_name=lambda prompt, _image: prompt.name,
    legal_images=(1,),
    scorer="python -c \"import sys; from cleanfid import fid; print(fid.compute_fid('mjhq30k_imgs', sys.argv[1]))\" "
    "{out}/images",
)
"""FID takes every picture below a folder, that of a category or that of all."""
