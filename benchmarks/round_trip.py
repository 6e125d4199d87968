"""The ceiling of a model: real renders through its image tokenizer, object by object, as the judge sees them.

    python benchmarks/round_trip.py [--model NAME_OR_DIR] [--images 512]

Scenes of all kinds, held-out ones included. Writes ``benchmarks/results/round_trip_MODEL.json``.
"""

import argparse
import json
import pathlib

import jax
import numpy as np

from toprovar_jax.comparison import where_and_when
from toprovar_jax.evaluation import coder_of
from toprovar_jax.files import replace_file
from toprovar_jax.hub import find_model
from toprovar_jax.images import to_uint8
from toprovar_jax.loading import load_model
from toprovar_jax.scenes.judge import Judge
from toprovar_jax.scenes.renderer import render
from toprovar_jax.scenes.sampling import sample_scenes
from toprovar_jax.scenes.score import objects_seen
from toprovar_jax.scenes.world import COLOURS, SHAPES
from toprovar_jax.similarity import psnr, ssim

TOGETHER = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="model folder or name; default: the embedded model")
    parser.add_argument("--images", type=int, default=512)
    options = parser.parse_args()
    model = load_model(find_model(options.model), precision="exact", with_encoder=True)
    schedule, coder, judge = model.card.schedule("1:1", None), coder_of(model.networks.image_tokenizer), Judge.load()
    height, width = schedule.pixel_size
    likeness, shown, seen = [], [], {"renders": [], "coded": []}
    for start in range(0, options.images, TOGETHER):
        count = min(TOGETHER, options.images - start)
        scenes = sample_scenes(jax.random.key(4242 + start), count, held_out=True)
        pictures = render(scenes, height=height, width=width)
        coded = np.clip(np.asarray(coder(pictures, schedule.latent_grids), np.float32), 0.0, 1.0)
        likeness.append((psnr(coded, np.asarray(pictures)), ssim(coded, np.asarray(pictures))))
        for name, images in (("renders", np.asarray(pictures)), ("coded", coded)):
            seen[name] += objects_seen(judge(to_uint8(images)))
        present, shape, colour = (np.asarray(field) for field in scenes[:3])
        names = list(COLOURS)
        shown += [
            sorted((SHAPES[shape[row, slot]], names[colour[row, slot]]) for slot in np.flatnonzero(present[row]))
            for row in range(count)
        ]
    report = {
        "model": model.card.name,
        "images": options.images,
        "psnr": round(float(np.mean(np.concatenate([decibels for decibels, _ in likeness]))), 2),
        "ssim": round(float(np.mean(np.concatenate([structure for _, structure in likeness]))), 4),
        **{name: _shares(pictures, shown) for name, pictures in seen.items()},
        **where_and_when(),
    }
    path = pathlib.Path(__file__).parent / "results" / f"round_trip_{model.card.name}.json"
    replace_file(path, (json.dumps(report, indent=1) + "\n").encode("utf-8"))
    print(json.dumps(report, indent=1))


def _shares(seen: list, shown: list) -> dict:
    """Share of pictures whose number of objects, and whose objects with shapes and colours, are exactly right."""
    counts = np.array([len(things) for things in shown])
    number = np.array([len(things) for things in seen]) == counts
    exact = np.array(
        [sorted((it.shape, it.colour) for it in things) == asked for things, asked in zip(seen, shown, strict=True)]
    )
    by_count = {str(count): round(float(exact[counts == count].mean()), 4) for count in np.unique(counts).tolist()}
    return {
        "count_right": round(float(number.mean()), 4),
        "all_right": round(float(exact.mean()), 4),
        "by_count": by_count,
    }


if __name__ == "__main__":
    main()
