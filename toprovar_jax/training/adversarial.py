"""The image tokenizer trained against a discriminator that learns to tell reconstructions from pictures."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from toprovar_jax.image_tokenizer.autoencoder import ImageTokenizer
from toprovar_jax.image_tokenizer.blocks import Conv, GroupNorm
from toprovar_jax.shapes import Array, Float, Int, Key
from toprovar_jax.training.flops import TRAINING, count_flops
from toprovar_jax.training.image_tokenizer import TokenizerState, TokenizerTrainer

_WIDTHS = (32, 64, 128)


class Discriminator(nnx.Module):
    """One score per patch of a picture, above zero for real ones: three strided convolutions (PatchGAN, made small)."""

    def __init__(self, *, rngs: nnx.Rngs):
        widths = (3, *_WIDTHS)
        self.convolutions = nnx.List(
            [Conv(inner, outer, stride=2, precision="exact", rngs=rngs) for inner, outer in itertools.pairwise(widths)]
        )
        self.norms = nnx.List([GroupNorm(width) for width in _WIDTHS[1:]])
        self.score = Conv(_WIDTHS[-1], 1, precision="exact", rngs=rngs)

    def __call__(self, images: Float[Array, "B h w 3"]) -> Float[Array, "B _ _"]:
        """Score pictures in [-1, 1] whose sides are multiples of 8."""
        x = images
        for index, convolution in enumerate(self.convolutions):
            x = convolution(x)
            x = jax.nn.leaky_relu(x if index == 0 else self.norms[index - 1](x), 0.2)
        return self.score(x)[..., 0]


class AdversarialState(NamedTuple):
    """Everything that a resumed run needs."""

    tokenizer: TokenizerState
    discriminator: nnx.State
    optimizer: Any

    @property
    def step(self) -> Int[Array, ""]:
        """Updates that are done."""
        return self.tokenizer.step


class AdversarialTrainer:
    """Adds ``training.adversarial`` times the discriminator's verdict to the loss of a :class:`TokenizerTrainer`.

    Hinge losses. The discriminator learns from the first step on; its verdict counts from
    ``training.adversarial_from``, when reconstructions no longer give themselves away.

    Args:
      trainer: what would be trained without it.
    """

    def __init__(self, trainer: TokenizerTrainer):
        self.trainer = trainer
        self.graph = nnx.split(nnx.eval_shape(lambda: Discriminator(rngs=nnx.Rngs(0))))[0]
        rate = 0.25 * trainer.training.learning_rate
        self.optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b1=0.5, b2=0.9))

    def init(self, seed: int) -> AdversarialState:
        """Fresh weights."""
        return self.start_at(ImageTokenizer(self.trainer.config, rngs=nnx.Rngs(seed)), seed)

    def start_at(self, tokenizer: ImageTokenizer, seed: int = 0) -> AdversarialState:
        """The weights of ``tokenizer`` and a fresh discriminator."""
        parameters = nnx.split(Discriminator(rngs=nnx.Rngs(seed + 1)))[1]
        return AdversarialState(self.trainer.start_at(tokenizer), parameters, self.optimizer.init(parameters))

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def step(
        self, state: AdversarialState, images: Float[Array, "B h w 3"], key: Key[Array, ""]
    ) -> tuple[AdversarialState, dict[str, Array]]:
        """One update of both networks."""
        training = self.trainer.training
        active = (state.step >= training.adversarial_from).astype(jnp.float32)

        def generator(parameters):
            loss, metrics, decoded = self.trainer.loss(parameters, images, key)
            verdict = -jnp.mean(nnx.merge(self.graph, state.discriminator)(decoded))
            return loss + active * training.adversarial * verdict, (metrics | {"adversarial": verdict}, decoded)

        def discriminator(parameters, decoded):
            network = nnx.merge(self.graph, parameters)
            real, made = network(images * 2.0 - 1.0), network(decoded)
            return jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + made))

        gradient, (metrics, decoded) = jax.grad(generator, has_aux=True)(state.tokenizer.parameters)
        tokenizer = self.trainer.apply(state.tokenizer, gradient)
        loss, gradient = jax.value_and_grad(discriminator)(state.discriminator, jax.lax.stop_gradient(decoded))
        updates, optimizer = self.optimizer.update(gradient, state.optimizer, state.discriminator)
        parameters = cast(nnx.State, optax.apply_updates(state.discriminator, updates))
        return AdversarialState(tokenizer, parameters, optimizer), metrics | {"discriminator": loss}

    def finish(self, state: AdversarialState, images: Float[Array, "B h w 3"]) -> ImageTokenizer:
        """See :meth:`TokenizerTrainer.finish`."""
        return self.trainer.finish(state.tokenizer, images)

    def step_flops(self, batch: int) -> float:
        """Operations of the convolutions of one step of both networks."""
        images = jax.ShapeDtypeStruct((batch, *self.trainer.empty.shape), jnp.float32)
        network = nnx.eval_shape(lambda: Discriminator(rngs=nnx.Rngs(0)))
        once = count_flops(lambda parameters, x: nnx.merge(self.graph, parameters)(x), nnx.split(network)[1], images)
        # The verdict's gradient is taken by the pictures alone: forward and one product back. Then it learns from two.
        return self.trainer.step_flops(batch) + (2 + 2 * TRAINING) * once
