"""Pictures and captions of the scenes world, as the documentation shows them.

python benchmarks/world_sheet.py [--seed 0] [--side 256] [--out benchmarks/results/world.png]
"""

from __future__ import annotations

import argparse
import pathlib

import jax
import numpy as np
from PIL import Image, ImageDraw

from toprovar_jax.lettering import LINE, wrapped, write
from toprovar_jax.scenes import render, sample_scenes
from toprovar_jax.scenes.captions import captions

HERE = pathlib.Path(__file__).parent

_COLUMNS, _LINES = 4, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results/world.png")
    options = parser.parse_args()
    scenes = sample_scenes(jax.random.key(options.seed), 8)
    images = np.asarray(render(scenes, height=options.side, width=options.side))
    words = captions(jax.device_get(scenes), np.random.default_rng(options.seed))
    cell = options.side + _LINES * LINE + 8
    sheet = Image.new("RGB", (_COLUMNS * options.side, -(-len(words) // _COLUMNS) * cell), "white")
    for number, (image, text) in enumerate(zip(images, words, strict=True)):
        left, top = number % _COLUMNS * options.side, number // _COLUMNS * cell
        sheet.paste(Image.fromarray((255 * image + 0.5).astype(np.uint8)), (left, top))
        lines = wrapped(text, options.side - 8, _LINES)
        write(ImageDraw.Draw(sheet), (left + 4, top + options.side + 2), lines)
    sheet.save(options.out, optimize=True)


if __name__ == "__main__":
    main()
