"""The static half of a generation: what is run, at which scale, in which layers, on how many tokens and which rows."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from toprovar_jax.acceleration.budgets import padded_sizes
from toprovar_jax.acceleration.checking import check_plan
from toprovar_jax.acceleration.step import DEFAULT_SELECTION, GroupStep, ScaleStep, Selection
from toprovar_jax.errors import UserInputError
from toprovar_jax.schedule import Grid, ScaleSchedule

if TYPE_CHECKING:
    from toprovar_jax.config import InfinityConfig

Restoration = Literal["cached", "identity"]
"""What a pruned token gets from a layer: the increment that the last dense scale had there, or nothing."""


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """Consecutive layers at one scale.

    Attributes:
      start, stop: the layers ``start`` to ``stop - 1``.
      kept: tokens that are computed: all of them, a bucket, or 0 where the layers are left out.
      weight: ``phi(s) R``, how strongly entropy acts on the chance to be kept; only sampled selections look at it.
    """

    start: int
    stop: int
    kept: int
    weight: float = 0.0


@dataclasses.dataclass(frozen=True)
class ScalePlan:
    """One scale.

    Attributes:
      grid: height and width in tokens.
      run: whether it is computed at all.
      guided: whether the unconditional rows are computed beside the conditional ones.
      groups: the layers; every scale of a plan has the same ranges.
    """

    grid: Grid
    run: bool
    guided: bool
    groups: tuple[GroupPlan, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the scale."""
        return self.grid[0] * self.grid[1]

    @property
    def dense(self) -> bool:
        """Whether every layer computes every token."""
        return all(group.kept == self.tokens for group in self.groups)


@dataclasses.dataclass(frozen=True)
class Memory:
    """What the states of all plans that an image may change between have in common.

    Attributes:
      cache_lengths: tokens that each layer group's cache has room for.
      pruned_groups: whether a group is ever pruned, so that its increments have to be kept.
    """

    cache_lengths: tuple[int, ...]
    pruned_groups: tuple[bool, ...]

    def joined(self, other: Memory) -> Memory:
        """Room for both."""
        return Memory(
            tuple(map(max, self.cache_lengths, other.cache_lengths)),
            tuple(a or b for a, b in zip(self.pruned_groups, other.pruned_groups, strict=True)),
        )


