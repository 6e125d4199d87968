"""What chips of pods and GPU clusters are, by their makers' documents, and slices of them by name.

TPUs: Google Cloud's pages of TPU v5e, v5p and v6e. GPUs: NVIDIA's data sheets of the SXM boards, without sparsity.
"""

from __future__ import annotations

import dataclasses
import re

from toprovar_jax.errors import UserInputError, unknown_name


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip; all are peaks.

    Attributes:
      name: as topologies begin.
      flops: bfloat16 products, operations per second.
      memory: bytes that a program may use. Of TPUs what their compiler allows, of GPUs what is on the board.
      bandwidth: of that memory, bytes per second.
      link: bytes per second that a chip sends to a neighbour: a TPU's port, all of a GPU's NVLink.
      neighbours: how many chips reach each other by such links, where that is limited; beyond it is ``network``.
      network: bytes per second of each chip beyond its neighbours; TPUs of a slice do not need it.
      cores: how many of them names of slices count for a chip.
    """

    name: str
    flops: float
    memory: int
    bandwidth: float
    link: float
    neighbours: int | None = None
    network: float | None = None
    cores: int = 1

    @property
    def is_tpu(self) -> bool:
        """Whether it is a TPU."""
        return self.neighbours is None


_GIB = 2**30
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, int(15.75 * _GIB), 819e9, 50e9),
        Chip("v6e", 918e12, int(31.25 * _GIB), 1640e9, 100e9),
        Chip("v5p", 459e12, int(95.74 * _GIB), 2765e9, 100e9, cores=2),
        Chip("h100", 989e12, 80 * 10**9, 3350e9, 450e9, neighbours=8, network=50e9),
        Chip("h200", 989e12, 141 * 10**9, 4800e9, 450e9, neighbours=8, network=50e9),
        Chip("a100", 312e12, 80 * 10**9, 2039e9, 300e9, neighbours=8, network=25e9),
    )
}
"""By name. A TPU's link is a port's share of what the chip's interconnect carries one way (v5e 4 of 50 GB/s, v6e 4 of
100, v5p 6 of 100); NVLink one way (600 and 900 GB/s are both ways); between hosts one adapter per GPU, 200 or 400
Gbit/s."""

SHAPES = {
    "v5e": {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    "v6e": {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    "v5p": {
        **{4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"},
        **{512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16", 6144: "16x16x24"},
    },
}
"""Chip -> chips of a slice -> its shape; the usual ones."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips that run one job.

    Attributes:
      chip: of which kind.
      count: how many.
      shape: of a TPU slice, such as ``4x4``; None for GPUs.
    """

    chip: Chip
    count: int
    shape: str | None = None

    @property
    def name(self) -> str:
        """As it is typed."""
        return f"{self.chip.name}-{self.count * self.chip.cores}"

    @property
    def compiled_for(self) -> str | None:
        """As the TPU compiler names it; None for GPUs, whose compiler knows one at a time."""
        return None if self.shape is None else f"{self.chip.name}:{self.shape}"

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.name}: {self.count} GPUs, up to {self.chip.neighbours} to a host"
        counted = f" ({self.name} counts cores, {self.chip.cores} to a chip)" if self.chip.cores > 1 else ""
        return f"{self.name}: {self.count} chips, {self.shape}{counted}"


def parse_topology(text: str) -> Topology:
    """A topology from text such as ``v5e-16``, ``v5p-32`` (16 chips: Google counts their cores) or ``h100-8``.

    Raises:
      UserInputError: not such a text, an unknown chip, or a slice that is not made.
    """
    read = re.fullmatch(r"\s*([a-z0-9]+)-([0-9]{1,5})\s*", text.lower())
    if not read:
        raise UserInputError(f"topology {text!r}", "must be a chip and a number", "for example v5e-16 or h100-8")
    if read[1] not in CHIPS:
        raise unknown_name("chip", read[1], CHIPS)
    chip, number = CHIPS[read[1]], int(read[2])
    shapes = SHAPES.get(chip.name)
    if shapes is None:
        hosts, left = divmod(number, chip.neighbours or 1)
        if not number or (hosts and left):
            raise UserInputError(
                f"topology {text!r}", f"must be 1 to {chip.neighbours} GPUs or whole hosts of them", f"{chip.name}-8"
            )
        return Topology(chip, number)
    if number % chip.cores or number // chip.cores not in shapes:
        sizes = ", ".join(str(size * chip.cores) for size in shapes)
        raise UserInputError(f"topology {text!r}", f"must be {chip.name}- and one of {sizes}", f"{chip.name}-16")
    return Topology(chip, number // chip.cores, shapes[number // chip.cores])
