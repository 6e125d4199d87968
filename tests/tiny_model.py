"""A complete model folder with random weights, small enough to compile in seconds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from toprovar_jax.config import ImageTokenizerConfig, InfinityConfig
from toprovar_jax.generation import InfinityModel
from toprovar_jax.image_tokenizer import ImageTokenizer
from toprovar_jax.loading import save_model
from toprovar_jax.model import Infinity
from toprovar_jax.model_card import ModelCard
from toprovar_jax.text_encoder import T5Config, T5Encoder, build_word_tokenizer

WORDS = ["a", "an", "the", "red", "green", "blue", "sphere", "cube", "cone", "on", "left", "right"]
TEXT_LENGTH = 12
SCALES, SIDE = 3, 8
TOKENIZER_JSON = build_word_tokenizer(WORDS).to_str()

CARD = ModelCard(
    name="tiny",
    transformer=InfinityConfig(
        num_layers=2,
        width=64,
        num_heads=2,
        text_width=128,
        text_length=TEXT_LENGTH,
        latent_channels=4,
        block_chunks=1,
    ),
    image_tokenizer=ImageTokenizerConfig(
        latent_channels=4, stride=2, base_width=24, width_multipliers=(1, 1), num_res_blocks=1
    ),
    text_encoder=T5Config(vocab_size=64, width=128, head_dim=16, feed_forward_width=64, num_layers=1, num_heads=2),
    pixel_budgets=(("tiny", SCALES), ("less", 2)),
    default_pixels="tiny",
    guidance=2.0,
    top_k=0,
    top_p=1.0,
    training=(("steps", 0), ("notes", ["random"])),
)
"""8 x 8 pixels in three scales; knows every prompt."""

SCENES_CARD = dataclasses.replace(CARD, name="tiny-scenes", world="scenes")
"""The same, but for the embedded world only."""


def networks(card: ModelCard = CARD) -> InfinityModel:
    """Networks in which everything matters: what training starts at zero is random as well."""
    model = InfinityModel(
        Infinity(card.transformer, rngs=nnx.Rngs(0)),
        ImageTokenizer(card.image_tokenizer, rngs=nnx.Rngs(1)),
        T5Encoder(card.text_encoder, rngs=nnx.Rngs(2)),
    )
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda x: x + jnp.asarray(0.06 * rng.standard_normal(x.shape), x.dtype), model)


def write_tiny_model(folder: Path, card: ModelCard = CARD) -> Path:
    """Write the folder; returns it."""
    save_model(folder, card, networks(card), TOKENIZER_JSON)
    return folder
