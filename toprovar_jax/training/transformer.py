"""Training the transformer, and a text encoder with it, on latents of a finished image tokenizer (MODEL_SPEC 9)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from toprovar_jax.config import InfinityConfig
from toprovar_jax.errors import UserInputError
from toprovar_jax.model import Infinity
from toprovar_jax.schedule import ScaleSchedule
from toprovar_jax.shapes import Array, Bool, Float, Int, Key
from toprovar_jax.text_encoder import T5Config, T5Encoder
from toprovar_jax.training.flops import TRAINING, count_flops
from toprovar_jax.training.image_tokenizer import moving_average
from toprovar_jax.training.losses import ScaleWeights, bit_accuracy, bit_cross_entropy, token_weights, weighted_loss
from toprovar_jax.training.self_correction import TrainingTokens, draw_flips, self_correct


@dataclasses.dataclass(frozen=True)
class TransformerTraining:
    """Hyperparameters; the defaults are those of the released models' recipe (MODEL_SPEC 9.5).

    Attributes:
      num_steps: where the learning rate's schedule ends.
      learning_rate: its constant value; the recipe's is 6e-3 for a batch of 256, in proportion to the batch.
      warmup_steps: linear increase at the start, over the constant part at most.
      constant: share of the steps after which the learning rate falls as a cosine to zero; 1 keeps it.
      weight_decay: of matrices only.
      clip: largest global gradient norm.
      text_dropout: share of captions that are replaced by the learned unconditional text.
      correction_strength, correction_scales: largest share of flipped bits, for all scales or for each
        (:func:`~toprovar_jax.training.self_correction.draw_flips`), and in how many of the first scales.
      drop_path: stochastic-depth rate of the last layer; linear from zero at the first.
      initial_gate: value of the residual gates (gammas) at the start of a short run; None keeps the tiny random ones.
      ema_decay: of the averaged weights, which are the result; 0 keeps the last weights instead.
      scale_weights: what a token's loss weighs (:func:`~toprovar_jax.training.losses.token_weights`).
      remat: whether the layers are computed again in the backward pass instead of kept; for memory.
      unroll: whether layers are compiled one by one instead of as a loop; for speed on a CPU.
    """

    num_steps: int
    learning_rate: float = 6e-3
    warmup_steps: int = 0
    constant: float = 1.0
    weight_decay: float = 0.005
    clip: float = 5.0
    text_dropout: float = 0.1
    correction_strength: float | tuple[float, ...] = 0.3
    correction_scales: int = 13
    drop_path: float = 0.1
    initial_gate: float | None = None
    ema_decay: float = 0.0
    scale_weights: ScaleWeights = "root"
    remat: bool = False
    unroll: bool = False

    @classmethod
    def for_scenes(cls, num_steps: int) -> TransformerTraining:
        """What works for a small model, a small world and a short run at batches of 16 to 64.

        No bits are flipped at the first two scales. What the caption leaves open is decided there: a model that learns
        to doubt them decides anew in every cell of the next scale, and an object that may stand anywhere is often drawn
        in none.
        """
        return cls(
            num_steps,
            learning_rate=2e-3,
            warmup_steps=100,
            constant=0.6,
            weight_decay=0.01,
            clip=1.0,
            correction_strength=(0.0, 0.0, 0.1),
            drop_path=0.0,
            initial_gate=0.3,
            ema_decay=0.998,
        )


Parameters = dict[str, Any]
"""State of each network (``nnx.State``), under ``transformer`` and ``text_encoder``."""

_NAMES = ("transformer", "text_encoder")


class Captions(NamedTuple):
    """Tokenised text of one batch: padded ids and the visible length, end token included."""

    tokens: Int[Array, "B P"]
    lengths: Int[Array, " B"]


class TransformerState(NamedTuple):
    """Everything that a resumed run needs."""

    parameters: Parameters
    average: Parameters
    optimizer: Any
    step: Int[Array, ""]


class TransformerTrainer:
    """Loss, step and result of one training.

    Args:
      config: the transformer.
      text_config: the text encoder, trained jointly.
      training: hyperparameters.
      schedule: the scales.

    Raises:
      UserInputError: transformer and text encoder do not fit.
    """

    def __init__(
        self, config: InfinityConfig, text_config: T5Config, training: TransformerTraining, schedule: ScaleSchedule
    ):
        if config.text_width != text_config.width:
            raise UserInputError(
                f"text encoder of width {text_config.width}",
                f"must be as wide as the transformer's text_width={config.text_width}",
                "change one of the configurations",
            )
        self.config, self.text_config, self.training, self.schedule = config, text_config, training, schedule
        transformer, text_encoder = nnx.eval_shape(lambda: self._create(0))
        self._graphs = nnx.split(transformer)[0], nnx.split(text_encoder)[0]
        decay = optax.add_decayed_weights(training.weight_decay, mask=decayed)
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(training.clip),
            optax.scale_by_adam(b1=0.9, b2=0.97),
            decay,
            optax.scale_by_learning_rate(_learning_rate(training)),
        )

    def init(self, seed: int) -> TransformerState:
        """Fresh weights."""
        # One program instead of one per random draw.
        parameters = jax.jit(
            lambda: {name: nnx.split(module)[1] for name, module in zip(_NAMES, self._create(seed), strict=True)}
        )()
        return self._start(parameters)

    def start_at(self, transformer: Infinity, text_encoder: T5Encoder) -> TransformerState:
        """The weights of these networks as the start."""
        networks = (transformer, text_encoder)
        return self._start({name: nnx.split(module)[1] for name, module in zip(_NAMES, networks, strict=True)})

    def _start(self, parameters: Parameters) -> TransformerState:
        average = jax.tree.map(jnp.copy, parameters)
        return TransformerState(parameters, average, self.optimizer.init(parameters), jnp.zeros((), jnp.int32))

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def step(
        self, state: TransformerState, latents: Float[Array, "B h w C"], captions: Captions, key: Key[Array, ""]
    ) -> tuple[TransformerState, dict[str, Array]]:
        """One update on a batch of latents and their captions; everything random comes from ``key``."""
        gradient, metrics = jax.grad(self._loss, has_aux=True)(state.parameters, latents, captions, key)
        updates, optimizer = self.optimizer.update(gradient, state.optimizer, state.parameters)
        parameters: Any = optax.apply_updates(state.parameters, updates)
        average = moving_average(state.average, parameters, self.training.ema_decay, state.step)
        metrics |= {"gradient_norm": optax.tree.norm(gradient)}
        return TransformerState(parameters, average, optimizer, state.step + 1), metrics

    @functools.partial(jax.jit, static_argnums=0)
    def evaluate(
        self, state: TransformerState, latents: Float[Array, "B h w C"], captions: Captions
    ) -> dict[str, Array]:
        """Loss, bits per image and accuracy per scale of the averaged weights, without any noise."""
        tokens = self_correct(latents, self.schedule, ())
        scores = self._scores(state.average, tokens, captions, jnp.zeros(latents.shape[:1], jnp.bool_), None)
        accuracy = bit_accuracy(scores, tokens.targets, self.schedule)
        return self._measure(scores, tokens) | {f"accuracy{k}": value for k, value in enumerate(accuracy)}

    def networks(self, state: TransformerState) -> tuple[Infinity, T5Encoder]:
        """The averaged transformer and text encoder."""
        return self._merge(state.average)

    def step_flops(self, batch: int, caption_tokens: int) -> float:
        """Operations of the products of one step, whatever is computed twice to save memory."""
        # Kernels hide their products; the plain form has the same.
        plain = TransformerTrainer(
            dataclasses.replace(self.config, attention=("reference",)), self.text_config, self.training, self.schedule
        )
        side = self.schedule.latent_grids[-1]
        latents = jax.ShapeDtypeStruct((batch, *side, self.config.latent_channels), jnp.float32)
        captions: Any = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, caption_tokens), (batch,)))
        parameters = jax.eval_shape(lambda: plain.init(0)).parameters
        key = jax.eval_shape(lambda: jax.random.key(0))
        return TRAINING * count_flops(plain._loss, parameters, latents, Captions(*captions), key)

    def _merge(self, parameters: Parameters) -> tuple[Infinity, T5Encoder]:
        transformer, text_encoder = self._graphs
        return nnx.merge(transformer, parameters[_NAMES[0]]), nnx.merge(text_encoder, parameters[_NAMES[1]])

    def _create(self, seed: int) -> tuple[Infinity, T5Encoder]:
        rngs = nnx.Rngs(seed)
        transformer, text_encoder = Infinity(self.config, rngs=rngs), T5Encoder(self.text_config, rngs=rngs)
        if self.training.initial_gate is not None:
            gates = transformer.layers.modulation
            gates[...] = gates[...].at[:, :2].set(self.training.initial_gate)
        return transformer, text_encoder

    def _loss(self, parameters, latents, captions, key):
        training, batch = self.training, latents.shape[0]
        flip_key, text_key, path_key = jax.random.split(key, 3)
        flips = draw_flips(
            flip_key,
            self.schedule,
            batch,
            self.config.latent_channels,
            strength=training.correction_strength,
            scales=training.correction_scales,
        )
        tokens = self_correct(latents, self.schedule, flips)
        dropped = jax.random.bernoulli(text_key, training.text_dropout, (batch,))
        keep = keep_factors(path_key, self.config.num_layers, batch, training.drop_path)
        scores = self._scores(parameters, tokens, captions, dropped, keep)
        metrics = self._measure(scores, tokens)
        return metrics["loss"], metrics

    def _scores(
        self,
        parameters: Parameters,
        tokens: TrainingTokens,
        captions: Captions,
        dropped: Bool[Array, " B"],
        keep: Float[Array, "L 2 B"] | None,
    ) -> Float[Array, "B S Z 2"]:
        transformer, text_encoder = self._merge(parameters)
        unroll = self.training.unroll
        features = drop_text(transformer, text_encoder(captions.tokens, captions.lengths, unroll=unroll), dropped)
        return transformer.parallel_logits(
            tokens.inputs,
            features,
            captions.lengths,
            self.schedule,
            keep=keep,
            remat=self.training.remat,
            unroll=unroll,
        )

    def _measure(self, scores: Float[Array, "B S Z 2"], tokens: TrainingTokens) -> dict[str, Array]:
        cross_entropy = bit_cross_entropy(scores, tokens.targets)
        bits = jnp.mean(jnp.sum(cross_entropy, axis=1)) * (self.config.token_bits / jnp.log(2.0))
        weights = jnp.asarray(token_weights(self.schedule, self.training.scale_weights))
        return {"loss": weighted_loss(cross_entropy, weights), "image_bits": bits}


def drop_text(
    transformer: Infinity, features: Float[Array, "B P E"], dropped: Bool[Array, " B"]
) -> Float[Array, "B P E"]:
    """Text features with the learned unconditional rows in place of the ``dropped`` samples' (MODEL_SPEC 9.3).

    Only rows up to a sample's own length are ever looked at, so the unconditional text is as long as the prompt.
    """
    rows = transformer.text.unconditional_rows(*features.shape[:2])
    return jnp.where(dropped[:, None, None], rows, features)


def keep_factors(key: Key[Array, ""], layers: int, batch: int, drop_path: float) -> Float[Array, "L 2 B"] | None:
    """Stochastic depth: 0 where a layer's branch is dropped for a sample, else one over the chance to be kept.

    The rate is linear in depth, from 0 to ``drop_path``. None, and no work, where that is 0.
    """
    if not drop_path:
        return None
    chance = 1.0 - jnp.linspace(0.0, drop_path, layers, dtype=jnp.float32)[:, None, None]
    return jax.random.bernoulli(key, chance, (layers, 2, batch)).astype(jnp.float32) / chance


def decayed(parameters: Any) -> Any:
    """For every parameter whether weight decay applies: to matrices alone.

    Biases, norms, attention scales, embeddings, modulation tables and learned queries are left out.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: _is_matrix(jax.tree_util.keystr(path)), parameters)


def _is_matrix(path: str) -> bool:
    text_matrix = "text_encoder" in path and ("'attention'" in path or "'feed_forward'" in path)
    return "'kernel'" in path or text_matrix


def _learning_rate(training: TransformerTraining) -> optax.Schedule:
    hold = round(training.constant * training.num_steps)
    warmup = min(training.warmup_steps, hold)
    parts = [optax.constant_schedule(training.learning_rate)]
    starts = []
    if warmup:
        parts.insert(0, optax.linear_schedule(0.0, training.learning_rate, warmup))
        starts.append(warmup)
    if hold < training.num_steps:
        parts.append(optax.cosine_decay_schedule(training.learning_rate, training.num_steps - hold))
        starts.append(hold)
    return optax.join_schedules(parts, starts)
