"""Predicted device memory beside XLA's own, for chips that are not there: every program of Infinity-2B and -8B.

    python benchmarks/memory_report.py --targets v5e v5p        (with libtpu)
    python benchmarks/memory_report.py --targets H200           (with the CUDA plugin of JAX)

Compiles the text and the scales with the largest predicted peak (``--scales all`` for every one); with ``--fused`` also
all scales as one program, with ``--decoder`` the decoder. Adds to benchmarks/results/memory_report.json and skips what
is there. A program that does not fit the chip is refused by its compiler with what it would need, which is recorded
too. Exit code 1 if a prediction is off by more than a tenth, 2 without a compiler.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import json
import pathlib
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from aot_common import start
from flax import nnx

from convert.dtypes import fast_dtype
from pallas_kernels.ahead_of_time import (
    GPU_ENVIRONMENT,
    GPUS,
    TPU_ENVIRONMENT,
    TPU_SINGLE_HOST,
    compile_for,
    gpu_mesh,
    placed,
    tpu_mesh,
    why_no_gpu_compiler,
    why_no_tpu_compiler,
)
from pallas_kernels.report import Parser
from toprovar_jax.acceleration import Dense, ToProVAR
from toprovar_jax.generation import (
    InfinityModel,
    condition_on,
    encode_text,
    initial_state,
    make_plan,
    run_scales,
    scale_step,
)
from toprovar_jax.image_tokenizer import ImageTokenizer
from toprovar_jax.memory import MemoryReport, Phase, predict
from toprovar_jax.memory_options import ON_DEVICE
from toprovar_jax.model import Infinity
from toprovar_jax.presets import PRESETS
from toprovar_jax.sampling import Sampling
from toprovar_jax.text_encoder import T5Encoder

RESULTS = pathlib.Path(__file__).parent / "results" / "memory_report.json"
POLICIES = {"dense": Dense(), "toprovar": ToProVAR(depth_rule="fixed", depth=10)}
"""The depth is fixed, so that both drivers can run the plan."""

MODELS, PIXELS, BATCHES = ("infinity-2b", "infinity-8b"), ("0.25M", "1M"), (1, 4)
TOLERANCE = 0.1


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of the grid."""

    target: str
    model: str
    pixels: str
    batch: int
    policy: str

    @property
    def name(self) -> str:
        return f"{self.target} {self.model} {self.pixels} batch {self.batch} {self.policy}"


def abstract(build: Callable[[], Any], network: str) -> Any:
    """A network's parameters as shapes in the dtypes in which they are loaded."""
    graph, state = nnx.split(nnx.eval_shape(build))
    leaves = [
        (
            path,
            leaf.replace(jax.ShapeDtypeStruct(leaf.get_value().shape, fast_dtype(network, ".".join(map(str, path))))),
        )
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(leaves))


class Programs:
    """The programs of one setting, compiled on request."""

    def __init__(self, setting: Setting):
        on_gpu = setting.target in GPUS
        self.mesh = gpu_mesh(setting.target) if on_gpu else tpu_mesh(TPU_SINGLE_HOST[setting.target])
        card = PRESETS[setting.model].with_precision("fast")
        self.card = card.with_attention("mosaic_gpu" if on_gpu else "mosaic_tpu")
        self.batch, config = setting.batch, self.card.transformer
        schedule = card.schedule("1:1", setting.pixels)
        self.plan = make_plan(schedule, Sampling(), POLICIES[setting.policy], num_layers=config.num_layers)
        self.model = InfinityModel(
            abstract(lambda: Infinity(config, rngs=nnx.Rngs(0)), "transformer"),
            abstract(
                lambda: ImageTokenizer(card.image_tokenizer, rngs=nnx.Rngs(0), with_encoder=False), "image_tokenizer"
            ),
            abstract(lambda: T5Encoder(card.text_encoder, rngs=nnx.Rngs(0)), "text_encoder"),
        )
        self.tokens = jax.ShapeDtypeStruct((self.batch, config.text_length), jnp.int32)
        self.lengths = jax.ShapeDtypeStruct((self.batch,), jnp.int32)
        self.sampling = jax.eval_shape(lambda: Sampling().for_scales(len(schedule)))
        self.keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), self.batch))

    @functools.cached_property
    def condition(self) -> Any:
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return jax.eval_shape(self.text_program, self.model, self.tokens, self.lengths)

    def text_program(self, model: InfinityModel, tokens: Any, lengths: Any) -> Any:
        """Text encoder and conditioning."""
        return condition_on(model.transformer, encode_text(model, tokens, lengths), guided=True)

    def state_before(self, scale: int) -> Any:
        """What a scale finds."""
        transformer = self.model.transformer
        state = jax.eval_shape(lambda model: initial_state(model, self.plan.step(0), self.batch), transformer)
        for before in range(scale):
            run = functools.partial(scale_step, step=self.plan.step(before))
            state, *_ = jax.eval_shape(run, transformer, self.condition, state, self.sampling, self.keys)
        return state

    def compile(self, phase: str) -> jax.stages.Compiled:
        """The program of a phase of the report."""
        if phase == "text":
            return self._compile(jax.jit(self.text_program), (self.model, self.tokens, self.lengths))
        if phase == "decoder":
            shape = (self.batch, *self.plan.schedule.latent_grids[-1], self.card.transformer.latent_channels)
            latents = jax.ShapeDtypeStruct(shape, jnp.float32)
            decode = jax.jit(lambda tokenizer, latents: tokenizer.decode(latents))
            return self._compile(decode, (self.model.image_tokenizer, latents))
        transformer = self.model.transformer
        if phase == "scales":
            given = (transformer, self.condition, self.keys, self.sampling)
            return self._compile(jax.jit(run_scales, static_argnames="plan"), given, plan=self.plan)
        scale = int(phase.split()[1]) - 1
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            state = self.state_before(scale)
        jitted = jax.jit(scale_step, static_argnames="step", donate_argnums=2)
        given = (transformer, self.condition, state, self.sampling, self.keys)
        return self._compile(jitted, given, step=self.plan.step(scale))

    def _compile(self, function: jax.stages.Wrapped, given: Any, **static: Any) -> jax.stages.Compiled:
        with warnings.catch_warnings():
            # Only the cache has one size at all scales.
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")
            return compile_for(self.mesh, function, *placed(given, self.mesh), **static)


