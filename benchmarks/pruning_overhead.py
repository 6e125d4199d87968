"""What entropy, selection and restoration cost together, as a share of the dense time; measured in one run.

    python benchmarks/pruning_overhead.py [--model DIR] [--repeats 21] [--large-repeats 2] [--quick] [--out DIR]

Scale by scale, for one picture with guidance, three steps take turns: the dense one; that of ToProVAR; and "bare", that
of ToProVAR with no maps, nothing recorded or restored, and a fixed list of as many tokens in place of a selection. The
share is the sum of ToProVAR less bare over the sum of dense, of medians. What it costs to run the layers in the groups
of the plan where nothing is pruned yet (bare less dense) is added in a second figure. States are random: no time
depends on what is in them.

(a) The model's transformer at its largest size, with the model's calibration, or the defaults without one.
(b) Four layers as wide as those of Infinity-2B, random weights, at one megapixel, scales 9 to 13 with D = 10: minutes
per pass on a CPU. ``--quick``: one layer, scales 9 and 10.

Writes ``pruning_overhead_<device>.json`` into ``--out``.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import pathlib
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import toprovar_jax
from toprovar_jax import InfinityPipeline
from toprovar_jax.acceleration import Dense, ScaleStep, ToProVAR
from toprovar_jax.config import InfinityConfig
from toprovar_jax.generation import Text, condition_on, initial_state, make_plan, scale_step
from toprovar_jax.model import Infinity, scale_layers
from toprovar_jax.presets import PRESETS
from toprovar_jax.sampling import Sampling
from toprovar_jax.schedule import ScaleSchedule

RESULTS = pathlib.Path(__file__).parent / "results"
RESAMPLES, RESAMPLING_SEED = 2000, 0


class Path(NamedTuple):
    """The steps of one picture, and the shapes of the text and of the state before every step."""

    steps: tuple[ScaleStep, ...]
    condition: Any
    states: tuple[Any, ...]


class Subject(NamedTuple):
    """What is measured: a transformer, densely and under ToProVAR."""

    transformer: Infinity
    schedule: ScaleSchedule
    dense: Path
    pruned: Path


def subject_of(transformer: Infinity, schedule: ScaleSchedule, policy: ToProVAR) -> Subject:
    """A picture that is pruned from the policy's ``depth`` on, or as near to it as there is a plan."""
    layers = transformer.config.num_layers
    dense = make_plan(schedule, Sampling(2.0), Dense(), num_layers=layers)
    plan = make_plan(schedule, Sampling(2.0), policy, num_layers=layers)
    taken = min(plan.alternatives, key=lambda other: abs(other.choice[0] - policy.depth), default=plan)
    parts = [taken if scale >= taken.branches_at else plan for scale in range(taken.num_run)]
    paths = ([dense] * dense.num_run, parts)
    return Subject(
        transformer,
        schedule,
        *(path_of(transformer, [part.step(scale) for scale, part in enumerate(plans)]) for plans in paths),
    )


def path_of(transformer: Infinity, steps: Sequence[ScaleStep]) -> Path:
    """The shapes along some steps; nothing is computed."""
    config = transformer.config

    def start(transformer: Infinity):
        features = jnp.zeros((1, config.text_length, config.text_width), jnp.float32)
        condition = condition_on(transformer, Text(features, jnp.zeros((1,), jnp.int32)), guided=True)
        return condition, initial_state(transformer, steps[0], 1)

    condition, state = jax.eval_shape(start, transformer)
    states = [state]
    for step in steps[:-1]:
        advance = functools.partial(scale_step, step=step)
        states.append(jax.eval_shape(advance, transformer, condition, states[-1], *drawing(steps[0].schedule))[0])
    return Path(tuple(steps), condition, tuple(states))


def drawing(schedule: ScaleSchedule) -> tuple[Any, ...]:
    """Sampling and the picture's key."""
    return Sampling(2.0).for_scales(len(schedule)), jax.random.split(jax.random.key(0), 1)


def without_measurement(step: ScaleStep) -> ScaleStep:
    """The step on as many tokens, with no maps and nothing recorded or restored."""
    nothing = {"maps_from": None, "keeps_maps": False, "measures": False, "spectrum": None, "observe": False}
    groups = tuple(dataclasses.replace(group, keeps_increments=False) for group in step.groups)
    restoration = None if step.restoration is None else "identity"
    return dataclasses.replace(
        step, groups=groups, restoration=restoration, increments_from=None, records_increments=False, **nothing
    )


