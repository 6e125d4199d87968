"""The dense policy: every scale, every layer, every token."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from toprovar_jax.acceleration.plan import GenerationPlan, ScalePlan
from toprovar_jax.errors import UserInputError
from toprovar_jax.schedule import ScaleSchedule


@dataclasses.dataclass(frozen=True)
class Dense:
    """Computes everything: the reference for quality and the baseline for speed."""

    name: ClassVar[str] = "dense"

    def plan(
        self,
        schedule: ScaleSchedule,
        *,
        guided: bool = True,
        stop_after: int | None = None,
        guidance_at: tuple[int, ...] = (0,),
    ) -> GenerationPlan:
        """All scales, or the first ``stop_after`` of them.

        Raises:
          UserInputError: ``stop_after`` outside 1 to the number of scales.
        """
        last = len(schedule) if stop_after is None else stop_after
        if not 1 <= last <= len(schedule):
            raise UserInputError(
                f"stop after scale {stop_after}", f"must be 1 to {len(schedule)} at this size", "choose a smaller one"
            )
        scales = tuple(ScalePlan(grid, k < last, guided) for k, grid in enumerate(schedule.grids))
        return GenerationPlan(self.name, schedule, scales, tuple(guidance_at))
