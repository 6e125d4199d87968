"""The judge is right about renders, also bad ones, and does not see what is not there."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from toprovar_jax.errors import UserInputError
from toprovar_jax.scenes.disturbance import disturb, nothing, spoil, truth_of
from toprovar_jax.scenes.judge import Detections, Judge
from toprovar_jax.scenes.renderer import STUDIO, Studio, empty_scene_image, render
from toprovar_jax.scenes.world import Scenes


def right(seen: Detections, scenes: Scenes) -> np.ndarray:
    """Whether each picture's detections are its objects: as many, and each one's nearest is like it."""
    truth, seen = jax.tree.map(np.asarray, (truth_of(scenes), seen))
    present = np.asarray(scenes.present)
    answers = []
    for picture in range(len(present)):
        found = np.flatnonzero(seen.found[picture])
        good = len(found) == present[picture].sum()
        for index in np.flatnonzero(present[picture]) if good else []:
            far = np.linalg.norm(seen.centre[picture, found] - truth.centre[picture, index], axis=-1)
            nearest = found[far.argmin()]
            good &= far.min() < 0.5 * truth.radius[picture, index]
            good &= bool(np.linalg.norm(seen.position[picture, nearest] - truth.position[picture, index]) < 0.4)
            for name in ("shape", "colour", "size"):
                good &= bool(getattr(seen, name)[picture, nearest] == getattr(truth, name)[picture, index])
        answers.append(good)
    return np.array(answers)


def blurred(images: jax.Array, sigma: float) -> jax.Array:
    place = np.arange(images.shape[1])
    kernel = np.exp(-0.5 * ((place[:, None] - place[None]) / sigma) ** 2)
    kernel = jnp.asarray(kernel / kernel.sum(axis=1, keepdims=True), jnp.float32)
    return jnp.einsum("ij,bjkc,lk->bilc", kernel, images, kernel)


def test_every_object_of_a_render_is_found_and_named(judge, scenes, images):
    assert right(judge(images), scenes).mean() >= 0.95


def test_blurred_and_noisy_renders_are_recognised(judge, scenes, images):
    noise = 0.03 * jax.random.normal(jax.random.key(1), images.shape)
    assert right(judge(jnp.clip(blurred(images, 0.8) + noise, 0.0, 1.0)), scenes).mean() >= 0.90


def test_disturbed_renders_are_recognised(judge, scenes, images):
    assert right(judge(jax.jit(disturb)(jax.random.key(2), images)), scenes).mean() >= 0.80


@pytest.mark.parametrize(("height", "width"), [(64, 98), (160, 80)])
def test_other_sizes_are_judged_alike(judge, scenes, height, width):
    few = jax.tree.map(lambda field: field[:16], scenes)
    assert right(judge(render(few, height=height, width=width)), few).mean() >= 14 / 16


def test_another_studio_changes_nothing(judge, scenes):
    few = jax.tree.map(lambda field: field[:16], scenes)
    assert right(judge(render(few, height=64, width=64, studio=Studio(STUDIO.light, 0.02, 0.0))), few).mean() >= 14 / 16


def test_the_empty_floor_shows_nothing(judge):
    floor = empty_scene_image(64, 64)[None]
    noise = 0.05 * jax.random.normal(jax.random.key(3), (8, 64, 64, 3))
    assert not judge(floor).found.any()
    assert not judge(jnp.clip(floor + noise, 0.0, 1.0)).found.any()


def test_noise_mosaics_stripes_and_gradients_show_nothing(judge):
    assert not judge(jax.jit(nothing, static_argnums=(1, 2, 3))(jax.random.key(4), 64, 64, 64)).found.any()


@pytest.mark.parametrize("level", [0.0, 0.1, 0.5, 1.0])
def test_a_uniform_picture_shows_nothing(judge, level):
    assert not judge(np.full((1, 64, 64, 3), level, np.float32)).found.any()


def test_most_melted_and_cut_objects_are_no_objects(judge, scenes, images):
    changed, truth = jax.jit(spoil)(jax.random.key(5), images, truth_of(scenes))
    standing = np.asarray(truth.standing != 0).sum(axis=1)
    extra = np.maximum(np.asarray(judge(changed).found).sum(axis=1) - standing, 0).sum()
    spoiled = 2 * np.asarray(scenes.present).sum() - standing.sum()
    assert extra < 0.1 * spoiled


def test_detections_come_in_order_of_confidence_and_do_not_depend_on_the_batch(judge, images):
    together = judge(images)
    assert (np.diff(together.confidence, axis=1) <= 0.0).all()
    np.testing.assert_array_equal(together.found, together.confidence > 0.5)
    alone = judge(images[3:4])
    for name, field in alone._asdict().items():
        kept = np.asarray(alone.found[0])
        wanted = np.asarray(getattr(together, name)[3])
        np.testing.assert_allclose(np.asarray(field[0])[kept], wanted[kept], atol=1e-4, err_msg=name)


def test_many_pictures_are_looked_at_in_parts(judge, images):
    seen = judge(jnp.concatenate([images, images, images[:5]]))
    assert seen.found.shape == (133, 8)
    np.testing.assert_array_equal(seen.found[64:128], judge(images).found)


def test_bytes_are_judged_like_floats(judge, images):
    as_bytes = np.asarray(images[:8] * 255.0 + 0.5).astype(np.uint8)
    np.testing.assert_allclose(judge(as_bytes).confidence, judge(images[:8]).confidence, atol=0.05)
    np.testing.assert_allclose(judge(as_bytes).confidence, judge(as_bytes / np.float32(255.0)).confidence, atol=1e-5)


def test_features_tell_pictures_apart_and_are_alike_for_alike_pictures(judge, images):
    features = judge.features(images[:8])
    assert features.shape == (8, 192)
    near = np.linalg.norm(features - judge.features(blurred(images[:8], 0.4)), axis=1)
    gaps = np.linalg.norm(np.asarray(features)[:, None] - np.asarray(features)[None], axis=-1)
    assert near.max() < gaps[~np.eye(8, dtype=bool)].min()


@pytest.mark.parametrize("look", [Judge.__call__, Judge.features])
def test_pictures_too_small_to_judge_are_refused(judge, look):
    with pytest.raises(UserInputError, match=r"images of shape \(1, 16, 64, 3\): must be .* at least 32 pixels"):
        look(judge, np.zeros((1, 16, 64, 3), np.float32))


def test_of_no_pictures_there_are_no_rows(judge, images):
    none, some = judge(images[:0]), judge(images[:1])
    for name, field in some._asdict().items():
        empty = getattr(none, name)
        assert (empty.shape, empty.dtype) == ((0, *field.shape[1:]), field.dtype), name
    assert judge.features(np.zeros((0, 40, 64, 3), np.uint8)).shape == (0, 192)


ONES = np.ones((1, 32, 32, 3), np.float32)


@pytest.mark.parametrize("look", [Judge.__call__, Judge.features])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (ONES.astype(np.int32), r"images of int32: must be floats in \[0, 1\] or bytes \(uint8\); use .astype"),
        (ONES.astype(np.uint16), "images of uint16: must be floats"),
        (jnp.asarray(ONES > 0.5), "images of bool: must be floats"),
        (ONES.tolist(), "images of type list: must be one array of numpy or jax; join pictures with np.stack"),
        (254.0 * ONES, r"images with values from 254 to 254: must be floats in \[0, 1\]; scale them \(x / 255"),
        (jnp.asarray(-ONES), "images with values from -1 to -1: must be floats"),
        (np.where(np.arange(3) == 1, np.float32(np.nan), ONES), "images with values that are not finite: must be"),
        (jnp.asarray(np.inf * ONES), "images with values that are not finite: must be"),
    ],
)
def test_what_is_no_picture_is_refused(judge, monkeypatch, look, given, message):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is outside of tests
    with pytest.raises(UserInputError, match=message):
        look(judge, given)


def test_values_outside_by_rounding_are_judged(judge):
    assert not judge(ONES * np.float32(1.0 + 1e-6)).found.any()


def test_traced_pictures_are_refused_by_their_type_alone(judge, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    features = jax.ShapeDtypeStruct((1, 192), jnp.float32)
    assert jax.eval_shape(judge.features, jax.ShapeDtypeStruct(ONES.shape, jnp.float32)) == features
    with pytest.raises(UserInputError, match="images of int32"):
        jax.eval_shape(judge.features, jax.ShapeDtypeStruct(ONES.shape, jnp.int32))


def test_a_file_that_is_not_a_judge_is_refused(tmp_path):
    with pytest.raises(UserInputError, match="must be an existing npz file"):
        Judge.load(tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", weight=np.zeros(3))
    with pytest.raises(UserInputError, match="must hold the arrays"):
        Judge.load(tmp_path / "other.npz")
