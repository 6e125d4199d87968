"""Training the image tokenizer on pictures.

Three choices matter more than any width (measured on the scenes world):

* The encoder's output is standardised per channel and scaled by a fixed gain while training, and the standardisation
  is folded into its last convolution afterwards: otherwise the coarse scales only code a constant offset.
* No term asks for balanced bits. Cells that show nothing but background are asked for the background's latents
  instead, which makes the bits predictable for the transformer. Entropy terms are there for other data; their weight
  is 0, since on scenes they made the code harder to predict.
* Some pictures are decoded from a prefix of the scales, so that the coarse scales carry what matters most.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from toprovar_jax.config import ImageTokenizerConfig
from toprovar_jax.errors import UserInputError
from toprovar_jax.image_tokenizer.autoencoder import Encoder, ImageTokenizer
from toprovar_jax.image_tokenizer.bsq import bits_to_codes, latents_to_bits
from toprovar_jax.image_tokenizer.resize import resize_area, resize_bilinear
from toprovar_jax.schedule import Grid
from toprovar_jax.shapes import Array, Bool, Float, Int, Key
from toprovar_jax.training.flops import TRAINING, count_flops


@dataclasses.dataclass(frozen=True)
class TokenizerTraining:
    """Hyperparameters.

    Attributes:
      grids: latent grids of the scales, coarse to fine.
      latent_gain: root mean square of every latent channel, in code amplitudes ``1 / sqrt(C)``.
      truncation: share of pictures that are decoded from a prefix of the scales.
      commitment: weight of the distance between latents and codes, in squared code amplitudes.
      consistency: weight of the distance between background cells and the empty picture's cells.
      foreground: extra pixel weight where the picture differs from the empty one.
      perceptual: weight of the distance between features of pictures and reconstructions; needs ``features``.
      adversarial, adversarial_from: weight of the loss that a discriminator gives, and the step it starts at; needs
        :class:`~toprovar_jax.training.adversarial.AdversarialTrainer`.
      entropy: weight of the entropy terms (:func:`entropy_penalty`).
      learning_rate, num_steps: Adam, constant for half of the steps, then cosine to zero.
      warmup_steps: linear increase at the start, over half of the steps at most.
      ema_decay: of the averaged weights, which are the result.
    """

    grids: tuple[Grid, ...]
    latent_gain: float = 2.5
    truncation: float = 0.2
    commitment: float = 0.02
    consistency: float = 0.3
    foreground: float = 4.0
    learning_rate: float = 2e-3
    num_steps: int = 5000
    warmup_steps: int = 50
    ema_decay: float = 0.998
    perceptual: float = 0.0
    adversarial: float = 0.0
    adversarial_from: int = 1000
    entropy: float = 0.0


Features = Callable[[Float[Array, "B h w 3"]], Float[Array, "B F"]]
"""What pictures in [0, 1] look like to some network."""


class TokenizerState(NamedTuple):
    """Everything that a resumed run needs."""

    parameters: nnx.State
    average: nnx.State
    optimizer: Any
    step: Int[Array, ""]


class TokenizerTrainer:
    """Loss, step and result of one training.

    Args:
      config: the tokenizer.
      training: hyperparameters.
      empty: the picture without objects, ``[h, w, 3]`` in [0, 1].
      features: differentiable, for the perceptual loss.

    Raises:
      UserInputError: a perceptual loss without features.
    """

    def __init__(
        self,
        config: ImageTokenizerConfig,
        training: TokenizerTraining,
        empty: Float[Array, "h w 3"],
        features: Features | None = None,
    ):
        if training.perceptual and features is None:
            raise UserInputError(
                f"perceptual weight {training.perceptual}", "needs a network that gives features", "pass features"
            )
        self.config, self.training, self.empty, self.features = config, training, empty, features
        self.graph = nnx.split(nnx.eval_shape(lambda: ImageTokenizer(config, rngs=nnx.Rngs(0))))[0]
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(1.0), optax.adam(_learning_rate(training), b1=0.9, b2=0.97)
        )

    def init(self, seed: int) -> TokenizerState:
        """Fresh weights."""
        return self.start_at(ImageTokenizer(self.config, rngs=nnx.Rngs(seed)))

    def start_at(self, tokenizer: ImageTokenizer) -> TokenizerState:
        """The weights of ``tokenizer``, encoder included, as the start."""
        parameters = nnx.split(tokenizer)[1]
        average = jax.tree.map(jnp.copy, parameters)
        return TokenizerState(parameters, average, self.optimizer.init(parameters), jnp.zeros((), jnp.int32))

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def step(
        self, state: TokenizerState, images: Float[Array, "B h w 3"], key: Key[Array, ""]
    ) -> tuple[TokenizerState, dict[str, Array]]:
        """One update.

        Raises:
          UserInputError: an adversarial loss, which takes a discriminator.
        """
        if self.training.adversarial:
            raise UserInputError(
                f"adversarial weight {self.training.adversarial}",
                "needs a discriminator",
                "train with an AdversarialTrainer",
            )
        gradient, metrics = jax.grad(self._loss, has_aux=True)(state.parameters, images, key)
        return self.apply(state, gradient), metrics

    def apply(self, state: TokenizerState, gradient: Any) -> TokenizerState:
        """The state after a gradient."""
        updates, optimizer = self.optimizer.update(gradient, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        average = moving_average(state.average, parameters, self.training.ema_decay, state.step)
        return TokenizerState(cast(nnx.State, parameters), average, optimizer, state.step + 1)

    @functools.partial(jax.jit, static_argnums=0)
    def finish(self, state: TokenizerState, images: Float[Array, "B h w 3"]) -> ImageTokenizer:
        """The averaged tokenizer with the latents' standardisation folded into its last encoder convolution.

        Mean and variance are those of ``images``: a few hundred, as they are in the data.
        """
        tokenizer = nnx.merge(self.graph, state.average)
        raw = tokenizer.encode(images)
        factor = self._gain * jax.lax.rsqrt(jnp.var(raw, axis=(0, 1, 2)) + 1e-6)
        last = cast(Encoder, tokenizer.encoder).conv_out
        last.kernel[...] = last.kernel[...] * factor[None, None, None]
        last.bias[...] = (last.bias[...] - jnp.mean(raw, axis=(0, 1, 2))) * factor
        return tokenizer

    @property
    def _gain(self) -> float:
        return self.training.latent_gain / self.config.latent_channels**0.5

    def step_flops(self, batch: int) -> float:
        """Operations of the convolutions of one step."""
        images = jax.ShapeDtypeStruct((batch, *self.empty.shape), jnp.float32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        return TRAINING * count_flops(self._loss, jax.eval_shape(lambda: self.init(0)).parameters, images, key)

    def _loss(self, parameters, images, key):
        loss, metrics, _ = self.loss(parameters, images, key)
        return loss, metrics

    def loss(
        self, parameters: Any, images: Float[Array, "B h w 3"], key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Array], Float[Array, "B h w 3"]]:
        """The loss without its adversarial part, its terms, and the reconstructions in [-1, 1]."""
        training, tokenizer = self.training, nnx.merge(self.graph, parameters)
        both = jnp.concatenate([images, self.empty[None]])
        raw = tokenizer.encode(both)
        mean = jnp.mean(raw[:-1], axis=(0, 1, 2))
        variance = jnp.var(raw[:-1], axis=(0, 1, 2))
        latents = (raw - mean[None, None, None]) * jax.lax.rsqrt(variance + 1e-6)[None, None, None] * self._gain
        partial_sums = residual_sums(jax.lax.stop_gradient(latents), training.grids)
        full = partial_sums[-1]

        which = self._truncate(key, both.shape[0])
        target = jnp.take_along_axis(jnp.stack(partial_sums), which[None, :, None, None, None], axis=0)[0]
        smooth = jnp.stack([low_pass(latents, grid) for grid in training.grids])
        smooth = jnp.take_along_axis(smooth, which[None, :, None, None, None], axis=0)[0]
        decoded = tokenizer.decoder(smooth + jax.lax.stop_gradient(target - smooth))

        difference = jnp.abs(both - self.empty[None]).max(axis=-1, keepdims=True)
        weight = 1.0 + training.foreground * (difference > 0.02).astype(jnp.float32)
        reconstruction = reconstruction_loss(decoded, both * 2.0 - 1.0, weight)
        commitment = jnp.mean(jnp.square(latents - full)) * self.config.latent_channels
        background = self._background_cells(difference)
        distance = jnp.square(latents - jax.lax.stop_gradient(latents[-1:])) / self._gain**2
        consistency = jnp.sum(distance.mean(axis=-1) * background) / (jnp.sum(background) + 1.0)
        loss = reconstruction + training.commitment * commitment + training.consistency * consistency
        metrics = {
            "loss": loss,
            "reconstruction": reconstruction,
            "commitment": commitment,
            "consistency": consistency,
            "psnr": psnr(decoded, both * 2.0 - 1.0, which == len(training.grids) - 1),
        }
        if training.perceptual and self.features is not None:
            distance = feature_distance(self.features, (jnp.clip(decoded, -1.0, 1.0) + 1.0) * 0.5, both)
            loss, metrics = loss + training.perceptual * distance, metrics | {"perceptual": distance}
        if training.entropy:
            inputs = [resize_area(latents, training.grids[0])]
            inputs += [
                resize_area(latents - jax.lax.stop_gradient(total), grid)
                for total, grid in zip(partial_sums, training.grids[1:], strict=False)
            ]
            penalty = jnp.mean(jnp.stack([entropy_penalty(cells) for cells in inputs]))
            loss, metrics = loss + training.entropy * penalty, metrics | {"entropy": penalty}
        return loss, metrics | {"loss": loss}, decoded[:-1]

    def _truncate(self, key: Key[Array, ""], batch: int) -> Int[Array, " B"]:
        """Index of the last scale that is decoded, per picture; the last picture (the empty one) keeps all."""
        chance, choice = jax.random.split(key)
        last = len(self.training.grids) - 1
        cut = jax.random.bernoulli(chance, self.training.truncation, (batch,)) & (jnp.arange(batch) < batch - 1)
        return jnp.where(cut, jax.random.randint(choice, (batch,), 0, max(1, last)), last)

    def _background_cells(self, difference: Float[Array, "B h w 1"]) -> Float[Array, "B lat_h lat_w"]:
        """1 where a cell and its eight neighbours show nothing but background."""
        stride = self.config.stride
        size = (1, 3 * stride, 3 * stride, 1)
        padding = ((0, 0), (stride, stride), (stride, stride), (0, 0))
        largest = jax.lax.reduce_window(difference, 0.0, jax.lax.max, size, (1, stride, stride, 1), padding)
        return (largest[..., 0] < 0.01).astype(jnp.float32)


def _learning_rate(training: TokenizerTraining) -> optax.Schedule:
    half = training.num_steps // 2
    warmup = min(training.warmup_steps, half)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, training.learning_rate, warmup),
            optax.constant_schedule(training.learning_rate),
            optax.cosine_decay_schedule(training.learning_rate, max(1, training.num_steps - half)),
        ],
        [warmup, half],
    )


def moving_average(average: Any, parameters: Any, decay: float, step: Int[Array, ""]) -> Any:
    """Exponential moving average whose memory grows with the run until it has reached ``decay``."""
    count = step.astype(jnp.float32)
    kept = jnp.minimum(decay, (1.0 + count) / (10.0 + count))
    return jax.tree.map(lambda a, p: kept * a + (1 - kept) * p, average, parameters)


def residual_sums(latents: Float[Array, "B h w C"], grids: tuple[Grid, ...]) -> list[Float[Array, "B h w C"]]:
    """The code sum after every scale of the residual quantiser, at full size."""
    size = (latents.shape[1], latents.shape[2])
    total, sums = jnp.zeros_like(latents), []
    for grid in grids:
        bits = latents_to_bits(resize_area(latents - total, grid))
        total = total + resize_bilinear(bits_to_codes(bits), size)
        sums.append(total)
    return sums


def low_pass(latents: Float[Array, "B h w C"], grid: Grid) -> Float[Array, "B h w C"]:
    """What of ``latents`` a scale of size ``grid`` can express."""
    return resize_bilinear(resize_area(latents, grid), (latents.shape[1], latents.shape[2]))


def reconstruction_loss(
    decoded: Float[Array, "B h w 3"], target: Float[Array, "B h w 3"], weight: Float[Array, "B h w 1"]
) -> Float[Array, ""]:
    """Weighted L1 and L2 plus L1 of the image gradients; pictures in [-1, 1]."""
    error = decoded - target
    down, across = jnp.diff(error, axis=1), jnp.diff(error, axis=2)
    gradient = jnp.mean(jnp.abs(down) * weight[:, 1:]) + jnp.mean(jnp.abs(across) * weight[:, :, 1:])
    return jnp.mean(weight * (jnp.abs(error) + 2.0 * jnp.square(error))) + 0.5 * gradient


def feature_distance(
    features: Features, decoded: Float[Array, "B h w 3"], images: Float[Array, "B h w 3"]
) -> Float[Array, ""]:
    """Mean square distance of features over the mean square of those of ``images``; pictures in [0, 1]."""
    target = jax.lax.stop_gradient(features(images))
    return jnp.mean(jnp.square(features(decoded) - target)) / (jnp.mean(jnp.square(target)) + 1e-6)


_INVERSE_TEMPERATURE = 100.0


def entropy_penalty(latents: Float[Array, "B h w C"]) -> Float[Array, ""]:
    """Uncertainty of each cell's bits minus that of the bits over all cells, which is to be large.

    BSQ, Sec. 3.2, with bits taken as independent: a bit of the latent ``u`` on the unit sphere is 0 with the soft
    probability ``sigmoid(-4 T u / sqrt(C))``, ``T = 100`` (released code). The two entropies, in nats and summed over
    bits, are weighted alike and divided by ``T`` as there.
    """
    unit = latents * jax.lax.rsqrt(jnp.sum(jnp.square(latents), axis=-1, keepdims=True) + 1e-12)
    soft = jax.nn.sigmoid(-4.0 * _INVERSE_TEMPERATURE / latents.shape[-1] ** 0.5 * unit)
    per_sample = jnp.mean(jnp.sum(_entropy(soft), axis=-1))
    codebook = jnp.sum(_entropy(jnp.mean(soft, axis=(0, 1, 2))))
    return (per_sample - codebook) / _INVERSE_TEMPERATURE


def _entropy(probability: Array) -> Array:
    """Of one bit, in nats."""
    # A mean of ones may be rounded to more than one.
    rest = jnp.maximum(1.0 - probability, 0.0)
    return -(probability * jnp.log(probability + 1e-8) + rest * jnp.log(rest + 1e-8))


def psnr(
    decoded: Float[Array, "B h w 3"], target: Float[Array, "B h w 3"], keep: Bool[Array, " B"]
) -> Float[Array, ""]:
    """Mean peak signal-to-noise ratio (dB) of the pictures in [-1, 1] that ``keep`` names."""
    error = jnp.mean(jnp.square(jnp.clip(decoded, -1.0, 1.0) - target), axis=(1, 2, 3)) / 4.0
    decibels = -10.0 * jnp.log10(error + 1e-10)
    count = jnp.sum(keep.astype(jnp.float32))
    return jnp.sum(jnp.where(keep, decibels, 0.0)) / jnp.maximum(count, 1.0)