def fixed_list(importance: jax.Array, grid: tuple[int, int], kept: int, **regions: Any) -> jax.Array:
    """Evenly spread tokens. They hang on a value that is never NaN, or the compiler would know the list."""
    del regions
    spread = np.arange(kept, dtype=np.int32) * (grid[0] * grid[1]) // kept
    return jnp.asarray(spread)[None] + jnp.isnan(importance[:, :1]).astype(jnp.int32)


def first_channel(x: jax.Array, maps: jax.Array, *rest: Any) -> jax.Array:
    """In place of an importance: something per token that costs nothing."""
    del rest
    return x[: maps.shape[0], :, 0]


def filled(shapes: Any, text_length: int) -> Any:
    """Random numbers of those shapes; the integers among them are the prompts' lengths."""
    rng = np.random.default_rng(0)

    def fill(shape: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(shape.dtype, jnp.integer):
            return jnp.full(shape.shape, text_length, shape.dtype)
        return jnp.asarray(np.abs(rng.standard_normal(shape.shape, np.float32)), shape.dtype)

    return jax.tree.map(fill, shapes)


def compiled(step: ScaleStep, arguments: Sequence[Any]) -> Callable[[], float]:
    """What runs the step once, on a fresh copy of its state, and returns the seconds."""
    jitted = jax.jit(lambda *given: scale_step(*given, step=step), donate_argnums=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        executable = jitted.lower(*arguments).compile()

    def run() -> float:
        transformer, condition, state, *rest = arguments
        state = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        start = time.perf_counter()
        jax.block_until_ready(executable(transformer, condition, state, *rest))
        return time.perf_counter() - start

    return run


def runs_at(subject: Subject, scale: int) -> dict[str, Callable[[], float]]:
    """What runs each variant of a scale; no ``toprovar`` where the scale is left out, no ``bare`` where it is that."""
    runs: dict[str, Callable[[], float]] = {}
    length = subject.transformer.config.text_length
    for name, path in (("dense", subject.dense), ("toprovar", subject.pruned)):
        if scale < len(path.steps):
            step, own = path.steps[scale], (filled(path.condition, length), filled(path.states[scale], length))
            arguments = (subject.transformer, *own, *drawing(subject.schedule))
            runs[name] = compiled(step, arguments)
            bare = without_measurement(step)
            if bare != step:
                with mock.patch.multiple(scale_layers, select_tokens=fixed_list, _importance=first_channel):
                    runs["bare"] = compiled(bare, arguments)
    return runs


def seconds_at(runs: Mapping[str, Callable[[], float]], repeats: int, *, cheap: bool) -> dict[str, np.ndarray]:
    """Times of every variant, taken in turns; where the others are ``cheap``, they come up three times as often."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(3 * repeats if cheap else repeats):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            if name != "dense" or not cheap or turn % 3 == 0:
                times[name].append(runs[name]())
    return {name: np.array(seconds) for name, seconds in times.items()}


def shares(times: Sequence[Mapping[str, np.ndarray]], pruned_from: int) -> np.ndarray:
    """Additional over dense time, of medians over the last axis: ``[2, ...]``, without and with the layers' groups."""
    added, grouped, dense = np.float64(0.0), np.float64(0.0), np.float64(0.0)
    for scale, taken in enumerate(times):
        median = {name: np.median(seconds, axis=-1) for name, seconds in taken.items()}
        dense = dense + median["dense"]
        if "toprovar" in median:
            bare = median.get("bare", median["toprovar"])
            added = added + median["toprovar"] - bare
            grouped = grouped + (bare - median["dense"] if scale < pruned_from else 0.0)
    return np.stack([added / dense, (added + grouped) / dense])


def share_intervals(times: Sequence[Mapping[str, np.ndarray]], pruned_from: int) -> np.ndarray:
    """Their 95 % bootstrap intervals ``[2, 2]``; a scale's turns are drawn anew, for its variants together."""
    rng = np.random.default_rng(RESAMPLING_SEED)
    drawn = []
    for taken in times:
        rows = {count: rng.integers(0, count, (RESAMPLES, count)) for count in {len(s) for s in taken.values()}}
        drawn.append({name: seconds[rows[len(seconds)]] for name, seconds in taken.items()})
    return np.percentile(shares(drawn, pruned_from), (2.5, 97.5), axis=-1).T


def measured(title: str, subject: Subject, scales: Sequence[int], repeats: int) -> dict[str, Any]:
    """One table, printed as it grows, and what goes into the report."""
    names = ("dense", "toprovar", "bare")
    print(f"\n{title}, milliseconds\nscale     grid  {'tokens kept':<24} " + " ".join(f"{name:>10}" for name in names))
    steps = subject.pruned.steps
    pruned_from = next(
        (k for k, scale in enumerate(scales) if scale >= len(steps) or steps[scale].selection), len(scales)
    )
    collected, lines = [], []
    for index, scale in enumerate(scales):
        times = seconds_at(runs_at(subject, scale), repeats, cheap=index >= pruned_from)
        collected.append(times)
        kept = [group.kept for group in steps[scale].groups] if scale < len(steps) else []
        median = {name: 1000 * float(np.median(seconds)) for name, seconds in times.items()}
        height, width = subject.schedule.grids[scale]
        shown = " ".join(f"{median[name]:10.2f}" if name in median else " " * 10 for name in names)
        tokens = ", ".join(map(str, kept)) or "left out"
        print(f"{scale + 1:>5} {f'{height}x{width}':>8}  {tokens:<24} {shown}", flush=True)
        lines.append({"scale": scale + 1, "grid": [height, width], "kept": kept, "milliseconds": median})
    report: dict[str, Any] = {"title": title, "repeats": repeats, "scales": lines}
    found, intervals = shares(collected, pruned_from), share_intervals(collected, pruned_from)
    what = {"share": "entropy, selection and restoration", "share_with_groups": "and the layers in groups"}
    for (key, words), value, (low, high) in zip(what.items(), found, intervals, strict=True):
        print(f"{words}: {100 * value:+.2f} % of the dense time [{100 * low:+.2f}, {100 * high:+.2f}]", flush=True)
        report |= {key: float(value), f"{key}_interval": [float(low), float(high)]}
    return report


def of_model(model: str | None, repeats: int) -> dict[str, Any]:
    """Part a."""
    pipeline = InfinityPipeline.from_pretrained(model)
    policy = ToProVAR() if pipeline.calibration is None else ToProVAR.from_calibration(pipeline.calibration)
    schedule = pipeline.plan_for("dense").schedule
    subject = subject_of(pipeline.networks.transformer, schedule, policy)
    title = f"model {pipeline.model_name}, {schedule.grids[-1][0]}x{schedule.grids[-1][1]} tokens"
    return measured(title, subject, range(len(schedule)), repeats)


def of_large_layers(layers: int, scales: Sequence[int], repeats: int) -> dict[str, Any]:
    """Part b."""
    card = PRESETS["infinity-2b"]
    precision = "exact" if jax.default_backend() == "cpu" else "fast"
    config: InfinityConfig = dataclasses.replace(
        card.transformer, num_layers=layers, block_chunks=layers, precision=precision
    )
    transformer = nnx.jit(lambda: Infinity(config, rngs=nnx.Rngs(0)))()
    subject = subject_of(transformer, card.schedule("1:1", "1M"), ToProVAR(depth_rule="fixed", depth=10))
    return measured(f"{layers} random layers of width {config.width} at 1M", subject, scales, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="model folder or name; default: the embedded model")
    parser.add_argument("--repeats", type=int, default=21, help="of every step in part a")
    parser.add_argument("--large-repeats", type=int, default=2, help="of the dense steps in part b")
    parser.add_argument("--quick", action="store_true", help="part b small, to see that everything works")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()

    device = jax.devices()[0].device_kind
    report = {
        "model": of_model(options.model, options.repeats),
        "large": of_large_layers(
            1 if options.quick else 4, range(8, 10 if options.quick else 13), options.large_repeats
        ),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"{device} x{jax.device_count()}, {platform.machine()}",
        "versions": {"toprovar_jax": toprovar_jax.__version__, "jax": jax.__version__},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"pruning_overhead_{device.lower().replace(' ', '_')}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
