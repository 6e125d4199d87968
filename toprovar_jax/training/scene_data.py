"""What the transformer is trained on: encoded pictures of scenes, from a pool or made on the way, and captions."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from toprovar_jax.files import replace_file
from toprovar_jax.image_tokenizer import ImageTokenizer
from toprovar_jax.scenes.captions import captions
from toprovar_jax.scenes.world import Scenes
from toprovar_jax.shapes import Int, Key
from toprovar_jax.text_encoder import TextTokenizer
from toprovar_jax.training.recipes import Recipe, draw_scenes
from toprovar_jax.training.transformer import Captions

_POOL_FIELDS = ("image_tokenizer", "num_scales", "pool", "held_out", "seed", "precision")
"""Of a recipe: what its pools depend on, besides the tokenizer's weights."""


class Pool(NamedTuple):
    """Encoded pictures on the host: their scenes, and latents ``[pool, h, w, C]`` float32."""

    scenes: Scenes
    latents: np.ndarray

    def take(self, rows: Int[np.ndarray, " B"]) -> Pool:
        """Some of them."""
        return Pool(host_scenes(field[rows] for field in self.scenes), self.latents[rows])


class Batch(NamedTuple):
    """One step's data on the host: ``pictures`` are latents of a pool, or scenes that are still to be rendered."""

    pictures: np.ndarray | Scenes
    captions: Captions


def batch_maker(recipe: Recipe, tokenizer: TextTokenizer, pool: Pool | None) -> Callable[[int], Batch]:
    """The batch of a step, a function of the recipe and the step's number alone; captions are drawn anew every time.

    Args:
      recipe: says how many.
      tokenizer: of the captions.
      pool: encoded pictures; without them every batch holds new scenes.
    """

    def make(number: int) -> Batch:
        rng = np.random.default_rng((recipe.seed, number))
        if pool is not None:
            chosen = pool.take(rng.choice(len(pool.latents), recipe.batch, replace=False))
            return Batch(chosen.latents, write_captions(chosen.scenes, recipe, tokenizer, rng))
        # Apart from the key that the pools are drawn with, whose other numbers are taken.
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(recipe.seed), 2), number)
        scenes = host_scenes(jax.device_get(draw_scenes(key, recipe.batch)))
        return Batch(scenes, write_captions(scenes, recipe, tokenizer, rng))

    return make


def write_captions(scenes: Scenes, recipe: Recipe, tokenizer: TextTokenizer, rng: np.random.Generator) -> Captions:
    """A caption for every scene, as padded token ids on the host."""
    batch = tokenizer.encode(captions(scenes, rng), max_length=recipe.transformer.text_length, strict=True)
    return Captions(np.asarray(batch.ids), np.asarray(batch.lengths))  # type: ignore[arg-type]


def make_pools(directory: Path, recipe: Recipe, tokenizer: ImageTokenizer, source: bytes) -> tuple[Pool | None, Pool]:
    """Training and held-out pictures; without a pool in the recipe only the latter.

    Args:
      directory: holds ``pool.npz``, a copy that will do if it comes from the same fields of the recipe and the same
        tokenizer.
      recipe: how many.
      tokenizer: encodes them.
      source: the bytes the tokenizer was read from.
    """
    key = jax.random.key(recipe.seed)
    made_from = f"{[getattr(recipe, name) for name in _POOL_FIELDS]} {hashlib.sha256(source).hexdigest()}"
    path = directory / "pool.npz"
    sizes = {"training": recipe.pool, "held_out": recipe.held_out}
    if path.exists():
        with np.load(path) as stored:
            if str(stored["made_from"]) == made_from:
                return _unpack(stored, "training") if recipe.pool else None, _unpack(stored, "held_out")
    pools = {
        name: _encode(tokenizer, recipe, jax.random.fold_in(key, number), size)
        for number, (name, size) in enumerate(sizes.items())
        if size is not None
    }
    arrays: dict[str, Any] = {f"{name}_latents": pool.latents for name, pool in pools.items()}
    arrays |= {f"{name}_{f}": v for name, pool in pools.items() for f, v in pool.scenes._asdict().items()}
    packed = io.BytesIO()
    np.savez(packed, made_from=np.array(made_from), **arrays)
    replace_file(path, packed.getbuffer())
    return pools.get("training"), pools["held_out"]


def host_scenes(fields: Iterable[Any]) -> Scenes:
    """Scenes as numpy arrays: captions are made on the host."""
    return Scenes(*fields)


def _unpack(stored: Mapping[str, np.ndarray], name: str) -> Pool:
    return Pool(host_scenes(stored[f"{name}_{field}"] for field in Scenes._fields), stored[f"{name}_latents"])


def _encode(tokenizer: ImageTokenizer, recipe: Recipe, key: Key[jax.Array, ""], count: int, chunk: int = 32) -> Pool:
    graph, parameters = nnx.split(tokenizer)
    encode = jax.jit(lambda parameters, images: nnx.merge(graph, parameters).encode(images))
    scenes, latents = [], []
    for number in range(0, count, chunk):
        drawn, images = recipe.draw(jax.random.fold_in(key, number), chunk)
        scenes.append(jax.device_get(drawn))
        latents.append(np.asarray(encode(parameters, images)))
    fields = (np.concatenate(parts)[:count] for parts in zip(*scenes, strict=True))
    return Pool(host_scenes(fields), np.concatenate(latents)[:count])
