import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toprovar_jax.errors import UserInputError
from toprovar_jax.image_tokenizer import encode_scales
from toprovar_jax.image_tokenizer.bsq import bits_to_tokens
from toprovar_jax.schedule import ScaleSchedule
from toprovar_jax.training import self_correction

# Compiled once per schedule: op by op, a seven-scale schedule takes seconds.
self_correct = jax.jit(self_correction.self_correct, static_argnums=1)
draw_flips = jax.jit(self_correction.draw_flips, static_argnums=(1, 2, 3), static_argnames=("strength", "scales"))


@pytest.mark.parametrize(
    ("case", "ratio", "factor", "stride"), [("c_vae", "1:1", 1, 16), ("c_vae_stride8", "3:4", 2, 16)]
)
def test_inputs_and_targets_equal_the_original(golden, case, ratio, factor, stride):
    config = json.loads((golden / case / "config.json").read_text())
    schedule = ScaleSchedule.of(ratio, 7, latent_per_token=factor, token_stride=stride)
    assert [list(grid) for grid in schedule.latent_grids] == [grid[1:] for grid in config["vae_scale_schedule"]]
    with np.load(golden / case / "io.npz") as stored:
        data = dict(stored)
    latents = jnp.asarray(data["features"].transpose(0, 2, 3, 1))
    flips = [jnp.asarray(data[f"bsc_flip_{k}"][:, 0], jnp.uint8) for k in range(len(data["bsc_flip_prob"]))]
    assert sum(int(flip.sum()) for flip in flips) > 0

    inputs, targets = self_correct(latents, schedule, flips)

    np.testing.assert_array_equal(targets, np.concatenate([data[f"bsc_target_{k}"] for k in range(7)], axis=1))
    np.testing.assert_allclose(inputs, data["bsc_transformer_input"], rtol=0, atol=2e-6)


def test_without_flips_the_targets_are_the_tokenizers_own_bits(schedule):
    latents = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    tokens = self_correct(latents, schedule, ())
    own = [bits_to_tokens(bits, patchify=False) for bits in encode_scales(latents, schedule.latent_grids).bits]
    np.testing.assert_array_equal(tokens.targets, np.concatenate(own, axis=1))


def test_a_flip_leaves_its_own_scales_target_and_changes_the_next_input(schedule):
    latents = jax.random.normal(jax.random.key(0), (1, 4, 4, 8))
    plain = self_correct(latents, schedule, ())
    flipped = self_correct(latents, schedule, [jnp.ones((1, 1, 1, 8), jnp.uint8)])
    np.testing.assert_array_equal(flipped.targets[:, :1], plain.targets[:, :1])
    np.testing.assert_allclose(flipped.inputs[:, :4], -plain.inputs[:, :4])
    assert (flipped.targets[:, 1:5] != plain.targets[:, 1:5]).any()


def test_flip_rates_are_hundredths_up_to_the_strength_shared_by_the_batch():
    schedule = ScaleSchedule.of("1:1", 4)
    rates = []
    for seed in range(8):
        masks = draw_flips(jax.random.key(seed), schedule, 16, 64, strength=0.29, scales=4)
        large = masks[-1].astype(jnp.float32)
        per_sample = large.mean(axis=(1, 2, 3))
        np.testing.assert_allclose(per_sample, float(large.mean()), atol=0.04)
        rates.append(float(large.mean()))
    assert max(rates) < 0.295
    assert max(rates) - min(rates) > 0.1


def test_scales_can_have_strengths_of_their_own_and_the_last_one_serves_the_rest():
    schedule = ScaleSchedule.of("1:1", 4)
    rates = np.zeros((24, 4))
    for seed in range(len(rates)):
        masks = draw_flips(jax.random.key(seed), schedule, 16, 64, strength=(0.9, 0.0, 0.3), scales=4)
        rates[seed] = [mask.mean() for mask in masks]
    assert 0.6 < rates[:, 0].max() < 0.95
    assert not rates[:, 1].any()
    assert (rates[:, 2:].max(axis=0) > 0.2).all()
    assert (rates[:, 2:].max(axis=0) < 0.35).all()


def test_only_the_first_scales_are_disturbed(schedule):
    assert len(draw_flips(jax.random.key(0), schedule, 1, 4, strength=0.3, scales=2)) == 2
    assert len(draw_flips(jax.random.key(0), schedule, 1, 4, strength=0.3, scales=13)) == 3
    assert not any(mask.any() for mask in draw_flips(jax.random.key(0), schedule, 4, 4, strength=0.0, scales=3))


def test_a_strength_that_is_no_probability_is_refused(schedule):
    with pytest.raises(UserInputError, match=r"strength 30.0: must be in \[0, 1\]"):
        draw_flips(jax.random.key(0), schedule, 1, 4, strength=30.0, scales=1)
    with pytest.raises(UserInputError, match=r"strength \(0.3, -0.1\): must be in \[0, 1\]"):
        draw_flips(jax.random.key(0), schedule, 1, 4, strength=(0.3, -0.1), scales=1)
