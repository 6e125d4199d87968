"""The static half of a generation: what is run, at which scale, on which rows."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

from toprovar_jax.errors import UserInputError
from toprovar_jax.schedule import Grid, ScaleSchedule


@dataclasses.dataclass(frozen=True)
class ScalePlan:
    """One scale.

    Attributes:
      grid: height and width in tokens.
      run: whether it is computed at all.
      guided: whether the unconditional rows are computed beside the conditional ones.
    """

    grid: Grid
    run: bool
    guided: bool

    @property
    def tokens(self) -> int:
        """Tokens of the scale."""
        return self.grid[0] * self.grid[1]


@dataclasses.dataclass(frozen=True)
class GenerationPlan:
    """All static decisions of one generation. Hashable; two equal plans share their executables.

    Attributes:
      policy: name of the policy that made it.
      schedule: the scales.
      scales: one entry per scale of the schedule.
      guidance_at: where guidance is applied: 0 for the logits, ``-n`` for the output of the n-th block from the end
        plus one (block ``depth - n``).
    """

    policy: str
    schedule: ScaleSchedule
    scales: tuple[ScalePlan, ...]
    guidance_at: tuple[int, ...] = (0,)

    @property
    def num_run(self) -> int:
        """How many scales are computed; they are a prefix."""
        return sum(scale.run for scale in self.scales)

    @property
    def guided(self) -> bool:
        """Whether any scale computes unconditional rows."""
        return any(scale.guided for scale in self.scales if scale.run)

    @property
    def cache_length(self) -> int:
        """Tokens that the cache holds: those of every computed scale but the last."""
        return self.schedule.offsets[max(0, self.num_run - 1)]

    def guided_blocks(self, depth: int) -> tuple[int, ...]:
        """Indices of the blocks after which the rows are blended.

        Raises:
          UserInputError: an entry of ``guidance_at`` that is neither 0 nor a negative block index.
        """
        blocks = []
        for where in self.guidance_at:
            if where > 0 or (where < 0 and depth + where <= 0):
                raise UserInputError(
                    f"guidance position {where}",
                    f"must be 0 (logits) or -1 to -{depth - 1} (a block counted from the end)",
                    "use 0",
                )
            if where < 0:
                blocks.append(depth + where)
        return tuple(sorted(blocks))

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready description."""
        height, width = self.schedule.pixel_size
        return {
            "policy": self.policy,
            "aspect_ratio": self.schedule.aspect_ratio,
            "height": height,
            "width": width,
            "guidance_at": list(self.guidance_at),
            "scales": [
                {"grid": list(scale.grid), "tokens": scale.tokens, "run": scale.run, "guided": scale.guided}
                for scale in self.scales
            ],
        }

    def __str__(self) -> str:
        height, width = self.schedule.pixel_size
        lines = [f"policy {self.policy}, {height}x{width} pixels, aspect ratio {self.schedule.aspect_ratio}"]
        lines.append(f"{'scale':>5} {'grid':>9} {'tokens':>6} {'cached':>6}  rows")
        for index, scale in enumerate(self.scales):
            rows = ("both" if scale.guided else "conditional") if scale.run else "skipped"
            grid = f"{scale.grid[0]}x{scale.grid[1]}"
            lines.append(f"{index + 1:>5} {grid:>9} {scale.tokens:>6} {self.schedule.offsets[index]:>6}  {rows}")
        return "\n".join(lines)


@runtime_checkable
class AccelerationPolicy(Protocol):
    """Decides what of a generation is computed."""

    name: ClassVar[str]

    def plan(
        self, schedule: ScaleSchedule, *, guided: bool, stop_after: int | None, guidance_at: tuple[int, ...]
    ) -> GenerationPlan:
        """The static plan for one schedule."""
        ...
