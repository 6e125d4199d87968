"""ImageReward (github.com/THUDM/ImageReward): all pictures of a model in one folder, named after prompt and number."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

from toprovar_jax.evaluation_suites.reading import checked, distinct, field, file_part, prompt_text, read_json
from toprovar_jax.evaluation_suites.suite import Suite, SuitePrompt


def read(path: pathlib.Path) -> list[SuitePrompt]:
    """The prompts of ``benchmark-prompts.json``; each is named after its id.

    Raises:
      UserInputError: the file is not what it should be.
    """
    prompts = []
    for number, entry in enumerate(checked(read_json(path), list, path.name)):
        origin = f"{path.name} entry {number}"
        record = checked(entry, dict, origin)
        name = file_part(field(record, "id", str, origin), f"{origin}: id")
        text = prompt_text(field(record, "prompt", str, origin), f"{origin}: prompt")
        prompts.append(SuitePrompt(number, text, name))
    return distinct(prompts, path)


def _file_name(prompt: SuitePrompt, image: int) -> str:
    return f"{prompt.name}_{image}"


def _metadata(prompts: Sequence[SuitePrompt], images: int) -> dict[str, str]:
    """One list for both scorers: ImageReward's own reads ids and prompts, that of Infinity also the paths."""
    listed = [
        {
            "id": prompt.name,
            "prompt": prompt.text,
            "gen_image_paths": [f"images/{_file_name(prompt, image)}.png" for image in range(images)],
        }
        for prompt in prompts
    ]
    return {"metadata.jsonl": json.dumps(listed, indent=1) + "\n"}


IMAGEREWARD = Suite(
    name="imagereward",
    read=read,
    images_per_prompt=10,
    file_name=_file_name,
    companions=_metadata,
    scorer="python test-benchmark.py --prompts_path {out}/metadata.jsonl --img_dir {out} --model images",
)
"""The scorer divides the number of files in the folder by that of prompts, and opens ``ID_NUMBER.png``."""
