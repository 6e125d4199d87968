"""The options of the plan-pod command and how they are read; imports neither jax nor numpy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated

from toprovar_jax.cli.command_line import option, read_command_line
from toprovar_jax.cli.memory_flags import DecoderStrips, Int8, LowMemory, TextEncoderOn, positive
from toprovar_jax.errors import UserInputError, unknown_name

ATTENTION = ("kernel", "xla")


@dataclasses.dataclass(frozen=True)
class PlanPodCommand:
    """The command line as typed: values stay text, so that a wrong one gets a one-line message when it is read."""

    topology: Annotated[
        str | None,
        option(
            "CHIP-N",
            "What is there, such as v5e-16, v6e-256 or h100-8; v5p-32 are 16 chips, as Google counts their cores.",
        ),
    ] = None
    model: Annotated[str, option("NAME", "2b, 8b, or a released model by name (default: 2b).")] = "2b"
    pixels: Annotated[str | None, option("BUDGET", "Picture size in pixels; default: the model's.")] = None
    policy: Annotated[str, option("NAME", "Which computations to spare; dense spares none (default: dense).")] = "dense"
    images: Annotated[str, option("N", "How many pictures are to be made (default: 1000000).")] = "1000000"
    mesh: Annotated[str, option("SPEC", "Such as data=4,tensor=4; default: as many copies of the model as fit.")] = (
        "auto"
    )
    batch_size: Annotated[
        str | None, option("B", "Pictures of each copy at once; default: what fits of 8, 4, 2, 1.")
    ] = None
    utilisation: Annotated[
        str, option("SHARE", "Of the chips' peak, what products are taken to reach (default: 0.4).")
    ] = "0.4"
    attention: Annotated[str, option("kernel|xla", "What attention is computed by (default: kernel).")] = "kernel"
    low_memory: LowMemory = False
    int8: Int8 = False
    text_encoder_on: TextEncoderOn = None
    decoder_strips: DecoderStrips = None
    predict_only: Annotated[
        bool, option("", "Do not compile, even where a TPU compiler is installed; takes seconds instead of minutes.")
    ] = False
    json: Annotated[bool, option("", "Print one JSON object instead of a table.")] = False
    debug: Annotated[bool, option("", "On failure, show the whole traceback.")] = False


def parse_options(argv: Sequence[str], *, prog: str = "plan-pod") -> PlanPodCommand:
    """Reads a command line. ``--help`` prints the options and raises ``SystemExit(0)``.

    Raises:
      UserInputError: an unknown option, an option without its value, or a stray word.
    """
    description = "Estimate what a pod would make of a model: mesh, memory, exchanges, pictures per second, hours."
    return read_command_line(PlanPodCommand, argv, prog=prog, description=description)


def checked(options: PlanPodCommand) -> tuple[str, int, int | None, float]:
    """Topology, number of pictures, pictures of a copy or None, and utilisation.

    Raises:
      UserInputError: a value is missing or not legal.
    """
    if options.topology is None:
        raise UserInputError("no --topology", "must say what chips there are", "for example --topology v5e-16")
    if options.attention not in ATTENTION:
        raise unknown_name("--attention", options.attention, ATTENTION)
    batch = None if options.batch_size is None else positive("--batch-size", options.batch_size)
    try:
        utilisation = float(options.utilisation)
    except ValueError:
        utilisation = math.nan
    if not 0.0 < utilisation <= 1.0:
        raise UserInputError(
            f"--utilisation {options.utilisation!r}", "must be above 0 and at most 1", "for example 0.4"
        )
    return options.topology, positive("--images", options.images), batch, utilisation
