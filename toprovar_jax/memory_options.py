"""How a model is fitted to a device with little memory."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from toprovar_jax.errors import UserInputError

TextEncoderPlace = Literal["device", "on_demand", "host"]
Quantization = Literal["int8"]


@dataclasses.dataclass(frozen=True)
class MemoryOptions:
    """What is given up so that a model needs less memory on its device. Static and hashable; all of them combine.

    Attributes:
      text_encoder: ``"device"``: stays there; ``"on_demand"``: kept in host memory, on the device only while it
        encodes; ``"host"``: computed by the CPU. With the last two, the transformer's parameters that texts alone need
        come to the device for each text as well (0.8 GB of Infinity-2B).
      stream_blocks: keep the matrices of the transformer's blocks in host memory and bring them to the device layer by
        layer, at every scale. The picture is the same; what it costs per call is their bytes times the scales that
        compute them, half of that with int8, against which only as much computing hides as there is. On a CPU, whose
        memory is the host's, nothing is saved.
      quantization: ``"int8"``: these matrices as 8-bit integers with a scale per output channel, multiplied out in the
        product, which changes pictures a little; None: as they are.
      decoder_strips: into how many horizontal strips the decoder's convolutions are cut; 1: not at all. The picture is
        the same.

    Raises:
      UserInputError: a value that does not exist.
    """

    text_encoder: TextEncoderPlace = "device"
    stream_blocks: bool = False
    quantization: Quantization | None = None
    decoder_strips: int = 1

    def __post_init__(self) -> None:
        places, kinds = get_args(TextEncoderPlace), get_args(Quantization)
        if self.text_encoder not in places:
            raise UserInputError(
                f"text_encoder {self.text_encoder!r}", f"must be one of {', '.join(places)}", "choose one"
            )
        if self.quantization not in (None, *kinds):
            raise UserInputError(
                f"quantization {self.quantization!r}", f"must be {' or '.join(kinds)}", "leave it out for none"
            )
        if not isinstance(self.decoder_strips, int) or self.decoder_strips < 1:
            raise UserInputError(f"decoder_strips {self.decoder_strips!r}", "must be an integer >= 1", "leave it out")


ON_DEVICE = MemoryOptions()
"""Everything stays on the device as it is."""
