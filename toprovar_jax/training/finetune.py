"""Finetuning a finished model's transformer on pictures with captions: all of it, or low-rank adapters beside it.

The image tokenizer and the text encoder stay as they are. Loss, self-correction and text dropout are those of the
released models' training (MODEL_SPEC 9); stochastic depth is left out (our choice: few steps on little data from
weights that are good already).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from toprovar_jax.errors import UserInputError
from toprovar_jax.files import replace_file
from toprovar_jax.generation import InfinityModel
from toprovar_jax.image_tokenizer import ImageTokenizer
from toprovar_jax.model import Infinity
from toprovar_jax.model_card import ModelCard
from toprovar_jax.schedule import ScaleSchedule
from toprovar_jax.shapes import Array, Bool, Float, Int, Key, UInt8
from toprovar_jax.text_encoder import T5Encoder, TextTokenizer
from toprovar_jax.training.adapters import ATTENTION, Adapters, adapt, init_adapters, merge
from toprovar_jax.training.flops import count_flops
from toprovar_jax.training.image_text import ImageTextBatch
from toprovar_jax.training.image_tokenizer import moving_average
from toprovar_jax.training.losses import bit_cross_entropy, token_weights
from toprovar_jax.training.placement import Placement
from toprovar_jax.training.self_correction import TrainingTokens, draw_flips, self_correct
from toprovar_jax.training.transformer import decayed, drop_text


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Hyperparameters. What is not said otherwise is the released models' recipe (MODEL_SPEC 9.5).

    Attributes:
      num_steps: how many updates.
      rank: of the adapters; None trains the whole transformer.
      alpha: an adapter's scale times its rank; None: the rank, so that the scale is 1.
      patterns: which linear maps are adapted (:func:`toprovar_jax.training.adapters.chosen_layers`).
      learning_rate: after the warm-up; our choice, as usual for finetuning: 1e-4 with adapters, 1e-5 for everything.
      warmup_steps: linear increase at the start.
      decay: ``cosine`` falls to zero at the end, ``constant`` stays.
      weight_decay: of matrices only, adapters left out.
      clip: largest global gradient norm.
      text_dropout: share of captions that are replaced by the learned unconditional text.
      correction_strength, correction_scales: largest share of flipped bits, and in how many of the first scales.
      ema_decay: of averaged weights, which are then the result; 0 keeps none.
      accumulate: batches per update.
      gradient_checkpointing: compute activations twice instead of keeping those of all layers.
      seed: of adapters, noise and data.
    """

    num_steps: int
    rank: int | None = 16
    alpha: float | None = None
    patterns: tuple[str, ...] = ATTENTION
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    decay: Literal["constant", "cosine"] = "constant"
    weight_decay: float = 0.005
    clip: float = 5.0
    text_dropout: float = 0.1
    correction_strength: float = 0.3
    correction_scales: int = 13
    ema_decay: float = 0.0
    accumulate: int = 1
    gradient_checkpointing: bool = False
    seed: int = 0

    @property
    def scale(self) -> float:
        """Factor of the adapters' product."""
        return 1.0 if self.rank is None or self.alpha is None else self.alpha / self.rank


class Encoded(NamedTuple):
    """One batch as the frozen networks see it: latents, text features (padded) and visible text rows."""

    latents: Float[Array, "B h w C"]
    features: Float[Array, "B P E"]
    lengths: Int[Array, " B"]


class FinetuneState(NamedTuple):
    """Everything that a resumed run needs: what is trained (adapters, or the transformer's state), its average or None.

    The frozen weights are not part of it: they come from the model.
    """

    trained: Any
    average: Any
    optimizer: Any
    step: Int[Array, ""]


