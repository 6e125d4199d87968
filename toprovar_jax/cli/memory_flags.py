"""The options that fit a model to a device with little memory; imports neither jax nor numpy."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from toprovar_jax.cli.command_line import option
from toprovar_jax.errors import UserInputError, unknown_name
from toprovar_jax.memory_options import MemoryOptions, TextEncoderPlace

LOW_MEMORY_STRIPS = 8
"""Into how many strips ``--low-memory`` cuts the decoder."""

TEXT_ENCODER_PLACES: dict[str, TextEncoderPlace] = {"device": "device", "on-demand": "on_demand", "host": "host"}
"""Places of the text encoder as they are typed, and what :class:`MemoryOptions` calls them."""

LowMemory = Annotated[
    bool,
    option(
        "",
        "Fit a small device: blocks streamed from host memory at every scale, --text-encoder-on on-demand, "
        f"--decoder-strips {LOW_MEMORY_STRIPS}. Slower; the same pictures.",
    ),
]
Int8 = Annotated[
    bool, option("", "Keep the blocks' matrices as 8-bit integers: half the memory, pictures a little different.")
]
TextEncoderOn = Annotated[
    str | None,
    option(
        "PLACE",
        "Where the text encoder is: device; on-demand: in host memory, on the device while it encodes; host: "
        "computed by the CPU (default: device).",
    ),
]
DecoderStrips = Annotated[
    str | None, option("N", "Decode in N horizontal strips, which takes less memory (default: 1).")
]


def memory_options_of(options: Any) -> MemoryOptions:
    """What is given up for less memory; what is said in particular goes before ``--low-memory``.

    Raises:
      UserInputError: a place or a number that does not exist.
    """
    typed, strips = options.text_encoder_on, options.decoder_strips
    if typed is not None and typed not in TEXT_ENCODER_PLACES:
        raise unknown_name("--text-encoder-on", typed, TEXT_ENCODER_PLACES)
    chosen = MemoryOptions(
        text_encoder="on_demand" if options.low_memory else "device",
        stream_blocks=options.low_memory,
        quantization="int8" if options.int8 else None,
        decoder_strips=LOW_MEMORY_STRIPS if options.low_memory else 1,
    )
    if typed is not None:
        chosen = dataclasses.replace(chosen, text_encoder=TEXT_ENCODER_PLACES[typed])
    if strips is not None:
        chosen = dataclasses.replace(chosen, decoder_strips=positive("--decoder-strips", strips))
    return chosen


def positive(flag: str, text: str) -> int:
    """A number as it was typed.

    Raises:
      UserInputError: not a positive integer.
    """
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise UserInputError(f"{flag} {text!r}", "must be an integer >= 1", "for example 4")
    return number
