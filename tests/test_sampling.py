import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toprovar_jax.errors import UserInputError
from toprovar_jax.sampling import Sampling, bit_probability, draw_uniforms, guide, sample_bits

from . import tiny


def _twin(scores: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Top-k and top-p for any number of classes, by sorting; the probability of class 1."""
    scores = scores.astype(np.float64).copy()
    if top_k > 0:
        kth = np.sort(scores, axis=-1)[..., -min(top_k, scores.shape[-1])][..., None]
        scores[scores < kth] = -np.inf
    order = np.argsort(scores, axis=-1, kind="stable")
    ascending = _softmax(np.take_along_axis(scores, order, axis=-1))
    drop = np.cumsum(ascending, axis=-1) <= 1 - top_p
    drop[..., -1] = False
    scores[np.take_along_axis(drop, np.argsort(order, axis=-1), axis=-1)] = -np.inf
    return _softmax(scores)[..., 1]


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def scores():
    drawn = 4 * np.random.default_rng(0).standard_normal((2, 50, 8, 2)).astype(np.float32)
    drawn[0, 0] = 1.5  # ties
    drawn[0, 1, :, 1] = drawn[0, 1, :, 0] + 200.0
    return drawn


@pytest.mark.parametrize("top_k", [0, 1, 2, 900])
@pytest.mark.parametrize("top_p", [0.3, 0.5, 0.9, 0.97, 1.0])
def test_probability_is_that_of_sorting_and_summing(scores, top_k, top_p):
    numbers = Sampling(3.0, 1.0, top_k, top_p).for_scales(1)
    ours = bit_probability(jnp.asarray(scores), numbers.top_k, numbers.top_p)
    np.testing.assert_allclose(ours, _twin(scores, top_k, top_p), atol=2e-6)


def test_top_p_makes_unlikely_values_impossible(scores):
    def certain(top_p):
        numbers = Sampling(top_p=top_p).for_scales(1)
        probability = bit_probability(jnp.asarray(scores), numbers.top_k, numbers.top_p)
        return float(np.mean((np.asarray(probability) == 0) | (np.asarray(probability) == 1)))

    assert certain(1.0) < 0.1 < 0.3 < certain(0.97) < certain(0.9)


def test_extreme_scores_stay_finite():
    scores = jnp.asarray([[[[-1e30, 1e30], [1e30, -1e30], [3e38, 3e38]]]], jnp.float32)
    probability = bit_probability(scores, jnp.int32(0), jnp.float32(1.0))
    np.testing.assert_array_equal(probability[0, 0], [1.0, 0.0, 0.5])


def test_bits_follow_their_probability():
    probability = jnp.asarray([0.0, 0.1, 0.5, 0.9, 1.0], jnp.float32)
    wide = jnp.broadcast_to(probability[None, None], (1, 40_000, 5))
    bits = sample_bits(wide, draw_uniforms(tiny.keys(1), 0, 40_000, 5))
    assert bits.dtype == np.uint8
    share = np.asarray(bits).mean(axis=(0, 1))
    assert share[0] == 0
    assert share[-1] == 1
    np.testing.assert_allclose(share, probability, atol=0.01)


def test_uniforms_of_an_image_come_from_its_key_alone():
    keys = tiny.keys(4)
    together = np.asarray(draw_uniforms(keys, 2, 6, 8))
    assert together.shape == (4, 6, 8)
    for i in range(4):
        np.testing.assert_array_equal(together[i], draw_uniforms(keys[i : i + 1], 2, 6, 8)[0])
        np.testing.assert_array_equal(together[i], draw_uniforms(keys[::-1], 2, 6, 8)[3 - i])
    assert len(np.unique(together)) > 0.99 * together.size
    assert (together >= 0).all()
    assert (together < 1).all()


def test_uniforms_differ_between_scales():
    assert not np.array_equal(draw_uniforms(tiny.keys(1), 1, 4, 8), draw_uniforms(tiny.keys(1), 2, 4, 8))


def test_guidance_of_one_gives_the_conditional_scores_exactly():
    conditional, unconditional = jax.random.normal(jax.random.key(0), (2, 3, 5, 2))
    np.testing.assert_array_equal(guide(conditional, unconditional, jnp.float32(1.0)), conditional)
    np.testing.assert_allclose(
        guide(conditional, unconditional, jnp.float32(3.0)),
        unconditional + 3 * (conditional - unconditional),
        rtol=1e-4,
    )


def test_numbers_and_lists_become_arrays_per_scale():
    one = Sampling(3.0, 0.5).for_scales(4)
    many = Sampling([3.0, 3.0, 3.0, 3.0], (0.5, 0.5, 0.5, 0.5)).for_scales(4)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), one) == jax.tree.map(lambda x: (x.shape, x.dtype), many)
    again = Sampling(*one).for_scales(4)
    for a, b, c in zip(one, many, again, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


def test_a_list_may_go_on_for_scales_that_are_not_run():
    np.testing.assert_array_equal(Sampling([1, 2, 3, 4, 5]).for_scales(3).guidance, [1, 2, 3])


@pytest.mark.parametrize("wrong", [{"guidance": [3.0, 3.0]}, {"tau": [1.0]}, {"guidance": []}])
def test_a_list_that_is_too_short_is_refused(wrong):
    with pytest.raises(UserInputError, match="one number, or one per scale"):
        Sampling(**wrong).for_scales(4)
