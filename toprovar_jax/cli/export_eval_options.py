"""The options of the export-eval command and how they are read; imports neither jax nor numpy."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

from toprovar_jax.cli.backend import check_backend
from toprovar_jax.cli.command_line import flag_of, option, read_command_line
from toprovar_jax.cli.memory_flags import DecoderStrips, Int8, LowMemory, TextEncoderOn
from toprovar_jax.cli.model_options import Model, TextEncoder, Vae, Variant
from toprovar_jax.errors import UserInputError, unknown_name
from toprovar_jax.evaluation_suites import SUITES, Suite
from toprovar_jax.settings import parse_setting


@dataclasses.dataclass(frozen=True)
class ExportEvalOptions:
    """The command line as typed: values stay text, so that a wrong one gets a one-line message when it is read."""

    suite: Annotated[str | None, option("|".join(SUITES), "Whose scorer the pictures are for.")] = None
    prompts: Annotated[
        str | None,
        option(
            "FILE_OR_DIR",
            "The suite's own prompts: evaluation_metadata.jsonl (geneval), the folder dpg_bench/prompts (dpg), the "
            "folder of anime.json and three more (hpsv2), benchmark-prompts.json (imagereward), meta_data.json (mjhq).",
        ),
    ] = None
    rewritten: Annotated[
        str | None,
        option(
            "FILE",
            "What to draw instead of each prompt: .json, one object from prompts to rewritten ones; .jsonl, lines of "
            '{"prompt": ..., "rewritten": ...}; .txt, one a line in the suite\'s order. Scorers still see the prompts.',
        ),
    ] = None
    model: Model = None
    variant: Variant = None
    vae: Vae = None
    text_encoder: TextEncoder = None
    low_memory: LowMemory = False
    int8: Int8 = False
    text_encoder_on: TextEncoderOn = None
    decoder_strips: DecoderStrips = None
    policy: Annotated[str, option("NAME", "Which computations to spare; dense spares none (default: dense).")] = "dense"
    out: Annotated[
        str | None,
        option("DIR", "Where export.json and the folder images go (default: outputs/SUITE). Whole pictures stay."),
    ] = None
    images_per_prompt: Annotated[str | None, option("N", "Pictures per prompt; default: the suite's.")] = None
    seed: Annotated[
        str, option("N", "Picture k of prompt p has the seed N + 1000 p + k, counted from 0 (default: 0).")
    ] = "0"
    guidance: Annotated[
        str | None, option("X|X,X,...", "How closely to follow the prompt, one number or one per scale.")
    ] = None
    tau: Annotated[str | None, option("X|X,X,...", "Sampling temperature, one number or one per scale.")] = None
    top_k: Annotated[str | None, option("K", "Sample among the K likeliest values of each bit; 0: all.")] = None
    top_p: Annotated[str | None, option("P", "Sample within this probability mass of each bit, in (0, 1].")] = None
    pixels: Annotated[str | None, option("BUDGET", "Picture size in pixels; default: the model's.")] = None
    aspect_ratio: Annotated[str, option("H:W", "Height to width (default: 1:1).")] = "1:1"
    batch_size: Annotated[str, option("B", "Pictures made together (default: 1).")] = "1"
    limit: Annotated[str | None, option("N", "The first N prompts only; the others can follow later.")] = None
    backend: Annotated[str | None, option("cpu|gpu|tpu", "Where to run; default: the best device found.")] = None
    json: Annotated[bool, option("", "Print one JSON object instead of the folder's path.")] = False
    quiet: Annotated[bool, option("", "No progress, no summary, no warnings; only errors.")] = False
    dry_run: Annotated[bool, option("", "Check everything and say what is to be made, but make nothing.")] = False
    debug: Annotated[bool, option("", "On failure, show the whole traceback.")] = False


@dataclasses.dataclass(frozen=True)
class ExportEvalRequest:
    """What the options ask for, checked.

    Attributes:
      suite: whose scorer the pictures are for.
      prompts: the suite's file or folder.
      rewritten: the file of rewritten prompts, if there is one.
      out: the folder.
      images: pictures per prompt.
      seed: of the run.
      settings: of every picture, as the pipeline takes them; None where the model's default holds.
      batch_size: pictures per call.
      limit: how many prompts at most, or None.
    """

    suite: Suite
    prompts: pathlib.Path
    rewritten: pathlib.Path | None
    out: pathlib.Path
    images: int
    seed: int
    settings: dict[str, Any]
    batch_size: int
    limit: int | None


def parse_options(argv: Sequence[str], *, prog: str = "toprovar export-eval") -> ExportEvalOptions:
    """Reads a command line. ``--help`` prints the options and raises ``SystemExit(0)``.

    Args:
      argv: the words after the command's name.
      prog: the command's name, as ``--help`` shows it.

    Raises:
      UserInputError: an unknown option, an option without its value, or a stray word.
    """
    description = "Make the pictures that a public benchmark's scorer reads, in its own folder layout."
    return read_command_line(ExportEvalOptions, argv, prog=prog, description=description)


def request_of(options: ExportEvalOptions) -> ExportEvalRequest:
    """What is asked for.

    Raises:
      UserInputError: a value is missing or not legal.
    """
    if options.suite is None:
        raise UserInputError("no suite", "one is needed", f"choose with --suite {'|'.join(SUITES)}")
    if options.suite not in SUITES:
        raise unknown_name("--suite", options.suite, SUITES)
    if options.prompts is None:
        raise UserInputError("no prompts", "the suite's own are needed", "say where they are with --prompts")
    if options.out is not None and not options.out.strip():
        raise UserInputError(f"--out {options.out!r}", "must name a directory", "for example outputs/geneval")
    if options.backend is not None:
        check_backend(options.backend)
    suite = SUITES[options.suite]
    given = options.images_per_prompt
    images = suite.images_per_prompt if given is None else _positive("--images-per-prompt", given)
    suite.check_images(images)
    settings: dict[str, Any] = {}
    for name in ("policy", "guidance", "tau", "top_k", "top_p", "pixels", "aspect_ratio"):
        text = getattr(options, name)
        value = None if text is None else parse_setting(name, text, label=flag_of(name))
        settings[name] = list(value) if isinstance(value, tuple) else value
    settings["guidance_scale"] = settings.pop("guidance")
    return ExportEvalRequest(
        suite=suite,
        prompts=pathlib.Path(options.prompts),
        rewritten=None if options.rewritten is None else pathlib.Path(options.rewritten),
        out=pathlib.Path(options.out or f"outputs/{suite.name}"),
        images=images,
        seed=parse_setting("seed", options.seed, label="--seed"),
        settings=settings,
        batch_size=_positive("--batch-size", options.batch_size),
        limit=None if options.limit is None else _positive("--limit", options.limit),
    )


def _positive(flag: str, text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= number <= 1_000_000:
        raise UserInputError(f"{flag} {text!r}", "must be an integer from 1 to 1000000", "for example 4")
    return number
