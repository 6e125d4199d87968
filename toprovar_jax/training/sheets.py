"""Contact sheets that a training writes while it runs."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from toprovar_jax.files import replace_file
from toprovar_jax.generation import InfinityModel, encode_text, generate
from toprovar_jax.sampling import Sampling
from toprovar_jax.text_encoder import TextTokenizer
from toprovar_jax.training.recipes import Recipe

PROMPTS = (
    "a red sphere",
    "a small blue cube",
    "a yellow cone and a green cylinder",
    "a black cube and an orange sphere",
    "three purple cones",
    "two red cylinders",
    "a blue sphere to the left of a yellow cube",
    "a green cone behind a red sphere",
)
"""What the transformer is asked for again and again, in the order of the pictures."""


def write_sheet(path: Path, rows: Sequence[Any]) -> None:
    """Pictures in [0, 1], one row for each ``[B, h, w, 3]``, at most 12 in a row."""
    sheet = np.concatenate([np.concatenate(list(np.asarray(row[:12])), axis=1) for row in rows])
    encoded = io.BytesIO()
    Image.fromarray((sheet * 255).astype(np.uint8)).save(encoded, format="png")
    replace_file(path, encoded.getbuffer())


def prompt_sheet(tokenizer: TextTokenizer, recipe: Recipe) -> Callable[[Path, InfinityModel], None]:
    """What writes a model's pictures of :data:`PROMPTS`, two rows with one seed each; compiled at its first use.

    Args:
      tokenizer: of the prompts.
      recipe: of the model.
    """
    batch = tokenizer.encode(list(PROMPTS), max_length=recipe.transformer.text_length, strict=False)
    ids, lengths = jnp.asarray(batch.ids), jnp.asarray(batch.lengths)
    sampling = Sampling(guidance=recipe.guidance, tau=recipe.tau, top_k=0, top_p=1.0)

    @jax.jit
    def draw(model: InfinityModel, keys: Any) -> Any:
        text = encode_text(model, ids, lengths)
        return generate(model, text, keys, schedule=recipe.schedule, sampling=sampling).images

    def write(path: Path, model: InfinityModel) -> None:
        keys = [jax.random.split(jax.random.key(seed), len(PROMPTS)) for seed in (0, 1)]
        write_sheet(path, [draw(model, each) for each in keys])

    return write
