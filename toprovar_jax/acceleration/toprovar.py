"""ToProVAR: attention entropy decides which scales, layers and tokens are computed (arXiv 2602.22948).

The paper leaves constants and several definitions open, and some of its formulas cannot be used as printed. What is
exact here, what was chosen and why stands with each field of :class:`ToProVAR`.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
from collections.abc import Sequence
from typing import Any, Literal, get_args

from toprovar_jax.acceleration.budgets import kept_tokens, layer_groups, prune_ratio, region_minimums
from toprovar_jax.acceleration.calibration import Calibration
from toprovar_jax.acceleration.dense import scales_to_run
from toprovar_jax.acceleration.plan import GenerationPlan, GroupPlan, Restoration, ScalePlan
from toprovar_jax.acceleration.step import Importance, Normalisation, Selection
from toprovar_jax.errors import UserInputError, unknown_name
from toprovar_jax.schedule import Grid, ScaleSchedule

DepthRule = Literal["le", "ge", "band", "fixed"]
Prune = Literal["tokens", "layers", "scales"]


@dataclasses.dataclass(frozen=True)
class ToProVAR:
    """The policy. Scales are counted from 1, as in the paper; layers from 0.

    Attributes:
      depth_rule: how D, the first scale that may be pruned, is found for each image. rho_s is measured while scale s is
        computed and decides about scale s + 1. ``"le"``: the first s with rho_(s-1) <= tau (paper, Eq. 13; the reading
        that agrees with a share of salient tokens that falls from scale to scale). ``"ge"``: rho_(s-1) >= tau (paper,
        main text). ``"band"``: rho_(s-1) within ``band`` of tau. ``"fixed"``: ``depth`` for every image. An image
        whose rho never meets the rule is not pruned (paper, fallback).
      tau: threshold of rho, a share in [0, 1] (paper: 0.4).
      band: half width of the band around tau, a share.
      depth: D of the rule ``"fixed"``; also the paper's fixed exit. On schedules with fewer scales the last one.
        Our choice of 10 agrees with the paper's latencies.
      min_depth, max_depth: the scales among which D is looked for; rho_1 is always 0, so some lower bound is needed and
        the paper states none. Schedules with fewer scales lower both to their last one.
      layer_scores: R of every layer, in [0, 1] (paper, Eq. 4): near 1 for Detail layers, which can be pruned, near 0
        for Global ones. Empty: 1 for all. Calibrated, since the paper finds them stable over prompts.
      online: measure varrho on each image instead and go by the nearest of ``patterns``: budgets stay static, so an
        image can only choose among finitely many.
      patterns: R of every layer, for each kind of image that calibration found.
      beta: R = exp(-beta (varrho - 1)), > 0; not stated in the paper; calibration gives the median layer R = 1/2.
      center: take a map's mean away before its singular values; without, the mean alone makes up the first one and no
        layer looks like a Detail layer.
      representative_scale: where varrho is measured (paper: 6; counted from 1 that is the 12x12 grid).
      guard_first, guard_last: shares of the layers at either end that are never pruned (our choice, from FastVAR's
        three and four of 32).
      max_groups: most groups of layers with a budget of their own.
      prune: what happens from D on. ``"tokens"``: in each layer a share of the tokens is computed. ``"layers"``: layers
        with R >= ``detail_threshold`` are left out, the others computed. ``"scales"``: nothing is run any more. The
        last two are steps of the paper's ablation.
      detail_threshold: R from which a layer counts as a Detail layer, in [0, 1]; for ``prune="layers"``.
      alpha_min, alpha_max: pruned share where phi(s) R(l) is 0 and 1, in [0, 1]; phi(s) = s / S (paper, Eq. 6; values
        not stated). Both 0: nothing is pruned, and the result is the dense one bit for bit.
      importance: ``"entropy"``: low entropy is kept (paper). ``"distance"`` (FastVAR's distance to the mean token) and
        ``"random"`` are controls at the same cost.
      sampled: keep tokens by chance with the probability of Eq. 6, filled up or cut to the bucket; else the K best.
      normalisation: of entropies in that probability: ``"rank"``, ``"minmax"``, ``"count"`` (mean 1), or ``"sum"``, the
        paper's Eq. 5, which with Eq. 6 gives every token practically the same chance.
      regions, region_minimum: at most so many regions per axis, and the share of every region's tokens that is kept
        (the paper demands a minimum per region and states no value); not more than the budget's share.
      bucket: kept tokens are a multiple of this; None: 128, less at small scales.
      restoration: what pruned tokens get (not stated in the paper): ``"cached"``, the layer's increment at the last
        dense scale, area-resized, or ``"identity"``, nothing, as in the paper's error analysis.
      skip_last: so many of the schedule's last scales are not run at all. The paper's fastest figures need it.
      model, num_scales: what it was calibrated for; None fits all.

    Raises:
      UserInputError: a value outside its range, or values that contradict each other.
    """

    depth_rule: DepthRule = "le"
    tau: float = 0.4
    band: float = 0.05
    depth: int = 10
    min_depth: int = 7
    max_depth: int = 11
    layer_scores: tuple[float, ...] = ()
    online: bool = False
    patterns: tuple[tuple[float, ...], ...] = ()
    beta: float = 1.0
    center: bool = True
    representative_scale: int = 6
    guard_first: float = 0.09
    guard_last: float = 0.125
    max_groups: int = 8
    prune: Prune = "tokens"
    detail_threshold: float = 0.5
    alpha_min: float = 0.3
    alpha_max: float = 0.95
    importance: Importance = "entropy"
    sampled: bool = False
    normalisation: Normalisation = "rank"
    regions: int = 8
    region_minimum: float = 0.05
    bucket: int | None = None
    restoration: Restoration = "cached"
    skip_last: int = 0
    model: str | None = None
    num_scales: int | None = None

    def __post_init__(self) -> None:
        self._normalise()
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                raise unknown_name(name, getattr(self, name), get_args(choices))
        for name in _SHARES:
            _check(name, getattr(self, name), _is_number(getattr(self, name), 0.0, 1.0), "must be a number from 0 to 1")
        _check("beta", self.beta, _is_number(self.beta, 0.0, 1e9) and self.beta > 0, "must be a number above 0")
        for name in ("online", "center", "sampled"):
            _check(name, getattr(self, name), isinstance(getattr(self, name), bool), "must be True or False")
        for name, least in _INTEGERS.items():
            value = getattr(self, name)
            _check(name, value, _is_integer(value, least), f"must be an integer of at least {least}")
        if self.bucket is not None:
            _check("bucket", self.bucket, _is_integer(self.bucket, 1), "must be an integer of at least 1")
        if self.alpha_min > self.alpha_max:
            raise UserInputError(
                f"alpha_min {self.alpha_min} and alpha_max {self.alpha_max}",
                "the first must not exceed the second",
                "exchange them",
            )
        if self.min_depth > self.max_depth:
            raise UserInputError(
                f"min_depth {self.min_depth} and max_depth {self.max_depth}",
                "the first must not exceed the second",
                "exchange them",
            )
        for scores in (self.layer_scores, *self.patterns):
            if not all(_is_number(score, 0.0, 1.0) for score in scores):
                raise UserInputError(f"layer scores {scores}", "must be numbers from 0 to 1", "calibrate again")
        if self.online and not self.patterns:
            raise UserInputError(
                "online layer scores without patterns", "need R patterns to choose from", "use from_calibration"
            )

    def _normalise(self) -> None:
        """Numbers of numpy become Python's and lists tuples: the policy is a key of compiled programs."""
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        try:
            object.__setattr__(self, "layer_scores", tuple(map(_plain, self.layer_scores)))
            object.__setattr__(self, "patterns", tuple(tuple(map(_plain, pattern)) for pattern in self.patterns))
        except TypeError:
            raise UserInputError(
                f"layer scores {self.layer_scores!r} and patterns {self.patterns!r}",
                "must be a sequence of numbers and a sequence of such sequences",
                "calibrate again",
            ) from None

    @classmethod
    def fast(cls, **changes: Any) -> ToProVAR:
        """The profile ``toprovar-fast``: the last two scales are left out, as in the paper's fastest figures for 2B."""
        return cls(**{"skip_last": 2, **changes})

    @classmethod
    def from_calibration(
        cls, source: str | os.PathLike[str] | Calibration, profile: str = "toprovar", **changes: Any
    ) -> ToProVAR:
        """The constants that ``toprovar calibrate`` found.

        Args:
          source: the file it wrote, or what was read from it.
          profile: ``"toprovar"`` or ``"toprovar-fast"``.
          **changes: fields that are to differ.

        Raises:
          UserInputError: a file that cannot be read or is none, an unknown profile, or values out of range.
        """
        calibration = source if isinstance(source, Calibration) else Calibration.read(os.fspath(source))
        if profile not in calibration.profiles:
            raise unknown_name(f"profile of model {calibration.model}'s calibration:", profile, calibration.profiles)
        for name in changes:
            if name not in cls.__dataclass_fields__:
                raise unknown_name("field", name, cls.__dataclass_fields__)
        made_for = {"model": calibration.model, "num_scales": calibration.num_scales}
        return cls(**{**made_for, **calibration.profiles[profile], **changes})

    @property
    def name(self) -> str:
        """The profile's name: ``toprovar-fast`` where scales may be left out."""
        return "toprovar-fast" if self.skip_last or self.prune == "scales" else "toprovar"

    @property
    def selection(self) -> Selection:
        """The static half of the choice of tokens."""
        return Selection(
            self.importance,
            self.sampled,
            self.normalisation,
            # Budgets are in the plan; without sampling nothing else depends on them.
            self.alpha_min if self.sampled else 0.0,
            self.alpha_max if self.sampled else 0.0,
            self.regions,
            self.region_minimum,
        )

    def plan(
        self,
        schedule: ScaleSchedule,
        *,
        num_layers: int,
        guided: bool = True,
        stop_after: int | None = None,
        guidance_at: tuple[int, ...] = (0,),
    ) -> GenerationPlan:
        """The plan, with one alternative for every depth (and pattern) that an image may turn out to have.

        Raises:
          UserInputError: calibrated for another number of scales or layers; a region minimum above the budget.
        """
        self._check_fits(schedule, num_layers)
        last = min(scales_to_run(schedule, stop_after), max(1, len(schedule) - self.skip_last))
        options: Any = {"schedule": schedule, "guided": guided, "guidance_at": tuple(guidance_at), "last": last}
        patterns = self.patterns if self.online else (self.layer_scores or (1.0,) * num_layers,)
        ranges = self._ranges(patterns, num_layers)
        if self.depth_rule == "fixed":
            depths = [min(max(self.depth, 2), len(schedule))]
        else:
            depths = list(range(min(self.min_depth, len(schedule)), min(self.max_depth, len(schedule)) + 1))
        depths = [depth for depth in depths if 2 <= depth <= last]
        found = {
            (depth, index): self._pruned_from(depth, index, pattern, ranges, **options)
            for depth in depths
            for index, pattern in enumerate(patterns)
        }
        found = {choice: plan for choice, plan in found.items() if plan.depth is not None and plan.depth <= last}
        if not found:
            return self._pruned_from(len(schedule) + 1, 0, patterns[0], ((0, num_layers),), **options)
        found = dict(zip(found, _with_fewest_groups(list(found.values()), self.sampled), strict=True))
        if self.depth_rule == "fixed" and not self.online:
            return dataclasses.replace(next(iter(found.values())), choice=())
        shared = next(iter(found.values())).scales[0].groups
        ranges = [(group.start, group.stop) for group in shared]
        undecided = self._pruned_from(len(schedule) + 1, 0, patterns[0], ranges, **options)
        if self.online:
            if self.representative_scale >= min(depths):
                raise UserInputError(
                    f"online layer scores from scale {self.representative_scale}",
                    f"must be measured before scale {min(depths)}, the first that may be pruned",
                    "lower representative_scale or raise min_depth",
                )
            undecided = dataclasses.replace(undecided, spectrum_at=self.representative_scale - 1, centred=self.center)
        decisions = sorted({depth - 1 for depth, _ in found})
        return undecided.family(tuple(found.values()), decisions)

    def replan(self, plan: GenerationPlan, scale: int, statistics: Sequence[Any]) -> GenerationPlan:
        """See :class:`~toprovar_jax.acceleration.plan.AdaptivePolicy`."""
        if scale not in plan.decisions or not self.may_prune(float(statistics[scale - 1].salient_share)):
            return plan
        pattern = 0
        if self.online and plan.spectrum_at is not None:
            from toprovar_jax.acceleration.entropy import detail_score

            ratios = statistics[plan.spectrum_at].spectrum_ratio
            scores = [float(detail_score(float(ratio), self.beta)) for ratio in ratios]
            distances = [math.dist(scores, known) for known in self.patterns]
            pattern = distances.index(min(distances))
        picked = [other for other in plan.alternatives if other.choice == (scale + 1, pattern)]
        return picked[0] if picked else plan

    def may_prune(self, salient_share: float) -> bool:
        """Whether a scale may be pruned after one with this rho."""
        if self.depth_rule == "fixed":
            return True
        if self.depth_rule == "band":
            return abs(salient_share - self.tau) <= self.band
        return salient_share <= self.tau if self.depth_rule == "le" else salient_share >= self.tau

    def _check_fits(self, schedule: ScaleSchedule, num_layers: int) -> None:
        if self.num_scales not in (None, len(schedule)):
            raise UserInputError(
                f"policy calibrated on {self.num_scales} scales{f' of model {self.model}' if self.model else ''}",
                f"cannot be used with a schedule of {len(schedule)}",
                "calibrate at this size",
            )
        for scores in (self.layer_scores, *self.patterns):
            if scores and len(scores) != num_layers:
                raise UserInputError(
                    f"layer scores of {len(scores)} layers{f' (model {self.model})' if self.model else ''}",
                    f"cannot be used with a transformer of {num_layers}",
                    "calibrate this model",
                )

    def _ranges(self, patterns: Sequence[Sequence[float]], num_layers: int) -> tuple[tuple[int, int], ...]:
        """Layer groups: the guards, and between them what has similar budgets in all patterns."""
        first, stop = round(self.guard_first * num_layers), num_layers - round(self.guard_last * num_layers)
        if first >= stop:
            raise UserInputError(
                f"guard_first {self.guard_first} and guard_last {self.guard_last}",
                f"leave none of {num_layers} layers to prune",
                "lower them",
            )
        inner = layer_groups([self._layer_budgets(pattern[first:stop]) for pattern in patterns], self.max_groups)
        groups = [(first + a, first + b) for a, b in inner]
        if first:
            groups.insert(0, (0, first))
        if stop < num_layers:
            groups.append((stop, num_layers))
        return tuple(groups)

    def _layer_budgets(self, scores: Sequence[float]) -> list[float]:
        if self.prune == "layers":
            return [float(score >= self.detail_threshold) for score in scores]
        return [prune_ratio(self.alpha_min, self.alpha_max, score) for score in scores]

    def _pruned_from(
        self,
        depth: int,
        pattern_index: int,
        pattern: Sequence[float],
        ranges: Sequence[tuple[int, int]],
        *,
        schedule: ScaleSchedule,
        guided: bool,
        guidance_at: tuple[int, ...],
        last: int,
    ) -> GenerationPlan:
        """The plan of an image with this D and layer scores; a D beyond the schedule prunes nothing."""
        num_layers = ranges[-1][1]
        first, stop = round(self.guard_first * num_layers), num_layers - round(self.guard_last * num_layers)
        scales = []
        for number, (grid, tokens) in enumerate(zip(schedule.grids, schedule.token_counts, strict=True), start=1):
            pruned = number >= depth
            groups = []
            for start, end in ranges:
                score = sum(pattern[start:end]) / (end - start)
                guarded = end <= first or start >= stop
                weight = number / len(schedule) * score
                kept = self._kept(number, grid, score, weight) if pruned and not guarded else tokens
                groups.append(GroupPlan(start, end, kept, weight))
            run = number <= last and not (pruned and self.prune == "scales")
            scales.append(ScalePlan(grid, run, guided, tuple(groups)))
        return GenerationPlan(
            self.name,
            schedule,
            tuple(scales),
            guidance_at,
            selection=self.selection,
            restoration=self.restoration,
            choice=(depth, pattern_index) if depth <= len(schedule) else (),
        )

    def _kept(self, number: int, grid: Grid, score: float, weight: float) -> int:
        """Tokens that a layer group computes of a pruned scale.

        Regions round their minimum up one by one, so where the bucket is smaller than their sum it grows.
        """
        tokens = grid[0] * grid[1]
        if self.prune == "layers":
            return 0 if score >= self.detail_threshold else tokens
        if self.prune == "scales":
            return tokens
        ratio = prune_ratio(self.alpha_min, self.alpha_max, weight)
        if self.region_minimum > 1.0 - ratio + _ROUNDING:
            raise UserInputError(
                f"region_minimum {self.region_minimum} at scale {number}",
                f"must not exceed the share {1.0 - ratio:.3g} that alpha_min {self.alpha_min} and alpha_max "
                f"{self.alpha_max} leave of its tokens",
                "lower one of them",
            )
        kept = kept_tokens(tokens, ratio, self.bucket)
        needed = sum(region_minimums(grid, self.regions, self.region_minimum))
        return max(kept, kept_tokens(tokens, 1.0 - needed / tokens, self.bucket))


_ROUNDING = 1e-9


def _with_fewest_groups(plans: Sequence[GenerationPlan], sampled: bool) -> list[GenerationPlan]:
    """The same plans with neighbouring layer groups joined that never differ in any of them.

    Budgets are rounded to buckets, so different layer scores often come to the same number of tokens.
    """
    rows = [scale.groups for plan in plans for scale in plan.scales]

    def alike(index: int) -> bool:
        pairs = [(groups[index - 1], groups[index]) for groups in rows]
        return all(a.kept == b.kept and (a.weight == b.weight or not sampled) for a, b in pairs)

    count = len(rows[0]) if rows else 0
    starts = [index for index in range(count) if index == 0 or not alike(index)]
    spans = list(zip(starts, [*starts[1:], count], strict=True))
    return [
        dataclasses.replace(
            plan,
            scales=tuple(
                dataclasses.replace(scale, groups=tuple(_joined(scale.groups[a:b]) for a, b in spans))
                for scale in plan.scales
            ),
        )
        for plan in plans
    ]


def _joined(groups: Sequence[GroupPlan]) -> GroupPlan:
    layers = groups[-1].stop - groups[0].start
    weight = math.fsum(group.weight * (group.stop - group.start) for group in groups) / layers
    return GroupPlan(groups[0].start, groups[-1].stop, groups[0].kept, weight)


_CHOICES = {
    "depth_rule": DepthRule,
    "prune": Prune,
    "importance": Importance,
    "normalisation": Normalisation,
    "restoration": Restoration,
}
_SHARES = (
    *("tau", "band", "guard_first", "guard_last", "detail_threshold", "alpha_min", "alpha_max", "region_minimum"),
)
_INTEGERS = {
    **{"depth": 2, "min_depth": 2, "max_depth": 2, "representative_scale": 1},
    **{"max_groups": 1, "regions": 1, "skip_last": 0},
}


def _plain(value: Any) -> Any:
    """A number of any library as Python's own; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _check(name: str, value: object, legal: bool, rule: str) -> None:
    if not legal:
        raise UserInputError(f"{name} {value!r}", rule, f"the default is {_default(name)}")


def _default(name: str) -> object:
    return ToProVAR.__dataclass_fields__[name].default


def _is_number(value: object, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _is_integer(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low
