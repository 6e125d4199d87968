"""The three signals against plain float64 numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toprovar_jax.acceleration.entropy import (
    detail_score,
    head_mean,
    keep_probability,
    normalise,
    resize_map,
    salient_share,
    spectrum_ratio,
)
from toprovar_jax.errors import UserInputError

compiled_ratio = jax.jit(spectrum_ratio, static_argnums=(1, 2))
NORMALISATIONS = ["rank", "minmax", "count", "sum"]


def entropies(*shape, seed=0):
    """Positive, as attention over some dozens of keys has them."""
    return np.random.default_rng(seed).gamma(20.0, 0.15, shape).astype(np.float32)


def normalised(entropy, how):
    """One image, float64."""
    entropy = np.float64(entropy)
    if how == "rank":
        less = (entropy[None] < entropy[:, None]).sum(1)
        equal = (entropy[None] == entropy[:, None]).sum(1)
        return (less + (equal - 1) / 2) / (len(entropy) - 1)
    if how == "minmax":
        return (entropy - entropy.min()) / (entropy.max() - entropy.min())
    return entropy / entropy.sum() * (len(entropy) if how == "count" else 1)


def resized(image, size):
    """Bilinear: output i looks at ``max(0, (i + 0.5) in / out - 0.5)``, float64."""
    for axis in (0, 1):
        image, length = np.moveaxis(np.float64(image), axis, 0), size[axis]
        source = np.maximum((np.arange(length) + 0.5) * len(image) / length - 0.5, 0)
        low = np.minimum(np.floor(source).astype(int), len(image) - 1)
        high, fraction = np.minimum(low + 1, len(image) - 1), (source - low)[:, None]
        image = np.moveaxis((1 - fraction) * image[low] + fraction * image[high], 0, axis)
    return image


@pytest.mark.parametrize("rows", [2, 4])
def test_the_head_mean_is_that_of_the_conditional_rows(rows):
    entropy = entropies(rows, 5, 12)
    got = head_mean(jnp.asarray(entropy), 2)
    np.testing.assert_allclose(got, np.float64(entropy[:2]).mean(1), rtol=3e-7)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.sampled_from([4, 54, 257]))
def test_the_salient_share_counts_the_tokens_below_the_mean(seed, tokens):
    entropy = np.random.default_rng(seed).integers(0, 50, (3, tokens)).astype(np.float32)
    got = salient_share(jnp.asarray(entropy))
    exact = np.float64(entropy)
    np.testing.assert_allclose(got, (exact < exact.mean(1, keepdims=True)).mean(1), rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 2.7, 6.931472])
@pytest.mark.parametrize("tokens", [1, 3, 144])
def test_no_token_of_a_constant_map_is_salient(value, tokens):
    """Also where the float32 mean of equal values would come out above them."""
    np.testing.assert_array_equal(salient_share(jnp.full((2, tokens), value, jnp.float32)), 0.0)


@pytest.mark.parametrize(
    ("grid_in", "grid_out"),
    [((2, 3), (7, 5)), ((6, 6), (9, 9)), ((9, 6), (15, 10)), ((8, 8), (3, 2)), ((1, 1), (2, 2))],
)
def test_maps_are_resized_bilinearly_whatever_their_leading_axes(grid_in, grid_out):
    maps = entropies(3, 2, grid_in[0] * grid_in[1])
    got = np.asarray(resize_map(jnp.asarray(maps), grid_in, grid_out))
    assert got.shape == (3, 2, grid_out[0] * grid_out[1])
    for layer, image in np.ndindex(3, 2):
        expected = resized(maps[layer, image].reshape(grid_in), grid_out)
        np.testing.assert_allclose(got[layer, image].reshape(grid_out), expected, rtol=3e-6)
        alone = resize_map(jnp.asarray(maps[layer, image]), grid_in, grid_out)
        np.testing.assert_allclose(alone, got[layer, image], rtol=3e-7)


def test_a_map_on_its_own_grid_is_unchanged():
    maps = jnp.asarray(entropies(2, 54))
    np.testing.assert_array_equal(resize_map(maps, (9, 6), (9, 6)), maps)


@pytest.mark.parametrize("how", NORMALISATIONS)
@pytest.mark.parametrize("tokens", [2, 54, 256])
def test_normalised_entropies_agree_with_float64(how, tokens):
    entropy = entropies(3, tokens)
    entropy[1] = np.round(entropy[1])  # many ties
    entropy[1, :2] = 1.0, 5.0
    got = normalise(jnp.asarray(entropy), how)
    for image in range(3):
        np.testing.assert_allclose(got[image], normalised(entropy[image], how), rtol=1e-6, atol=1e-7)


def test_ranks_run_from_0_to_1_around_one_half_and_ignore_the_head_temperature():
    entropy = entropies(2, 100)
    ranks = np.asarray(normalise(jnp.asarray(entropy), "rank"))
    assert ranks.min() == 0.0
    assert ranks.max() == 1.0
    np.testing.assert_allclose(ranks.mean(1), 0.5, rtol=1e-6)
    np.testing.assert_array_equal(normalise(jnp.asarray(entropy**2 + 3), "rank"), ranks)


@pytest.mark.parametrize(("how", "value"), [("rank", 0.5), ("minmax", 0.5), ("count", 1.0), ("sum", None)])
@pytest.mark.parametrize("level", [0.0, 0.7])
@pytest.mark.parametrize("tokens", [1, 7])
def test_a_constant_map_favours_no_token(how, value, level, tokens):
    """Zero everywhere is what the first token has, which sees only itself and is certain."""
    got = normalise(jnp.full((2, tokens), level, jnp.float32), how)
    np.testing.assert_allclose(got, 1 / tokens if value is None else value, rtol=3e-7)


@pytest.mark.parametrize("how", NORMALISATIONS)
@pytest.mark.parametrize(("alpha_min", "alpha_max", "weight"), [(0.3, 0.95, 0.8), (0.0, 0.0, 1.0), (0.5, 1.0, 1.0)])
def test_the_keep_probability_agrees_with_float64(how, alpha_min, alpha_max, weight):
    entropy = entropies(2, 54)
    got = keep_probability(jnp.asarray(entropy), weight, alpha_min, alpha_max, how)
    for image in range(2):
        expected = 1 - np.clip(alpha_min + (alpha_max - alpha_min) * weight * normalised(entropy[image], how), 0, 1)
        np.testing.assert_allclose(got[image], expected, rtol=1e-6, atol=2e-7)


def test_the_printed_formula_treats_all_tokens_alike_where_ranks_span_the_whole_range():
    """Eq. 5 divides by the sum over tokens, so Eq. 6 moves P_keep by about 1/T: nothing is selected."""
    tokens, alpha_min, alpha_max = 1024, 0.3, 0.95
    entropy = entropies(1, tokens)
    assert entropy.max() > 2 * entropy.min()
    printed, ranked = (
        np.float64(keep_probability(jnp.asarray(entropy), 1.0, alpha_min, alpha_max, how)) for how in ("sum", "rank")
    )
    assert np.ptp(printed) < 3 * (alpha_max - alpha_min) / tokens
    np.testing.assert_allclose(printed, 1 - alpha_min, atol=3 * (alpha_max - alpha_min) / tokens)
    assert np.ptp(ranked) == pytest.approx(alpha_max - alpha_min, rel=1e-6)


def test_an_unknown_normalisation_is_refused_and_the_nearest_one_named():
    with pytest.raises(UserInputError, match="did you mean rank"):
        normalise(jnp.ones((1, 4)), "ranks")


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("grid", [(12, 12), (9, 6)], ids=str)
def test_the_spectrum_ratio_is_that_of_every_map_image_first(grid, center):
    maps = entropies(3, 2, grid[0] * grid[1])
    got = np.asarray(compiled_ratio(jnp.asarray(maps), grid, center))
    assert got.shape == (2, 3)
    for layer, image in np.ndindex(3, 2):
        exact = np.float64(maps[layer, image]).reshape(grid)
        values = np.linalg.svd(exact - exact.mean() if center else exact, compute_uv=False)
        np.testing.assert_allclose(got[image, layer], values[0] / values[1], rtol=1e-4)


def test_uncentred_entropy_maps_all_look_global():
    """The mean of a positive map is its first pattern: even noise is far from the ratio 1 of a detail layer."""
    maps = jnp.asarray(entropies(3, 2, 144))
    assert np.min(compiled_ratio(maps, (12, 12), False)) > 5
    assert np.max(compiled_ratio(maps, (12, 12), True)) < 2


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_the_detail_score_falls_from_1_at_ratio_1_to_0_at_infinity_in_every_kind_of_number(beta):
    ratios = [1.0, 1.3, 4.0, math.inf]
    exact = [math.exp(-beta * (ratio - 1)) for ratio in ratios]
    scores = [detail_score(ratio, beta) for ratio in ratios]
    assert all(type(score) is float for score in scores)
    assert scores == exact
    assert scores[0] == 1.0
    assert scores[-1] == 0.0
    on_host = detail_score(np.array(ratios), beta)
    assert isinstance(on_host, np.ndarray)
    np.testing.assert_allclose(on_host, exact, rtol=1e-15)
    traced = jax.jit(lambda ratio: detail_score(ratio, beta))(jnp.asarray(ratios, jnp.float32))
    np.testing.assert_allclose(traced, exact, rtol=2e-6)
