"""The spectrum ratio against numpy's float64 singular values, easy and hard spectra alike."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pallas_kernels import spectrum
from pallas_kernels.spectrum import entropy_spectrum_ratio

SHAPES = [(12, 12), (16, 16), (64, 64), (8, 18), (18, 8)]


def uniform(random, shape):
    return random.uniform(0.0, 1.0, (6, *shape))


def nearly_constant(random, shape):
    return 1.0 + 0.05 * random.standard_normal((6, *shape))


def blobs(random, shape):
    grid = np.stack(np.meshgrid(*(np.linspace(0.0, 1.0, size) for size in shape), indexing="ij"))[None, None]
    centre, width = random.uniform(0.0, 1.0, (6, 4, 2, 1, 1)), random.uniform(0.1, 0.4, (6, 4, 1, 1))
    return 0.2 + np.sum(np.exp(-np.sum((grid - centre) ** 2, axis=2) / (2 * width**2)), axis=1)


def nearly_rank_one(random, shape):
    column, row = random.uniform(0.5, 1.0, (6, shape[0], 1)), random.uniform(0.5, 1.0, (6, 1, shape[1]))
    return column * row + 1e-4 * random.standard_normal((6, *shape))


def with_values(values):
    """Random singular vectors under a given start of the spectrum, continued at half its last value."""

    def draw(random, shape):
        rank = min(shape)
        full = np.concatenate([values, np.full(rank, 0.5 * values[-1])])[:rank]
        left, right = (np.linalg.qr(random.standard_normal((6, size, rank)))[0] for size in shape)
        return (left * full) @ right.swapaxes(-1, -2)

    return draw


FAMILIES = {
    "uniform": uniform,
    "nearly constant": nearly_constant,
    "blobs": blobs,
    "nearly rank one": nearly_rank_one,
    "second equals third": with_values([10.0, 1.0, 1.0]),
    "second to fifth nearly equal": with_values([10.0, 1.0, 0.999, 0.998, 0.997]),
    "first equals second": with_values([1.0, 1.0, 0.5]),
    "first nearly second": with_values([1.0, 0.9999, 0.9998]),
    "flat tail": with_values(np.r_[10.0, np.linspace(1.0, 0.98, 63)]),
    "all equal": with_values(np.ones(64)),
}


def exact(maps):
    values = np.linalg.svd(np.float64(maps), compute_uv=False)
    return values[..., 0] / values[..., 1]


def worst(got, want) -> float:
    return float(np.max(np.abs(np.float64(got) / want - 1.0)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_the_float64_svd(family, shape):
    maps = np.float32(FAMILIES[family](np.random.default_rng(0), shape))
    bound = 2e-4 if family in ("nearly rank one", "first nearly second") else 5e-5
    assert worst(jax.jit(entropy_spectrum_ratio)(maps), exact(maps)) < bound


def test_centring_takes_the_mean_away():
    maps = np.float32(uniform(np.random.default_rng(1), (12, 12)))
    centred = np.float64(maps) - np.mean(np.float64(maps), axis=(-2, -1), keepdims=True)
    assert worst(jax.jit(functools.partial(entropy_spectrum_ratio, center=True))(maps), exact(centred)) < 1e-5


def test_more_squarings_separate_closer_values(monkeypatch):
    maps = np.float32(FAMILIES["second to fifth nearly equal"](np.random.default_rng(2), (12, 12)))
    errors = []
    for squarings in (3, 6, 12):
        monkeypatch.setattr(spectrum, "SQUARINGS", squarings)
        errors.append(worst(jax.jit(lambda maps: entropy_spectrum_ratio(maps))(maps), exact(maps)))
    assert errors[0] > errors[1] > 1e-4
    assert errors[2] < 1e-5


@pytest.mark.parametrize("level", [1e-18, 1.0, 1e18], ids=str)
def test_the_size_of_the_values_does_not_matter(level):
    maps = np.float32(level * uniform(np.random.default_rng(3), (12, 12)))
    assert worst(entropy_spectrum_ratio(jnp.asarray(maps)), exact(maps)) < 1e-5


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1)], ids=str)
def test_a_single_row_or_column_has_no_second_value(shape):
    maps = jnp.asarray(np.random.default_rng(4).uniform(0.5, 1.0, shape), jnp.float32)
    assert entropy_spectrum_ratio(maps) == np.inf


def test_rank_one_is_infinite_and_zero_is_one():
    constant = jnp.full((12, 12), 0.7, jnp.float32)
    outer = jnp.outer(jnp.arange(1.0, 10.0), jnp.arange(3.0, 20.0))
    assert entropy_spectrum_ratio(constant) == np.inf
    assert entropy_spectrum_ratio(outer) == np.inf
    assert entropy_spectrum_ratio(jnp.zeros((5, 4), jnp.float32)) == 1.0
    centred = jax.jit(functools.partial(entropy_spectrum_ratio, center=True))
    for value in (0.7, 0.1, 5.3, 1 / 3, 4.787, 0.001, 1e4):
        for shape in ((12, 12), (7, 9), (12, 13), (64, 64), (1, 5)):
            assert centred(jnp.full(shape, value, jnp.float32)) == 1.0


def test_a_map_with_nan_gives_nan_and_spoils_no_other():
    maps = jnp.asarray(uniform(np.random.default_rng(5), (12, 12)), jnp.float32)
    got = entropy_spectrum_ratio(maps.at[1, 3, 3].set(jnp.nan))
    np.testing.assert_array_equal(np.isnan(got), np.arange(6) == 1)


def test_leading_axes_batch_like_vmap_and_shard_map():
    maps = jnp.asarray(np.random.default_rng(6).uniform(0.0, 1.0, (8, 5, 9, 7)), jnp.float32)
    plain = jax.jit(entropy_spectrum_ratio)(maps)
    assert plain.shape == (8, 5)
    np.testing.assert_allclose(jax.jit(jax.vmap(jax.vmap(entropy_spectrum_ratio)))(maps), plain, rtol=1e-5)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    split = jax.shard_map(entropy_spectrum_ratio, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"))
    np.testing.assert_allclose(jax.jit(split)(maps), plain, rtol=1e-5)


def test_lower_precisions_are_computed_in_float32():
    maps = jnp.asarray(uniform(np.random.default_rng(7), (12, 12)), jnp.bfloat16)
    got = entropy_spectrum_ratio(maps)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, entropy_spectrum_ratio(maps.astype(jnp.float32)))


@pytest.mark.parametrize(
    ("maps", "rule"),
    [
        (jnp.ones((3,)), "must be \\[..., h, w\\]"),
        (jnp.ones((0, 4)), "at least one element"),
        (jnp.ones((3, 3), jnp.int32), "must be floating"),
    ],
    ids=["rank", "empty", "integer"],
)
def test_wrong_inputs_are_named(monkeypatch, maps, rule):
    # What a user without annotation checks sees.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=rule) as caught:
        entropy_spectrum_ratio(maps)
    assert "\n" not in str(caught.value)
