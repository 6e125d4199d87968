"""How scenes are drawn: every kind, room for every object, nothing held out, everything from the key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toprovar_jax.errors import UserInputError
from toprovar_jax.scenes import world
from toprovar_jax.scenes.sampling import held_out_kind, held_out_relation, sample_scenes
from toprovar_jax.scenes.world import Scenes


@pytest.fixture(scope="module")
def many() -> Scenes:
    return jax.device_get(sample_scenes(jax.random.key(5), 4096))


@pytest.fixture(scope="module")
def anything() -> Scenes:
    return jax.device_get(sample_scenes(jax.random.key(5), 4096, held_out=True))


def test_the_key_alone_decides_the_scenes():
    first, again = (sample_scenes(jax.random.key(7), 5) for _ in range(2))
    other = sample_scenes(jax.random.key(8), 5)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first.position, other.position)


def test_every_number_of_objects_occurs_and_the_first_is_always_there(many):
    counts = np.bincount(many.present.sum(axis=1), minlength=6) / len(many.present)
    assert many.present[:, 0].all()
    assert counts[0] == 0.0
    np.testing.assert_allclose(counts[1:], [0.31, 0.44, 0.085, 0.115, 0.05], atol=0.025)


def test_every_shape_colour_material_and_size_occurs_equally_often(anything):
    there = anything.present
    for field, count in ((anything.shape, 5), (anything.colour, 8)):
        shares = np.bincount(field[there], minlength=count) / there.sum()
        np.testing.assert_allclose(shares, 1.0 / count, atol=0.02)
    assert 0.3 < (anything.material[there] == 1).mean() < 0.4
    assert set(np.unique(anything.size)) == {np.float32(size) for size in world.SIZES}


def test_training_never_shows_what_is_held_out(many, anything):
    assert not held_out_kind(jax.tree.map(jnp.asarray, many)).any()
    assert not held_out_relation(jax.tree.map(jnp.asarray, many)).any()
    assert held_out_kind(jax.tree.map(jnp.asarray, anything)).mean() > 0.15
    assert held_out_relation(jax.tree.map(jnp.asarray, anything)).mean() > 0.02


def test_held_out_relations_are_recognised_from_their_positions():
    def scene(first: str, second: str, places) -> Scenes:
        shape = [world.SHAPES.index(name) for name in (first, second)]
        return Scenes(
            jnp.ones((1, 2), bool),
            jnp.array([shape], jnp.int32),
            jnp.zeros((1, 2), jnp.int32),
            jnp.zeros((1, 2), jnp.int32),
            jnp.array([places], jnp.float32),
            jnp.full((1, 2), 0.56),
            jnp.zeros((1, 2)),
        )

    assert ("cone", "left of", "cube") in world.HELD_OUT_RELATIONS
    assert held_out_relation(scene("cone", "cube", [(-0.5, 0.0), (0.5, 0.0)]))
    assert held_out_relation(scene("cube", "cone", [(0.5, 0.0), (-0.5, 0.0)]))
    assert not held_out_relation(scene("cone", "cube", [(0.5, 0.0), (-0.5, 0.0)]))
    assert held_out_relation(scene("cone", "cube", [(-0.2, 0.0), (0.2, 0.0)]))
    assert not held_out_relation(scene("cone", "cube", [(-0.1, 0.0), (0.1, 0.0)]))
    hidden = scene("cone", "cube", [(-0.5, 0.0), (0.5, 0.0)])._replace(present=jnp.array([[True, False]]))
    assert not held_out_relation(hidden)


def test_objects_keep_to_the_frame_and_apart(many):
    size, x, z = many.size, many.position[..., 0], many.position[..., 1]
    near, far = (np.asarray(limit).reshape(size.shape) for limit in world.depth_range(jnp.asarray(size.ravel())))
    limit = np.asarray(world.side_limit(jnp.asarray(size.ravel()), jnp.asarray(z.ravel()))).reshape(size.shape)
    there = many.present
    assert (z >= near)[there].all()
    assert (z <= far)[there].all()
    assert (np.abs(x) <= limit)[there].all()
    distance = np.linalg.norm(many.position[:, :, None] - many.position[:, None], axis=-1)
    pairs = there[:, :, None] & there[:, None] & ~np.eye(world.MAX_OBJECTS, dtype=bool)
    assert (distance[pairs] >= 1.07 * (size[:, :, None] + size[:, None])[pairs]).all()


def test_several_alike_are_of_one_shape_and_often_of_one_colour(many):
    number = many.present.sum(axis=1)
    alike = [
        (len(set(shape[there])) == 1, len(set(colour[there])) == 1)
        for shape, colour, there in zip(many.shape, many.colour, many.present, strict=True)
        if there.sum() >= 3
    ]
    assert (number >= 3).sum() == len(alike)
    same_shape, same_kind = np.mean(alike, axis=0)
    assert 0.4 < same_shape < 0.75
    assert 0.15 < same_kind < 0.5


def test_an_empty_batch_is_refused():
    with pytest.raises(UserInputError, match="batch 0: must be at least 1"):
        sample_scenes(jax.random.key(0), 0)
