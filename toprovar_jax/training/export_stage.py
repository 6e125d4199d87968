"""The last stage of an embedded model: the newest checkpoint as a model folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from toprovar_jax.checkpoint import Checkpoints
from toprovar_jax.errors import UserInputError
from toprovar_jax.generation import InfinityModel
from toprovar_jax.loading import TOKENIZER, save_model
from toprovar_jax.model_card import ModelCard
from toprovar_jax.training.recipes import Recipe
from toprovar_jax.training.tokenizer_stage import load_image_tokenizer
from toprovar_jax.training.transformer_stage import read_text_tokenizer, transformer_trainer


def export(directory: Path, recipe: Recipe) -> Path:
    """The newest checkpoint's averaged weights as a model folder, ``directory/model``.

    Raises:
      UserInputError: a stage before has not been run.
    """
    text_tokenizer = read_text_tokenizer(directory)
    # The optimiser's state has one structure, however long the run is; the exported arithmetic is the exact one's.
    exact = dataclasses.replace(recipe, precision="exact")
    trainer = transformer_trainer(exact, text_tokenizer, 1)
    checkpoints = Checkpoints(directory / "transformer" / "checkpoints")
    step = checkpoints.latest_step
    if step is None:
        checkpoints.close()
        raise UserInputError(f"directory {directory}", "holds no transformer checkpoint", "run the stage transformer")
    state = checkpoints.restore(trainer.init(recipe.seed))
    checkpoints.close()
    transformer, text_encoder = trainer.networks(state)
    card = ModelCard(
        name=recipe.name,
        transformer=recipe.transformer,
        image_tokenizer=recipe.image_tokenizer,
        text_encoder=trainer.text_config,
        pixel_budgets=((recipe.pixels, recipe.num_scales),),
        default_pixels=recipe.pixels,
        guidance=recipe.guidance,
        tau=recipe.tau,
        top_k=0,
        top_p=1.0,
        world="scenes",
        training=(
            ("program", "toprovar_jax.training.scenes"),
            ("steps", step),
            ("samples", step * recipe.batch),
            ("pool", recipe.pool),
            ("seed", recipe.seed),
            *((("start_from", recipe.start_from),) if recipe.start_from else ()),
        ),
    )
    folder = directory / "model"
    tokenizer_json = (directory / TOKENIZER).read_text(encoding="utf-8")
    networks = InfinityModel(transformer, load_image_tokenizer(directory, exact), text_encoder)
    save_model(folder, card, networks, tokenizer_json)
    return folder
