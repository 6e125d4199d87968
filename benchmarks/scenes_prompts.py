"""The embedded model's score on plain prompts, by the scenes judge, with a contact sheet to look at.

    python benchmarks/scenes_prompts.py [--model DIR] [--seeds-per-prompt 1] [--shapes sphere cube cone]

Prompts are "a <colour> <shape>" over all colours and the given shapes; prompt i is drawn with seed i (and i + 1000,
i + 2000, ... for more seeds). Writes ``scenes_prompts.json`` and ``scenes_prompts.png`` into ``benchmarks/results``.
"""

import argparse
import datetime
import json
import pathlib
import platform

import jax
import numpy as np
from PIL import Image

import toprovar_jax
from toprovar_jax import InfinityPipeline
from toprovar_jax.images import make_grid, to_uint8
from toprovar_jax.scenes.judge import Judge
from toprovar_jax.scenes.world import COLOURS, SHAPES

RESULTS = pathlib.Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="model folder or name; default: the embedded model")
    parser.add_argument("--shapes", nargs="+", default=["sphere", "cube", "cone"], choices=SHAPES)
    parser.add_argument("--seeds-per-prompt", type=int, default=1)
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--tau", type=float, default=None)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()

    pipeline = InfinityPipeline.from_pretrained(options.model)
    wanted = [(colour, shape) for shape in options.shapes for colour in COLOURS]
    prompts = [f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}" for colour, shape in wanted]
    rounds = range(options.seeds_per_prompt)
    seeds = [i + 1000 * r for r in rounds for i in range(len(prompts))]
    sampling = {"guidance_scale": options.guidance, "tau": options.tau}
    compiling = pipeline(prompts[0], seed=0, **sampling).timings
    result = pipeline(prompts * len(rounds), seed=seeds, output_type="np", **sampling)

    verdicts = Judge.load()(result.images)
    found, shape, colour = (np.asarray(part) for part in (verdicts.found, verdicts.shape, verdicts.colour))
    colour_right = found & (colour == np.array([list(COLOURS).index(c) for c, _ in wanted] * len(rounds)))
    shape_right = found & (shape == np.array([SHAPES.index(s) for _, s in wanted] * len(rounds)))
    count = len(seeds)
    report = {
        "model": pipeline.model_name,
        "images": count,
        "found": int(found.sum()),
        "colour_right": int(colour_right.sum()),
        "shape_right": int(shape_right.sum()),
        "both_right": int((colour_right & shape_right).sum()),
        "guidance": pipeline.default_guidance if options.guidance is None else options.guidance,
        "tau": pipeline.default_tau if options.tau is None else options.tau,
        "seconds_first_call": round(compiling.total, 3),
        "seconds_compile": round(compiling.compile, 3),
        "seconds_per_image": round(result.timings.steady / count, 4),
        "wrong": [
            f"{prompt} (seed {seed})"
            for prompt, seed, right in zip(prompts * len(rounds), seeds, colour_right & shape_right, strict=True)
            if not right
        ],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"{jax.devices()[0].device_kind} x{jax.device_count()}, {platform.machine()}",
        "versions": {"toprovar_jax": toprovar_jax.__version__, "jax": jax.__version__},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "scenes_prompts.json").write_text(json.dumps(report, indent=1) + "\n")
    sheet = Image.fromarray(make_grid(list(to_uint8(result.images[: len(prompts)])), columns=len(COLOURS)))
    sheet = sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.LANCZOS)
    sheet.save(options.out / "scenes_prompts.png")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
