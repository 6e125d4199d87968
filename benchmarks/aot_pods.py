"""Compiles the programs of a generation for TPU slices that are not there, and checks what their chips hold and send.

    python benchmarks/aot_pods.py [--topologies v5e:4x4 ...] [--models ...] [--policies ...] [--programs largest ...]

Infinity-2B and -8B at one megapixel, as many copies of the model as there are chips where it fits on one, and four
chips per copy. For every program: bytes on each chip beside what the chip has, and collectives. A copy of the model on
one chip must exchange nothing at any scale; four chips per copy must do two pairs of reduce-scatter and all-gather in
each block. Adds to benchmarks/results/aot_pods.json and skips what is there. Exit code 1 if a program does not fit,
exchanges something else, or does not compile; 2 without a compiler.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
from aot_common import start
from jax.experimental import topologies

from pallas_kernels.ahead_of_time import TPU_ENVIRONMENT, why_no_tpu_compiler
from pallas_kernels.report import Parser
from toprovar_jax.acceleration import Dense, ToProVAR
from toprovar_jax.distributed.choosing import program_bytes
from toprovar_jax.distributed.collectives import count
from toprovar_jax.distributed.mesh import MEMORY_SHARE, MeshSpec, make_mesh
from toprovar_jax.distributed.pod_programs import PodPrograms
from toprovar_jax.generation import make_plan
from toprovar_jax.memory_options import ON_DEVICE
from toprovar_jax.presets import PRESETS
from toprovar_jax.sampling import Sampling

RESULTS = pathlib.Path(__file__).parent / "results" / "aot_pods.json"
MEMORY = {"v5e": 15.75, "v6e": 31.25, "v5p": 95.74}
"""GiB of a chip that programs may use, as their compiler says where one asks for more."""

TOPOLOGIES = {"v5e:4x4": 16, "v5e:16x16": 256, "v5p:2x2x4": 16, "v6e:4x4": 16}
MODELS = ("infinity-2b", "infinity-8b")
POLICIES = {"dense": Dense(), "toprovar": ToProVAR(depth_rule="fixed", depth=10)}
TENSOR = 4
PROGRAMS = ("largest", "second", "text", "decoder")
"""Of each generation: its two largest scales, the text, and the decoder, which takes the compiler many minutes."""

PAIRS = {"reduce-scatter": 2, "all-gather": 2}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is made on which slice; ``tensor`` chips share a copy of the model."""

    topology: str
    model: str
    tensor: int
    policy: str

    @property
    def spec(self) -> MeshSpec:
        return MeshSpec(TOPOLOGIES[self.topology] // self.tensor, 1, self.tensor)

    @property
    def limit(self) -> int:
        """Bytes of a chip."""
        return int(MEMORY[self.topology.partition(":")[0]] * 2**30)

    @property
    def card(self) -> Any:
        return PRESETS[self.model].with_precision("fast").with_attention("mosaic_tpu")

    @property
    def plan(self) -> Any:
        layers = self.card.transformer.num_layers
        return make_plan(self.card.schedule("1:1", "1M"), Sampling(), POLICIES[self.policy], num_layers=layers)

    def predicted(self, batch: int) -> dict[str, int]:
        """Bytes on each chip, program by program."""
        return program_bytes(self.card, self.plan, ON_DEVICE, self.spec, pictures=batch)

    @property
    def batch(self) -> int:
        """Pictures of a copy: the largest power of two that is predicted to fit, at most 8; 0 if none does."""
        sizes = (size for size in (8, 4, 2, 1) if max(self.predicted(size).values()) <= MEMORY_SHARE * self.limit)
        return next(sizes, 0)

    def name(self, program: str) -> str:
        # Texts and pictures are the same whatever is spared between them.
        policy = self.policy if program.startswith("scale") else "any policy"
        return f"{self.topology} {self.model} {self.spec} batch {self.batch} {policy}: {program}"


def settings(options: Any) -> Iterator[Setting]:
    """The grid; dense first. A copy of the model on one chip where it fits."""
    grid = itertools.product(options.policies, options.topologies, options.models, (1, TENSOR))
    for policy, topology, model, tensor in grid:
        setting = Setting(topology, model, tensor, policy)
        if setting.batch:
            yield setting


def measure(setting: Setting, programs: PodPrograms, name: str) -> dict[str, Any]:
    """What a program takes and exchanges, and what is wrong with it."""
    began = time.perf_counter()
    predicted = setting.predicted(setting.batch)[name]
    try:
        facts = programs.facts(name)
    except Exception as error:
        # Whatever a compiler throws is one line of the table; the other lines still count.
        return {"predicted": predicted, "failure": " ".join(str(error).split())[:300]}
    counts = count(facts.collectives)
    found = {field.name: getattr(facts, field.name) for field in dataclasses.fields(facts) if field.name != "name"}
    found["collectives"] = {"loops": counts.loops, "outside": counts.outside}
    found["sent_per_turn"] = sum(each.sent for each in facts.collectives if each.loop is not None)
    found |= {"peak": facts.peak, "limit": setting.limit, "predicted": predicted}
    found["failure"] = wrong(setting, name, found)
    return found | {"seconds": round(time.perf_counter() - began, 1), "versions": jax.__version__}


def wrong(setting: Setting, name: str, found: dict[str, Any]) -> str | None:
    """Why a compiled program is not as it should be, or None."""
    if found["peak"] > found["limit"]:
        return f"{found['peak'] / 2**30:.2f} GiB on each chip, must be at most {found['limit'] / 2**30:.2f}"
    loops, outside = found["collectives"]["loops"], found["collectives"]["outside"]
    if setting.tensor == 1 and (loops or outside):
        return f"exchanges {loops} {outside}, must exchange nothing"
    if setting.tensor > 1 and name.startswith("scale"):
        step = setting.plan.step(int(name.split()[1]) - 1)
        computed = sum(group.kept > 0 for group in step.groups)
        # Where importance is measured, all layers' mean over the heads is taken at once.
        others = set(outside) - ({"all-reduce"} if step.with_entropy else set())
        if len(loops) != computed or others or any(dict(loop) != PAIRS for loop in loops):
            return f"exchanges {loops} in loops and {outside} outside, must exchange {PAIRS} in {computed}"
    return None


def programs_of(setting: Setting, names: tuple[str, ...]) -> dict[str, str]:
    """The programs to compile: the two largest scales, the largest first, the text and the decoder."""
    sizes = setting.predicted(setting.batch)
    largest, second, *_ = sorted((name for name in names if name.startswith("scale")), key=lambda name: -sizes[name])
    return {"largest": largest, "second": second, "text": "text", "decoder": "decoder"}


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(description="Compile pods' programs without a pod.")
    parser.add_argument("--topologies", nargs="+", choices=tuple(TOPOLOGIES), default=list(TOPOLOGIES))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--policies", nargs="+", choices=tuple(POLICIES), default=list(POLICIES))
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if not start(why_no_tpu_compiler(), TPU_ENVIRONMENT):
        return 2
    results: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    failures = 0
    for setting in settings(options):
        sizes = setting.predicted(setting.batch)
        programs = None
        named = programs_of(setting, tuple(sizes))
        for name in (named[program] for program in options.programs):
            key = setting.name(name)
            if key not in results:
                programs = programs or traced(setting)
                results[key] = measure(setting, programs, name)
            # What was compiled stays; the prediction may be another by now.
            results[key]["predicted"] = sizes[name]
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n")
            print(line(key, results[key]), flush=True)
            failures += results[key]["failure"] is not None
        jax.clear_caches()
        gc.collect()
    return 1 if failures else 0


def traced(setting: Setting) -> PodPrograms:
    """The programs of a setting, not compiled yet."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=setting.topology).devices
    return PodPrograms(setting.card, setting.plan, make_mesh(setting.spec, devices), batch=setting.batch)


def line(key: str, found: dict[str, Any]) -> str:
    """One line of the table, GB."""
    if "peak" not in found:
        return f"{key:<80} {found['failure'][:120]}"
    sizes = (found["peak"], found["predicted"], found["limit"])
    ends = f"{found['seconds']:>7.0f} s  {found['collectives']}  {found['failure'] or ''}"
    return f"{key:<80}" + "".join(f"{size / 1e9:>8.2f}" for size in sizes) + ends


if __name__ == "__main__":
    sys.exit(main())
