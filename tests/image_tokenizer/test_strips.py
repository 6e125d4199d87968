"""The decoder in strips makes the pictures that it makes in one piece."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from tests.tiny import drawn
from toprovar_jax.config import ImageTokenizerConfig
from toprovar_jax.errors import UserInputError
from toprovar_jax.image_tokenizer import ImageTokenizer
from toprovar_jax.image_tokenizer.strips import decode_in_strips

STRIDE_16 = ImageTokenizerConfig(
    latent_channels=4, stride=16, base_width=24, width_multipliers=(1, 2, 1, 2, 1), num_res_blocks=1
)
STRIDE_8 = dataclasses.replace(STRIDE_16, stride=8, width_multipliers=(1, 2, 1, 1))
LEVEL_WITHOUT_DOUBLING = dataclasses.replace(STRIDE_16, stride=2, width_multipliers=(1, 2, 1))


@functools.cache
def tokenizer(config: ImageTokenizerConfig) -> ImageTokenizer:
    return drawn(lambda: ImageTokenizer(config, rngs=nnx.Rngs(0), with_encoder=False), 1)


def latents(batch: int, height: int, width: int) -> jax.Array:
    return jnp.asarray(0.3 * np.random.default_rng(0).standard_normal((batch, height, width, 4)), jnp.float32)


@functools.partial(jax.jit, static_argnames="strips")
def decode(tokenizer: ImageTokenizer, latents: jax.Array, *, strips: int) -> jax.Array:
    # Not yet clamped: a picture of these weights is black and white.
    return decode_in_strips(tokenizer.decoder, latents, strips) if strips > 1 else tokenizer.decoder(latents)


@pytest.mark.parametrize(
    ("config", "batch", "height", "width", "strips"),
    [
        (LEVEL_WITHOUT_DOUBLING, 1, 6, 4, 2),
        (LEVEL_WITHOUT_DOUBLING, 1, 5, 7, 3),  # the last strip reaches beyond the picture
        (LEVEL_WITHOUT_DOUBLING, 2, 4, 3, 4),
        (LEVEL_WITHOUT_DOUBLING, 1, 7, 2, 5),  # four strips of two rows are enough
        (LEVEL_WITHOUT_DOUBLING, 1, 3, 5, 50),  # as many as there are rows
        (LEVEL_WITHOUT_DOUBLING, 1, 1, 2, 2),
        (STRIDE_8, 2, 3, 2, 2),
        (STRIDE_16, 1, 2, 3, 2),
    ],
)
def test_strips_leave_no_trace_in_the_picture(config, batch, height, width, strips):
    given = latents(batch, height, width)
    want, got = (decode(tokenizer(config), given, strips=count) for count in (1, strips))
    assert got.shape == want.shape == (batch, height * config.stride, width * config.stride, 3)
    error = np.max(np.abs(got - want), axis=(0, 2, 3)) / np.max(np.abs(want))
    assert np.max(error) < 4e-6  # rounding, twice what is seen: another order of the same sums
    # Were there seams, the rows beside them would stand out from the others.
    assert np.max(error) < 20 * np.median(error) + 1e-7


def test_in_fast_precision_strips_are_as_far_from_exact_as_the_whole():
    fast = dataclasses.replace(LEVEL_WITHOUT_DOUBLING, precision="fast")
    given = latents(1, 6, 4)
    exact = decode(tokenizer(LEVEL_WITHOUT_DOUBLING), given, strips=1)
    whole, cut = (jnp.mean(jnp.abs(decode(tokenizer(fast), given, strips=n) - exact)) for n in (1, 3))
    assert 0 < cut < 1.5 * whole


def test_the_decoders_pictures_are_the_same_through_the_tokenizer():
    given = latents(2, 4, 3)
    whole, cut = (tokenizer(LEVEL_WITHOUT_DOUBLING).decode(given, strips=n) for n in (1, 2))
    assert len(np.unique(whole)) > 10
    np.testing.assert_allclose(cut, whole, atol=1e-5)


def test_a_picture_in_strips_does_not_depend_on_its_batch():
    given = latents(3, 4, 3)
    together = decode(tokenizer(LEVEL_WITHOUT_DOUBLING), given, strips=2)
    alone = decode(tokenizer(LEVEL_WITHOUT_DOUBLING), given[1:2], strips=2)
    np.testing.assert_array_equal(together[1:2], alone)


@pytest.mark.parametrize("strips", [0, -1])
def test_strips_that_cannot_be_are_refused(strips):
    with pytest.raises(UserInputError, match="strips"):
        tokenizer(LEVEL_WITHOUT_DOUBLING).decode(latents(1, 2, 2), strips=strips)


def test_the_largest_product_is_a_strip():
    traced = jax.jit(lambda x: tokenizer(LEVEL_WITHOUT_DOUBLING).decode(x, strips=4)).trace(latents(1, 8, 4))
    cells = []

    def look(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "conv_general_dilated":
                cells.append(np.prod(equation.outvars[0].aval.shape[1:3]))
            for inner in jaxprs_in_params(equation.params):
                look(inner)

    look(traced.jaxpr.jaxpr)
    assert max(cells) == 16 * 8 // 4
