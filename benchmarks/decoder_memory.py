"""What the decoder needs in device memory at one megapixel, whole and in strips, by the compiler's own account.

    python benchmarks/decoder_memory.py --target v5e [--models 2b 8b] [--batches 1 4] [--strips 1 4 8 16]

Compiles for a device that is not there, so nothing is allocated: in the environment of ``make aot-tpu`` for TPUs, of
``make aot-gpu`` for GPUs. Each program adds its entry to ``benchmarks/results/decoder_memory.json`` or replaces it.
Exit code 0 if all compile, 1 if any does not, 2 without the compiler.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from aot_common import report, start
from flax import nnx

from convert.dtypes import fast_dtype
from pallas_kernels.ahead_of_time import (
    GPU_ENVIRONMENT,
    GPUS,
    TPU_ENVIRONMENT,
    TPU_SINGLE_HOST,
    Facts,
    Program,
    compile_for,
    gpu_mesh,
    placed,
    tpu_mesh,
    why_no_gpu_compiler,
    why_no_tpu_compiler,
)
from pallas_kernels.report import Parser
from toprovar_jax.image_tokenizer import ImageTokenizer
from toprovar_jax.model_card import ModelCard
from toprovar_jax.presets import PRESETS

RESULT = Path(__file__).parent / "results" / "decoder_memory.json"
COLUMNS = (("temporary MB", 14, lambda facts: f"{facts['temporary_bytes'] / 1e6:.0f}"),)


def tokenizer_as_loaded(card: ModelCard) -> ImageTokenizer:
    """Described, with the parameter dtypes of ``precision="fast"``."""
    graph, state = nnx.split(
        nnx.eval_shape(lambda: ImageTokenizer(card.image_tokenizer, rngs=nnx.Rngs(0), with_encoder=False))
    )
    parameters = []
    for path, variable in nnx.to_flat_state(state):
        dtype = fast_dtype("image_tokenizer", ".".join(map(str, path)))
        parameters.append((path, variable.replace(jax.ShapeDtypeStruct(variable.get_value().shape, dtype))))
    return nnx.merge(graph, nnx.from_flat_state(parameters))


def programs(
    target: str, models: list[str], batches: list[int], strips: list[int], entries: dict[str, Facts]
) -> Iterator[Program]:
    """One decoder each; what is found of it goes into ``entries``."""
    mesh = tpu_mesh(TPU_SINGLE_HOST[target]) if target in TPU_SINGLE_HOST else gpu_mesh(target)

    def build(name: str, model: str, batch: int, count: int) -> Facts:
        card = PRESETS[f"infinity-{model}"].with_precision("fast")
        grid = card.schedule("1:1", "1M").latent_grids[-1]
        latents = jax.ShapeDtypeStruct((batch, *grid, card.image_tokenizer.latent_channels), jnp.float32)

        def decode(tokenizer: ImageTokenizer, latents: jax.Array) -> jax.Array:
            return tokenizer.decode(latents, strips=count)

        compiled = compile_for(mesh, jax.jit(decode), *placed((tokenizer_as_loaded(card), latents), mesh))
        memory = compiled.memory_analysis()
        if memory is None:
            return {"failure": "the compiler gives no account of memory"}
        facts = {"temporary_bytes": memory.temp_size_in_bytes, "output_bytes": memory.output_size_in_bytes}
        entries[name] = {"target": target, "model": model, "batch": batch, "strips": count} | facts
        return facts

    for model, batch, count in itertools.product(models, batches, strips):
        name = f"{target} {model} batch {batch} strips {count}"
        yield Program(
            target, f"{model}, batch {batch}, {count} strips", lambda given=(name, model, batch, count): build(*given)
        )


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(description="Measure the memory of the decoder without a device.")
    parser.add_argument("--target", choices=(*TPU_SINGLE_HOST, *GPUS), required=True)
    parser.add_argument("--models", nargs="+", choices=("2b", "8b"), default=["2b", "8b"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--strips", nargs="+", type=int, default=[1, 4, 8, 16])
    given = parser.parse_args(arguments)
    tpu = given.target in TPU_SINGLE_HOST
    reason, environment = why_no_tpu_compiler() if tpu else why_no_gpu_compiler(), TPU_ENVIRONMENT
    if not start(reason, environment if tpu else GPU_ENVIRONMENT):
        return 2
    entries: dict[str, Facts] = {}
    if RESULT.exists():
        entries = json.loads(RESULT.read_text(encoding="utf-8"))["programs"]
    code = report(programs(given.target, given.models, given.batches, given.strips, entries), COLUMNS, given.target)
    content = {"jax": jax.__version__, "pixels": "1M", "precision": "fast", "programs": dict(sorted(entries.items()))}
    RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
