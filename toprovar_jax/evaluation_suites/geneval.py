"""GenEval (github.com/djghosh13/geneval): a folder per prompt with its metadata and its samples."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from toprovar_jax.evaluation_suites.reading import distinct, field, prompt_text, read_json_lines
from toprovar_jax.evaluation_suites.suite import Suite, SuitePrompt


def read(path: pathlib.Path) -> list[SuitePrompt]:
    """The prompts of ``evaluation_metadata.jsonl``; each is named after its number.

    Raises:
      UserInputError: the file is not what it should be.
    """
    prompts = []
    for number, (origin, line, record) in enumerate(read_json_lines(path)):
        field(record, "tag", str, origin)
        field(record, "include", list, origin)
        text = prompt_text(field(record, "prompt", str, origin), f"{origin}: prompt")
        prompts.append(SuitePrompt(number, text, f"{number:05d}", line))
    return distinct(prompts, path)


def _file_name(prompt: SuitePrompt, image: int) -> str:
    return f"{prompt.name}/samples/{image:04d}"


def _metadata(prompts: Sequence[SuitePrompt], _images: int) -> dict[str, str]:
    return {f"images/{prompt.name}/metadata.jsonl": f"{prompt.record}\n" for prompt in prompts}


GENEVAL = Suite(
    name="geneval",
    read=read,
    images_per_prompt=4,
    file_name=_file_name,
    companions=_metadata,
    scorer="python evaluation/evaluate_images.py {out}/images --outfile {out}/results.jsonl --model-path DETECTOR_DIR "
    "&& python evaluation/summary_scores.py {out}/results.jsonl",
)
"""The scorer takes folders named by digits, in them ``metadata.jsonl`` and ``samples/DIGITS.png``."""
