import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toprovar_jax.config import ImageTokenizerConfig
from toprovar_jax.image_tokenizer import encode_scales
from toprovar_jax.training.image_tokenizer import (
    TokenizerTrainer,
    TokenizerTraining,
    low_pass,
    moving_average,
    psnr,
    residual_sums,
)

GRIDS = ((1, 1), (2, 2), (4, 4))


@pytest.fixture(scope="module")
def trainer():
    config = ImageTokenizerConfig(8, 2, 24, (1, 1), 1)
    return TokenizerTrainer(config, TokenizerTraining(GRIDS, num_steps=20), jnp.full((8, 8, 3), 0.4))


@pytest.fixture(scope="module")
def images():
    """Eight pictures: the empty one with a coloured square each."""
    rng = np.random.default_rng(0)
    pictures = np.full((8, 8, 8, 3), 0.4, np.float32)
    for picture in pictures:
        row, column = rng.integers(0, 5, 2)
        picture[row : row + 3, column : column + 3] = rng.random(3)
    return jnp.asarray(pictures)


@pytest.fixture(scope="module")
def latents():
    return jax.random.normal(jax.random.key(0), (2, 4, 4, 8))


def test_the_last_residual_sum_is_the_quantised_map(latents):
    sums = residual_sums(latents, GRIDS)
    assert len(sums) == len(GRIDS)
    np.testing.assert_allclose(sums[-1], encode_scales(latents, GRIDS).latents, rtol=0, atol=1e-6)


def test_low_pass_keeps_what_a_scale_can_express(latents):
    mean = jnp.mean(latents, axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(low_pass(latents, (1, 1)), jnp.broadcast_to(mean, latents.shape), atol=1e-6)
    np.testing.assert_array_equal(low_pass(latents, (4, 4)), latents)


def test_finish_folds_the_standardisation_into_the_encoder(trainer, images):
    encoded = trainer.finish(trainer.init(0), images).encode(images)
    gain = trainer.training.latent_gain / 8**0.5
    np.testing.assert_allclose(jnp.mean(encoded, axis=(0, 1, 2)), np.zeros(8), atol=2e-4)
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(jnp.square(encoded), axis=(0, 1, 2))), np.full(8, gain), rtol=1e-3)


def test_the_reconstruction_improves_within_a_few_steps(trainer, images):
    state, losses = trainer.init(0), []
    for number in range(20):
        state, metrics = trainer.step(state, images, jax.random.key(number))
        losses.append(float(metrics["reconstruction"]))
    assert np.mean(losses[-5:]) < 0.7 * losses[0]


def test_the_average_forgets_slower_as_the_run_grows():
    for step, decay in ((0, 0.1), (90, 0.91), (10_000, 0.99)):
        average = moving_average({"w": jnp.ones(())}, {"w": jnp.zeros(())}, 0.99, jnp.asarray(step, jnp.int32))
        assert float(average["w"]) == pytest.approx(decay)


def test_psnr_counts_only_the_pictures_asked_for():
    target = jnp.zeros((2, 4, 4, 3))
    decoded = target.at[0].set(0.2).at[1].set(1.0)
    # A difference of 0.2 in [-1, 1] is a tenth of the range: 20 dB.
    assert float(psnr(decoded, target, jnp.array([True, False]))) == pytest.approx(20.0, abs=1e-3)
