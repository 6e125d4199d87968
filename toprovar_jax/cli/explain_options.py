"""The options of the explain command and how they are read; imports neither jax nor numpy."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

from toprovar_jax.cli.backend import check_backend
from toprovar_jax.cli.command_line import option, read_command_line
from toprovar_jax.cli.model_options import Model, TextEncoder, Vae, Variant
from toprovar_jax.errors import UserInputError
from toprovar_jax.settings import parse_setting


@dataclasses.dataclass(frozen=True)
class ExplainOptions:
    """The command line as typed: values stay text, so that a wrong one gets a one-line message when it is read."""

    prompt: Annotated[str | None, option("TEXT", "What to draw.")] = None
    out: Annotated[str, option("DIR", "Where the pages go; existing files are kept (default: outputs/explain).")] = (
        "outputs/explain"
    )
    model: Model = None
    variant: Variant = None
    vae: Vae = None
    text_encoder: TextEncoder = None
    policy: Annotated[str, option("NAME", "What decides which computations to spare (default: toprovar).")] = "toprovar"
    seed: Annotated[str, option("N", "Seed of the picture (default: 0).")] = "0"
    backend: Annotated[str | None, option("cpu|gpu|tpu", "Where to run; default: the best device found.")] = None
    guidance: Annotated[
        str | None, option("X|X,X,...", "How closely to follow the prompt, one number or one per scale.")
    ] = None
    debug: Annotated[bool, option("", "On failure, show the whole traceback.")] = False


@dataclasses.dataclass(frozen=True)
class ExplainRequest:
    """What the options ask for, checked.

    Attributes:
      prompt, policy, seed: of the picture.
      guidance: one number or one per scale; None: the model's default.
      out: the folder.
    """

    prompt: str
    policy: str
    seed: int
    guidance: Any
    out: pathlib.Path


def parse_options(argv: Sequence[str], *, prog: str = "explain.py") -> ExplainOptions:
    """Reads a command line. ``--help`` prints the options and raises ``SystemExit(0)``.

    Args:
      argv: the words after the command's name.
      prog: the command's name, as ``--help`` shows it.

    Raises:
      UserInputError: an unknown option, an option without its value, or a stray word.
    """
    description = "Show how one picture is made, and what sparing work does to it."
    return read_command_line(ExplainOptions, argv, prog=prog, description=description)


def request_of(options: ExplainOptions) -> ExplainRequest:
    """What is asked for.

    Raises:
      UserInputError: there is no prompt, or a value is not legal.
    """
    if options.backend is not None:
        check_backend(options.backend)
    if options.prompt is None:
        raise UserInputError("no prompt", "one is needed", 'say what to draw with --prompt "a red sphere"')
    if not options.out.strip():
        raise UserInputError(f"--out {options.out!r}", "must name a directory", "for example outputs/explain")
    guidance = options.guidance
    return ExplainRequest(
        parse_setting("prompt", options.prompt, label="--prompt"),
        parse_setting("policy", options.policy, label="--policy"),
        parse_setting("seed", options.seed, label="--seed"),
        None if guidance is None else parse_setting("guidance", guidance, label="--guidance"),
        pathlib.Path(options.out),
    )
