import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from toprovar_jax.config import ImageTokenizerConfig
from toprovar_jax.errors import UserInputError
from toprovar_jax.image_tokenizer import encode_scales
from toprovar_jax.scenes.judge import Judge
from toprovar_jax.training.adversarial import AdversarialTrainer
from toprovar_jax.training.image_tokenizer import (
    TokenizerTrainer,
    TokenizerTraining,
    entropy_penalty,
    feature_distance,
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


def with_terms(trainer, features=None, **terms):
    training = dataclasses.replace(trainer.training, warmup_steps=0, **terms)
    return TokenizerTrainer(trainer.config, training, trainer.empty, features)


def brightness(images):
    return jnp.mean(images, axis=(1, 2))


def test_the_perceptual_loss_is_the_distance_of_features_and_reaches_the_weights(trainer, images):
    other = images.at[:, :4].set(0.9)
    mine, theirs = (np.asarray(x, np.float64).mean(axis=(1, 2)) for x in (other, images))
    expected = np.mean((mine - theirs) ** 2) / np.mean(theirs**2)
    assert float(feature_distance(brightness, other, images)) == pytest.approx(expected, rel=1e-4)

    weighted = with_terms(trainer, brightness, perceptual=50.0)
    state, key = weighted.init(0), jax.random.key(0)
    (loss, metrics, _), (plain, _, _) = (t.loss(state.parameters, images, key) for t in (weighted, trainer))
    assert float(loss - plain) == pytest.approx(50.0 * float(metrics["perceptual"]), rel=1e-4)
    before = float(metrics["perceptual"])
    for number in range(8):
        state, metrics = weighted.step(state, images, jax.random.key(number))
    assert float(metrics["perceptual"]) < 0.5 * before
    with pytest.raises(UserInputError, match=r"perceptual weight 0\.5: needs a network"):
        with_terms(trainer, perceptual=0.5)


def test_the_entropy_penalty_equals_a_float64_twin_and_its_descent_balances_the_bits():
    latents = jax.random.normal(jax.random.key(1), (2, 3, 3, 4)) + 0.8
    u = np.asarray(latents, np.float64)
    u = u / np.linalg.norm(u, axis=-1, keepdims=True)
    p = 1 / (1 + np.exp(4 * 100 * u / 4**0.5))

    def entropy(p):
        return -(p * np.log(p + 1e-8) + (1 - p) * np.log(1 - p + 1e-8))

    expected = (entropy(p).sum(-1).mean() - entropy(p.mean(axis=(0, 1, 2))).sum()) / 100
    assert float(entropy_penalty(latents)) == pytest.approx(expected, rel=1e-3)
    # Half of the bits of each channel set is the least: minus log 2 a bit, over the temperature.
    balanced = jnp.stack([jnp.ones((1, 2, 4)), -jnp.ones((1, 2, 4))], axis=1)
    assert float(entropy_penalty(balanced)) == pytest.approx(-4 * np.log(2) / 100, rel=1e-3)


def test_the_entropy_term_enters_the_loss(trainer, images):
    weighted = with_terms(trainer, entropy=3.0)
    parameters, key = weighted.init(0).parameters, jax.random.key(0)
    (loss, metrics, _), (plain, _, _) = (t.loss(parameters, images, key) for t in (weighted, trainer))
    assert float(loss - plain) == pytest.approx(3.0 * float(metrics["entropy"]), rel=1e-3)


def test_the_discriminator_learns_and_its_verdict_counts_from_its_step_on(trainer, images):
    patient = AdversarialTrainer(with_terms(trainer, adversarial=1.0, adversarial_from=1))
    plain = with_terms(trainer)
    state, alone = patient.init(0), plain.init(0)
    same, losses = [], []
    for number in range(10):
        state, metrics = patient.step(state, images, jax.random.key(number))
        losses.append(float(metrics["discriminator"]))
        if number < 2:
            alone, _ = plain.step(alone, images, jax.random.key(number))
            pairs = zip(jax.tree.leaves(state.tokenizer.parameters), jax.tree.leaves(alone.parameters), strict=True)
            same.append(all(np.allclose(a, b, atol=1e-6) for a, b in pairs))
    assert same == [True, False]
    assert losses[-1] < losses[0]


def test_an_adversarial_loss_is_not_forgotten_where_there_is_no_discriminator(trainer, images):
    alone = with_terms(trainer, adversarial=0.1)
    with pytest.raises(UserInputError, match=r"adversarial weight 0\.1: needs a discriminator"):
        alone.step(alone.init(0), images, jax.random.key(0))


def test_the_judges_features_have_a_gradient_towards_the_picture():
    features = Judge.load().features
    target = jax.random.uniform(jax.random.key(0), (1, 32, 32, 3))
    start = 0.8 * target + 0.1

    @jax.jit
    @jax.value_and_grad
    def distance(pictures):
        return feature_distance(features, pictures, target)

    before, gradient = distance(start)
    after, _ = distance(start - 1e-2 * gradient / jnp.max(jnp.abs(gradient)))
    assert 0 < after < before


def test_bfloat16_products_keep_float32_weights_and_give_nearly_the_same_gradient(trainer, images, latents):
    fast = TokenizerTrainer(dataclasses.replace(trainer.config, precision="fast"), trainer.training, trainer.empty)
    parameters = trainer.init(0).parameters

    def gradient(own):
        # Encoder and decoder apart: between them, a rounded latent near zero would be another bit.
        def loss(parameters):
            tokenizer = nnx.merge(own.graph, parameters)
            return jnp.mean(jnp.square(tokenizer.encode(images))) + jnp.mean(jnp.square(tokenizer.decoder(latents)))

        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.jit(jax.grad(loss))(parameters))])

    ours, theirs = gradient(fast), gradient(trainer)
    assert ours.dtype == np.float32
    assert 1e-5 < np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 0.05
