"""The first stage of an embedded model: the image tokenizer, on freshly drawn pictures."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from convert import image_tokenizer as image_tokenizer_table
from convert.rules import fill_module, official_state_dict
from convert.safetensors_io import open_safetensors, save_safetensors
from toprovar_jax.errors import UserInputError
from toprovar_jax.generation import InfinityModel
from toprovar_jax.hub import find_model
from toprovar_jax.image_tokenizer import ImageTokenizer, encode_scales
from toprovar_jax.loading import IMAGE_TOKENIZER, load_model
from toprovar_jax.scenes.judge import Judge
from toprovar_jax.scenes.renderer import empty_scene_image
from toprovar_jax.shapes import Array, Float
from toprovar_jax.training.adversarial import AdversarialTrainer
from toprovar_jax.training.image_tokenizer import TokenizerTrainer, residual_sums
from toprovar_jax.training.loop import LoopConfig, run
from toprovar_jax.training.placement import Placement
from toprovar_jax.training.recipes import Recipe, draw_scenes
from toprovar_jax.training.sheets import write_sheet
from toprovar_jax.training.timing import EVALUATIONS, Work, steps_within


def train_image_tokenizer(
    directory: Path,
    recipe: Recipe,
    num_steps: int | None,
    *,
    minutes: float = 0.0,
    placement: Placement | None = None,
    report: Callable[[str], None] = print,
) -> None:
    """Train, and write ``image_tokenizer.safetensors`` (encoder and decoder) into ``directory``.

    Args:
      directory: the stage's own files go into its folder ``tokenizer``.
      recipe: what to make.
      num_steps: how long; None for as many as take ``minutes``.
      minutes: see ``num_steps``.
      placement: devices; default one of them.
      report: receives lines.

    Raises:
      UserInputError: a recipe that does not fit the devices, its start or the folder.
    """
    begun, own = time.monotonic(), directory / "tokenizer"
    placement = placement or Placement.over(jax.devices()[:1])
    placement.check_batch(recipe.tokenizer_batch)
    grids = recipe.schedule.latent_grids
    # Latents are standardised by batch while training; afterwards by these pictures.
    calibration = recipe.draw(jax.random.key(1000), 256)[1]
    held_out = recipe.draw(jax.random.key(99), 24)[1]

    features = Judge.load().features if recipe.perceptual else None

    def trainer_of(steps: int) -> TokenizerTrainer | AdversarialTrainer:
        empty = empty_scene_image(*recipe.schedule.pixel_size)
        trainer = TokenizerTrainer(recipe.tokenizer_as_trained, recipe.tokenizer_training(steps), empty, features)
        return AdversarialTrainer(trainer) if recipe.adversarial else trainer

    def build(steps: int) -> Work:
        trainer = trainer_of(steps)

        def evaluate(state: Any, _: int) -> Mapping[str, float]:
            decoded, entropies = _round_trip(trainer.finish(state, calibration), held_out, grids)
            write_sheet(own / "samples.png", [held_out, *decoded])
            errors = [jnp.mean(jnp.square(picture - held_out), axis=(1, 2, 3)) for picture in decoded]
            psnr = {f"psnr{k}": float(jnp.mean(-10.0 * jnp.log10(error + 1e-10))) for k, error in enumerate(errors)}
            return psnr | {f"entropy{k}": float(entropy) for k, entropy in enumerate(entropies)}

        given = starting_networks(recipe)
        start = trainer.init(0) if given is None else trainer.start_at(given.image_tokenizer)
        state = placement.put_state(start)
        return Work(state, _step_on(placement, trainer, recipe, state), evaluate)

    planned = num_steps or steps_within(own, build, minutes, begun)
    report(f"{planned} steps")
    work = build(planned)
    loop = LoopConfig(
        own,
        planned,
        recipe=recipe.of_tokenizer,
        images_per_step=recipe.tokenizer_batch,
        flops_per_step=trainer_of(planned).step_flops(recipe.tokenizer_batch),
        **({} if num_steps else {"evaluate_every": -(-planned // EVALUATIONS)}),
    )
    state = run(work.state, work.step, loop, evaluate=work.evaluate, report=report)
    finished = trainer_of(planned).finish(state, calibration)
    tensors = official_state_dict(finished, image_tokenizer_table.rules(recipe.image_tokenizer))
    save_safetensors(directory / IMAGE_TOKENIZER, tensors, {"format": "pt", "steps": str(int(state.step))})


def _step_on(
    placement: Placement, trainer: TokenizerTrainer | AdversarialTrainer, recipe: Recipe, state: Any
) -> Callable[..., Any]:
    """A step that draws, renders and trains, each device on its part of the pictures."""
    render = placement.on_each(recipe.render)

    def whole(state: Any, number: Array) -> Any:
        data_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(7), number))
        return trainer.step(state, render(draw_scenes(data_key, recipe.tokenizer_batch)), noise_key)

    compiled = placement.compile(whole, state)
    return lambda state, number: compiled(state, jnp.asarray(number, jnp.uint32))


def starting_networks(recipe: Recipe, folder: Path | None = None) -> InfinityModel | None:
    """The networks in ``folder``, or else those that the recipe starts from; None for random ones.

    Raises:
      UserInputError: their configurations are not the recipe's.
    """
    source = folder or recipe.start_from
    if source is None:
        return None
    card, networks, *_ = load_model(find_model(source), precision="exact", with_encoder=True)
    if (card.transformer, card.image_tokenizer) != (recipe.transformer, recipe.image_tokenizer):
        raise UserInputError(
            f"model {source} as the start of {recipe.name}",
            "must have the same configurations",
            "choose another",
        )
    return networks


def load_image_tokenizer(directory: Path, recipe: Recipe) -> ImageTokenizer:
    """What the stage wrote.

    Raises:
      UserInputError: it has not been run.
    """
    path = directory / IMAGE_TOKENIZER
    if not path.is_file():
        raise UserInputError(f"directory {directory}", f"holds no {IMAGE_TOKENIZER}", "run the stage tokenizer first")
    abstract = nnx.eval_shape(lambda: ImageTokenizer(recipe.tokenizer_as_trained, rngs=nnx.Rngs(0)))
    rules = image_tokenizer_table.rules(recipe.image_tokenizer)
    filled: Any = fill_module(abstract, rules, open_safetensors(path), source=str(path))
    return filled


@functools.partial(jax.jit, static_argnums=2)
def _round_trip(
    tokenizer: ImageTokenizer, images: Float[Array, "B h w 3"], grids: tuple[tuple[int, int], ...]
) -> tuple[list[Array], list[Array]]:
    """Pictures decoded from the first 1, 2, ... scales, and the mean entropy of each scale's bits (by channel)."""
    latents = tokenizer.encode(images)
    means = [jnp.mean(bits.astype(jnp.float32), axis=(0, 1, 2)) for bits in encode_scales(latents, grids).bits]
    entropies = [jnp.mean(-(p * jnp.log2(p + 1e-6) + (1 - p) * jnp.log2(1 - p + 1e-6))) for p in means]
    return [tokenizer.decode(total) for total in residual_sums(latents, grids)], entropies
