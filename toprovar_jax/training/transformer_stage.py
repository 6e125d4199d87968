"""The second stage of an embedded model: transformer and text encoder, on latents of the finished image tokenizer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from toprovar_jax.files import replace_file
from toprovar_jax.generation import InfinityModel
from toprovar_jax.image_tokenizer import ImageTokenizer
from toprovar_jax.loading import IMAGE_TOKENIZER, TOKENIZER
from toprovar_jax.scenes.captions import VOCABULARY
from toprovar_jax.scenes.world import Scenes
from toprovar_jax.shapes import Array
from toprovar_jax.text_encoder import TextTokenizer, build_word_tokenizer
from toprovar_jax.training.ahead import Ahead
from toprovar_jax.training.loop import LoopConfig, run
from toprovar_jax.training.placement import Placement
from toprovar_jax.training.recipes import Recipe
from toprovar_jax.training.scene_data import Batch, batch_maker, make_pools, write_captions
from toprovar_jax.training.sheets import prompt_sheet
from toprovar_jax.training.timing import EVALUATIONS, Work, steps_within
from toprovar_jax.training.tokenizer_stage import load_image_tokenizer, starting_networks
from toprovar_jax.training.transformer import TransformerState, TransformerTrainer

SHEET_EVERY = 5
"""Evaluations from one sheet of samples to the next; there is one at the end in any case."""


def train_transformer(
    directory: Path,
    recipe: Recipe,
    num_steps: int | None,
    *,
    minutes: float = 0.0,
    start_from: Path | None = None,
    placement: Placement | None = None,
    report: Callable[[str], None] = print,
) -> TransformerState:
    """Train; needs the first stage's result in ``directory``. Returns the final state.

    Args:
      directory: the stage's own files go into its folder ``transformer``.
      recipe: what to make.
      num_steps: how long; None for as many as take ``minutes``.
      minutes: see ``num_steps``.
      start_from: model folder to start from instead of the recipe's start.
      placement: devices; default one of them.
      report: receives lines.

    Raises:
      UserInputError: there is no image tokenizer in ``directory``, or a recipe that does not fit the devices, its start
        or the folder.
    """
    begun, own = time.monotonic(), directory / "transformer"
    placement = placement or Placement.over(jax.devices()[:1])
    placement.check_batch(recipe.batch)
    text_tokenizer = read_text_tokenizer(directory)
    image_tokenizer = load_image_tokenizer(directory, recipe)
    report("encoding pictures")
    pool, held_out = make_pools(own, recipe, image_tokenizer, (directory / IMAGE_TOKENIZER).read_bytes())
    make = batch_maker(recipe, text_tokenizer, pool)
    write = prompt_sheet(text_tokenizer, recipe)
    rng = np.random.default_rng((recipe.seed, 2**32))
    parts = [held_out.take(rows) for rows in np.arange(len(held_out.latents)).reshape(-1, recipe.batch)]
    batches = [(jnp.asarray(part.latents), write_captions(part.scenes, recipe, text_tokenizer, rng)) for part in parts]

    def build(steps: int, ahead: Callable[[int], Batch] = make, sheet_every: int = 1) -> Work:
        trainer = transformer_trainer(recipe, text_tokenizer, steps, placement.devices)

        def evaluate(state: TransformerState, step: int) -> Mapping[str, float]:
            results = jax.device_get([trainer.evaluate(state, *batch) for batch in batches])
            if step % sheet_every == 0 or step == steps:
                transformer, text_encoder = trainer.networks(state)
                write(own / "samples.png", InfinityModel(transformer, image_tokenizer, text_encoder))
            return {name: float(np.mean([result[name] for result in results])) for name in results[0]}

        given = starting_networks(recipe, start_from)
        if given is None or given.text_encoder is None:
            start = trainer.init(recipe.seed)
        else:
            start = trainer.start_at(given.transformer, given.text_encoder)
        state = placement.put_state(start)
        step = _step_on(placement, trainer, recipe, image_tokenizer, state)

        def with_data(state: TransformerState, number: int) -> Any:
            return step(state, placement.put_batch(ahead(number)), jnp.asarray(number, jnp.uint32))

        return Work(state, with_data, evaluate)

    planned = num_steps or steps_within(own, build, minutes, begun)
    report(f"{planned} steps")
    trainer = transformer_trainer(recipe, text_tokenizer, planned, placement.devices)
    loop = LoopConfig(
        own,
        planned,
        recipe=recipe.of_transformer,
        images_per_step=recipe.batch,
        flops_per_step=trainer.step_flops(recipe.batch, recipe.transformer.text_length),
        **({} if num_steps else {"evaluate_every": -(-planned // EVALUATIONS)}),
    )
    ahead = Ahead(make, planned)
    work = build(planned, ahead, SHEET_EVERY * loop.evaluate_every)
    try:
        return run(work.state, work.step, loop, evaluate=work.evaluate, report=report)
    finally:
        ahead.close()


def _step_on(
    placement: Placement, trainer: TransformerTrainer, recipe: Recipe, image_tokenizer: ImageTokenizer, state: Any
) -> Callable[..., Any]:
    """A step on a batch of latents, or of scenes that it renders and encodes, each device its part."""
    graph, parameters = nnx.split(image_tokenizer)
    encoder = placement.put_state(parameters)
    render = placement.on_each(recipe.render)

    def whole(state: Any, batch: Batch, number: Array, encoder: Any) -> Any:
        pictures = batch.pictures
        latents = nnx.merge(graph, encoder).encode(render(pictures)) if isinstance(pictures, Scenes) else pictures
        key = jax.random.fold_in(jax.random.key(recipe.seed), number)
        return trainer.step(state, latents, batch.captions, key)

    compiled = placement.compile(whole, state)
    return lambda state, batch, number: compiled(state, batch, number, encoder)


def read_text_tokenizer(directory: Path) -> TextTokenizer:
    """The captions' tokenizer; written at its first use, since a run must keep its vocabulary when it is resumed."""
    path = directory / TOKENIZER
    if not path.exists():
        replace_file(path, build_word_tokenizer(VOCABULARY).to_str(pretty=True).encode())
    return TextTokenizer.from_file(path)


def transformer_trainer(
    recipe: Recipe, text_tokenizer: TextTokenizer, num_steps: int, devices: int = 1
) -> TransformerTrainer:
    """The stage's trainer for a number of steps."""
    text_encoder = recipe.text_encoder(text_tokenizer.vocab_size)
    training = recipe.transformer_training(num_steps)
    return TransformerTrainer(recipe.transformer_as_trained(devices), text_encoder, training, recipe.schedule)
