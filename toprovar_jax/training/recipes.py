"""What fixes an embedded model, apart from how long it is trained."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from toprovar_jax.config import ImageTokenizerConfig, InfinityConfig, Precision
from toprovar_jax.scenes.renderer import render
from toprovar_jax.scenes.sampling import sample_scenes
from toprovar_jax.scenes.world import Scenes
from toprovar_jax.schedule import ScaleSchedule
from toprovar_jax.shapes import Array, Float, Key
from toprovar_jax.text_encoder import T5Config
from toprovar_jax.training.image_tokenizer import TokenizerTraining
from toprovar_jax.training.losses import ScaleWeights
from toprovar_jax.training.transformer import TransformerTraining

_TOKENIZER_LOSSES = ("perceptual", "entropy", "adversarial", "adversarial_from")

_SAMPLING = ("guidance", "tau")
"""Fields that training does not depend on."""

_YOUNGER = (*_TOKENIZER_LOSSES, "scale_weights", "unroll")
"""Fields that records of older checkpoints do not have."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that fixes the embedded model, apart from the number of steps.

    Attributes:
      name: of the model.
      image_tokenizer, transformer: configurations; captions are padded to the latter's ``text_length``, and none may
        be longer.
      text_layers: depth of the text encoder; its vocabulary is that of the captions.
      num_scales: of the square template; with the tokenizer's stride it fixes the size of the pictures.
      tokenizer_batch, batch: pictures per step of either stage.
      pool: encoded pictures that the transformer is trained on, again and again with new captions; None renders and
        encodes new ones at every step, which an accelerator does on the way and a CPU does not.
      held_out: pictures for its evaluation, a multiple of ``batch``.
      pixels: name of the model's only pixel budget.
      seed: of the transformer stage.
      learning_rates: the constant value of the image tokenizer's and of the transformer's.
      start_from: a model (:func:`toprovar_jax.hub.find_model`) with the same configurations, other scales perhaps,
        whose weights are the start of both stages; None for random ones.
      precision: of matrix products and convolutions while training. Parameters, optimiser, norms and losses are
        float32 either way.
      remat: whether the transformer's layers are computed again in the backward pass instead of kept.
      unroll: whether the transformer's layers are compiled one by one instead of as a loop, which a CPU may gain from
        (``benchmarks/training_speed.py`` measures a recipe both ways; it depends on the batch).
      perceptual, entropy, adversarial, adversarial_from: of the image tokenizer's loss
        (:class:`~toprovar_jax.training.image_tokenizer.TokenizerTraining`). The perceptual one compares what the judge
        of scenes sees, and needs pictures of 32 pixels a side.
      scale_weights: what a token's loss weighs (:func:`~toprovar_jax.training.losses.token_weights`).
      guidance, tau: how pictures are sampled, in sheets and by default, one number or one per scale.
    """

    name: str
    image_tokenizer: ImageTokenizerConfig
    transformer: InfinityConfig
    text_layers: int
    num_scales: int
    tokenizer_batch: int
    batch: int
    pool: int | None
    held_out: int
    pixels: str
    seed: int = 0
    learning_rates: tuple[float, float] = (2e-3, 2e-3)
    start_from: str | None = None
    precision: Precision = "exact"
    remat: bool = False
    unroll: bool = False
    perceptual: float = 0.0
    entropy: float = 0.0
    adversarial: float = 0.0
    adversarial_from: int = 1000
    scale_weights: ScaleWeights = "root"
    guidance: float | tuple[float, ...] = 2.0
    tau: float | tuple[float, ...] = 1.0

    @property
    def schedule(self) -> ScaleSchedule:
        """The scales of a picture."""
        return ScaleSchedule.of("1:1", self.num_scales, token_stride=self.image_tokenizer.stride)

    def text_encoder(self, vocab_size: int) -> T5Config:
        """The text encoder for a vocabulary; narrow inside, since a caption is a handful of known words."""
        width = self.transformer.text_width
        dtype = "float32" if self.precision == "exact" else "bfloat16"
        return T5Config(
            vocab_size,
            width,
            head_dim=32,
            feed_forward_width=width,
            num_layers=self.text_layers,
            num_heads=4,
            compute_dtype=dtype,
        )

    @property
    def tokenizer_as_trained(self) -> ImageTokenizerConfig:
        """The image tokenizer at the recipe's precision."""
        return dataclasses.replace(self.image_tokenizer, precision=self.precision)

    @property
    def of_tokenizer(self) -> dict[str, Any]:
        """What the first stage depends on: its checkpoints serve all recipes that agree in this."""
        names = ("image_tokenizer", "num_scales", "tokenizer_batch", "start_from", "precision", *_TOKENIZER_LOSSES)
        return self._record(names) | {"learning_rate": self.learning_rates[0]}

    @property
    def of_transformer(self) -> dict[str, Any]:
        """What the second stage depends on, the first one's result included."""
        return self._record(field.name for field in dataclasses.fields(self) if field.name not in _SAMPLING)

    def _record(self, names: Iterable[str]) -> dict[str, Any]:
        """Fields by name; younger ones only where they are not at their default, which is what older records mean."""
        defaults = {field.name: field.default for field in dataclasses.fields(self) if field.name in _YOUNGER}
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}

    def transformer_as_trained(self, devices: int) -> InfinityConfig:
        """The transformer at the recipe's precision.

        Several devices compute attention in plain XLA, which a compiler can split; it cannot split kernels.
        """
        attention = ("xla",) if devices > 1 else self.transformer.attention
        return dataclasses.replace(self.transformer, precision=self.precision, attention=attention)

    def tokenizer_training(self, num_steps: int) -> TokenizerTraining:
        """Hyperparameters of the first stage."""
        grids = self.schedule.latent_grids
        losses = {name: getattr(self, name) for name in _TOKENIZER_LOSSES}
        return TokenizerTraining(grids, num_steps=num_steps, learning_rate=self.learning_rates[0], **losses)

    def transformer_training(self, num_steps: int) -> TransformerTraining:
        """Hyperparameters of the second stage."""
        base = TransformerTraining.for_scenes(num_steps)
        own = {name: getattr(self, name) for name in ("remat", "unroll", "scale_weights")}
        return dataclasses.replace(base, learning_rate=self.learning_rates[1], **own)

    def draw(self, key: Key[Array, ""], batch: int) -> tuple[Scenes, Float[Array, "B h w 3"]]:
        """Random scenes and their pictures, in [0, 1]."""
        scenes = draw_scenes(key, batch)
        return scenes, self.render(scenes)

    def render(self, scenes: Scenes) -> Float[Array, "B h w 3"]:
        """Pictures of scenes, in [0, 1]."""
        height, width = self.schedule.pixel_size
        return render(scenes, height=height, width=width)