class Finetuner:
    """Loss, step and result of one finetuning.

    Args:
      card: the model.
      config: hyperparameters.
      schedules: of every aspect ratio that occurs.
    """

    def __init__(self, card: ModelCard, config: FinetuneConfig, schedules: Mapping[str, ScaleSchedule]):
        self.card, self.config, self.schedules = card, config, dict(schedules)
        self._graph = nnx.split(nnx.eval_shape(lambda: Infinity(card.transformer, rngs=nnx.Rngs(0))))[0]
        # An adapter's factors are not the kernel itself: pulling each to zero would be another rule.
        decay = optax.add_decayed_weights(config.weight_decay, mask=decayed) if config.rank is None else None
        parts = (optax.clip_by_global_norm(config.clip), optax.scale_by_adam(b1=0.9, b2=0.97), decay)
        rate = optax.scale_by_learning_rate(_learning_rate(config))
        self.optimizer = optax.chain(*(part for part in parts if part is not None), rate)

    def init(self, transformer: Infinity) -> FinetuneState:
        """The start: fresh adapters, or a float32 copy of the transformer.

        Raises:
          UserInputError: adapters that cannot be made (rank, patterns).
        """
        config = self.config
        if config.rank is None:
            trained: Any = jax.tree.map(lambda x: jnp.array(x, jnp.float32), nnx.split(transformer)[1])
        else:
            key = jax.random.fold_in(jax.random.key(config.seed), 2**31)
            trained = init_adapters(self.card.transformer, key, rank=config.rank, patterns=config.patterns)
        average = jax.tree.map(jnp.copy, trained) if config.ema_decay else None
        return FinetuneState(trained, average, self.optimizer.init(trained), jnp.zeros((), jnp.int32))

    @functools.partial(jax.jit, static_argnums=0)
    def encode(
        self,
        frozen: tuple[ImageTokenizer, T5Encoder],
        images: UInt8[Array, "B h w 3"],
        tokens: Int[Array, "B P"],
        lengths: Int[Array, " B"],
    ) -> Encoded:
        """What the frozen image tokenizer and text encoder make of pictures and token ids."""
        image_tokenizer, text_encoder = frozen
        latents = image_tokenizer.encode(images.astype(jnp.float32) / 255.0).astype(jnp.float32)
        return Encoded(latents, text_encoder(tokens, lengths), lengths)

    def gradient(
        self,
        trained: Any,
        base: Infinity | None,
        batch: Encoded,
        key: Key[Array, ""],
        bucket: str,
        so_far: Any = None,
    ) -> tuple[Any, dict[str, Array]]:
        """Gradient and metrics of one batch; everything random comes from ``key``.

        Args:
          trained: see :class:`FinetuneState`.
          base: the frozen transformer; None where all of it is trained.
          batch: from :meth:`encode`.
          key: of the flips and of the dropped captions.
          bucket: the batch's aspect ratio.
          so_far: gradient of the batches before, to which this one is added; its memory is used again.
        """
        return self._gradient(trained, base, batch, key, so_far, self.schedules[bucket])

    @functools.partial(jax.jit, static_argnums=(0, 6), donate_argnums=5)
    def _gradient(self, trained, base, batch, key, so_far, schedule):
        gradient, metrics = jax.grad(self.loss, has_aux=True)(trained, base, batch, key, schedule)
        return gradient if so_far is None else jax.tree.map(jnp.add, so_far, gradient), metrics

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def update(self, state: FinetuneState, gradient: Any) -> tuple[FinetuneState, dict[str, Array]]:
        """One update with the gradients of ``accumulate`` batches, summed."""
        gradient = jax.tree.map(lambda x: x / self.config.accumulate, gradient)
        updates, optimizer = self.optimizer.update(gradient, state.optimizer, state.trained)
        trained: Any = optax.apply_updates(state.trained, updates)
        average = state.average
        if average is not None:
            average = moving_average(average, trained, self.config.ema_decay, state.step)
        metrics = {"gradient_norm": optax.tree.norm(gradient)}
        return FinetuneState(trained, average, optimizer, state.step + 1), metrics

    def loss(
        self, trained: Any, base: Infinity | None, batch: Encoded, key: Key[Array, ""], schedule: ScaleSchedule
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The training loss and its metrics."""
        config, count = self.config, batch.latents.shape[0]
        flip_key, text_key = jax.random.split(key)
        flips = draw_flips(
            flip_key,
            schedule,
            count,
            self.card.transformer.latent_channels,
            strength=config.correction_strength,
            scales=config.correction_scales,
        )
        tokens = self_correct(batch.latents, schedule, flips)
        dropped = jax.random.bernoulli(text_key, config.text_dropout, (count,))
        loss = jnp.mean(self._losses(trained, base, batch, tokens, dropped, schedule))
        return loss, {"loss": loss}

    def evaluate(self, state: FinetuneState, base: Infinity | None, batch: Encoded, bucket: str) -> Float[Array, " B"]:
        """Loss of every picture with the result's weights, without any noise."""
        return self._evaluate(_result(state), base, batch, self.schedules[bucket])

    @functools.partial(jax.jit, static_argnums=(0, 4))
    def _evaluate(self, trained, base, batch, schedule):
        tokens = self_correct(batch.latents, schedule, ())
        kept = jnp.zeros(batch.latents.shape[:1], jnp.bool_)
        return self._losses(trained, base, batch, tokens, kept, schedule)

    def _losses(
        self,
        trained: Any,
        base: Infinity | None,
        batch: Encoded,
        tokens: TrainingTokens,
        dropped: Bool[Array, " B"],
        schedule: ScaleSchedule,
    ) -> Float[Array, " B"]:
        transformer = nnx.merge(self._graph, trained) if base is None else adapt(base, trained, self.config.scale)
        features = drop_text(transformer, batch.features, dropped)
        remat = self.config.gradient_checkpointing
        scores = transformer.parallel_logits(tokens.inputs, features, batch.lengths, schedule, remat=remat)
        weights = jnp.asarray(token_weights(schedule))
        return jnp.sum(bit_cross_entropy(scores, tokens.targets) * weights[None], axis=1)

    def step_flops(self, bucket: str, batch_size: int, text_rows: int) -> float:
        """Operations of the transformer's products in one update with batches of a bucket.

        Frozen kernels get no gradient, which spares a third; what is computed twice to save memory counts once.
        """
        # Kernels hide their products; the plain form has the same.
        plain = Finetuner(
            self.card.with_attention("reference"),
            dataclasses.replace(self.config, gradient_checkpointing=False),
            self.schedules,
        )
        config, schedule = plain.card.transformer, self.schedules[bucket]
        transformer = nnx.eval_shape(lambda: Infinity(config, rngs=nnx.Rngs(0)))
        trained = jax.eval_shape(plain.init, transformer).trained
        shapes = ((*schedule.latent_grids[-1], config.latent_channels), (text_rows, config.text_width))
        arrays: Any = [jax.ShapeDtypeStruct((batch_size, *shape), jnp.float32) for shape in shapes]
        arrays.append(jax.ShapeDtypeStruct((batch_size,), jnp.int32))
        batch = Encoded(*arrays)
        key = jax.eval_shape(lambda: jax.random.key(0))
        gradient = jax.grad(lambda trained, base, batch, key: plain.loss(trained, base, batch, key, schedule)[0])
        base = None if self.config.rank is None else transformer
        return self.config.accumulate * count_flops(gradient, trained, base, batch, key)

    def transformer(self, state: FinetuneState, base: Infinity | None) -> Infinity:
        """The result as a plain transformer: adapters are merged into ``base``."""
        if base is None:
            return nnx.merge(self._graph, _result(state))
        return merge(base, self.adapters(state), self.config.scale)

    def adapters(self, state: FinetuneState) -> Adapters:
        """The result's adapters."""
        return _result(state)


def _result(state: FinetuneState) -> Any:
    return state.trained if state.average is None else state.average


def _learning_rate(config: FinetuneConfig) -> optax.Schedule:
    rest = max(config.num_steps - config.warmup_steps, 1)
    cosine = config.decay == "cosine"
    after = optax.cosine_decay_schedule if cosine else lambda rate, _: optax.constant_schedule(rate)
    schedule = after(config.learning_rate, rest)
    if not config.warmup_steps:
        return schedule
    rise = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([rise, schedule], [config.warmup_steps])


class FrozenEncoders:
    """Pictures and captions to what the transformer is trained on, with a memory on disk where wanted.

    Args:
      finetuner: whose programs to use.
      networks: the model's; the image tokenizer with its encoder.
      tokenizer: of captions; those that are too long lose their last words.
      text_length: rows of text, the same for all batches.
      cache: a folder for latents and text features, one file per picture; None encodes every time anew. A stored
        picture is what it was when it was first encoded, in whichever batch that was.
      model: what the stored numbers depend on beside the pictures, such as a checksum of the networks.
      placement: devices that share every batch, and that have a copy of the networks each; None: the default device.
    """

    def __init__(
        self,
        finetuner: Finetuner,
        networks: InfinityModel,
        tokenizer: TextTokenizer,
        text_length: int,
        *,
        cache: Path | None = None,
        model: str = "",
        placement: Placement | None = None,
    ):
        if networks.text_encoder is None:
            raise UserInputError("a model without text encoder", "cannot be finetuned on captions", "take another")
        self._finetuner, self._frozen = finetuner, (networks.image_tokenizer, networks.text_encoder)
        self._tokenizer, self._length, self._cache, self._model = tokenizer, text_length, cache, model
        self._put = (lambda arrays: jax.tree.map(jnp.asarray, arrays)) if placement is None else placement.put_batch

    def __call__(self, batch: ImageTextBatch) -> Encoded:
        """Encode a batch."""
        if self._cache is None:
            return self._encode(batch)
        paths = [self._cache / f"{self._name(batch, row)}.npz" for row in range(len(batch.samples))]
        if not all(path.is_file() for path in paths):
            encoded = jax.device_get(self._encode(batch))
            for path, latents, features, length in zip(paths, *encoded, strict=True):
                content = io.BytesIO()  # without padding, which is zeros
                np.savez(content, latents=latents, features=features[:length])
                replace_file(path, content.getbuffer())
        latents, features, lengths = [], [], []
        for path in paths:
            with np.load(path) as stored:
                latents.append(stored["latents"])
                rows = stored["features"]
            lengths.append(len(rows))
            features.append(np.pad(rows, ((0, self._length - len(rows)), (0, 0))))
        arrays: Any = self._put((np.stack(latents), np.stack(features), np.array(lengths, np.int32)))
        return Encoded(*arrays)

    def _encode(self, batch: ImageTextBatch) -> Encoded:
        captions = [sample.caption for sample in batch.samples]
        tokens = self._tokenizer.encode(captions, max_length=self._length)
        return self._finetuner.encode(self._frozen, *self._put((batch.images, tokens.ids, tokens.lengths)))

    def _name(self, batch: ImageTextBatch, row: int) -> str:
        digest = hashlib.sha256(f"{self._model} {self._length} {batch.samples[row].caption}".encode())
        digest.update(batch.images[row].tobytes())
        return digest.hexdigest()[:32]
