"""Scale schedules: which token grids an image is generated on, per aspect ratio and pixel budget (MODEL_SPEC 3)."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from fractions import Fraction

from toprovar_jax.errors import UserInputError, unknown_name

Grid = tuple[int, int]
"""Height and width in tokens (or latent cells, or pixels, as the context says)."""

_TALL_GRIDS: dict[Fraction, tuple[Grid, ...]] = {
    Fraction(1): tuple((side, side) for side in (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)),
    Fraction(5, 4): (
        *((1, 1), (2, 2), (3, 3), (5, 4)),
        *((10, 8), (15, 12), (20, 16), (25, 20), (30, 24), (35, 28), (45, 36), (55, 44), (70, 56)),
    ),
    Fraction(4, 3): (
        *((1, 1), (2, 2), (4, 3), (8, 6)),
        *((12, 9), (16, 12), (20, 15), (24, 18), (28, 21), (36, 27), (48, 36), (60, 45), (72, 54)),
    ),
    Fraction(3, 2): (
        *((1, 1), (2, 2), (3, 2), (6, 4)),
        *((9, 6), (15, 10), (21, 14), (27, 18), (33, 22), (39, 26), (48, 32), (63, 42), (78, 52)),
    ),
    Fraction(7, 4): (
        *((1, 1), (2, 2), (3, 3), (7, 4)),
        *((11, 6), (14, 8), (21, 12), (28, 16), (35, 20), (42, 24), (56, 32), (70, 40), (84, 48)),
    ),
    Fraction(2): (
        *((1, 1), (2, 2), (4, 2), (6, 3)),
        *((10, 5), (16, 8), (22, 11), (30, 15), (38, 19), (46, 23), (60, 30), (74, 37), (90, 45)),
    ),
    Fraction(5, 2): (
        *((1, 1), (2, 2), (5, 2), (10, 4)),
        *((15, 6), (20, 8), (25, 10), (30, 12), (40, 16), (50, 20), (65, 26), (80, 32), (100, 40)),
    ),
    Fraction(3): (
        *((1, 1), (2, 2), (6, 2), (9, 3)),
        *((15, 5), (21, 7), (27, 9), (36, 12), (45, 15), (54, 18), (72, 24), (90, 30), (111, 37)),
    ),
}


def _templates() -> dict[str, tuple[Grid, ...]]:
    """All 15 templates in the order of the original table, keyed ``"H:W"``."""
    templates: dict[str, tuple[Grid, ...]] = {}
    for ratio, grids in _TALL_GRIDS.items():
        templates[f"{ratio.numerator}:{ratio.denominator}"] = grids
        if ratio != 1:
            templates[f"{ratio.denominator}:{ratio.numerator}"] = tuple((w, h) for h, w in grids)
    return templates


ASPECT_RATIOS: Mapping[str, tuple[Grid, ...]] = _templates()
"""The legal aspect ratios, ``"height:width"``, and their 13 token grids each."""

PIXEL_BUDGETS: Mapping[str, int] = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}
"""Pixel budgets of the released models: how many of the 13 scales are run."""

MAX_SCALES = 13


def parse_aspect_ratio(text: str) -> str:
    """The legal aspect ratio (``"H:W"``) that ``text`` names.

    ``text`` is ``"H:W"`` in any multiple (``"8:6"`` is ``"4:3"``) or a decimal height/width (``"1.333"``).
    Nothing is rounded: a ratio that is not a template is refused and the two nearest ones are named.

    Raises:
      UserInputError: not a ratio, or not one of the templates.
    """
    text = str(text).strip()
    sides = _RATIO.fullmatch(text)
    height, width = (Fraction(side) for side in sides.groups("1")) if sides else (0, 0)
    if height == 0 or width == 0:
        legal = ", ".join(ASPECT_RATIOS)
        raise UserInputError(
            f"aspect ratio {_shortened(text)!r}",
            f"must be height:width, one of {legal}",
            "for example --aspect-ratio 4:3",
        )
    ratio = height / width
    for name in ASPECT_RATIOS:
        exact = _as_fraction(name)
        if ratio == exact or (":" not in text and text in (f"{float(exact):.3f}", f"{int(exact * 1000) / 1000}")):
            return name
    nearest = sorted(ASPECT_RATIOS, key=lambda name: abs(_as_fraction(name) - ratio))[:2]
    raise UserInputError(
        f"aspect ratio {text!r} (height:width)",
        f"must be one of {', '.join(ASPECT_RATIOS)}",
        f"the nearest are {nearest[0]} and {nearest[1]}",
    )


# No signs, exponents or long digit strings: Fraction would take "1e999999999" and work on it for minutes.
_RATIO = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(?:\s*:\s*([0-9]{1,9}(?:\.[0-9]{1,9})?))?")


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "..."


def _as_fraction(name: str) -> Fraction:
    height, width = name.split(":")
    return Fraction(int(height), int(width))


@dataclasses.dataclass(frozen=True)
class ScaleSchedule:
    """The token grids of one image, coarse to fine. Static and hashable.

    Attributes:
      aspect_ratio: ``"H:W"``, a key of :data:`ASPECT_RATIOS`.
      grids: ``(height, width)`` in transformer tokens of every scale that is run.
      finest_grid: the last grid of this ratio's full 13-scale schedule; RoPE coordinates live on it whatever
        prefix is used (MODEL_SPEC 5).
      latent_per_token: image-tokenizer cells per token and axis: 1, or 2 with spatial patchify.
      token_stride: pixels per token and axis.
    """

    aspect_ratio: str
    grids: tuple[Grid, ...]
    finest_grid: Grid
    latent_per_token: int = 1
    token_stride: int = 16

    @classmethod
    def of(
        cls, aspect_ratio: str, num_scales: int, *, latent_per_token: int = 1, token_stride: int = 16
    ) -> ScaleSchedule:
        """The first ``num_scales`` scales of an aspect-ratio template.

        Raises:
          UserInputError: unknown aspect ratio, or ``num_scales`` outside 1..13.
        """
        if aspect_ratio not in ASPECT_RATIOS:
            aspect_ratio = parse_aspect_ratio(aspect_ratio)
        if not 1 <= num_scales <= MAX_SCALES:
            raise UserInputError(f"{num_scales} scales", f"must be 1 to {MAX_SCALES}", "choose another pixel budget")
        grids = ASPECT_RATIOS[aspect_ratio]
        return cls(aspect_ratio, grids[:num_scales], grids[-1], latent_per_token, token_stride)

    @classmethod
    def for_budget(
        cls, aspect_ratio: str, pixels: str, *, latent_per_token: int = 1, token_stride: int = 16
    ) -> ScaleSchedule:
        """The schedule of an official pixel budget (``"0.06M"``, ``"0.25M"``, ``"0.60M"``, ``"1M"``)."""
        if pixels not in PIXEL_BUDGETS:
            raise unknown_name("pixel budget", pixels, PIXEL_BUDGETS)
        return cls.of(aspect_ratio, PIXEL_BUDGETS[pixels], latent_per_token=latent_per_token, token_stride=token_stride)

    def __len__(self) -> int:
        return len(self.grids)

    @functools.cached_property
    def token_counts(self) -> tuple[int, ...]:
        """Tokens per scale."""
        return tuple(h * w for h, w in self.grids)

    @functools.cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each scale starts in the token sequence; one entry more than scales, the last is the total."""
        offsets = [0]
        for count in self.token_counts:
            offsets.append(offsets[-1] + count)
        return tuple(offsets)

    @property
    def num_tokens(self) -> int:
        """Tokens of all scales together."""
        return self.offsets[-1]

    @functools.cached_property
    def latent_grids(self) -> tuple[Grid, ...]:
        """Image-tokenizer cells per scale, ``(height, width)``."""
        factor = self.latent_per_token
        return tuple((h * factor, w * factor) for h, w in self.grids)

    @property
    def pixel_size(self) -> Grid:
        """Height and width of the picture in pixels."""
        height, width = self.grids[-1]
        return height * self.token_stride, width * self.token_stride
