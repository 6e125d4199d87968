"""Measuring a model, and choosing the constants of ToProVAR from that: what ``toprovar calibrate`` does.

How each constant follows from the measurements is said in :mod:`toprovar_jax.acceleration.fitting`.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import toprovar_jax
from toprovar_jax.acceleration import Dense, GenerationPlan, ScalePlan, ToProVAR
from toprovar_jax.acceleration.calibration import Calibration
from toprovar_jax.acceleration.entropy import detail_score
from toprovar_jax.acceleration.fitting import (
    STABLE_SSIMS,
    DepthChoice,
    choose_beta,
    choose_depth,
    largest_passing,
    predicted_depths,
    score_patterns,
    stable_scales,
    strength_constants,
)
from toprovar_jax.outputs import PipelineOutput
from toprovar_jax.shapes import Array, Float
from toprovar_jax.similarity import ssim

STRENGTHS = 16
"""Steps from no pruning to full strength; token budgets are too coarse for more to differ."""

_REPRESENTATIVE_SCALE = 6

OnPicture = Callable[[str, int, int], None]
"""``(what, done, total)`` after every picture: what the pictures are for, and how many of them there are by now."""


@dataclasses.dataclass(frozen=True)
class Target:
    """What the strength of pruning is chosen for. One of the two is given.

    Attributes:
      speedup: transformer FLOPs of dense generation over those of pruned generation, to be reached.
      drop: 1 - mean SSIM to the dense pictures of the same seeds, not to be exceeded.
    """

    speedup: float | None = None
    drop: float | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """A model and the pictures it is measured on: one for each prompt, with the model's own settings.

    Attributes:
      pipeline: the model: an ``InfinityPipeline`` or anything that is called like one.
      prompts, seeds: of each picture.
      on_picture: told after every picture.
    """

    pipeline: Any
    prompts: Sequence[str]
    seeds: Sequence[int]
    on_picture: OnPicture = lambda what, done, total: None

    def outputs(self, what: str, policy: Dense | ToProVAR, **options: Any) -> Iterator[PipelineOutput]:
        """One picture at a time, so that the memory it takes does not grow with their number."""
        for index, (prompt, seed) in enumerate(zip(self.prompts, self.seeds, strict=True)):
            yield self.pipeline(prompt, seed=seed, policy=policy, output_type="np", **options)
            self.on_picture(what, index + 1, len(self.prompts))


class Measurements(NamedTuple):
    """Dense pictures, and what was seen while they were made.

    Attributes:
      images: finished pictures in [0, 1].
      salient_share: rho.
      partial_ssim: similarity of the decoded sum after each scale to the finished picture; 1 for the last.
      spectrum_ratio: varrho of each layer's map at the representative scale.
      representative_scale: that scale, from 1: 6, as in the paper, or the last one of a shorter schedule.
    """

    images: Float[np.ndarray, "B h w 3"]
    salient_share: Float[np.ndarray, "B scales"]
    partial_ssim: Float[np.ndarray, "B scales"]
    spectrum_ratio: Float[np.ndarray, "B L"]
    representative_scale: int


class Outcome(NamedTuple):
    """What a policy does to the pictures: mean SSIM to the dense ones, and dense over pruned transformer FLOPs."""

    ssim: float
    speedup: float


def measure(setup: Setup) -> Measurements:
    """Makes the dense pictures and measures them.

    Raises:
      UserInputError: pictures that are too small for a structural similarity.
    """
    decode = jax.jit(lambda tokenizer, latents: tokenizer.decode(latents))
    tokenizer = setup.pipeline.networks.image_tokenizer
    sums: list[Array | np.ndarray] = []
    images, shares, similarities, ratios = [], [], [], []
    representative = 1

    def keep_sum(index: int, count: int, info: dict[str, Any]) -> None:
        del index, count
        sums.append(info["latents"])

    for output in setup.outputs("dense", Dense(), observe=True, callback_on_scale_end=keep_sum):
        image, statistics = np.asarray(output.images), output.statistics
        partial = [ssim(np.asarray(decode(tokenizer, latents)), image)[0] for latents in sums[:-1]]
        sums.clear()
        images.append(image)
        similarities.append([*partial, 1.0])
        shares.append([float(scale.salient_share[0]) for scale in statistics])
        representative = min(_REPRESENTATIVE_SCALE, len(statistics))
        ratios.append(statistics[representative - 1].spectrum_ratio)
    return Measurements(
        np.concatenate(images),
        np.array(shares),
        np.array(similarities),
        np.concatenate(ratios).astype(np.float64),
        representative,
    )


class Trials:
    """ToProVAR at different strengths, with all its other constants chosen; each strength is tried once.

    Args:
      setup: the model and the prompts.
      measured: their dense pictures.
      choice: the rule for the depth.
      constants: fields of the policy but its strength.
    """

    def __init__(self, setup: Setup, measured: Measurements, choice: DepthChoice, constants: dict[str, Any]):
        self._setup, self._measured, self._choice, self._constants = setup, measured, choice, constants
        self._config = setup.pipeline.card.transformer
        self._dense_flops = setup.pipeline.plan_for(Dense()).flops(self._config)
        self._outcomes: dict[tuple[tuple[ScalePlan, ...], ...], Outcome] = {}
        self._tried: dict[int, dict[str, float]] = {}

    @property
    def tried(self) -> list[dict[str, float]]:
        """Every strength that was looked at: its constants, predicted speed-up and, where pictures were made, SSIM."""
        return [self._tried[step] for step in sorted(self._tried)]

    def constants(self, step: int, **changes: Any) -> dict[str, Any]:
        """The policy's fields at strength ``step / STRENGTHS``."""
        return {**self._constants, **strength_constants(step / STRENGTHS), **changes}

    def speedup(self, step: int) -> float:
        """Predicted by plans alone: up to its depth a picture is dense, so rho of the dense ones tells the depth."""
        plans = self._plans(step)
        found = self._dense_flops / float(np.mean([plan.flops(self._config) for plan in plans]))
        self._note(step)["speedup"] = round(found, 4)
        return found

    def outcome(self, step: int) -> Outcome:
        """Measured. Strengths that come to the same budgets share their pictures."""
        self.speedup(step)
        budgets = tuple(plan.scales for plan in self._plans(step))
        if budgets not in self._outcomes:
            what = f"strength {step / STRENGTHS:g}"
            self._outcomes[budgets] = self.outcome_of(ToProVAR(**self.constants(step)), what)
        self._note(step)["ssim"] = round(self._outcomes[budgets].ssim, 4)
        return self._outcomes[budgets]

    def outcome_of(self, policy: ToProVAR, what: str) -> Outcome:
        """Measured, for any policy."""
        similarities, flops = [], []
        for index, output in enumerate(self._setup.outputs(what, policy)):
            image = np.asarray(output.images)
            similarities.append(ssim(image, self._measured.images[index : index + 1])[0])
            flops.append(output.plans[0].flops(self._config))
        return Outcome(float(np.mean(similarities)), self._dense_flops / float(np.mean(flops)))

    def _plans(self, step: int) -> tuple[GenerationPlan, ...]:
        return tuple(
            self._plan(step, depth) for depth in predicted_depths(self._measured.salient_share, self._choice).tolist()
        )

    def _plan(self, step: int, depth: int) -> GenerationPlan:
        if depth > self._measured.salient_share.shape[1]:
            return self._setup.pipeline.plan_for(Dense())
        fixed = self.constants(step, depth_rule="fixed", depth=depth)
        return self._setup.pipeline.plan_for(ToProVAR(**fixed))

    def _note(self, step: int) -> dict[str, float]:
        strength = step / STRENGTHS
        return self._tried.setdefault(step, {"strength": strength, **strength_constants(strength)})


