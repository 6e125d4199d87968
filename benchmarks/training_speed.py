"""How fast an embedded model's two stages train here: images/s, GFLOP/s, share of peak and memory.

``python benchmarks/training_speed.py --recipe scenes-small`` writes ``results/training_speed_scenes-small.json``. Each
stage starts in a process of its own, so that its peak of memory is its own; weights are random, data is as in training.
Where the recipe compiles layers one by one, the second stage is also measured with a loop over them.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from toprovar_jax.image_tokenizer import ImageTokenizer
from toprovar_jax.scenes.captions import VOCABULARY
from toprovar_jax.scenes.renderer import empty_scene_image
from toprovar_jax.text_encoder import TextTokenizer, build_word_tokenizer
from toprovar_jax.training import tokenizer_stage, transformer_stage
from toprovar_jax.training.image_tokenizer import TokenizerTrainer
from toprovar_jax.training.metrics import speed
from toprovar_jax.training.placement import Placement
from toprovar_jax.training.recipes import RECIPES
from toprovar_jax.training.scene_data import Pool, batch_maker, draw_scenes, host_scenes

RESULTS = Path(__file__).parent / "results"


LOOP = "transformer, layers as a loop"


def measure(stage: str, recipe_name: str, steps: int) -> dict[str, Any]:
    recipe, placement = RECIPES[recipe_name], Placement.over()
    if stage == LOOP:
        recipe = dataclasses.replace(recipe, unroll=False)
    if stage == "tokenizer":
        empty = empty_scene_image(*recipe.schedule.pixel_size)
        trainer = TokenizerTrainer(recipe.tokenizer_as_trained, recipe.tokenizer_training(1000), empty)
        state = placement.put_state(trainer.init(0))
        step = tokenizer_stage._step_on(placement, trainer, recipe, state)
        images, flops = recipe.tokenizer_batch, trainer.step_flops(recipe.tokenizer_batch)
    else:
        text = TextTokenizer(build_word_tokenizer(VOCABULARY))
        trainer = transformer_stage.transformer_trainer(recipe, text, 1000, placement.devices)
        tokenizer = ImageTokenizer(recipe.tokenizer_as_trained, rngs=nnx.Rngs(0))
        pool = None
        if recipe.pool is not None:
            grid = recipe.schedule.latent_grids[-1]
            shape = (recipe.batch, *grid, recipe.image_tokenizer.latent_channels)
            scenes = host_scenes(jax.device_get(draw_scenes(jax.random.key(0), recipe.batch)))
            pool = Pool(scenes, np.random.default_rng(0).standard_normal(shape, np.float32))
        make = batch_maker(recipe, text, pool)
        state = placement.put_state(trainer.init(0))
        compiled = transformer_stage._step_on(placement, trainer, recipe, tokenizer, state)

        def step(state, number):
            return compiled(state, placement.put_batch(make(number)), jnp.asarray(number, jnp.uint32))

        images, flops = recipe.batch, trainer.step_flops(recipe.batch, recipe.transformer.text_length)
    clock = time.perf_counter()
    state = jax.block_until_ready(step(state, 0)[0])
    first = time.perf_counter() - clock
    seconds = []
    for number in range(1, steps + 1):
        clock = time.perf_counter()
        state = jax.block_until_ready(step(state, number)[0])
        seconds.append(time.perf_counter() - clock)
    devices = list(placement.mesh.devices.ravel())
    each = float(np.median(seconds))
    return {
        "first_step_seconds": first,
        "seconds_per_step": each,
        "batch": images,
        **speed(each, images=images, flops=flops, devices=devices),
    }


def main(recipe: str = "scenes-small", steps: int = 10) -> None:
    """Measure both stages of a recipe.

    Args:
      recipe: its name.
      steps: how many are timed; the median counts.
    """
    result: dict[str, Any] = {"recipe": recipe, "precision": RECIPES[recipe].precision}
    for stage in ("tokenizer", "transformer", *([LOOP] if RECIPES[recipe].unroll else [])):
        with multiprocessing.get_context("spawn").Pool(1) as workers:
            result[stage] = workers.apply(measure, (stage, recipe, steps))
    result["device"] = f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
    path = RESULTS / f"training_speed_{recipe}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    tyro.cli(main)
