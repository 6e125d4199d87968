"""Makes the embedded model: ``python -m toprovar_jax.training.scenes all --directory runs/scenes``.

Three stages, each of which continues where it was when it is started again: the image tokenizer on freshly drawn
pictures; transformer and text encoder on a pool of encoded pictures whose captions are drawn anew at every use; and
the export of the newest checkpoint as a model folder.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from PIL import Image

from convert import image_tokenizer as image_tokenizer_table
from convert.rules import fill_module, official_state_dict
from convert.safetensors_io import open_safetensors, save_safetensors
from toprovar_jax.checkpoint import Checkpoints
from toprovar_jax.config import ImageTokenizerConfig, InfinityConfig
from toprovar_jax.errors import UserInputError, unknown_name
from toprovar_jax.generation import InfinityModel
from toprovar_jax.hub import find_model
from toprovar_jax.image_tokenizer import ImageTokenizer, encode_scales
from toprovar_jax.loading import IMAGE_TOKENIZER, TOKENIZER, load_model, save_model
from toprovar_jax.model_card import ModelCard
from toprovar_jax.scenes.captions import VOCABULARY, captions
from toprovar_jax.scenes.renderer import empty_scene_image, render
from toprovar_jax.scenes.world import Scenes, sample_scenes
from toprovar_jax.schedule import ScaleSchedule
from toprovar_jax.shapes import Array, Float, Int, Key
from toprovar_jax.text_encoder import T5Config, TextTokenizer, build_word_tokenizer
from toprovar_jax.training.image_tokenizer import TokenizerState, TokenizerTrainer, TokenizerTraining, residual_sums
from toprovar_jax.training.loop import LoopConfig, run
from toprovar_jax.training.transformer import Captions, TransformerState, TransformerTrainer, TransformerTraining

CAPTION_TOKENS = 20
"""Captions are padded to this many tokens while training; the longest has 17."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that fixes the embedded model, apart from the number of steps.

    Attributes:
      name: of the model.
      image_tokenizer, transformer: configurations.
      text_layers: depth of the text encoder; its vocabulary is that of the captions.
      num_scales: of the square template; with the tokenizer's stride it fixes the size of the pictures.
      tokenizer_batch, batch: pictures per step of either stage.
      pool: encoded pictures that the transformer is trained on.
      held_out: pictures for its evaluation, a multiple of ``batch``.
      pixels: name of the model's only pixel budget.
      seed: of the transformer stage.
      learning_rates: the constant value of the image tokenizer's and of the transformer's.
      start_from: a model (:func:`toprovar_jax.hub.find_model`) with the same configurations, other scales perhaps,
        whose weights are the start of both stages; None for random ones.
    """

    name: str
    image_tokenizer: ImageTokenizerConfig
    transformer: InfinityConfig
    text_layers: int
    num_scales: int
    tokenizer_batch: int
    batch: int
    pool: int
    held_out: int
    pixels: str
    seed: int = 0
    learning_rates: tuple[float, float] = (2e-3, 2e-3)
    start_from: str | None = None

    @property
    def schedule(self) -> ScaleSchedule:
        """The scales of a picture."""
        return ScaleSchedule.of("1:1", self.num_scales, token_stride=self.image_tokenizer.stride)

    def text_encoder(self, vocab_size: int) -> T5Config:
        """The text encoder for a vocabulary; narrow inside, since a caption is a handful of known words."""
        width = self.transformer.text_width
        return T5Config(
            vocab_size, width, head_dim=32, feed_forward_width=width, num_layers=self.text_layers, num_heads=4
        )

    def draw(self, key: Key[Array, ""], batch: int) -> tuple[Scenes, Float[Array, "B h w 3"]]:
        """Random scenes and their pictures, in [0, 1]."""
        height, width = self.schedule.pixel_size
        return _draw(key, batch, height, width)


SCENES_SMALL = Recipe(
    name="scenes-small",
    image_tokenizer=ImageTokenizerConfig(
        latent_channels=32, stride=8, base_width=24, width_multipliers=(1, 1, 2, 4), num_res_blocks=1
    ),
    transformer=InfinityConfig(
        num_layers=6, width=128, num_heads=4, text_width=256, text_length=24, latent_channels=32, block_chunks=2
    ),
    text_layers=2,
    num_scales=5,
    tokenizer_batch=8,
    batch=16,
    pool=16384,
    held_out=256,
    pixels="0.004M",
)
"""64 x 64 pixels, 121 tokens of 32 bits: small enough to train on two CPU cores."""

SCENES_MEDIUM = dataclasses.replace(
    SCENES_SMALL,
    name="scenes-medium",
    num_scales=7,
    batch=8,
    pool=3072,
    held_out=128,
    pixels="0.016M",
    learning_rates=(1e-3, 1e-3),
    start_from="scenes-small",
)
"""128 x 128 pixels, 521 tokens: the small model's weights, trained on at twice the resolution."""

