"""Prompts of the scenes world for calibrating on and for scoring with: two files that share no prompt.

    python benchmarks/prompts/make_scenes.py

Writes ``scenes_calibration.txt`` (50) and ``scenes_200.txt`` (200) beside this file. Captions as the models were
trained on (``toprovar_jax.scenes.captions``), drawn with a fixed seed; those that leave out the colour or the shape are
drawn again, for a judge could not say whether the picture is right. Every pair of colour and shape comes up as often as
every other one, up to one time.
"""

import itertools
import pathlib

import numpy as np

from toprovar_jax.scenes.captions import NOUNS, caption
from toprovar_jax.scenes.world import COLOURS, SHAPES, SIZES

FOLDER = pathlib.Path(__file__).parent
FILES = {"scenes_calibration.txt": 50, "scenes_200.txt": 200}
SEED = 4


def says_all(text: str, shape: int, colour: int) -> bool:
    words = text.split()
    return list(COLOURS)[colour] in words and any(noun in words for noun in NOUNS[SHAPES[shape]])


def new_caption(shape: int, colour: int, rng: np.random.Generator, taken: set[str]) -> str:
    while True:
        text = caption(shape, colour, rng.uniform(-1.0, 1.0, 2), float(rng.choice(SIZES)), rng)
        if text not in taken and says_all(text, shape, colour):
            taken.add(text)
            return text


def main() -> None:
    rng = np.random.default_rng(SEED)
    pairs = list(itertools.product(range(len(SHAPES)), range(len(COLOURS))))
    taken: set[str] = set()
    for name, count in FILES.items():
        wanted = [pair for _ in range(-(-count // len(pairs))) for pair in rng.permutation(pairs)][:count]
        lines = [f"# {count} prompts of the scenes world, made by make_scenes.py in this folder."]
        lines += [new_caption(int(shape), int(colour), rng, taken) for shape, colour in wanted]
        (FOLDER / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
