"""Prompts that were rewritten beforehand, such as by a language model: what is drawn differs from what is scored."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from toprovar_jax.errors import UserInputError
from toprovar_jax.evaluation_suites.reading import checked, field, prompt_text, read_json, read_json_lines, refuse
from toprovar_jax.evaluation_suites.suite import SuitePrompt
from toprovar_jax.prompts import lines_of, read_text

_WHAT = "file of rewritten prompts"
_REMEDY = "rewrite every prompt of the suite"


def read_rewritten(path: pathlib.Path, prompts: Sequence[SuitePrompt]) -> list[str]:
    """What to draw for each of ``prompts``.

    Args:
      path: ``.json``: one object from prompts to rewritten prompts, as Infinity's ``prompt_rewrite_cache.json``;
        ``.jsonl``: an object a line with ``"prompt"`` and ``"rewritten"``; ``.txt``: one rewritten prompt a line, in
        the suite's order. It may hold more than is asked for; a text file must fit in its number of lines.
      prompts: all of the suite's.

    Raises:
      UserInputError: the file is not what it should be, or lacks a prompt; the message names the first one.
    """
    readers = {".json": _from_json, ".jsonl": _from_json_lines}
    if path.suffix.lower() == ".txt":
        return _from_lines(path, prompts)
    if path.suffix.lower() not in readers:
        rule = "must end in .json (one object), .jsonl (an object a line) or .txt (a prompt a line)"
        raise UserInputError(f"{_WHAT} {path}", rule, "rename it")
    rewritten = readers[path.suffix.lower()](path)
    missing = [prompt for prompt in prompts if prompt.text not in rewritten]
    if missing:
        count = f"{len(missing)} of {len(prompts)} prompts" if len(missing) > 1 else "a prompt"
        refuse(f"{_WHAT} {path}", f"lacks {count}, the first being {missing[0].text[:200]!r}", _REMEDY)
    return [rewritten[prompt.text] for prompt in prompts]


def _from_json(path: pathlib.Path) -> dict[str, str]:
    found = checked(read_json(path, _WHAT), dict, path.name)
    return {prompt: prompt_text(text, f"{path.name}: {prompt[:60]!r}") for prompt, text in found.items()}


def _from_json_lines(path: pathlib.Path) -> dict[str, str]:
    rewritten: dict[str, str] = {}
    for origin, _, record in read_json_lines(path, _WHAT):
        prompt = field(record, "prompt", str, origin)
        text = prompt_text(field(record, "rewritten", str, origin), f"{origin}: rewritten")
        if rewritten.setdefault(prompt, text) != text:
            refuse(f"{origin}: prompt {prompt[:60]!r}", "must not be rewritten in two ways", "keep one of them")
    return rewritten


def _from_lines(path: pathlib.Path, prompts: Sequence[SuitePrompt]) -> list[str]:
    lines = lines_of(read_text(path, _WHAT).lstrip("\ufeff"))
    if lines[-1] == "":
        lines.pop()
    if len(lines) != len(prompts):
        refuse(f"{_WHAT} {path}", f"must have a line for each of {len(prompts)} prompts, not {len(lines)}", _REMEDY)
    return [prompt_text(line.strip(), f"{path.name} line {number}") for number, line in enumerate(lines, start=1)]
