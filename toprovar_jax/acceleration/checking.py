"""Whether a plan that came from outside can be run."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from toprovar_jax.acceleration.step import Importance, Normalisation
from toprovar_jax.errors import UserInputError

if TYPE_CHECKING:
    from toprovar_jax.acceleration.plan import GenerationPlan


def check_plan(plan: GenerationPlan) -> None:
    """Refuses a plan that contradicts itself, so that nothing is compiled for it.

    Raises:
      UserInputError: scales that are not the schedule's or not a prefix of it, layer groups that do not cover the
        layers once and alike at every scale, token counts out of range, unknown names, or too little memory.
    """
    _check(tuple(scale.grid for scale in plan.scales) == plan.schedule.grids, "scales", "must be those of its schedule")
    flags = [scale.run for scale in plan.scales]
    legal = all(isinstance(flag, bool) for flag in flags) and flags[:1] == [True] and flags == sorted(flags)[::-1]
    _check(legal, f"run flags {flags}", "must be true for the first scales and false after them")
    ranges = [tuple((group.start, group.stop) for group in scale.groups) for scale in plan.scales]
    _check(len(set(ranges)) == 1 and bool(ranges[0]), "layer groups", "must be the same at every scale, one at least")
    edges = [0, *(stop for _, stop in ranges[0])]
    _check(
        all(_integer(a) and _integer(b) and b > a for a, b in ranges[0]) and [a for a, _ in ranges[0]] == edges[:-1],
        f"layer groups {ranges[0]}",
        "must follow each other from layer 0 on",
    )
    for number, scale in enumerate(plan.scales, start=1):
        for group in scale.groups:
            legal = _integer(group.kept) and 0 <= group.kept <= scale.tokens
            _check(legal, f"kept {group.kept!r} at scale {number}", f"must be an integer from 0 to {scale.tokens}")
    _check(
        plan.restoration in ("cached", "identity"), f"restoration {plan.restoration!r}", "must be cached or identity"
    )
    selection = plan.selection
    _check(selection.importance in get_args(Importance), f"importance {selection.importance!r}", "must be a known one")
    known = selection.normalisation in get_args(Normalisation)
    _check(known, f"normalisation {selection.normalisation!r}", "must be a known one")
    if plan.memory is not None:
        own, given = plan.own_memory, plan.memory
        enough = (
            len(given.cache_lengths) == len(given.pruned_groups) == len(ranges[0])
            and all(a <= b for a, b in zip(own.cache_lengths, given.cache_lengths, strict=True))
            and all(b or not a for a, b in zip(own.pruned_groups, given.pruned_groups, strict=True))
        )
        _check(enough, f"memory {given}", "must hold what the plan computes")
    for other in plan.alternatives:
        check_plan(other)


def _integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(legal: bool, what: str, rule: str) -> None:
    if not legal:
        raise UserInputError(f"plan with {what}", rule, "make the plan again")
