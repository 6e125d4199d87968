"""The transformer stage of a tiny recipe, for tests that end it from outside: ``scenes_run.py DIRECTORY STEPS``."""

import functools
import sys
import time
from pathlib import Path

from toprovar_jax.config import ImageTokenizerConfig, InfinityConfig
from toprovar_jax.training import transformer_stage
from toprovar_jax.training.loop import LoopConfig
from toprovar_jax.training.recipes import Recipe

RECIPE = Recipe(
    name="tiny",
    image_tokenizer=ImageTokenizerConfig(4, 2, 24, (1, 1), 1),
    transformer=InfinityConfig(
        num_layers=2, width=64, num_heads=2, text_width=128, text_length=48, latent_channels=4, block_chunks=2
    ),
    text_layers=1,
    num_scales=3,
    tokenizer_batch=2,
    batch=2,
    pool=6,
    held_out=4,
    pixels="0.0001M",
)

EveryStep = functools.partial(LoopConfig, checkpoint_minutes=0.0, log_every=1)
"""In place of ``LoopConfig``: a checkpoint and a row of the table after every step."""


def main(directory, steps):
    transformer_stage.LoopConfig = EveryStep
    original = transformer_stage.Placement.put_batch

    def slowly(*arguments):
        time.sleep(0.5)  # long enough to be killed in between
        return original(*arguments)

    transformer_stage.Placement.put_batch = slowly
    transformer_stage.train_transformer(Path(directory), RECIPE, steps)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