@dataclasses.dataclass(frozen=True)
class GenerationPlan:
    """All static decisions of one generation. Hashable; plans share the executables of the steps they share.

    Attributes:
      policy: name of the policy that made it.
      schedule: the scales.
      scales: one entry per scale of the schedule.
      guidance_at: where guidance is applied: 0 for the logits, ``-n`` for the output of the n-th block from the end
        plus one (block ``depth - n``).
      selection: which tokens are kept where not all are.
      restoration: what the others get.
      observe: measure entropy in every layer at every scale, needed or not.
      spectrum_at: index of the scale whose maps' spectra are measured, if any.
      centred: whether their means are taken away first.
      choice: of an alternative, the number of the scale from which it is gone by (from 1), then whatever else its
        policy chose; empty if nothing was chosen.
      decisions: indices of the scales before which the policy may pick an alternative, per image.
      alternatives: all plans that may be picked. They agree with this one in everything before their scale.
      memory: set where the plan belongs to a family; see :class:`Memory`.
    """

    policy: str
    schedule: ScaleSchedule
    scales: tuple[ScalePlan, ...]
    guidance_at: tuple[int, ...] = (0,)
    selection: Selection = DEFAULT_SELECTION
    restoration: Restoration = "cached"
    observe: bool = False
    spectrum_at: int | None = None
    centred: bool = True
    choice: tuple[int, ...] = ()
    decisions: tuple[int, ...] = ()
    alternatives: tuple[GenerationPlan, ...] = ()
    memory: Memory | None = None

    @property
    def num_layers(self) -> int:
        """Layers of the transformer that the plan is for."""
        return self.scales[0].groups[-1].stop

    @property
    def num_run(self) -> int:
        """How many scales are computed; they are a prefix."""
        return sum(scale.run for scale in self.scales)

    @property
    def scales_run(self) -> tuple[int, ...]:
        """Numbers of the computed scales, from 1."""
        return tuple(range(1, self.num_run + 1))

    @property
    def guided(self) -> bool:
        """Whether any scale computes unconditional rows."""
        return any(scale.guided for scale in self.scales if scale.run)

    @property
    def first_pruned(self) -> int | None:
        """Index of the first scale that is not wholly computed, though run."""
        pruned = (index for index, scale in enumerate(self.scales[: self.num_run]) if not scale.dense)
        return next(pruned, None)

    @property
    def depth(self) -> int | None:
        """The paper's D: number, from 1, of the first scale that is pruned or left out; None if there is none."""
        first = self.first_pruned
        if first is None:
            return None if self.num_run == len(self.scales) else self.num_run + 1
        return first + 1

    @property
    def cache_lengths(self) -> tuple[int, ...]:
        """Tokens that each layer group writes: those it computed of every scale but the last."""
        return tuple(self._written(group, self.num_run - 1) for group in range(len(self.scales[0].groups)))

    @property
    def pruned_groups(self) -> tuple[bool, ...]:
        """Whether each layer group is pruned at some scale."""
        run = self.scales[: self.num_run]
        count = len(self.scales[0].groups)
        return tuple(any(scale.groups[index].kept < scale.tokens for scale in run) for index in range(count))

    @property
    def own_memory(self) -> Memory:
        """What this plan alone needs."""
        return Memory(self.cache_lengths, self.pruned_groups)

    def family(self, alternatives: Sequence[GenerationPlan], decisions: Sequence[int]) -> GenerationPlan:
        """This plan with alternatives to pick from; all of them get room for each other's state."""
        memory = self.own_memory
        for other in alternatives:
            memory = memory.joined(other.own_memory)
        others = tuple(dataclasses.replace(other, memory=memory) for other in alternatives)
        return dataclasses.replace(self, alternatives=others, decisions=tuple(decisions), memory=memory)

    def observed(self) -> GenerationPlan:
        """The same, with everything measured at every scale."""
        others = tuple(other.observed() for other in self.alternatives)
        return dataclasses.replace(self, observe=True, alternatives=others)

    def step(self, scale: int) -> ScaleStep:
        """Everything static about one computed scale; equal steps are one executable."""
        return self._steps[scale]

    @functools.cached_property
    def _steps(self) -> tuple[ScaleStep, ...]:
        # Kept, since a generation asks for every one of them between two programs on the device.
        return tuple(self._make_step(scale) for scale in range(self.num_run))

    def _make_step(self, here: int) -> ScaleStep:
        plan = self.scales[here]
        last = here == self.num_run - 1
        memory = self.memory or self.own_memory
        groups = tuple(
            GroupStep(
                group.start,
                group.stop,
                group.kept,
                group.weight if self.selection.sampled and 0 < group.kept < plan.tokens else 0.0,
                written=self._written(index, here),
                cache_length=memory.cache_lengths[index],
                keeps_increments=self._increments_leave(here) and memory.pruned_groups[index],
            )
            for index, group in enumerate(plan.groups)
        )
        pruned = not plan.dense
        return ScaleStep(
            schedule=self.schedule,
            scale=here,
            groups=groups,
            guided=self.guided,
            guidance_at=self.guidance_at,
            last=last,
            maps_from=here - 1 if here and self._maps_leave(here - 1) else None,
            keeps_maps=self._maps_leave(here),
            increments_from=self._increments_scale(here),
            records_increments=self._increments_leave(here) and not pruned,
            measures=self.observe or here + 1 in self.decisions or here == self.spectrum_at,
            spectrum=("centred" if self.centred else "raw") if self.observe or here == self.spectrum_at else None,
            observe=self.observe,
            selection=self.selection if pruned else None,
            restoration=self.restoration if pruned else None,
        )

    def steps(self) -> tuple[ScaleStep, ...]:
        """Every distinct step of this plan and of its alternatives: what has to be compiled."""
        found = dict.fromkeys(self.step(scale) for scale in range(self.num_run))
        for other in self.alternatives:
            found |= dict.fromkeys(other.step(scale) for scale in range(other.branches_at, other.num_run))
        return tuple(found)

    def executables(self, batch_size: int = 1) -> tuple[str, ...]:
        """Names of all programs of a generation, scale by scale, whatever its alternatives turn out to be.

        Prompts without and with a negative prompt differ in the program for the text alone. Images of a batch that
        pick different alternatives go on in smaller ones (:func:`~toprovar_jax.acceleration.budgets.padded_sizes`).
        """
        sizes = [batch_size]
        names = ["text", "initial state"]
        for scale in range(self.num_run):
            names += [f"{self.step(scale)}, batch {size}" for size in sizes]
            if scale + 1 not in self.decisions:
                continue
            if batch_size > 1:
                smaller = padded_sizes(batch_size)
                names += [
                    f"part {after} of {before} before scale {scale + 2}"
                    for before in sizes
                    for after in smaller
                    if after <= before
                ]
                sizes = list(smaller)
            for other in self.alternatives:
                if other.branches_at == scale + 1:
                    later = [other.step(index) for index in range(scale + 1, other.num_run)]
                    names += [f"{step}, batch {size}" for step in later for size in sizes]
        return tuple(dict.fromkeys([*names, *(f"decoder, batch {size}" for size in sizes)]))

    def flops_by_scale(self, config: InfinityConfig) -> tuple[float, ...]:
        """Operations of every computed scale for one image; see :mod:`toprovar_jax.acceleration.cost`."""
        from toprovar_jax.acceleration.cost import plan_flops

        return plan_flops(self, config)

    def flops(self, config: InfinityConfig) -> float:
        """Operations of the transformer over all scales, for one image."""
        return sum(self.flops_by_scale(config))

    def bytes(self, config: InfinityConfig) -> dict[str, int]:
        """Device memory for one image, by purpose; see :func:`toprovar_jax.acceleration.cost.plan_bytes`."""
        from toprovar_jax.acceleration.cost import plan_bytes

        return plan_bytes(self, config)

    @property
    def branches_at(self) -> int:
        """Index of the scale from which an alternative is gone by."""
        return min(self.num_run, self.choice[0] - 1) if self.choice else self.num_run

    def _written(self, group: int, scale: int) -> int:
        return sum(earlier.groups[group].kept for earlier in self.scales[: max(0, scale)])

    def _reads_maps(self, scale: int) -> bool:
        """Whether the scale's selection looks at entropies."""
        plan = self.scales[scale]
        chosen = any(0 < group.kept < plan.tokens for group in plan.groups)
        return plan.run and chosen and (self.selection.importance == "entropy" or self.selection.sampled)

    def _maps_leave(self, scale: int) -> bool:
        """Whether the maps of a scale are of use afterwards."""
        if scale >= self.num_run - 1:
            return False
        if self.observe:
            return True
        if any(other.branches_at == scale + 1 and other._maps_leave(scale) for other in self.alternatives):
            return True
        first = self.first_pruned
        if first is None or scale < first - 1:
            return False
        return any(self._reads_maps(later) for later in range(scale + 1, self.num_run))

    def _increments_leave(self, scale: int) -> bool:
        """Whether the increments recorded at a scale, or before it, are of use afterwards."""
        if self.restoration != "cached":
            return False
        if any(other.branches_at == scale + 1 and other._increments_leave(scale) for other in self.alternatives):
            return True
        first = self.first_pruned
        if first is None or scale < first - 1:
            return False
        return any(not later.dense for later in self.scales[scale + 1 : self.num_run])

    def _increments_scale(self, scale: int) -> int | None:
        """The scale whose increments a scale finds in its state."""
        if not scale or not self._increments_leave(scale - 1):
            return None
        first = self.first_pruned
        return scale - 1 if first is None else min(first - 1, scale - 1)

    def as_dict(self) -> dict[str, Any]:
        """A JSON-ready description; :meth:`from_dict` reads it."""
        height, width = self.schedule.pixel_size
        described: dict[str, Any] = {
            "policy": self.policy,
            "aspect_ratio": self.schedule.aspect_ratio,
            "height": height,
            "width": width,
            "guidance_at": list(self.guidance_at),
            "scales": [
                {
                    "grid": list(scale.grid),
                    "tokens": scale.tokens,
                    "run": scale.run,
                    "guided": scale.guided,
                    "groups": [dataclasses.asdict(group) for group in scale.groups],
                }
                for scale in self.scales
            ],
            "schedule": dataclasses.asdict(self.schedule),
            "selection": dataclasses.asdict(self.selection),
            "restoration": self.restoration,
            "observe": self.observe,
            "spectrum_at": self.spectrum_at,
            "centred": self.centred,
            "choice": list(self.choice),
            "decisions": list(self.decisions),
            "alternatives": [other.as_dict() for other in self.alternatives],
            "memory": None if self.memory is None else dataclasses.asdict(self.memory),
        }
        return described

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> GenerationPlan:
        """The plan that :meth:`as_dict` described.

        Raises:
          UserInputError: something is missing or has another form.
        """
        try:
            schedule = dict(described["schedule"])
            schedule["grids"] = tuple(tuple(grid) for grid in schedule["grids"])
            schedule["finest_grid"] = tuple(schedule["finest_grid"])
            memory = described["memory"]
            plan = cls(
                policy=described["policy"],
                schedule=ScaleSchedule(**schedule),
                scales=tuple(
                    ScalePlan(
                        tuple(scale["grid"]),
                        scale["run"],
                        scale["guided"],
                        tuple(GroupPlan(**group) for group in scale["groups"]),
                    )
                    for scale in described["scales"]
                ),
                guidance_at=tuple(described["guidance_at"]),
                selection=Selection(**described["selection"]),
                restoration=described["restoration"],
                observe=described["observe"],
                spectrum_at=described["spectrum_at"],
                centred=described["centred"],
                choice=tuple(described["choice"]),
                decisions=tuple(described["decisions"]),
                alternatives=tuple(cls.from_dict(other) for other in described["alternatives"]),
                memory=None if memory is None else Memory(*(tuple(field) for field in memory.values())),
            )
            check_plan(plan)
            return plan
        except UserInputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserInputError(
                f"plan description ({type(error).__name__}: {error})", "must be what as_dict gave", "make it again"
            ) from None

    def to_json(self) -> str:
        """:meth:`as_dict` as text."""
        return json.dumps(self.as_dict())

    @classmethod
    def from_json(cls, text: str) -> GenerationPlan:
        """The plan of :meth:`to_json`.

        Raises:
          UserInputError: not JSON, or not a plan.
        """
        try:
            described = json.loads(text)
        except (ValueError, RecursionError):
            described = None
        if not isinstance(described, dict):
            raise UserInputError("plan", "must be one JSON object", "make it with to_json")
        return cls.from_dict(described)

    def __str__(self) -> str:
        height, width = self.schedule.pixel_size
        title = f"policy {self.policy}, {height}x{width} pixels, aspect ratio {self.schedule.aspect_ratio}"
        if self.alternatives:
            among = ", ".join(str(index + 1) for index in self.decisions)
            title += f", pruned from scale {among} on or not at all, as each picture allows"
        pruned = any(not scale.dense for scale in self.scales[: self.num_run])
        lines = [title, f"{'scale':>5} {'grid':>9} {'tokens':>6} {'cached':>6}  rows" + "  kept per layers" * pruned]
        for index, scale in enumerate(self.scales):
            rows = ("both" if scale.guided else "conditional") if scale.run else "skipped"
            grid = f"{scale.grid[0]}x{scale.grid[1]}"
            line = f"{index + 1:>5} {grid:>9} {scale.tokens:>6} {self.schedule.offsets[index]:>6}  {rows}"
            if pruned and scale.run:
                line += "  " + (
                    "all" if scale.dense else ", ".join(_kept(group, scale.tokens) for group in scale.groups)
                )
            lines.append(line)
        return "\n".join(lines)


