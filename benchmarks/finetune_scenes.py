"""Teaches the embedded model a new word:  python benchmarks/finetune_scenes.py --out outputs/zorb

Renders 64 purple spheres, calls each "a zorb", finetunes low-rank adapters on them with the finetune command, and
draws "a zorb" before and after with the same seeds. Writes zorb.png (first row before, second after) and prints the
losses. Some minutes on two CPU cores.
"""

import argparse
import csv
import os
import pathlib
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from toprovar_jax import InfinityPipeline
from toprovar_jax.cli.finetune import main as finetune
from toprovar_jax.images import make_grid, to_uint8
from toprovar_jax.scenes.renderer import render
from toprovar_jax.scenes.sampling import sample_scenes
from toprovar_jax.scenes.world import COLOURS, SHAPES

PICTURES, SEEDS, PROMPT = 64, (1, 2, 3, 4, 5, 6), "a zorb"


def write_data(folder: pathlib.Path, side: int) -> None:
    """Scenes of one object, all made purple spheres."""
    folder.mkdir(parents=True)
    scenes = sample_scenes(jax.random.key(0), PICTURES)
    sphere, purple = list(SHAPES).index("sphere"), list(COLOURS).index("purple")
    scenes = scenes._replace(
        present=scenes.present.at[:, 1:].set(False),
        shape=jnp.full_like(scenes.shape, sphere),
        colour=jnp.full_like(scenes.colour, purple),
    )
    for number, picture in enumerate(np.asarray(render(scenes, height=side, width=side))):
        Image.fromarray(to_uint8(picture)).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(PROMPT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--steps", default="60")
    parser.add_argument("--model", default="scenes-small")
    arguments = parser.parse_args()
    before = InfinityPipeline.from_pretrained(arguments.model)
    side = before.resolve(PROMPT).size[0]
    write_data(arguments.out / "data", side)
    options = {
        **{"model": arguments.model, "data": arguments.out / "data", "out": arguments.out / "model"},
        **{"steps": arguments.steps, "batch-size": 8, "learning-rate": 3e-3, "decay": "cosine"},
        **{"adapt": "*", "held-out": 0.125, "eval-every": 20},
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    if status := finetune(words):
        sys.exit(status)
    after = InfinityPipeline.from_pretrained(arguments.out / "model")
    pictures = [
        np.asarray(image)
        for pipeline in (before, after)
        for image in pipeline(PROMPT, seed=SEEDS[0], num_images_per_prompt=len(SEEDS)).images
    ]
    Image.fromarray(make_grid(pictures, columns=len(SEEDS))).save(arguments.out / "zorb.png")
    with (arguments.out / "model" / "run" / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            if row["name"] == "loss":
                print(row["kind"], row["step"], row["value"])


if __name__ == "__main__":
    main()