def measure(programs: Programs, phase: Phase) -> dict[str, Any]:
    """What XLA says of a phase's program, and what was predicted."""
    began = time.perf_counter()
    predicted = {name: getattr(phase, name) for name in ("arguments", "outputs", "reused", "temporaries", "program")}
    try:
        analysis: Any = programs.compile(phase.name).memory_analysis()
    except Exception as error:
        found: dict[str, Any] = {"failure": " ".join(str(error).split())[:400]}
        # A chip that is too small says what it would have needed, its own reserve and code included.
        needed = re.search(r"Used ([0-9.]+)([KMGT]) of", found["failure"])
        if needed:
            found["program"] = int(float(needed[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[needed[2]])
    else:
        found = {
            "arguments": analysis.argument_size_in_bytes,
            "outputs": analysis.output_size_in_bytes,
            "reused": analysis.alias_size_in_bytes,
            "temporaries": analysis.temp_size_in_bytes,
        }
        found["program"] = found["arguments"] + found["outputs"] - found["reused"] + found["temporaries"]
    error = found and found.get("program") and predicted["program"] / found["program"] - 1
    seconds = round(time.perf_counter() - began, 1)
    return {"predicted": predicted, "compiled": found, "error": error, "seconds": seconds, "beside": phase.beside}


def chosen_phases(reports: dict[str, MemoryReport], scales: str, fused: bool, decode: bool) -> Iterator[Phase]:
    """The two largest scales or all, the text, and what else was asked for."""
    text, *steps, decoder = reports["stepwise"].phases
    if scales == "largest":
        steps = sorted(steps, key=lambda phase: phase.program)[-2:]
    yield from (*steps, text)
    if fused:
        yield reports["fused"].phases[1]
    if decode:
        yield decoder


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(description="Compare predicted device memory with XLA's.")
    parser.add_argument("--targets", nargs="+", choices=(*TPU_SINGLE_HOST, *GPUS), default=["v5e", "v5p"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--pixels", nargs="+", choices=PIXELS, default=list(PIXELS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--policies", nargs="+", choices=tuple(POLICIES), default=list(POLICIES))
    parser.add_argument("--scales", choices=("largest", "all"), default="largest")
    parser.add_argument("--fused", action="store_true", help="also all scales in one program, minutes each")
    parser.add_argument("--decoder", action="store_true", help="also the decoder, which a TPU compiler takes long for")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args(arguments)
    on_gpu = any(target in GPUS for target in options.targets)
    reason = why_no_gpu_compiler() if on_gpu else why_no_tpu_compiler()
    if not start(reason, GPU_ENVIRONMENT if on_gpu else TPU_ENVIRONMENT):
        return 2
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    worst = 0.0
    grid = (options.targets, options.models, options.pixels, options.batches, options.policies)
    for setting in itertools.starmap(Setting, itertools.product(*grid)):
        programs = Programs(setting)
        given: Any = (programs.card, programs.plan, setting.batch, setting.pixels, ON_DEVICE)
        reports = {driver: predict(*given, driver=driver) for driver in ("stepwise", "fused")}
        for phase in chosen_phases(reports, options.scales, options.fused, options.decoder):
            key = f"{setting.name}: {phase.name}"
            if key not in results:
                results[key] = measure(programs, phase)
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(results, indent=1) + "\n")
                jax.clear_caches()
                gc.collect()
            else:
                # What was compiled stays; the prediction may be another by now.
                results[key] |= repredicted(results[key], phase)
            print(line(key, results[key]), flush=True)
            worst = max(worst, abs(results[key]["error"] or 0.0))
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if worst > TOLERANCE else 0


def repredicted(found: dict[str, Any], phase: Phase) -> dict[str, Any]:
    """A result with today's prediction."""
    predicted = {name: getattr(phase, name) for name in found["predicted"]}
    compiled = found["compiled"].get("program")
    return {"predicted": predicted, "beside": phase.beside, "error": compiled and predicted["program"] / compiled - 1}


def line(key: str, found: dict[str, Any]) -> str:
    """One line of the table, GB."""
    compiled = found["compiled"]
    if "program" not in compiled:
        return f"{key:<72} {compiled['failure'][:120]}"
    names = ("arguments", "outputs", "reused", "temporaries", "program")
    numbers = (f"{found['predicted'][name] / 1e9:.2f}/{compiled.get(name, 0) / 1e9:.2f}" for name in names)
    return (
        f"{key:<72}" + "".join(f"{pair:>14}" for pair in numbers) + f"{found['error']:>+8.1%}{found['seconds']:>7.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
