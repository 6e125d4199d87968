"""The options of the calibrate command and how they are read; imports neither jax nor numpy."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Annotated

from toprovar_jax.cli.backend import check_backend
from toprovar_jax.cli.command_line import option, read_command_line
from toprovar_jax.cli.model_options import Model, TextEncoder, Vae, Variant
from toprovar_jax.errors import UserInputError
from toprovar_jax.prompts import read_prompts
from toprovar_jax.settings import MAX_SEED, parse_setting

DEFAULT_DROP = 0.05


@dataclasses.dataclass(frozen=True)
class CalibrateOptions:
    """The command line as typed: values stay text, so that a wrong one gets a one-line message when it is read."""

    prompts: Annotated[
        str | None,
        option("FILE", "What to draw while measuring: .txt, one prompt a line; or .jsonl with nothing but prompts."),
    ] = None
    model: Model = None
    variant: Variant = None
    vae: Vae = None
    text_encoder: TextEncoder = None
    backend: Annotated[str | None, option("cpu|gpu|tpu", "Where to run; default: the best device found.")] = None
    images: Annotated[
        str, option("N", "Measure on the first N prompts, or on all if there are fewer (default: 50).")
    ] = "50"
    seed: Annotated[str, option("N", "Seed of the first picture; each further one has the next (default: 0).")] = "0"
    target_speedup: Annotated[
        str | None,
        option("X", "Prune so much that the transformer needs X times fewer operations than dense, such as 2."),
    ] = None
    target_drop: Annotated[
        str | None,
        option(
            "Y",
            "Prune as much as a mean similarity (SSIM) to the dense pictures of 1 - Y allows "
            f"(default: {DEFAULT_DROP}, if no speed-up is asked for).",
        ),
    ] = None
    out: Annotated[
        str | None, option("FILE", "Where the constants go; default: calibration.json in the model's folder.")
    ] = None
    force: Annotated[bool, option("", "Replace that file if it is there already.")] = False
    quiet: Annotated[bool, option("", "No progress, no table, no warnings; only the file's path, and errors.")] = False
    debug: Annotated[bool, option("", "On failure, show the whole traceback.")] = False


@dataclasses.dataclass(frozen=True)
class CalibrateRequest:
    """What the options ask for, checked.

    Attributes:
      prompts, seeds: of each picture.
      target_speedup, target_drop: one of the two is None.
      out: the file, or None for the one in the model's folder.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    target_speedup: float | None
    target_drop: float | None
    out: pathlib.Path | None


def parse_options(argv: Sequence[str], *, prog: str = "calibrate") -> CalibrateOptions:
    """Reads a command line. ``--help`` prints the options and raises ``SystemExit(0)``.

    Args:
      argv: the words after the command's name.
      prog: the command's name, as ``--help`` shows it.

    Raises:
      UserInputError: an unknown option, an option without its value, or a stray word.
    """
    description = "Measure a model, and write the constants of the toprovar policies for it."
    return read_command_line(CalibrateOptions, argv, prog=prog, description=description)


def request_of(options: CalibrateOptions) -> CalibrateRequest:
    """What is asked for.

    Raises:
      UserInputError: a value is not legal, two contradict each other, or the prompts file is not what it should be.
    """
    if options.backend is not None:
        check_backend(options.backend)
    if options.target_speedup is not None and options.target_drop is not None:
        raise UserInputError(
            "--target-speedup with --target-drop", "only one of them can be reached exactly", "leave one out"
        )
    speedup = _number("--target-speedup", options.target_speedup, 1.0, math.inf, "above 1", "2")
    drop = _number("--target-drop", options.target_drop, 0.0, 1.0, "between 0 and 1", str(DEFAULT_DROP))
    if options.target_speedup is None and options.target_drop is None:
        drop = DEFAULT_DROP
    prompts = _prompts(options)
    seed = parse_setting("seed", options.seed, label="--seed")
    if seed + len(prompts) - 1 > MAX_SEED:
        raise UserInputError(
            f"--seed {seed} for {len(prompts)} pictures", f"must leave every seed at most {MAX_SEED}", "lower it"
        )
    seeds = tuple(range(seed, seed + len(prompts)))
    return CalibrateRequest(prompts, seeds, speedup, drop, _out(options))


def _number(label: str, text: str | None, low: float, high: float, rule: str, example: str) -> float | None:
    """A number strictly between ``low`` and ``high``."""
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low < value < high:  # so written, NaN is refused too
        raise UserInputError(f"{label} {text!r}", f"must be a number {rule}", f"for example {example}")
    return value


def _prompts(options: CalibrateOptions) -> tuple[str, ...]:
    count = int(options.images) if options.images.isascii() and options.images.isdigit() else 0
    if count < 1:
        raise UserInputError(f"--images {options.images!r}", "must be an integer >= 1", "for example 50")
    if options.prompts is None:
        raise UserInputError("no prompts", "they are needed", "say which pictures to measure on with --prompts FILE")
    requests = read_prompts(options.prompts)[:count]
    for request in requests:
        extra = [*request.overrides, *(["seed"] if request.seed is not None else [])]
        if extra:
            raise UserInputError(
                f"{request.origin}: key {extra[0]!r}",
                "calibration gives every picture the model's own settings, and counts seeds up from --seed",
                "leave nothing but the prompt on the line",
            )
    return tuple(request.prompt for request in requests)


def _out(options: CalibrateOptions) -> pathlib.Path | None:
    if options.out is None:
        return None
    if not options.out.strip():
        raise UserInputError(f"--out {options.out!r}", "must name a file", "leave it out for the model's folder")
    return pathlib.Path(options.out)
