"""Rays against solids, held to points of the same solids: a float64 membership function sampled along each ray."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toprovar_jax.scenes import world
from toprovar_jax.scenes.solids import SOLIDS

STEPS = 4000


def inside(shape: str, x, y, z):
    """Positive inside, negative outside, smooth near the surface; float64."""
    across = np.sqrt(x * x + z * z)
    if shape == "sphere":
        return 1.0 - np.sqrt(x * x + (y - 1.0) ** 2 + z * z)
    if shape == "cube":
        half = world.CUBE_HALF_SIDE
        return half - np.maximum(np.maximum(np.abs(x), np.abs(z)), np.abs(y - half))
    if shape == "cylinder":
        return np.minimum(world.CYLINDER_RADIUS - across, np.minimum(y, world.CYLINDER_HEIGHT - y))
    if shape == "cone":
        return np.minimum((world.CONE_HEIGHT - y) / world.CONE_HEIGHT - across, y)
    return world.TORUS_TUBE - np.sqrt((across - world.TORUS_RING) ** 2 + (y - world.TORUS_TUBE) ** 2)


def rays(count: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """From a shell around the solids, downwards as the camera's rays are, towards places near them."""
    rng = np.random.default_rng(0)
    target = rng.uniform((-1.2, 0.0, -1.2), (1.2, 1.9, 1.2), (count, 3))
    turn, steep = rng.uniform(0, 2 * np.pi, count), rng.uniform(0.25, 0.95, count)
    way = np.stack([np.cos(turn) * np.cos(steep), -np.sin(steep), np.sin(turn) * np.cos(steep)], axis=-1)
    return target - 6.0 * way, way


@pytest.mark.parametrize("shape", world.SHAPES)
def test_rays_meet_a_solid_where_its_points_begin(shape):
    origin, way = rays()
    solid = jax.jit(SOLIDS[world.SHAPES.index(shape)])
    hit = solid(*(tuple(jnp.asarray(v[:, k], jnp.float32) for k in range(3)) for v in (origin, way)))
    place = np.linspace(0.0, 12.0, STEPS)
    points = origin[:, None] + place[None, :, None] * way[:, None]
    within = inside(shape, points[..., 0], points[..., 1], points[..., 2])
    deepest = within.max(axis=1)
    clear = np.abs(deepest) > 0.02  # rays that graze the edge may go either way
    assert clear.sum() > 500
    assert 0.2 < (deepest > 0).mean() < 0.9
    np.testing.assert_array_equal(np.asarray(hit.found)[clear], (deepest > 0)[clear])

    met = deepest > 0.05
    entry = place[(within > 0).argmax(axis=1)]
    np.testing.assert_allclose(np.asarray(hit.distance)[met], entry[met], atol=0.02)
    surface = origin + np.asarray(hit.distance, np.float64)[:, None] * way
    np.testing.assert_allclose(inside(shape, *surface[met].T), 0.0, atol=4e-3)


@pytest.mark.parametrize("shape", world.SHAPES)
def test_normals_have_length_one_and_point_out_of_the_solid(shape):
    origin, way = rays()
    hit = SOLIDS[world.SHAPES.index(shape)](
        *(tuple(jnp.asarray(v[:, k], jnp.float32) for k in range(3)) for v in (origin, way))
    )
    met = np.asarray(hit.found) & (np.asarray(hit.depth) > 0.05)
    normal = np.stack(hit.normal, axis=-1).astype(np.float64)[met]
    surface = (origin + np.asarray(hit.distance, np.float64)[:, None] * way)[met]
    np.testing.assert_allclose(np.linalg.norm(normal, axis=-1), 1.0, atol=2e-3)
    outer, inner = (inside(shape, *(surface + sign * 0.02 * normal).T) for sign in (1.0, -1.0))
    assert (outer < 0).mean() > 0.99
    assert (inner > 0).mean() > 0.97
    # Along the normal the distance to the surface grows as fast as one walks (two directions for edges).
    steep = (inner - outer) / 0.04
    assert np.median(steep) > (0.8 if shape == "cone" else 0.97)


@pytest.mark.parametrize("shape", world.SHAPES)
def test_depth_changes_sign_at_the_silhouette_and_grows_inwards(shape):
    x = np.linspace(-2.0, 2.0, 401)
    way = np.array([0.6, -0.15, 0.786])  # oblique to the faces of the cube
    way /= np.linalg.norm(way)
    origin, way = (
        tuple(jnp.asarray(v + 0 * x, jnp.float32) for v in vector)
        for vector in ((x - 6.0 * way[0], 0.3 - 6.0 * way[1], -6.0 * way[2]), way)
    )
    depth = np.asarray(SOLIDS[world.SHAPES.index(shape)](origin, way).depth)
    middle = len(x) // 2
    found = depth > 0
    edges = np.flatnonzero(np.diff(found.astype(int)))
    assert len(edges) == 2
    assert found[middle]
    assert (np.diff(depth[edges[0] - 3 : edges[0] + 3]) > 0).all()
    assert (np.diff(depth[edges[1] - 2 : edges[1] + 4]) < 0).all()
    assert depth[edges[0] + 1] < 0.05


def test_what_lies_behind_the_origin_is_not_met():
    origin = tuple(jnp.array([value], jnp.float32) for value in (0.0, 0.4, 4.0))
    way = tuple(jnp.array([value], jnp.float32) for value in (0.0, 0.0, 1.0))
    for solid in SOLIDS:
        assert not solid(origin, way).found[0]