draw_scenes = functools.partial(jax.jit, static_argnums=1)(sample_scenes)
"""Random scenes as one program."""

SCENES_SMALL = Recipe(
    name="scenes-small",
    image_tokenizer=ImageTokenizerConfig(
        latent_channels=32, stride=8, base_width=24, width_multipliers=(1, 1, 2, 4), num_res_blocks=1
    ),
    transformer=InfinityConfig(
        num_layers=6, width=128, num_heads=4, text_width=256, text_length=32, latent_channels=32, block_chunks=2
    ),
    text_layers=2,
    num_scales=5,
    tokenizer_batch=8,
    batch=64,
    pool=40960,
    held_out=512,
    pixels="0.004M",
    unroll=True,
    guidance=(1.0, 2.0, 3.0, 3.0, 3.0),
    tau=(1.5, 1.0, 1.0, 1.0, 1.0),
)
"""64 x 64 pixels, 121 tokens of 32 bits: small enough to train on two CPU cores.

The first scale is sampled freely, since what captions leave open is decided there, and later ones keep to the caption.
"""

SCENES_MEDIUM = dataclasses.replace(
    SCENES_SMALL,
    name="scenes-medium",
    num_scales=7,
    batch=8,
    pool=3072,
    held_out=128,
    pixels="0.016M",
    unroll=False,
    guidance=2.0,
    tau=1.0,
    learning_rates=(1e-3, 1e-3),
    start_from="scenes-small",
)
"""128 x 128 pixels, 521 tokens: the small model's weights, trained on at twice the resolution."""

SCENES_BASE = Recipe(
    name="scenes-base",
    image_tokenizer=ImageTokenizerConfig(
        latent_channels=32, stride=16, base_width=32, width_multipliers=(1, 1, 2, 4, 4), num_res_blocks=1
    ),
    transformer=InfinityConfig(
        num_layers=10, width=320, num_heads=5, text_width=256, text_length=48, latent_channels=32, block_chunks=2
    ),
    text_layers=2,
    num_scales=7,
    tokenizer_batch=64,
    batch=256,
    pool=None,
    held_out=512,
    pixels="0.06M",
    learning_rates=(1e-3, 2e-3),
    precision="fast",
    remat=True,
)
"""256 x 256 pixels, 521 tokens, 22 million parameters (45 MB in bfloat16): for one accelerator and 25 minutes. Learning
rates are those of the small model and its half, not searched."""

RECIPES: Mapping[str, Recipe] = {recipe.name: recipe for recipe in (SCENES_SMALL, SCENES_MEDIUM, SCENES_BASE)}
