"""Disturbed pictures still show their objects; spoiled ones say truly which of theirs are left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toprovar_jax.scenes import disturbance
from toprovar_jax.scenes.disturbance import DOUBTFUL, GONE, STANDS, Truth, disturb, nothing, spoil, truth_of
from toprovar_jax.scenes.world import SIZES, projected


def plain_truth(centres: list, radius: float = 0.3, colour: int = 0) -> Truth:
    """One picture with objects of one kind at ``centres``."""
    places = jnp.asarray([centres], jnp.float32)
    whole = jnp.zeros(places.shape[:2], jnp.int32)
    return Truth(whole + STANDS, whole, whole + colour, whole, places, places, jnp.full(whole.shape, radius))


def test_the_truth_of_scenes_is_what_they_hold(scenes):
    truth = truth_of(scenes)
    np.testing.assert_array_equal(truth.standing == STANDS, scenes.present)
    np.testing.assert_array_equal(np.asarray(SIZES, np.float32)[truth.size], scenes.size)
    centre, unit = projected(scenes.position, 0.7 * scenes.size)
    np.testing.assert_allclose(truth.centre, centre, rtol=1e-6)
    np.testing.assert_allclose(truth.radius, unit * scenes.size, rtol=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_disturbed_pictures_stay_near_what_they_were(size):
    smooth = jax.image.resize(jax.random.uniform(jax.random.key(0), (16, 4, 4, 3)), (16, *size, 3), "linear")
    changed = jax.jit(disturb)(jax.random.key(1), smooth)
    difference = np.abs(changed - smooth).mean(axis=(1, 2, 3))
    assert (float(changed.min()) >= 0.0) & (float(changed.max()) <= 1.0)
    assert (difference < 0.15).all()
    assert difference.max() > 0.03
    # About every fourth picture is left as it was, but for a blur of a fifth of a pixel.
    assert 1 <= (difference < 1e-4).sum() <= 8


@pytest.fixture(scope="module")
def spoiled(scenes, images) -> tuple:
    few = jax.tree.map(lambda field: field[:48], scenes)
    truth = truth_of(few)
    return images[:48], truth, *jax.jit(spoil)(jax.random.key(4), images[:48], truth)


def test_spoiled_pictures_are_joined_laid_over_each_other_or_bent(spoiled):
    images, _, changed, _ = (np.asarray(part) if not isinstance(part, Truth) else part for part in spoiled)
    kinds = {"columns": 0, "rows": 0, "over": 0, "bent": 0}
    for index, picture in enumerate(changed):
        own, other = images[index], images[index - 1]
        is_own, is_other = (picture == own).all(axis=-1), (picture == other).all(axis=-1)
        if (is_own.all(axis=0) | is_other.all(axis=0)).all():
            kinds["columns"] += 1
        elif (is_own.all(axis=1) | is_other.all(axis=1)).all():
            kinds["rows"] += 1
        elif (picture == np.minimum(own, other)).all():
            kinds["over"] += 1
        else:
            kinds["bent"] += 1
            assert not (is_own | is_other).all()
    assert min(kinds.values()) >= 3
    assert kinds["bent"] == max(kinds.values())


def test_spoiled_pictures_list_both_pictures_objects_and_invent_none(spoiled):
    _, truth, _, after = spoiled
    both = jax.tree.map(lambda field: jnp.concatenate([field, jnp.roll(field, 1, axis=0)], axis=1), truth)
    for name in ("shape", "colour", "size", "centre"):
        np.testing.assert_array_equal(getattr(after, name), getattr(both, name))
    assert not ((after.standing != GONE) & (both.standing == GONE)).any()
    assert {GONE, STANDS, DOUBTFUL} == set(np.unique(after.standing[both.standing == STANDS]).tolist())


def test_an_object_stands_where_a_cut_clears_it_and_is_gone_where_it_halves_it():
    inside = jnp.array([[1.5, 1.21, 0.9, 0.5, 0.0, -0.8, -3.0]])
    wanted = [STANDS, STANDS, DOUBTFUL, GONE, GONE, GONE, GONE]
    assert disturbance._cut(inside)[0].tolist() == wanted


def test_an_evenly_moved_object_is_in_doubt_and_an_unevenly_moved_one_is_gone():
    truth = plain_truth([(-0.5, 0.0), (0.5, 0.0)])
    place = jnp.arange(64, dtype=jnp.float32)
    columns = jnp.where(place < 32.0, 5.0, 4.0 * jnp.sin(2.0 * place))
    field = jnp.broadcast_to(columns[None, None, :, None], (1, 64, 64, 2))
    assert disturbance._melted(truth, field, 32.0)[0].tolist() == [DOUBTFUL, GONE]


@pytest.mark.parametrize(
    ("distance", "colour", "standing"),
    [(0.9, 0, STANDS), (0.65, 0, DOUBTFUL), (0.3, 0, GONE), (0.3, 7, DOUBTFUL), (0.05, 0, DOUBTFUL)],
)
def test_objects_laid_over_each_other_stand_only_when_clear(distance, colour, standing):
    own, other = plain_truth([(0.0, 0.0)]), plain_truth([(distance, 0.0)], colour=colour)
    assert disturbance._mixed(own, other)[0].tolist() == [standing]
    absent = other._replace(standing=jnp.full_like(other.standing, GONE))
    assert disturbance._mixed(own, absent)[0].tolist() == [STANDS]


def test_clouds_are_white_noise_whose_amplitudes_fall_with_frequency():
    fall = np.array([0.5, 1.0, 2.0], np.float32)
    draw = jax.jit(disturbance.clouds, static_argnums=(2, 3))
    white, fields = (np.asarray(draw(jax.random.key(5), each, 32, 48), np.float64) for each in (0.0 * fall, fall))
    np.testing.assert_allclose(fields.mean(axis=(1, 2)), 0.0, atol=1e-5)
    np.testing.assert_allclose(fields.var(axis=(1, 2)), 1.0, rtol=1e-4)
    frequency = np.hypot(np.fft.fftfreq(32)[:, None], np.fft.fftfreq(48)[None])[None, :, :, None]
    frequency[0, 0, 0] = 1.0
    flat = np.fft.fft2(fields, axes=(1, 2)) * frequency ** fall[:, None, None, None]
    told = np.fft.fft2(white, axes=(1, 2))
    scale = np.sqrt((abs(flat) ** 2).sum(axis=(1, 2)) / (abs(told) ** 2).sum(axis=(1, 2)))
    np.testing.assert_allclose(flat / scale[:, None, None], told, atol=1e-3 * abs(told).max())


def test_pictures_of_nothing_differ_and_stay_in_range():
    pictures = jax.jit(nothing, static_argnums=(1, 2, 3))(jax.random.key(3), 12, 32, 48)
    assert pictures.shape == (12, 32, 48, 3)
    assert (float(pictures.min()) >= 0.0) & (float(pictures.max()) <= 1.0)
    means = np.asarray(pictures.mean(axis=(1, 2)))
    assert len(np.unique(means.round(4), axis=0)) == 12
