"""A tiny model with weights that all matter, for tests that need no reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from toprovar_jax.config import ImageTokenizerConfig, InfinityConfig
from toprovar_jax.generation import InfinityModel, Text
from toprovar_jax.image_tokenizer import ImageTokenizer
from toprovar_jax.model import Infinity

TRANSFORMER = InfinityConfig(
    num_layers=4, width=64, num_heads=4, text_width=128, text_length=12, latent_channels=8, block_chunks=2
)
TOKENIZER = ImageTokenizerConfig(latent_channels=8, stride=2, base_width=24, width_multipliers=(1, 1), num_res_blocks=1)
LENGTHS = (3, 7, 2, 5)


def drawn(create: Callable[[], Any], seed: int) -> Any:
    """The module that ``create`` makes, with parameters of visible size.

    Fresh ones start so small that most could not be told from zero. Nothing is computed but these numbers.
    """
    graph, state = nnx.split(nnx.eval_shape(create))
    random = np.random.default_rng(seed)
    filled = []
    for path, variable in nnx.to_flat_state(state):
        shape = variable.get_value().shape
        noise = random.standard_normal(shape)
        if path[-1] == "kernel":  # linear: [.., in, out]; convolution: [kh, kw, in, out]
            value = noise / np.sqrt(shape[-2] if len(shape) < 4 else np.prod(shape[:-1]))
        else:
            value = {"scale": 1.0, "log_scale": np.log(4.0)}.get(path[-1], 0.0) + 0.3 * noise
        filled.append((path, variable.replace(jnp.asarray(value, jnp.float32))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def transformer(seed: int = 1, **changes: Any) -> Infinity:
    """A transformer of the tiny configuration, with ``changes``."""
    config = dataclasses.replace(TRANSFORMER, **changes)
    return drawn(lambda: Infinity(config, rngs=nnx.Rngs(0)), seed)


def image_tokenizer(seed: int = 2) -> ImageTokenizer:
    """An image tokenizer that fits it; no encoder."""
    return drawn(lambda: ImageTokenizer(TOKENIZER, rngs=nnx.Rngs(0), with_encoder=False), seed)


def model(**changes: Any) -> InfinityModel:
    """Both, without a text encoder."""
    return InfinityModel(transformer(**changes), image_tokenizer())


def with_config(module: Infinity, **changes: Any) -> Infinity:
    """The same weights under another configuration."""
    other = nnx.eval_shape(lambda: Infinity(dataclasses.replace(module.config, **changes), rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.split(other)[0], nnx.split(module)[1])


def text(batch: int = 4, *, padded_to: int = 8, seed: int = 3, width: int = TRANSFORMER.text_width) -> Text:
    """Ragged random prompts; what stands beyond their lengths is large, so that looking at it is seen."""
    lengths = np.asarray(LENGTHS[:batch], np.int32)
    features = np.random.default_rng(seed).standard_normal((batch, 8, width)).astype(np.float32)
    features = np.pad(features, ((0, 0), (0, max(0, padded_to - 8)), (0, 0)), constant_values=50.0)[:, :padded_to]
    features[np.arange(padded_to)[None] >= lengths[:, None]] = 50.0
    return Text(jnp.asarray(features), jnp.asarray(lengths))


def image(whole: Any, index: int) -> Any:
    """Image ``index`` of a batch, as a batch of one."""
    return jax.tree.map(lambda x: x[index : index + 1], whole)


def keys(batch: int = 4, first: int = 0) -> jax.Array:
    """One key per image."""
    return jax.vmap(jax.random.key)(jnp.arange(first, first + batch))
