"""The judge is right about renders, also bad ones, and does not see what is not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toprovar_jax.errors import UserInputError
from toprovar_jax.scenes import judge as module
from toprovar_jax.scenes.judge import Judge, Verdicts, agreement, disturb, spoil
from toprovar_jax.scenes.renderer import empty_scene_image, render


def blurred(images: jax.Array, sigma: float) -> jax.Array:
    place = np.arange(images.shape[1])
    kernel = np.exp(-0.5 * ((place[:, None] - place[None]) / sigma) ** 2)
    kernel = jnp.asarray(kernel / kernel.sum(axis=1, keepdims=True), jnp.float32)
    return jnp.einsum("ij,bjkc,lk->bilc", kernel, images, kernel)


def test_renders_are_recognised(judge, scenes, images):
    verdicts = judge(images)
    assert agreement(verdicts, scenes.shape, scenes.colour).mean() >= 0.98
    assert np.abs(verdicts.position - scenes.position).mean() < 0.04


def test_blurred_and_noisy_renders_are_recognised(judge, scenes, images):
    noise = 0.03 * jax.random.normal(jax.random.key(1), images.shape)
    verdicts = judge(jnp.clip(blurred(images, 0.8) + noise, 0.0, 1.0))
    assert agreement(verdicts, scenes.shape, scenes.colour).mean() >= 0.96


def test_disturbed_renders_are_recognised(judge, scenes, images):
    verdicts = judge(disturb(jax.random.key(2), images))
    assert agreement(verdicts, scenes.shape, scenes.colour).mean() >= 0.93


@pytest.mark.parametrize(("height", "width"), [(64, 96), (160, 80)])
def test_other_sizes_are_judged_alike(judge, scenes, height, width):
    few = jax.tree.map(lambda field: field[:16], scenes)
    verdicts = judge(render(few, height=height, width=width))
    assert agreement(verdicts, few.shape, few.colour).mean() >= 15 / 16


def test_the_empty_floor_shows_nothing(judge):
    floor = empty_scene_image(64, 64)[None]
    noise = 0.03 * jax.random.normal(jax.random.key(3), (8, 64, 64, 3))
    assert not judge(floor).found.any()
    assert not judge(jnp.clip(floor + noise, 0.0, 1.0)).found.any()


@pytest.mark.parametrize("cells", [64, 16, 4])
def test_noise_shows_nothing(judge, cells):
    coarse = jax.random.uniform(jax.random.key(4), (16, cells, cells, 3))
    assert not judge(jax.image.resize(coarse, (16, 64, 64, 3), "linear")).found.any()


@pytest.mark.parametrize("level", [0.0, 0.1, 0.5, 1.0])
def test_a_uniform_picture_shows_nothing(judge, level):
    assert not judge(np.full((1, 64, 64, 3), level, np.float32)).found.any()


def test_melted_and_mixed_objects_are_no_objects(judge, scenes):
    alike = scenes._replace(colour=jnp.sort(scenes.colour))
    spoiled = spoil(jax.random.key(5), render(alike, height=64, width=64))
    assert judge(spoiled).found.mean() < 0.15


def test_two_separate_objects_are_not_one(judge, scenes):
    few = jax.tree.map(lambda field: field[:8], scenes)
    apart = render(few._replace(position=jnp.zeros_like(few.position), size=jnp.full((8,), 0.7)), height=64, width=64)
    pairs = jnp.concatenate([apart[:, :, 12:52], apart[::-1, :, 12:52]], axis=2)
    assert not judge(pairs).found.any()


def test_verdicts_do_not_depend_on_the_batch(judge, images):
    alone, together = judge(images[3:4]), judge(images[:8])
    for name in ("found", "shape", "colour"):
        assert getattr(alone, name)[0] == getattr(together, name)[3]


def test_agreement_needs_every_wanted_property_and_ignores_the_others():
    verdicts = Verdicts(
        found=jnp.array([True, True, True, False]),
        shape=jnp.array([0, 0, 1, 0]),
        colour=jnp.array([2, 3, 2, 2]),
        position=jnp.zeros((4, 2)),
        confidence=jnp.ones(4),
    )
    wanted = jnp.zeros(4, jnp.int32)
    assert agreement(verdicts, wanted, wanted + 2).tolist() == [True, False, False, False]
    assert agreement(verdicts, wanted - 1, wanted + 2).tolist() == [True, False, True, False]
    assert agreement(verdicts, wanted, wanted - 1).tolist() == [True, True, False, False]


def test_bytes_are_judged_like_floats(judge, images):
    as_bytes = np.asarray(images[:8] * 255.0 + 0.5).astype(np.uint8)
    for name in ("found", "shape", "colour"):
        np.testing.assert_array_equal(getattr(judge(as_bytes), name), getattr(judge(images[:8]), name))


def test_pictures_too_small_to_judge_are_refused(judge):
    with pytest.raises(UserInputError, match=r"images of shape \(1, 16, 64, 3\): must be .* at least 32 pixels"):
        judge(np.zeros((1, 16, 64, 3), np.float32))


def test_a_little_training_already_tells_most_shapes(tmp_path, monkeypatch, scenes, images):
    monkeypatch.setattr(module, "_TRAIN_IMAGES", 512)
    monkeypatch.setattr(module, "_TRAIN_STEPS", 100)
    monkeypatch.setattr("sys.argv", ["judge", "--train", str(tmp_path / "judge.npz"), "--seed", "3"])
    module.main()
    verdicts = Judge.load(tmp_path / "judge.npz")(images)
    assert (verdicts.shape == scenes.shape).mean() > 0.8


def test_a_file_that_is_not_a_judge_is_refused(tmp_path):
    with pytest.raises(UserInputError, match="must be an existing npz file"):
        Judge.load(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", weight=np.zeros(3))
    with pytest.raises(UserInputError, match="must hold the arrays"):
        Judge.load(tmp_path / "other.npz")
