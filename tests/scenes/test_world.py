"""What the world is made of: names, hues, projections."""

import colorsys
import itertools
import math

import jax.numpy as jnp
import numpy as np

from toprovar_jax.scenes import world


def test_hues_are_far_apart():
    hues = [colorsys.rgb_to_hsv(*rgb)[0] * 360 for name, rgb in world.COLOURS.items() if name != "black"]
    gaps = [abs((a - b + 180) % 360 - 180) for a, b in itertools.combinations(hues, 2)]
    assert min(gaps) > 24


def test_what_training_never_shows_names_things_of_the_world_and_leaves_every_shape_and_relation():
    kinds = world.HELD_OUT_KINDS
    assert sorted(shape for shape, _ in kinds) == sorted(world.SHAPES)
    assert len({colour for _, colour in kinds} & set(world.COLOURS)) == len(kinds)
    assert {relation for _, relation, _ in world.HELD_OUT_RELATIONS} == set(world.RELATIONS)
    assert {shape for first, _, second in world.HELD_OUT_RELATIONS for shape in (first, second)} <= set(world.SHAPES)


def test_points_are_projected_as_a_pinhole_camera_sees_them():
    rng = np.random.default_rng(0)
    position, height = rng.uniform(-2, 2, (50, 2)), rng.uniform(0, 2, 50)
    sine, cosine = math.sin(world.CAMERA_PITCH), math.cos(world.CAMERA_PITCH)
    eye = np.array([0.0, world.CAMERA_TARGET_HEIGHT + world.CAMERA_DISTANCE * sine, -world.CAMERA_DISTANCE * cosine])
    offset = np.stack([position[:, 0], height, position[:, 1]], axis=-1) - eye
    depth = offset @ np.array([0.0, -sine, cosine])
    right, up = offset[:, 0] / depth, offset @ np.array([0.0, cosine, sine]) / depth
    seen, unit = world.projected(jnp.asarray(position, jnp.float32), jnp.asarray(height, jnp.float32))
    expected = world.CAMERA_FOCAL * np.stack([right, -up], axis=-1)
    np.testing.assert_allclose(seen, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(unit, world.CAMERA_FOCAL / depth, rtol=1e-5)
