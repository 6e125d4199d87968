"""Why one choice of tokens serves better than another: how the computed tokens spread over layers.

    python benchmarks/selection_coverage.py [--model DIR] [--images 40] [--seed 0] [--alpha-max 0.75] [--out DIR]

At the last scale, for the same plan under each importance: the share of tokens that no prunable layer computes, which
live on increments of an earlier scale alone, and how far the layers agree about what they keep (mean overlap of two
layers' kept tokens over what independent choices would give; 1 is chance). Writes ``selection_coverage_<model>.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import pathlib
import platform
from typing import Any

import jax
import numpy as np

import toprovar_jax
from toprovar_jax import InfinityPipeline, ToProVAR
from toprovar_jax.prompts import read_prompts

HERE = pathlib.Path(__file__).parent


def coverage(kept: np.ndarray) -> dict[str, float]:
    """Of one picture: ``kept``, bool ``[L, T]``, the prunable layers alone."""
    pairs = [
        np.mean(a & b) / (np.mean(a) * np.mean(b)) for a, b in itertools.combinations(kept, 2) if a.any() and b.any()
    ]
    return {"computed_by_no_layer": float(np.mean(~kept.any(axis=0))), "overlap": float(np.mean(pairs))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes-medium")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alpha-max", type=float, default=0.75)
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    options = parser.parse_args()
    pipeline = InfinityPipeline.from_pretrained(options.model)
    requests = read_prompts(HERE / "prompts/scenes_200.txt")[: options.images]
    prompts = [request.prompt for request in requests]
    base = ToProVAR() if pipeline.calibration is None else ToProVAR.from_calibration(pipeline.calibration)
    proportion = base.alpha_min / base.alpha_max if base.alpha_max else 0.0
    found: dict[str, Any] = {}
    for importance in ("entropy", "distance", "random"):
        policy = dataclasses.replace(
            base,
            **{"importance": importance, "depth_rule": "fixed", "online": False},
            **{"alpha_max": options.alpha_max, "alpha_min": round(options.alpha_max * proportion, 6)},
        )
        seeds = list(range(options.seed, options.seed + len(prompts)))
        result = pipeline(prompts, seed=seeds, policy=policy, observe=True, output_type="np")
        last = result.plan.scales[result.plan.num_run - 1]
        layers = [
            layer for group in last.groups if group.kept < last.tokens for layer in range(group.start, group.stop)
        ]
        kept = result.statistics[result.plan.num_run - 1].kept[:, layers]
        rows = [coverage(picture) for picture in kept]
        found[importance] = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        print(importance, {name: round(value, 3) for name, value in found[importance].items()}, flush=True)
    report = {
        **{"model": pipeline.model_name, "images": len(prompts), "alpha_max": options.alpha_max},
        "last_scale": found,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"{jax.devices()[0].device_kind} x{jax.device_count()}, {platform.machine()}",
        "versions": {"toprovar_jax": toprovar_jax.__version__, "jax": jax.__version__},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"selection_coverage_{pipeline.model_name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
