"""The options of the eval command and how they are read; imports neither jax nor numpy."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

from toprovar_jax.cli.backend import check_backend
from toprovar_jax.cli.command_line import flag_of, option, read_command_line
from toprovar_jax.cli.model_options import Model, TextEncoder, Vae, Variant
from toprovar_jax.errors import UserInputError, unknown_name
from toprovar_jax.settings import parse_setting

PRECISIONS = ("exact", "fast")


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """The command line as typed: values stay text, so that a wrong one gets a one-line message when it is read."""

    model: Model = None
    variant: Variant = None
    vae: Vae = None
    text_encoder: TextEncoder = None
    policy: Annotated[str, option("NAME", "Which computations to spare; dense spares none (default: dense).")] = "dense"
    against: Annotated[
        str, option("NAME", "The policy to compare it with, on the same prompts and seeds (default: dense).")
    ] = "dense"
    images: Annotated[str, option("N", "Pictures per prompt (default: 1).")] = "1"
    per_task: Annotated[str | None, option("N", "Prompts per task (default: 50).")] = None
    tasks: Annotated[
        str | None,
        option("A,B,C", 'Some of the tasks, such as "counting,position"; default: all that the model knows.'),
    ] = None
    prompts: Annotated[
        str | None, option("FILE", "Prompts of your own: .jsonl as GenEval has them, instead of those of the tasks.")
    ] = None
    guidance: Annotated[
        str | None, option("X|X,X,...", "How closely to follow the prompt, one number or one per scale.")
    ] = None
    tau: Annotated[str | None, option("X|X,X,...", "Sampling temperature, one number or one per scale.")] = None
    aspect_ratio: Annotated[str | None, option("H:W", "Height to width, such as 4:3; default: 1:1.")] = None
    pixels: Annotated[str | None, option("BUDGET", "Picture size in pixels; default: the model's.")] = None
    seed: Annotated[
        str,
        option("N", "Seed of the first picture, counting up from there, and of the choice of prompts (default: 0)."),
    ] = "0"
    batch_size: Annotated[str, option("B", "Pictures made together (default: 16).")] = "16"
    ceiling: Annotated[
        bool, option("", "Also judge renders that the model's image tokenizer has coded: the most it can reach.")
    ] = False
    backend: Annotated[str | None, option("cpu|gpu|tpu", "Where to run; default: the best device found.")] = None
    precision: Annotated[
        str | None, option("exact|fast", "float32, or bfloat16 products; default: exact on a CPU, fast elsewhere.")
    ] = None
    out: Annotated[str, option("DIR", "Where results.json and contact_sheet.png go (default: outputs/eval).")] = (
        "outputs/eval"
    )
    force: Annotated[bool, option("", "Replace those two files if they are there already.")] = False
    json: Annotated[bool, option("", "Print one JSON object instead of the table and the files' paths.")] = False
    quiet: Annotated[bool, option("", "No progress, no table, no warnings; only the files' paths, and errors.")] = False
    debug: Annotated[bool, option("", "On failure, show the whole traceback.")] = False


@dataclasses.dataclass(frozen=True)
class EvaluateRequest:
    """What the options ask for, checked.

    Attributes:
      policy, against: names.
      images: pictures per prompt.
      per_task: prompts per task.
      tasks: names; None for all that the model knows.
      prompts: a file of them, instead.
      settings: of every picture, as the pipeline takes them.
      seed: of the first picture.
      batch_size: pictures per call.
      precision: None for the device's own.
      out: the folder.
    """

    policy: str
    against: str
    images: int
    per_task: int
    tasks: tuple[str, ...] | None
    prompts: pathlib.Path | None
    settings: dict[str, Any]
    seed: int
    batch_size: int
    precision: str | None
    out: pathlib.Path


def parse_options(argv: Sequence[str], *, prog: str = "toprovar eval") -> EvaluateOptions:
    """Reads a command line. ``--help`` prints the options and raises ``SystemExit(0)``.

    Args:
      argv: the words after the command's name.
      prog: the command's name, as ``--help`` shows it.

    Raises:
      UserInputError: an unknown option, an option without its value, or a stray word.
    """
    description = "Judge how much of what prompts of six tasks ask for a model draws, by the protocol of GenEval."
    return read_command_line(EvaluateOptions, argv, prog=prog, description=description)


def request_of(options: EvaluateOptions) -> EvaluateRequest:
    """What is asked for.

    Raises:
      UserInputError: a value is not legal, or two options exclude each other.
    """
    if options.backend is not None:
        check_backend(options.backend)
    if options.precision not in (None, *PRECISIONS):
        raise unknown_name("--precision", options.precision, PRECISIONS)
    if not options.out.strip():
        raise UserInputError(f"--out {options.out!r}", "must name a directory", "for example outputs/eval")
    for name in ("per_task", "tasks"):
        if options.prompts is not None and getattr(options, name) is not None:
            rule = f"cannot be used together with {flag_of(name)}"
            raise UserInputError(f"--prompts {options.prompts}", rule, "leave one of them out")
    policy, against = (
        parse_setting("policy", getattr(options, name), label=f"--{name}") for name in ("policy", "against")
    )
    settings = {
        name: list(value) if isinstance(value, tuple) else value
        for name in ("guidance", "tau", "aspect_ratio", "pixels")
        if (text := getattr(options, name)) is not None
        for value in [parse_setting(name, text, label=flag_of(name))]
    }
    if "guidance" in settings:
        settings["guidance_scale"] = settings.pop("guidance")
    return EvaluateRequest(
        policy=policy,
        against=against,
        images=_positive("--images", options.images),
        per_task=_positive("--per-task", "50" if options.per_task is None else options.per_task),
        tasks=None if options.tasks is None else tuple(_task(name) for name in options.tasks.split(",")),
        prompts=None if options.prompts is None else pathlib.Path(options.prompts),
        settings=settings,
        seed=parse_setting("seed", options.seed, label="--seed"),
        batch_size=_positive("--batch-size", options.batch_size),
        precision=options.precision,
        out=pathlib.Path(options.out),
    )


def _positive(flag: str, text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= number <= 1_000_000:
        raise UserInputError(f"{flag} {text!r}", "must be an integer from 1 to 1000000", "for example 4")
    return number


def _task(name: str) -> str:
    """A task's name as it is written elsewhere; whether there is such a task is asked later."""
    return " ".join(name.lower().replace("_", " ").replace("-", " ").split())
