"""The options of the finetune command and how they are read; imports neither jax nor numpy."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Annotated

from toprovar_jax.cli.backend import check_backend
from toprovar_jax.cli.command_line import option, read_command_line
from toprovar_jax.cli.model_options import Model, TextEncoder, Vae, Variant
from toprovar_jax.errors import UserInputError, unknown_name
from toprovar_jax.schedule import parse_aspect_ratio
from toprovar_jax.settings import parse_setting

DEFAULT_RANK, DEFAULT_ADAPTERS = 16, "*attention.*"


@dataclasses.dataclass(frozen=True)
class FinetuneOptions:
    """The command line as typed: values stay text, so that a wrong one gets a one-line message when it is read."""

    data: Annotated[
        str | None,
        option(
            "DIR",
            "Pictures with captions: NAME.png beside NAME.txt; or a metadata.jsonl or captions.jsonl with lines such "
            'as {"file_name": "a.png", "text": "a red sphere"}; or .tar shards of a webdataset.',
        ),
    ] = None
    out: Annotated[
        str | None, option("DIR", "Where the finetuned model goes; the run's checkpoints go to DIR/run.")
    ] = None
    model: Model = None
    variant: Variant = None
    vae: Vae = None
    text_encoder: TextEncoder = None
    backend: Annotated[str | None, option("cpu|gpu|tpu", "Where to run; default: the best device found.")] = None
    devices: Annotated[str, option("N", "Devices that share every batch (default: 1).")] = "1"
    precision: Annotated[
        str | None,
        option("exact|fast", "float32, or bfloat16 products (default: exact on a CPU, fast elsewhere)."),
    ] = None
    rank: Annotated[
        str | None, option("R", f"Rank of the low-rank adapters that are trained (default: {DEFAULT_RANK}).")
    ] = None
    alpha: Annotated[str | None, option("A", "Adapters count A / R times (default: R, so once).")] = None
    adapt: Annotated[
        str | None,
        option(
            "PATTERN,...",
            f"Which linear maps get adapters (default: {DEFAULT_ADAPTERS}; add feed_forward.* for all of them).",
        ),
    ] = None
    full: Annotated[bool, option("", "Train the whole transformer instead of adapters.")] = False
    steps: Annotated[str, option("N", "Updates (default: 1000).")] = "1000"
    batch_size: Annotated[str, option("B", "Pictures per batch (default: 4).")] = "4"
    accumulate: Annotated[str, option("K", "Batches per update (default: 1).")] = "1"
    learning_rate: Annotated[
        str | None, option("X", "After the warm-up (default: 1e-4 for adapters, 1e-5 with --full).")
    ] = None
    warmup: Annotated[str, option("N", "Steps in which the learning rate rises (default: 0).")] = "0"
    decay: Annotated[str, option("constant|cosine", "What the learning rate does after that (default: constant).")] = (
        "constant"
    )
    ema: Annotated[str, option("X", "Keep averaged weights with this decay, such as 0.999 (default: 0, none).")] = "0"
    gradient_checkpointing: Annotated[
        bool, option("", "Compute activations twice instead of keeping them: less memory, a third more work.")
    ] = False
    pixels: Annotated[str | None, option("BUDGET", "Picture size in pixels; default: the model's.")] = None
    aspect: Annotated[
        str | None, option("H:W", "Crop all pictures to this ratio; default: each to the nearest template.")
    ] = None
    seed: Annotated[str, option("N", "Of adapters, noise and the order of the data (default: 0).")] = "0"
    held_out: Annotated[
        str, option("X", "Share of the pictures that only measures the loss; 0: none (default: 0.05).")
    ] = "0.05"
    eval_every: Annotated[str, option("N", "Steps between those measurements (default: 200).")] = "200"
    cache: Annotated[
        bool, option("", "Keep encoded pictures and captions in DIR/run/cache: faster epochs for some disk.")
    ] = False
    adapter_only: Annotated[bool, option("", "Write adapter.safetensors alone, without a merged model.")] = False
    dry_run: Annotated[
        bool, option("", "Check everything and show the memory it needs, but train nothing; needs no weights.")
    ] = False
    quiet: Annotated[bool, option("", "Only the path of the result, and errors.")] = False
    debug: Annotated[bool, option("", "On failure, show the whole traceback.")] = False


@dataclasses.dataclass(frozen=True)
class FinetuneRequest:
    """What the options ask for, checked as far as no model is needed for it; see :class:`FinetuneOptions`.

    Attributes:
      rank: None for the whole transformer.
      data, out: None in a dry run that does not say.
    """

    data: pathlib.Path | None
    out: pathlib.Path | None
    rank: int | None
    alpha: float | None
    patterns: tuple[str, ...]
    steps: int
    batch_size: int
    accumulate: int
    learning_rate: float
    warmup: int
    ema: float
    aspect: str | None
    seed: int
    held_out: float
    eval_every: int
    devices: int


def parse_options(argv: Sequence[str], *, prog: str = "finetune.py") -> FinetuneOptions:
    """Reads a command line. ``--help`` prints the options and raises ``SystemExit(0)``.

    Args:
      argv: the words after the command's name.
      prog: the command's name, as ``--help`` shows it.

    Raises:
      UserInputError: an unknown option, an option without its value, or a stray word.
    """
    return read_command_line(FinetuneOptions, argv, prog=prog, description="Train a model on pictures with captions.")


def request_of(options: FinetuneOptions) -> FinetuneRequest:
    """What is asked for.

    Raises:
      UserInputError: a value is not legal, two contradict each other, or one is missing.
    """
    if options.backend is not None:
        check_backend(options.backend)
    for name, legal in (("precision", ("exact", "fast")), ("decay", ("constant", "cosine"))):
        value = getattr(options, name)
        if value is not None and value not in legal:
            raise unknown_name(f"--{name}", value, legal)
    for name in ("rank", "alpha", "adapt"):
        if options.full and getattr(options, name) is not None:
            raise UserInputError(f"--{name} with --full", "there are no adapters then", "leave one of them out")
    if options.full and options.adapter_only:
        raise UserInputError("--adapter-only with --full", "there are no adapters then", "leave one of them out")
    rate = "1e-5" if options.full else "1e-4"
    steps, warmup = _whole("--steps", options.steps), _whole("--warmup", options.warmup, 0)
    if warmup >= steps:
        raise UserInputError(f"--warmup {warmup}", f"must be below --steps {steps}", "lower it")
    rank = None if options.full else _whole("--rank", options.rank or str(DEFAULT_RANK))
    return FinetuneRequest(
        data=_path("--data", options.data, options.dry_run),
        out=_path("--out", options.out, options.dry_run),
        rank=rank,
        alpha=None if options.alpha is None else _number("--alpha", options.alpha, 0.0, math.inf, "above 0"),
        patterns=tuple((DEFAULT_ADAPTERS if options.adapt is None else options.adapt).split(",")),
        steps=steps,
        batch_size=_whole("--batch-size", options.batch_size),
        accumulate=_whole("--accumulate", options.accumulate),
        learning_rate=_number("--learning-rate", options.learning_rate or rate, 0.0, math.inf, "above 0"),
        warmup=warmup,
        ema=_share("--ema", options.ema),
        aspect=None if options.aspect is None else parse_aspect_ratio(options.aspect),
        seed=parse_setting("seed", options.seed, label="--seed"),
        held_out=_share("--held-out", options.held_out),
        eval_every=_whole("--eval-every", options.eval_every),
        devices=_whole("--devices", options.devices),
    )


def _whole(label: str, text: str, least: int = 1) -> int:
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1
    if value < least:
        raise UserInputError(f"{label} {text!r}", f"must be an integer from {least} to 999999999", "for example 16")
    return value


def _number(label: str, text: str, low: float, high: float, rule: str) -> float:
    """A number strictly between ``low`` and ``high``."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low < value < high:  # so written, NaN is refused too
        raise UserInputError(f"{label} {text!r}", f"must be a number {rule}", "see --help for the default")
    return value


def _share(label: str, text: str) -> float:
    return _number(label, text, -math.ulp(0.0), 1.0, "from 0 to below 1")


def _path(label: str, text: str | None, optional: bool) -> pathlib.Path | None:
    if text is None and optional:
        return None
    if text is None or not text.strip():
        raise UserInputError(f"no {label}", "it is needed", f"name a folder with {label} DIR")
    return pathlib.Path(text)
