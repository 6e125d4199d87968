"""What 8-bit matrices change, on the embedded models: weights, scores of bits, drawn bits, judged pictures.

    python benchmarks/quantization_error.py [--models scenes-small scenes-medium] [--images 24] [--seed 0]

The reference is the model in float32. Beside it stand the same with int8 matrices, and bfloat16 without and with them,
which shows how much of a difference any rounding makes. Scores of bits are those of all scales given the reference's
own bits; drawn bits are those of a generation of its own with the same seed, where each scale starts from what the ones
before have made different. Writes ``benchmarks/results/quantization_error.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toprovar_jax import InfinityPipeline
from toprovar_jax.comparison import where_and_when
from toprovar_jax.files import replace_file
from toprovar_jax.generation import InfinityModel, encode_text
from toprovar_jax.image_tokenizer.bsq import decode_scales, next_scale_input, tokens_to_bits
from toprovar_jax.images import to_uint8
from toprovar_jax.memory_options import MemoryOptions, Quantization
from toprovar_jax.outputs import PipelineOutput
from toprovar_jax.prompts import read_prompts
from toprovar_jax.scenes.score import judged_right
from toprovar_jax.schedule import ScaleSchedule
from toprovar_jax.similarity import psnr

FOLDER = pathlib.Path(__file__).parent
VARIANTS: dict[str, tuple[Any, Quantization | None]] = {
    "float32": ("exact", None),
    "float32, int8": ("exact", "int8"),
    "bfloat16": ("fast", None),
    "bfloat16, int8": ("fast", "int8"),
}
"""Precision and quantisation; the first is the reference."""


def scores_of_bits(
    pipeline: InfinityPipeline, prompts: Sequence[str], bits: Sequence[np.ndarray], schedule: ScaleSchedule
) -> list[np.ndarray]:
    """Scores ``[B, T, Z, 2]`` of every scale, each given ``bits`` of the ones before; no guidance."""
    tokens = pipeline.tokenizer.encode(prompts, max_length=pipeline.card.transformer.text_length, strict=True)

    @jax.jit
    def run(model: InfinityModel, ids: jax.Array, lengths: jax.Array, bits: tuple[jax.Array, ...]) -> jax.Array:
        text, patchify = encode_text(model, ids, lengths), model.transformer.config.spatial_patchify
        maps = [tokens_to_bits(scale, grid, patchify) for scale, grid in zip(bits, schedule.grids, strict=True)]
        given = [
            next_scale_input(decode_scales(maps[:scale], schedule.latent_grids[-1]), schedule, scale)
            for scale in range(1, len(maps))
        ]
        inputs = jnp.concatenate(given, axis=1)
        return model.transformer.parallel_logits(inputs, text.features, text.lengths, schedule)

    whole = np.asarray(run(pipeline.networks, tokens.ids, tokens.lengths, tuple(map(jnp.asarray, bits))))
    return np.split(whole, schedule.offsets[1:-1], axis=1)


def compare(model: str, prompts: Sequence[str], seed: int) -> dict[str, Any]:
    """One model's report, variant by variant."""
    report: dict[str, Any] = {}
    drawn: PipelineOutput | None = None
    scores: list[np.ndarray] = []
    for name, (precision, quantization) in VARIANTS.items():
        memory = MemoryOptions(quantization=quantization)
        pipeline = InfinityPipeline.from_pretrained(model, precision=precision, memory=memory)
        seeds = list(range(seed, seed + len(prompts)))
        output = pipeline(list(prompts), seed=seeds, output_type="np")
        schedule = output.plan.schedule
        own = scores_of_bits(pipeline, prompts, (drawn or output).bits, schedule)
        right = judged_right(to_uint8(np.asarray(output.images)), prompts)
        row: dict[str, Any] = {"judged_right": round(float(right.mean()), 4)}
        if drawn is None:
            drawn, scores = output, own
            reference = right
        else:
            row["judged_otherwise"] = int((right != reference).sum())
            row["scores_relative_error"] = [_rounded(_relative(a, b)) for a, b in zip(own, scores, strict=True)]
            row["drawn_bits_that_differ"] = [
                _rounded(float(np.mean(a != b))) for a, b in zip(output.bits, drawn.bits, strict=True)
            ]
            likeness = psnr(np.asarray(output.images), np.asarray(drawn.images))
            row["median_psnr"] = round(float(np.median(likeness)), 2)
        if quantization:
            row["weights_relative_error"] = {kind: _rounded(e) for kind, e in pipeline.quantization_error.items()}
        report[name] = row
        print(model, name, json.dumps(row), flush=True)
    return report


def _relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Frobenius norm of the difference of log-odds over that of ``theirs``: nothing else of two scores matters."""
    ours, theirs = (np.diff(scores.astype(np.float64), axis=-1) for scores in (ours, theirs))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def _rounded(number: float) -> float:
    """To three significant digits."""
    return round(number, 2 - math.floor(math.log10(number))) if number else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["scenes-small", "scenes-medium"], help="names or folders")
    parser.add_argument("--images", type=int, default=24, help="the first so many prompts of scenes_200.txt")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; picture i has seed + i")
    options = parser.parse_args()
    requests = read_prompts(FOLDER / "prompts" / "scenes_200.txt")[: options.images]
    prompts = [request.prompt for request in requests]
    models = {model: compare(model, prompts, options.seed) for model in options.models}
    report = {"images": len(prompts), "seed": options.seed, "models": models, **where_and_when()}
    path = FOLDER / "results" / "quantization_error.json"
    replace_file(path, (json.dumps(report, indent=1) + "\n").encode("utf-8"))


if __name__ == "__main__":
    main()
