"""One step program for any number of devices, with the same results."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toprovar_jax.config import ImageTokenizerConfig
from toprovar_jax.errors import UserInputError
from toprovar_jax.scenes.renderer import empty_scene_image
from toprovar_jax.training.image_tokenizer import TokenizerTrainer, TokenizerTraining
from toprovar_jax.training.placement import Placement
from toprovar_jax.training.recipes import SCENES_SMALL, draw_scenes
from toprovar_jax.training.tokenizer_stage import _step_on
from toprovar_jax.training.transformer import TransformerTraining

STEPS = 4


def transformer_losses(trainer, placement, data, compiled):
    state = placement.put_state(trainer.init(0))
    step = placement.compile(trainer.step, state)
    losses = []
    for number in range(STEPS):
        if number == 1:
            compiled.clear()
        state, metrics = step(state, *placement.put_batch(data), jax.random.key(number))
        losses.append(float(metrics["loss"]))
    return losses, len(compiled), state


@pytest.fixture(scope="module")
def noisy(make_trainer):
    """Everything that draws random numbers: flips, dropped text, dropped layers."""
    training = dataclasses.replace(TransformerTraining.for_scenes(10), warmup_steps=0, drop_path=0.2)
    return make_trainer(training)


def test_one_and_eight_devices_train_the_transformer_alike_with_one_program(noisy, batch, compiled):
    latents, captions = batch
    data = jax.tree.map(lambda x: np.concatenate([np.asarray(x)] * 2), (latents, captions))
    one, again, _ = transformer_losses(noisy, Placement.over(jax.devices()[:1]), data, compiled)
    assert again <= 1  # a small program makes the next step's key
    many, again, state = transformer_losses(noisy, Placement.over(state_parts=2), data, compiled)
    assert again <= 1
    np.testing.assert_allclose(many, one, rtol=2e-5)
    assert len(jax.tree.leaves(state)[0].sharding.device_set) == 8
    # Half of each matrix is on each device.
    kernels = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim == 3]
    assert all(leaf.addressable_shards[0].data.size * 2 == leaf.size for leaf in kernels)


def test_eight_devices_render_and_train_the_tokenizer_as_one_does():
    config = ImageTokenizerConfig(4, 2, 24, (1, 1), 1)
    recipe = dataclasses.replace(SCENES_SMALL, image_tokenizer=config, num_scales=3, tokenizer_batch=8)
    training = TokenizerTraining(recipe.schedule.latent_grids, num_steps=20, warmup_steps=0)
    trainer = TokenizerTrainer(config, training, empty_scene_image(8, 8))
    losses = []
    for placement in (Placement.over(jax.devices()[:1]), Placement.over()):
        state = placement.put_state(trainer.init(0))
        step = _step_on(placement, trainer, recipe, state)
        own = []
        for number in range(STEPS):
            state, metrics = step(state, number)
            own.append(float(metrics["loss"]))
        losses.append(own)
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-4)


def test_each_device_renders_its_own_part():
    scenes = draw_scenes(jax.random.key(0), 8)
    recipe = dataclasses.replace(SCENES_SMALL, num_scales=2)
    placement = Placement.over()
    spread = jax.jit(placement.on_each(recipe.render))(placement.put_batch(scenes))
    assert {shard.data.shape[0] for shard in spread.addressable_shards} == {1}
    np.testing.assert_allclose(spread, recipe.render(scenes), atol=1e-5)


def test_batches_and_parts_that_do_not_divide_are_refused():
    with pytest.raises(UserInputError, match="batch 12: must be a multiple of 8 devices"):
        Placement.over().check_batch(12)
    with pytest.raises(UserInputError, match="3 parts of the state: must divide 8 devices"):
        Placement.over(state_parts=3)


def test_small_arrays_are_whole_everywhere():
    placement = Placement.over(state_parts=8)
    state = placement.put_state({"bias": jnp.zeros(16), "odd": jnp.zeros((3, 5)), "kernel": jnp.zeros((8, 16))})
    assert state["bias"].sharding.is_fully_replicated
    assert state["odd"].sharding.is_fully_replicated
    assert state["kernel"].addressable_shards[0].data.shape == (8, 2)