RECIPES = {recipe.name: recipe for recipe in (SCENES_SMALL, SCENES_MEDIUM)}


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(key: Key[Array, ""], batch: int, height: int, width: int) -> tuple[Scenes, Float[Array, "B h w 3"]]:
    scenes = sample_scenes(key, batch)
    return scenes, render(scenes, height=height, width=width)


class Pool(NamedTuple):
    """Encoded pictures on the host: their scenes, and latents ``[pool, h, w, C]`` float32."""

    scenes: Scenes
    latents: np.ndarray

    def take(self, rows: Int[np.ndarray, " B"]) -> Pool:
        """Some of them."""
        return Pool(_host_scenes(field[rows] for field in self.scenes), self.latents[rows])


def train_image_tokenizer(directory: Path, recipe: Recipe, num_steps: int) -> None:
    """The first stage; writes ``image_tokenizer.safetensors`` (encoder and decoder) into ``directory``."""
    grids = recipe.schedule.latent_grids
    empty = empty_scene_image(*recipe.schedule.pixel_size)
    training = TokenizerTraining(grids, num_steps=num_steps, learning_rate=recipe.learning_rates[0])
    trainer = TokenizerTrainer(recipe.image_tokenizer, training, empty)
    # Latents are standardised by batch while training; afterwards by these pictures.
    calibration = recipe.draw(jax.random.key(1000), 256)[1]
    held_out = recipe.draw(jax.random.key(99), 24)[1]
    own = directory / "tokenizer"

    def step(state: TokenizerState, number: int) -> tuple[TokenizerState, Mapping[str, Array]]:
        data_key, noise_key = jax.random.split(jax.random.fold_in(jax.random.key(7), number))
        return trainer.step(state, recipe.draw(data_key, recipe.tokenizer_batch)[1], noise_key)

    def evaluate(state: TokenizerState, _: int) -> Mapping[str, float]:
        decoded, entropies = _round_trip(trainer.finish(state, calibration), held_out, grids)
        _write_sheet(own / "samples.png", [held_out, *decoded])
        errors = [jnp.mean(jnp.square(picture - held_out), axis=(1, 2, 3)) for picture in decoded]
        psnr = {f"psnr{k}": float(jnp.mean(-10.0 * jnp.log10(error + 1e-10))) for k, error in enumerate(errors)}
        return psnr | {f"entropy{k}": float(entropy) for k, entropy in enumerate(entropies)}

    given = _start(recipe)
    start = trainer.init(0) if given is None else trainer.start_at(given.image_tokenizer)
    state = run(start, step, LoopConfig(own, num_steps), evaluate=evaluate, report=_report)
    tensors = official_state_dict(
        trainer.finish(state, calibration), image_tokenizer_table.rules(recipe.image_tokenizer)
    )
    save_safetensors(directory / IMAGE_TOKENIZER, tensors, {"format": "pt", "steps": str(int(state.step))})


def train_transformer(directory: Path, recipe: Recipe, num_steps: int) -> TransformerState:
    """The second stage; needs the first one's result in ``directory``. Returns the final state.

    Raises:
      UserInputError: there is no image tokenizer in ``directory``.
    """
    text_tokenizer = _text_tokenizer(directory)
    trainer = _transformer_trainer(recipe, text_tokenizer, num_steps)
    training, held_out = _pools(directory, recipe)
    noise = jax.random.key(recipe.seed)

    def caption(scenes: Scenes, rng: np.random.Generator) -> Captions:
        batch = text_tokenizer.encode(captions(scenes, rng), max_length=CAPTION_TOKENS, strict=True)
        return Captions(jnp.asarray(batch.ids), jnp.asarray(batch.lengths))

    def step(state: TransformerState, number: int) -> tuple[TransformerState, Mapping[str, Array]]:
        rng = np.random.default_rng((recipe.seed, number))
        chosen = training.take(rng.choice(len(training.latents), recipe.batch, replace=False))
        key = jax.random.fold_in(noise, number)
        return trainer.step(state, jnp.asarray(chosen.latents), caption(chosen.scenes, rng), key)

    held_out_rng = np.random.default_rng((recipe.seed, 2**32))
    parts = [held_out.take(rows) for rows in np.arange(len(held_out.latents)).reshape(-1, recipe.batch)]
    batches = [(jnp.asarray(part.latents), caption(part.scenes, held_out_rng)) for part in parts]

    def evaluate(state: TransformerState, _: int) -> Mapping[str, float]:
        results = jax.device_get([trainer.evaluate(state, *batch) for batch in batches])
        return {name: float(np.mean([result[name] for result in results])) for name in results[0]}

    loop = LoopConfig(directory / "transformer", num_steps)
    given = _start(recipe)
    if given is None or given.text_encoder is None:
        start = trainer.init(recipe.seed)
    else:
        start = trainer.start_at(given.transformer, given.text_encoder)
    return run(start, step, loop, evaluate=evaluate, report=_report)


