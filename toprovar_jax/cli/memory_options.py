"""The options of the memory command and how they are read; imports neither jax nor numpy."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Annotated, Any

from toprovar_jax.cli.backend import check_backend
from toprovar_jax.cli.command_line import option, read_command_line
from toprovar_jax.cli.memory_flags import (
    DecoderStrips,
    Int8,
    LowMemory,
    TextEncoderOn,
    memory_options_of,
    positive,
)
from toprovar_jax.errors import UserInputError, unknown_name

UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
"""Bytes by unit."""

DRIVERS = ("fused", "stepwise")
PRECISIONS = ("fast", "exact")


@dataclasses.dataclass(frozen=True)
class MemoryCommand:
    """The command line as typed: values stay text, so that a wrong one gets a one-line message when it is read."""

    model: Annotated[
        str | None, option("NAME_OR_DIR", "A model by name or folder; default: the small embedded one.")
    ] = None
    pixels: Annotated[str | None, option("BUDGET", "Picture size in pixels; default: the model's.")] = None
    aspect_ratio: Annotated[str, option("H:W", "Height to width, such as 4:3 (default: 1:1).")] = "1:1"
    batch_size: Annotated[str, option("B", "Pictures made together (default: 1).")] = "1"
    policy: Annotated[str, option("NAME", "Which computations to spare; dense spares none (default: dense).")] = "dense"
    precision: Annotated[str, option("fast|exact", "bfloat16 or float32 products (default: fast).")] = "fast"
    driver: Annotated[
        str | None,
        option("fused|stepwise", "All scales in one program, or one each, as with a progress bar; default: as needed."),
    ] = None
    unguided: Annotated[bool, option("", "Without unconditional rows, as at guidance 1.")] = False
    low_memory: LowMemory = False
    int8: Int8 = False
    text_encoder_on: TextEncoderOn = None
    decoder_strips: DecoderStrips = None
    device_memory: Annotated[
        str | None, option("SIZE", "What it has to fit, such as 24GB; default: the present device's, where it tells.")
    ] = None
    backend: Annotated[str | None, option("cpu|gpu|tpu", "Whose memory; default: the best device found.")] = None
    json: Annotated[bool, option("", "Print one JSON object instead of a table.")] = False
    debug: Annotated[bool, option("", "On failure, show the whole traceback.")] = False


def parse_options(argv: Sequence[str], *, prog: str = "memory") -> MemoryCommand:
    """Reads a command line. ``--help`` prints the options and raises ``SystemExit(0)``.

    Raises:
      UserInputError: an unknown option, an option without its value, or a stray word.
    """
    description = "Tell how much device memory making pictures takes; nothing is loaded or run."
    return read_command_line(MemoryCommand, argv, prog=prog, description=description)


def asked(options: MemoryCommand) -> dict[str, Any]:
    """The arguments of :func:`toprovar_jax.memory.memory_report`.

    Raises:
      UserInputError: a value is not legal.
    """
    if options.backend is not None:
        check_backend(options.backend)
    if options.precision not in PRECISIONS:
        raise unknown_name("--precision", options.precision, PRECISIONS)
    if options.driver not in (None, *DRIVERS):
        raise unknown_name("--driver", options.driver, DRIVERS)
    return {
        "model": options.model,
        "pixels": options.pixels,
        "aspect_ratio": options.aspect_ratio,
        "batch_size": positive("--batch-size", options.batch_size),
        "policy": options.policy,
        "precision": options.precision,
        "driver": options.driver,
        "guided": not options.unguided,
        "memory": memory_options_of(options),
    }


def limit_of(options: MemoryCommand) -> int | None:
    """``--device-memory`` in bytes.

    Raises:
      UserInputError: it is not a positive size.
    """
    text = options.device_memory
    if text is None:
        return None
    read = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): size for unit, size in UNITS.items()}
    size = float(read[1]) * units.get(read[2].lower(), math.nan) if read else math.nan
    if not 1 <= size < math.inf:
        raise UserInputError(
            f"--device-memory {text!r}", f"must be a size in {', '.join(filter(None, UNITS))}", "for example 24GB"
        )
    return int(size)
