import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toprovar_jax.schedule import ScaleSchedule
from toprovar_jax.training.losses import bit_accuracy, bit_cross_entropy, token_weights, weighted_loss


@pytest.mark.parametrize(("ratio", "scales"), [("1:1", 5), ("4:3", 7), ("1:3", 13)])
def test_weights_sum_to_one_and_fall_with_the_root_of_a_scales_tokens(ratio, scales):
    schedule = ScaleSchedule.of(ratio, scales)
    weights = token_weights(schedule)
    assert weights.shape == (schedule.num_tokens,)
    assert weights.sum() == pytest.approx(1.0, abs=1e-5)
    totals = [weights[a:b].sum() for a, b in zip(schedule.offsets[:-1], schedule.offsets[1:], strict=True)]
    expected = np.sqrt(schedule.token_counts) / np.sqrt(schedule.token_counts).sum()
    np.testing.assert_allclose(totals, expected, rtol=1e-4)


def test_loss_equals_a_plain_numpy_computation(schedule):
    scores = np.random.default_rng(0).normal(size=(2, schedule.num_tokens, 8, 2), scale=3.0)
    targets = np.random.default_rng(1).integers(0, 2, scores.shape[:-1])
    expected = 0.0
    for image in range(2):
        denominator = sum(count**0.5 for count in schedule.token_counts)
        for scale, count in enumerate(schedule.token_counts):
            for token in range(schedule.offsets[scale], schedule.offsets[scale + 1]):
                odds = np.exp(scores[image, token]) / np.exp(scores[image, token]).sum(-1, keepdims=True)
                chosen = np.take_along_axis(odds, targets[image, token][:, None], axis=1)
                expected += -np.log(chosen).mean() / (count**0.5 * denominator) / 2
    cross_entropy = bit_cross_entropy(jnp.asarray(scores, jnp.float32), jnp.asarray(targets, jnp.uint8))
    loss = weighted_loss(cross_entropy, jnp.asarray(token_weights(schedule)))
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_confident_scores_neither_overflow_nor_lose_their_gradient():
    scores = jnp.array([[[[0.0, 200.0], [200.0, 0.0]]]])
    wrong = jnp.array([[[0, 1]]], jnp.uint8)
    value, gradient = jax.value_and_grad(lambda s: bit_cross_entropy(s, wrong)[0, 0])(scores)
    assert float(value) == pytest.approx(200.0)
    np.testing.assert_allclose(gradient[0, 0], [[-0.5, 0.5], [0.5, -0.5]])


def test_accuracy_is_counted_scale_by_scale(schedule):
    targets = jnp.ones((1, schedule.num_tokens, 4), jnp.uint8)
    right = jnp.arange(schedule.num_tokens) < schedule.offsets[2]
    ones = jnp.where(jnp.broadcast_to(right[None, :, None], targets.shape), 1.0, -1.0)
    scores = jnp.stack([jnp.zeros(targets.shape), ones], axis=-1)
    np.testing.assert_array_equal(bit_accuracy(scores, targets, schedule), [1.0, 1.0, 0.0])


def test_weights_of_none_count_all_tokens_alike(schedule):
    np.testing.assert_allclose(token_weights(schedule, "none"), np.full(schedule.num_tokens, 1 / schedule.num_tokens))