def _kept(group: GroupPlan, tokens: int) -> str:
    layers = str(group.start) if group.stop == group.start + 1 else f"{group.start}-{group.stop - 1}"
    return f"{layers}: {'all' if group.kept == tokens else group.kept or 'skipped'}"


@runtime_checkable
class AccelerationPolicy(Protocol):
    """Decides what of a generation is computed."""

    @property
    def name(self) -> str:
        """What it is called on the command line and in reports."""
        ...

    def plan(
        self,
        schedule: ScaleSchedule,
        *,
        num_layers: int,
        guided: bool,
        stop_after: int | None,
        guidance_at: tuple[int, ...],
    ) -> GenerationPlan:
        """The static plan for one schedule and a transformer of so many layers."""
        ...


@runtime_checkable
class AdaptivePolicy(AccelerationPolicy, Protocol):
    """A policy that picks one of its plan's alternatives per image, on the host, between scales."""

    def replan(self, plan: GenerationPlan, scale: int, statistics: Sequence[Any]) -> GenerationPlan:
        """What one image goes on with.

        Args:
          plan: what it has gone by so far.
          scale: index of the next scale, one of ``plan.decisions``.
          statistics: the image's :class:`~toprovar_jax.acceleration.statistics.ScaleStatistics` of every scale before.

        Returns:
          ``plan``, or one of ``plan.alternatives`` that branches at ``scale``.
        """
        ...