def calibrate(setup: Setup, target: Target) -> Calibration:
    """Measures a model and chooses its profiles.

    The profile ``toprovar`` runs every scale; its strength is the least that reaches the target speed-up, or the
    greatest whose drop stays within the target. Of the bars from which a partial picture counts as stable
    (:data:`~toprovar_jax.acceleration.fitting.STABLE_SSIMS`) the one is taken that serves the target best: the fastest
    within a drop, the most similar at a speed-up. ``toprovar-fast`` has the same constants and leaves out as many of
    the last scales as, in dense pictures, cost no more similarity than the pruning does (our choice: the same again).

    Raises:
      UserInputError: pictures that are too small, or maps that tell no layers apart.
    """
    measured = measure(setup)
    beta = choose_beta(measured.spectrum_ratio)
    scores = detail_score(measured.spectrum_ratio, beta)
    layers: dict[str, Any] = {
        **{"beta": round(beta, 6), "representative_scale": measured.representative_scale},
        "layer_scores": tuple(_rounded(scores.mean(axis=0))),
        "patterns": tuple(tuple(_rounded(pattern)) for pattern in score_patterns(scores)),
    }
    attempts = _attempts(setup, measured, layers, target)
    best = max(attempts, key=lambda attempt: attempt.merit(target))
    trials, choice, step, pruned, reached = best.trials, best.choice, best.step, best.outcome, best.reached
    num_scales = measured.partial_ssim.shape[1]
    last_needed = 1 + int(np.argmax(measured.partial_ssim.mean(axis=0) >= pruned.ssim))
    profiles = {
        "toprovar": trials.constants(step),
        "toprovar-fast": trials.constants(step, skip_last=num_scales - last_needed),
    }
    fast = trials.outcome_of(ToProVAR(**profiles["toprovar-fast"]), "toprovar-fast")
    outcomes = {"toprovar": pruned, "toprovar-fast": fast}
    curves = {
        "salient_share": _summary(measured.salient_share),
        "partial_ssim": _summary(measured.partial_ssim),
        "spectrum_ratio": _summary(measured.spectrum_ratio),
        "stable_ssim": best.bar,
        "stable_scale": stable_scales(measured.partial_ssim, best.bar).tolist(),
        "attempts": [attempt.summary() for attempt in attempts],
        "depth_error": {rule: round(error, 4) for rule, error in choice.errors.items()},
        "strengths": trials.tried,
        "target": {name: value for name, value in dataclasses.asdict(target).items() if value is not None},
        "target_reached": reached,
        "outcome": {
            name: {
                "ssim": round(outcome.ssim, 4),
                "speedup": round(outcome.speedup, 4),
                "scales_run": num_scales - profiles[name].get("skip_last", 0),
            }
            for name, outcome in outcomes.items()
        },
    }
    return Calibration(
        model=setup.pipeline.model_name,
        num_scales=num_scales,
        num_layers=setup.pipeline.card.transformer.num_layers,
        images=len(setup.prompts),
        prompts_sha256=hashlib.sha256("\n".join(setup.prompts).encode("utf-8")).hexdigest(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        versions={"toprovar_jax": toprovar_jax.__version__, "jax": jax.__version__},
        curves=curves,
        profiles=profiles,
    )


class Attempt(NamedTuple):
    """What comes of one bar of stability: the depths it leads to and, with them, the strength for the target."""

    bar: float
    choice: DepthChoice
    trials: Trials
    step: int
    outcome: Outcome
    reached: bool

    def merit(self, target: Target) -> tuple[bool, float]:
        """More is better; ties go to the first."""
        return self.reached, self.outcome.speedup if target.speedup is None else self.outcome.ssim

    def summary(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            **{"stable_ssim": self.bar, "depth_rule": self.choice.rule},
            **{"min_depth": self.choice.min_depth, "max_depth": self.choice.max_depth},
            **{"strength": self.step / STRENGTHS, "target_reached": self.reached},
            **{"ssim": round(self.outcome.ssim, 4), "speedup": round(self.outcome.speedup, 4)},
        }


def _attempts(setup: Setup, measured: Measurements, layers: dict[str, Any], target: Target) -> list[Attempt]:
    """One for each bar that leads to other depths than those before."""
    found: list[Attempt] = []
    for bar in STABLE_SSIMS:
        choice = choose_depth(measured.salient_share, stable_scales(measured.partial_ssim, bar))
        if any(choice == earlier.choice for earlier in found):
            continue
        depths = {
            **{"depth_rule": choice.rule, "tau": round(choice.tau, 6), "depth": choice.depth},
            **{"min_depth": choice.min_depth, "max_depth": choice.max_depth},
        }
        trials = Trials(setup, measured, choice, {**depths, **layers})
        step, reached = _step_for(target, trials)
        found.append(Attempt(bar, choice, trials, step, trials.outcome(step), reached))
    return found


def _step_for(target: Target, trials: Trials) -> tuple[int, bool]:
    """The strength for a target, and whether that is met by pruning anything."""
    if target.speedup is not None:
        wanted = target.speedup
        step = min(largest_passing(lambda step: trials.speedup(step) < wanted, STRENGTHS) + 1, STRENGTHS)
        return step, trials.speedup(step) >= wanted
    allowed = target.drop if target.drop is not None else 0.0
    step = largest_passing(lambda step: 1.0 - trials.outcome(step).ssim <= allowed, STRENGTHS)
    return step, trials.speedup(step) > 1.0


def _summary(values: Float[np.ndarray, "B columns"]) -> dict[str, list[float | None]]:
    """Mean, 5th and 95th percentile over the images, ready for JSON."""
    low, high = np.percentile(values, (5, 95), axis=0, method="nearest")
    return {"mean": _finite(values.mean(axis=0)), "p5": _finite(low), "p95": _finite(high)}


def _rounded(values: Float[np.ndarray, " L"]) -> list[float]:
    return [round(float(value), 4) for value in values]


def _finite(values: Float[np.ndarray, " columns"]) -> list[float | None]:
    return [round(float(value), 4) if np.isfinite(value) else None for value in values]
