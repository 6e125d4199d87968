"""The policy that runs a plan as it stands: one that was saved, or picked out of another policy's alternatives."""

from __future__ import annotations

import dataclasses

from toprovar_jax.acceleration.plan import GenerationPlan
from toprovar_jax.errors import UserInputError
from toprovar_jax.schedule import ScaleSchedule


@dataclasses.dataclass(frozen=True)
class FixedPlan:
    """Runs ``given`` and nothing else, so it also works where a policy that decides per image cannot.

    Attributes:
      given: the plan; its alternatives are left out.
    """

    given: GenerationPlan

    @property
    def name(self) -> str:
        """The name of the policy that made the plan."""
        return self.given.policy

    def plan(
        self,
        schedule: ScaleSchedule,
        *,
        num_layers: int,
        guided: bool = True,
        stop_after: int | None = None,
        guidance_at: tuple[int, ...] = (0,),
    ) -> GenerationPlan:
        """The plan.

        Raises:
          UserInputError: it is for another schedule, another number of layers, or other rows.
        """
        given = self.given
        for what, theirs, ours, remedy in (
            ("schedule", _shown(given.schedule), _shown(schedule), "make the plan for this size"),
            ("transformer layers", given.num_layers, num_layers, "make the plan for this model"),
            ("guided rows", given.guided, guided, "make the plan with the guidance it is used with"),
            ("guidance position", given.guidance_at, tuple(guidance_at), "make the plan with that position"),
        ):
            if theirs != ours:
                raise UserInputError(f"plan for {what} {theirs}", f"cannot be used with {ours}", remedy)
        if given.schedule != schedule:
            raise UserInputError(
                f"plan for schedule {given.schedule}", f"cannot be used with {schedule}", "make the plan for this model"
            )
        if stop_after is not None and stop_after != given.num_run:
            raise UserInputError(
                f"stop after scale {stop_after}", f"the plan runs {given.num_run}", "make a plan that stops there"
            )
        return dataclasses.replace(given, decisions=(), alternatives=())


def _shown(schedule: ScaleSchedule) -> str:
    height, width = schedule.grids[-1]
    return f"{schedule.aspect_ratio} with {len(schedule)} scales up to {height}x{width}"