def export(directory: Path, recipe: Recipe, num_steps: int) -> Path:
    """The third stage: the newest checkpoint's averaged weights as a model folder, ``directory/model``.

    Raises:
      UserInputError: a stage before has not been run.
    """
    text_tokenizer = _text_tokenizer(directory)
    trainer = _transformer_trainer(recipe, text_tokenizer, num_steps)
    checkpoints = Checkpoints(directory / "transformer" / "checkpoints")
    step = checkpoints.latest_step
    if step is None:
        checkpoints.close()
        raise UserInputError(f"directory {directory}", "holds no transformer checkpoint", "run the stage transformer")
    state = checkpoints.restore(trainer.init(recipe.seed))
    checkpoints.close()
    transformer, text_encoder = trainer.networks(state)
    image_tokenizer = _load_image_tokenizer(directory, recipe)
    card = ModelCard(
        name=recipe.name,
        transformer=recipe.transformer,
        image_tokenizer=recipe.image_tokenizer,
        text_encoder=trainer.text_config,
        pixel_budgets=((recipe.pixels, recipe.num_scales),),
        default_pixels=recipe.pixels,
        guidance=2.0,
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
    save_model(folder, card, InfinityModel(transformer, image_tokenizer, text_encoder), tokenizer_json)
    return folder


def _text_tokenizer(directory: Path) -> TextTokenizer:
    """The captions' tokenizer; written at its first use, since a run must keep its vocabulary when it is resumed."""
    path = directory / TOKENIZER
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(build_word_tokenizer(VOCABULARY).to_str(pretty=True), encoding="utf-8")
        os.replace(partial, path)
    return TextTokenizer.from_file(path)


def _transformer_trainer(recipe: Recipe, text_tokenizer: TextTokenizer, num_steps: int) -> TransformerTrainer:
    text_encoder = recipe.text_encoder(text_tokenizer.vocab_size)
    training = dataclasses.replace(TransformerTraining.for_scenes(num_steps), learning_rate=recipe.learning_rates[1])
    return TransformerTrainer(recipe.transformer, text_encoder, training, recipe.schedule)


def _start(recipe: Recipe) -> InfinityModel | None:
    """The networks that training starts from, if not from random ones.

    Raises:
      UserInputError: their configurations are not the recipe's.
    """
    if recipe.start_from is None:
        return None
    card, networks, *_ = load_model(find_model(recipe.start_from), precision="exact", with_encoder=True)
    if (card.transformer, card.image_tokenizer) != (recipe.transformer, recipe.image_tokenizer):
        raise UserInputError(
            f"model {recipe.start_from} as the start of {recipe.name}",
            "must have the same configurations",
            "choose another",
        )
    return networks


def _load_image_tokenizer(directory: Path, recipe: Recipe) -> ImageTokenizer:
    path = directory / IMAGE_TOKENIZER
    if not path.is_file():
        raise UserInputError(f"directory {directory}", f"holds no {IMAGE_TOKENIZER}", "run the stage tokenizer first")
    abstract = nnx.eval_shape(lambda: ImageTokenizer(recipe.image_tokenizer, rngs=nnx.Rngs(0)))
    rules = image_tokenizer_table.rules(recipe.image_tokenizer)
    filled: Any = fill_module(abstract, rules, open_safetensors(path), source=str(path))
    return filled


def _pools(directory: Path, recipe: Recipe) -> tuple[Pool, Pool]:
    """Training and held-out pictures. They depend on the recipe and the tokenizer alone, so a copy on disk will do."""
    tokenizer = _load_image_tokenizer(directory, recipe)
    key = jax.random.key(recipe.seed)
    made_from = f"{recipe} {hashlib.sha256((directory / IMAGE_TOKENIZER).read_bytes()).hexdigest()}"
    path = directory / "transformer" / "pool.npz"
    if path.exists():
        with np.load(path) as stored:
            if str(stored["made_from"]) == made_from:
                return _unpack(stored, "training"), _unpack(stored, "held_out")
    _report(f"encoding {recipe.pool + recipe.held_out} pictures")
    pools = {
        "training": _encode(tokenizer, recipe, jax.random.fold_in(key, 0), recipe.pool),
        "held_out": _encode(tokenizer, recipe, jax.random.fold_in(key, 1), recipe.held_out),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    arrays: dict[str, Any] = {f"{name}_latents": pool.latents for name, pool in pools.items()}
    arrays |= {f"{name}_{f}": v for name, pool in pools.items() for f, v in pool.scenes._asdict().items()}
    np.savez(partial, made_from=np.array(made_from), **arrays)
    os.replace(partial, path)
    return pools["training"], pools["held_out"]


def _unpack(stored: Mapping[str, np.ndarray], name: str) -> Pool:
    return Pool(_host_scenes(stored[f"{name}_{field}"] for field in Scenes._fields), stored[f"{name}_latents"])


def _encode(tokenizer: ImageTokenizer, recipe: Recipe, key: Key[Array, ""], count: int, chunk: int = 32) -> Pool:
    graph, parameters = nnx.split(tokenizer)
    encode = jax.jit(lambda parameters, images: nnx.merge(graph, parameters).encode(images))
    scenes, latents = [], []
    for number in range(0, count, chunk):
        drawn, images = recipe.draw(jax.random.fold_in(key, number), chunk)
        scenes.append(jax.device_get(drawn))
        latents.append(np.asarray(encode(parameters, images)))
    fields = (np.concatenate(parts)[:count] for parts in zip(*scenes, strict=True))
    return Pool(_host_scenes(fields), np.concatenate(latents)[:count])


def _host_scenes(fields: Iterable[Any]) -> Scenes:
    """Scenes as numpy arrays: captions are made on the host."""
    return Scenes(*fields)


@functools.partial(jax.jit, static_argnums=2)
def _round_trip(
    tokenizer: ImageTokenizer, images: Float[Array, "B h w 3"], grids: tuple[tuple[int, int], ...]
) -> tuple[list[Array], list[Array]]:
    """Pictures decoded from the first 1, 2, ... scales, and the mean entropy of each scale's bits (by channel)."""
    latents = tokenizer.encode(images)
    means = [jnp.mean(bits.astype(jnp.float32), axis=(0, 1, 2)) for bits in encode_scales(latents, grids).bits]
    entropies = [jnp.mean(-(p * jnp.log2(p + 1e-6) + (1 - p) * jnp.log2(1 - p + 1e-6))) for p in means]
    return [tokenizer.decode(total) for total in residual_sums(latents, grids)], entropies


def _write_sheet(path: Path, rows: list[Array]) -> None:
    sheet = np.concatenate([np.concatenate(list(np.asarray(row[:12])), axis=1) for row in rows])
    Image.fromarray((sheet * 255).astype(np.uint8)).save(path)


def _report(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)


def main(arguments: list[str] | None = None, recipes: Mapping[str, Recipe] = RECIPES) -> int:
    """The command; returns its exit status."""

    def command(
        stage: Annotated[Literal["tokenizer", "transformer", "export", "all"], tyro.conf.Positional],
        directory: Path,
        tokenizer_steps: int = 3400,
        steps: int = 4200,
        recipe: str = next(iter(recipes)),
    ) -> Any:
        """Train and export the embedded model.

        Args:
          stage: what to do; what was finished before is not done again.
          directory: checkpoints, metrics and results.
          tokenizer_steps: steps of the image tokenizer.
          steps: steps of the transformer.
          recipe: name of the model to make.
        """
        if recipe not in recipes:
            raise unknown_name("recipe", recipe, recipes)
        chosen = recipes[recipe]
        if stage in ("tokenizer", "all"):
            train_image_tokenizer(directory, chosen, tokenizer_steps)
        if stage in ("transformer", "all"):
            train_transformer(directory, chosen, steps)
        if stage in ("export", "all"):
            _report(f"wrote {export(directory, chosen, steps)}")

    try:
        tyro.cli(command, args=arguments, prog="python -m toprovar_jax.training.scenes")
    except UserInputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
