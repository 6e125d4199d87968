"""The options of the compare command and how they are read; imports neither jax nor numpy."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

from tyro.conf import UseAppendAction

from toprovar_jax.acceleration import POLICIES
from toprovar_jax.cli.backend import check_backend
from toprovar_jax.cli.command_line import flag_of, option, read_command_line
from toprovar_jax.cli.model_options import Model, TextEncoder, Vae, Variant
from toprovar_jax.errors import UserInputError, unknown_name
from toprovar_jax.prompts import PromptRequest, read_prompts
from toprovar_jax.settings import MAX_SEED, check_setting, parse_setting

PRECISIONS = ("exact", "fast")


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """The command line as typed: values stay text, so that a wrong one gets a one-line message when it is read."""

    prompt: Annotated[UseAppendAction[tuple[str, ...]], option("TEXT", "What to draw; repeat it for more.")] = ()
    prompts_file: Annotated[
        str | None,
        option("FILE", "Prompts from a file: .txt, one a line; or .jsonl with prompts and, as needed, seeds."),
    ] = None
    policies: Annotated[
        str | None,
        option(
            "A,B,C",
            "What to compare with dense: policies, or several at once such as fastvar+guidance-off-late "
            "(default: every policy there is).",
        ),
    ] = None
    out: Annotated[str, option("DIR", "Where compare.png and compare.json go (default: outputs/compare).")] = (
        "outputs/compare"
    )
    model: Model = None
    variant: Variant = None
    vae: Vae = None
    text_encoder: TextEncoder = None
    seed: Annotated[str, option("N", "Seed of a prompt's first picture, counting up from there (default: 0).")] = "0"
    num_images: Annotated[str, option("K", "Pictures per prompt (default: 1).")] = "1"
    guidance: Annotated[
        str | None, option("X|X,X,...", "How closely to follow the prompt, one number or one per scale.")
    ] = None
    aspect_ratio: Annotated[str, option("H:W", "Height to width, such as 4:3 (default: 1:1).")] = "1:1"
    pixels: Annotated[str | None, option("BUDGET", "Picture size in pixels; default: the model's.")] = None
    repeats: Annotated[
        str,
        option(
            "N", "Time every picture N times, by turns with dense, after it was made once; 0: no times (default: 3)."
        ),
    ] = "3"
    backend: Annotated[str | None, option("cpu|gpu|tpu", "Where to run; default: the best device found.")] = None
    precision: Annotated[
        str | None, option("exact|fast", "float32, or bfloat16 products; default: exact on a CPU, fast elsewhere.")
    ] = None
    force: Annotated[bool, option("", "Replace those two files if they are there already.")] = False
    quiet: Annotated[bool, option("", "No progress, no table, no warnings; only the files' paths, and errors.")] = False
    debug: Annotated[bool, option("", "On failure, show the whole traceback.")] = False


@dataclasses.dataclass(frozen=True)
class CompareRequest:
    """What the options ask for, checked.

    Attributes:
      prompts, seeds: of each picture.
      policies: names.
      settings: of every picture, as the pipeline takes them.
      precision: None for the device's own.
      repeats: timed runs of each picture.
      out: the folder.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    policies: tuple[str, ...]
    settings: dict[str, Any]
    precision: str | None
    repeats: int
    out: pathlib.Path


def parse_options(argv: Sequence[str], *, prog: str = "compare_policies.py") -> CompareOptions:
    """Reads a command line. ``--help`` prints the options and raises ``SystemExit(0)``.

    Args:
      argv: the words after the command's name.
      prog: the command's name, as ``--help`` shows it.

    Raises:
      UserInputError: an unknown option, an option without its value, or a stray word.
    """
    description = "Make the same pictures by several policies, and show what each saves and what that does to them."
    return read_command_line(CompareOptions, argv, prog=prog, description=description)


def request_of(options: CompareOptions) -> CompareRequest:
    """What is asked for.

    Raises:
      UserInputError: there is no prompt, a value is not legal, or the prompts file is not what it should be.
    """
    if options.backend is not None:
        check_backend(options.backend)
    if options.precision not in (None, *PRECISIONS):
        raise unknown_name("--precision", options.precision, PRECISIONS)
    if not options.out.strip():
        raise UserInputError(f"--out {options.out!r}", "must name a directory", "for example outputs/compare")
    repeats = int(options.repeats) if options.repeats.isascii() and options.repeats.isdigit() else -1
    if repeats < 0:
        raise UserInputError(f"--repeats {options.repeats!r}", "must be an integer >= 0", "for example 3; 0: no times")
    if options.policies is None:
        policies = tuple(POLICIES)
    else:
        names = options.policies.split(",")
        policies = tuple(parse_setting("policy", name.strip(), label="--policies") for name in names)
    settings = {
        name: parse_setting(name, text, label=flag_of(name))
        for name in ("guidance", "aspect_ratio", "pixels")
        if (text := getattr(options, name)) is not None
    }
    if "guidance" in settings:
        settings["guidance_scale"] = settings.pop("guidance")
    pictures = _pictures(options)
    prompts, seeds = zip(*pictures, strict=True)
    return CompareRequest(prompts, seeds, policies, settings, options.precision, repeats, pathlib.Path(options.out))


def _pictures(options: CompareOptions) -> list[tuple[str, int]]:
    """Prompt and seed of each."""
    first = parse_setting("seed", options.seed, label="--seed")
    count = parse_setting("num_images", options.num_images, label="--num-images")
    requests = [PromptRequest(check_setting("prompt", prompt, label="--prompt")) for prompt in options.prompt]
    if options.prompts_file is not None:
        requests += read_prompts(options.prompts_file)
    if not requests:
        raise UserInputError(
            "no prompt", "one is needed", 'say what to draw with --prompt "a red sphere" or --prompts-file FILE'
        )
    for request in requests:
        if request.overrides:
            raise UserInputError(
                f"{request.origin}: key {next(iter(request.overrides))!r}",
                "a comparison gives every picture the same settings",
                "leave nothing but the prompt and its seed on the line",
            )
    return [
        (request.prompt, ((first if request.seed is None else request.seed) + offset) % (MAX_SEED + 1))
        for request in requests
        for offset in range(count)
    ]
