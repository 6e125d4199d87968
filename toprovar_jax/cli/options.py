"""The options of the generate command and how they are read; imports neither jax nor numpy."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any

from tyro.conf import UseAppendAction

from toprovar_jax.cli.backend import check_backend
from toprovar_jax.cli.command_line import flag_of, option, read_command_line
from toprovar_jax.cli.memory_flags import DecoderStrips, Int8, LowMemory, TextEncoderOn, positive
from toprovar_jax.cli.model_options import Model, TextEncoder, Vae, Variant
from toprovar_jax.errors import UserInputError
from toprovar_jax.prompts import PromptRequest, read_prompts
from toprovar_jax.settings import check_setting, parse_setting


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """The command line as typed: values stay text, so that a wrong one gets a one-line message when it is read."""

    prompt: Annotated[UseAppendAction[tuple[str, ...]], option("TEXT", "What to draw; repeat it for more.")] = ()
    prompts_file: Annotated[
        str | None,
        option(
            "FILE",
            "Prompts from a file: .txt, one a line; or .jsonl, one object a line, such as "
            '{"prompt": "a red sphere", "seed": 1, "guidance": 2} (any setting may differ per line).',
        ),
    ] = None
    negative_prompt: Annotated[str | None, option("TEXT", "What to avoid; acts through guidance.")] = None
    positive_prompt: Annotated[bool, option("", "Append standard words for good faces to prompts about people.")] = (
        False
    )
    backend: Annotated[str | None, option("cpu|gpu|tpu", "Where to run; default: the best device found.")] = None
    model: Model = None
    variant: Variant = None
    vae: Vae = None
    text_encoder: TextEncoder = None
    low_memory: LowMemory = False
    int8: Int8 = False
    text_encoder_on: TextEncoderOn = None
    decoder_strips: DecoderStrips = None
    policy: Annotated[str, option("NAME", "Which computations to spare; dense spares none (default: dense).")] = "dense"
    seed: Annotated[str, option("N", "Seed of a prompt's first picture, counting up from there (default: 0).")] = "0"
    num_images: Annotated[str, option("K", "Pictures per prompt (default: 1).")] = "1"
    batch_size: Annotated[
        str,
        option(
            "B",
            "Pictures made together; each batch is saved before the next begins (default: 1). In exact precision, as "
            "on a CPU, they are computed one by one all the same, so a larger batch is no faster there.",
        ),
    ] = "1"
    aspect_ratio: Annotated[str, option("H:W", "Height to width, such as 4:3 (default: 1:1).")] = "1:1"
    pixels: Annotated[
        str | None,
        option(
            "BUDGET",
            "Picture size in pixels; default: the model's. The embedded model makes 0.004M (64x64) and nothing else; "
            "0.06M, 0.25M, 0.60M and 1M are for models with the official weights.",
        ),
    ] = None
    guidance: Annotated[
        str | None, option("X|X,X,...", "How closely to follow the prompt, one number or one per scale.")
    ] = None
    tau: Annotated[str | None, option("X|X,X,...", "Sampling temperature, one number or one per scale.")] = None
    top_k: Annotated[str | None, option("K", "Sample among the K likeliest values of each bit; 0: all.")] = None
    top_p: Annotated[str | None, option("P", "Sample within this probability mass of each bit, in (0, 1].")] = None
    stop_after_scale: Annotated[str | None, option("K", "Stop after K scales and decode what is there.")] = None
    out: Annotated[str, option("DIR", "Where pictures go; existing files are kept (default: outputs).")] = "outputs"
    grid: Annotated[bool, option("", "Also save all pictures on one sheet.")] = False
    no_metadata: Annotated[bool, option("", "Leave prompt, seed and settings out of the PNG files.")] = False
    json: Annotated[bool, option("", "Print one JSON object instead of one path a line.")] = False
    quiet: Annotated[bool, option("", "No progress, no summary, no warnings; only errors.")] = False
    dry_run: Annotated[bool, option("", "Check everything and show the plan, but make nothing.")] = False
    strict: Annotated[
        bool, option("", "Refuse whatever would otherwise only warn, such as a prompt that is too long.")
    ] = False
    debug: Annotated[bool, option("", "On failure, show the whole traceback.")] = False


def parse_options(argv: Sequence[str], *, prog: str = "generate.py") -> GenerateOptions:
    """Reads a command line. ``--help`` prints the options and raises ``SystemExit(0)``.

    Args:
      argv: the words after the command's name.
      prog: the command's name, as ``--help`` shows it.

    Raises:
      UserInputError: an unknown option, an option without its value, or a stray word.
    """
    return read_command_line(GenerateOptions, argv, prog=prog, description="Make pictures from text.")


def requests_of(options: GenerateOptions) -> list[PromptRequest]:
    """What is to be drawn: the prompts of the command line, then those of the file.

    Raises:
      UserInputError: there is none, one is empty, or the file is not what it should be.
    """
    requests = [PromptRequest(check_setting("prompt", prompt, label="--prompt")) for prompt in options.prompt]
    if options.prompts_file is not None:
        requests += read_prompts(options.prompts_file)
    if not requests:
        raise UserInputError(
            "no prompt", "one is needed", 'say what to draw with --prompt "a red sphere" or --prompts-file FILE'
        )
    return requests


def settings_of(options: Any) -> dict[str, Any]:
    """The settings of every picture whose own line says nothing else; None where the model's default holds.

    Args:
      options: of any command that takes settings under the names that :class:`GenerateOptions` has for them.

    Raises:
      UserInputError: a value is not legal.
    """
    if options.backend is not None:
        check_backend(options.backend)
    typed = ("negative_prompt", "policy", "seed", "num_images", "aspect_ratio", "pixels", "guidance", "tau")
    settings: dict[str, Any] = {"positive_prompt": options.positive_prompt}
    for name in (*typed, "top_k", "top_p", "stop_after_scale"):
        text = getattr(options, name)
        settings[name] = None if text is None else parse_setting(name, text, label=flag_of(name))
    return settings


def batch_size_of(options: GenerateOptions) -> int:
    """Pictures per call.

    Raises:
      UserInputError: not a positive integer.
    """
    return positive("--batch-size", options.batch_size)


def folder_of(options: GenerateOptions) -> pathlib.Path:
    """Where the pictures go.

    Raises:
      UserInputError: ``--out`` is blank.
    """
    if not options.out.strip():
        raise UserInputError(
            f"--out {options.out!r}", "must name a directory", "for example outputs, or . for this one"
        )
    return pathlib.Path(options.out)
