"""How scenes are drawn: balanced kinds, objects inside the picture, everything from the key."""

import colorsys
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toprovar_jax.errors import UserInputError
from toprovar_jax.scenes import world
from toprovar_jax.scenes.captions import places


def test_a_multiple_of_32_scenes_holds_every_combination_equally_often(scenes):
    kinds = np.asarray(scenes.shape) * len(world.COLOURS) + np.asarray(scenes.colour)
    np.testing.assert_array_equal(np.bincount(kinds, minlength=32), np.full(32, 2))


def test_small_batches_favour_no_shape_and_no_colour():
    draw = jax.jit(jax.vmap(lambda key: world.sample_scenes(key, 3)))
    drawn = draw(jax.random.split(jax.random.key(0), 2000))
    for field, count in ((drawn.shape, 4), (drawn.colour, 8)):
        shares = np.bincount(np.asarray(field).ravel(), minlength=count) / field.size
        np.testing.assert_allclose(shares, 1.0 / count, atol=0.02)


def test_the_key_alone_decides_the_scenes():
    first, again = (world.sample_scenes(jax.random.key(7), 5) for _ in range(2))
    other = world.sample_scenes(jax.random.key(8), 5)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first.position, other.position)


def test_objects_stand_on_all_sides_of_the_floor():
    drawn = world.sample_scenes(jax.random.key(3), 512)
    named = [place for position in np.asarray(drawn.position) for place in places(position)]
    for place in ("left", "right", "front", "back"):
        assert named.count(place) > 0.25 * 512
    assert named.count("middle") > 0.03 * 512


def test_both_sizes_occur_and_fit_their_own_range_of_depths():
    drawn = world.sample_scenes(jax.random.key(4), 256)
    near, far = world.depth_range(drawn.size)
    assert set(np.unique(drawn.size)) == {np.float32(size) for size in world.SIZES}
    assert ((drawn.position[:, 1] >= near) & (drawn.position[:, 1] <= far)).all()
    assert (jnp.abs(drawn.position[:, 0]) <= world.side_limit(drawn.size, drawn.position[:, 1])).all()


def test_hues_are_far_apart():
    hues = [colorsys.rgb_to_hsv(*rgb)[0] * 360 for name, rgb in world.COLOURS.items() if name != "black"]
    gaps = [abs((a - b + 180) % 360 - 180) for a, b in itertools.combinations(hues, 2)]
    assert min(gaps) > 24


def test_an_empty_batch_is_refused():
    with pytest.raises(UserInputError, match="batch 0: must be at least 1"):
        world.sample_scenes(jax.random.key(0), 0)
