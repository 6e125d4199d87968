"""Pitfalls of the transformer, by their number in MODEL_SPEC 13: ours is right, and the wrong way would be seen.

Where the recorded outputs can tell the two apart, a test computes both and shows that they reject the wrong one.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from toprovar_jax.acceleration import Dense
from toprovar_jax.generation import advance, condition_on, initial_state, make_plan
from toprovar_jax.model.block import LayerText
from toprovar_jax.presets import PRESETS
from toprovar_jax.sampling import Sampling, bit_probability, sample_bits
from toprovar_jax.schedule import ScaleSchedule

from .. import tiny
from ..golden_cases import findings
from .common import (
    assert_tells_apart,
    distance,
    first_layer,
    projected_queries,
    unrotated,
    with_parameter,
)


def test_2_top_p_decides_bits_and_top_k_does_not(generated):
    guided, uniforms, bits = (
        np.concatenate([generated[f"{name}_{k}"] for k in range(7)], axis=1)
        for name in ("logits_guided", "uniform", "bits")
    )
    scores = jnp.asarray(guided.reshape(*uniforms.shape, 2))
    differ = []
    for top_k, top_p in ((900, 0.97), (0, 0.97), (900, 1.0)):
        numbers = Sampling(top_k=top_k, top_p=top_p).for_scales(1)
        ours = sample_bits(bit_probability(scores, numbers.top_k, numbers.top_p), jnp.asarray(uniforms))
        differ.append(int(np.sum(np.asarray(ours) != bits)))
    assert differ == [0, 0, 546]


def test_4_self_attention_has_a_learned_and_clamped_scale_and_no_other(conditioned, pieces):
    transformer, _, arrays = conditioned
    attend = first_layer(transformer).self_attention
    head_dim = transformer.config.head_dim
    right = projected_queries(attend, arrays["sa_in_2"], unrotated(16, head_dim))
    reference = pieces["sa_q_scaled_2"]
    assert_tells_apart(reference, right, right / math.sqrt(head_dim), findings.SCALED_QUERY_BOUND, by=1000)
    largest = np.linalg.norm(reference, axis=-1).max(axis=(0, 2))
    assert largest[1] == pytest.approx(100, rel=1e-4), "this head's weight asks for more"
    assert float(jnp.exp(attend.log_scale[...][1])) > 140


@pytest.mark.parametrize(
    "order",
    [(2, 3, 0, 1, 4, 5), (0, 1, 4, 5, 2, 3), (0, 2, 4, 1, 3, 5), (1, 0, 2, 3, 4, 5)],
    ids=["scales first", "shifts before scales", "by branch", "gammas swapped"],
)
def test_5_modulation_is_gamma_gamma_scale_scale_shift_shift(conditioned, pieces, block_out, order):
    transformer, condition, arrays = conditioned
    block = first_layer(transformer)
    right = block_out(block, condition, arrays["block_in_0"])
    permuted = condition._replace(modulation=condition.modulation[:, np.array(order)])
    permuted_block = with_parameter(block, "modulation", lambda m: m[np.array(order)])
    wrong = block_out(permuted_block, permuted, arrays["block_in_0"])
    assert_tells_apart(pieces["block0_out_0"], right, wrong, findings.BLOCK_BOUND, by=100)


def test_5_cross_attention_has_no_gate(conditioned, block_out):
    transformer, condition, arrays = conditioned
    closed = condition._replace(modulation=condition.modulation.at[:, :2].set(0.0))
    block = with_parameter(first_layer(transformer), "modulation", lambda m: m.at[:2].set(0.0))
    x = arrays["block_in_0"]
    text = LayerText(condition.keys[0], condition.values[0], condition.lengths)
    expected = x + block.cross_attention(block.cross_norm(x), text)
    assert distance(block_out(block, closed, x), expected) < 1e-5
    assert distance(expected, x) > 0.1


def test_9_queries_keys_and_values_are_thirds_with_heads_inside(conditioned, pieces):
    transformer, _, arrays = conditioned
    attend, config = first_layer(transformer).self_attention, transformer.config

    def heads_outside(kernel):
        by_head = kernel.reshape(-1, config.num_heads, 3, config.head_dim)
        return by_head.transpose(0, 2, 1, 3).reshape(kernel.shape)

    rope = unrotated(36, config.head_dim)
    right = projected_queries(attend, arrays["sa_in_3"], rope)
    wrong = projected_queries(with_parameter(attend, "qkv.kernel", heads_outside), arrays["sa_in_3"], rope)
    assert_tells_apart(pieces["sa_q_scaled_3"], right, wrong, findings.SCALED_QUERY_BOUND, by=1000)


@pytest.mark.parametrize(
    ("name", "width", "half_up"), [("infinity-layer32", 8192, 8448), ("infinity-layer48", 13312, 13568)]
)
def test_10_feed_forward_width_is_rounded_half_to_even(name, width, half_up):
    config = PRESETS[name].transformer
    assert config.feed_forward_width == width
    assert math.floor(config.width * 4 / 256 + 0.5) * 256 == half_up


def test_12_levels_are_fifteen_rows_indexed_by_scale(transformer_of, pieces):
    levels = transformer_of("e_blocks").level_embedding[...]
    assert levels.shape[0] == 15
    for k in range(4):
        added = pieces[f"lvl_out_{k}"] - pieces[f"lvl_in_{k}"]
        assert_tells_apart(added, *(jnp.broadcast_to(levels[i], added.shape) for i in (k, k + 1)), 1e-5, by=1000)


def test_13_the_other_norms_subtract_the_mean(conditioned, pieces):
    transformer, condition, arrays = conditioned
    x = arrays["head_in"]
    right = transformer.head(x, condition.head_modulation)
    moved = transformer.head(x + 3.0, condition.head_modulation)
    assert distance(right, moved) < findings.BLOCK_BOUND
    assert distance(right.reshape(*x.shape[:2], -1), pieces["head_out"]) < findings.BLOCK_BOUND


@pytest.mark.parametrize("piece", ["text_norm", "head", "block0"])
def test_13_epsilon_is_one_millionth(conditioned, other_epsilon, pieces, block_out, piece):
    transformer, condition, arrays = conditioned
    visible = np.arange(arrays["features"].shape[1])[None] < pieces["text_lens"][:, None]
    run = {
        "text_norm": lambda m: np.asarray(m.text.norm(arrays["features_small"]))[visible],
        "head": lambda m: m.head(arrays["head_small_in"], condition.head_modulation).reshape(2, 36, -1),
        "block0": lambda m: block_out(first_layer(m), condition, arrays["block0_small_in"]),
    }[piece]
    reference = pieces[f"{piece}_small_out"]
    assert_tells_apart(reference, run(transformer), run(other_epsilon), findings.BLOCK_BOUND, by=5)


def _matrix_products(jaxpr: Jaxpr):
    """All matrix products and convolutions of a program, those of inner programs too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation
        inner = jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr))
        for program in inner:
            if isinstance(program, Jaxpr | ClosedJaxpr):
                yield from _matrix_products(getattr(program, "jaxpr", program))


def test_16_exact_precision_asks_for_full_precision_whatever_the_default():
    """Also where the caller's default is low, as it is on accelerators."""
    model, text = tiny.model(), tiny.text(1)
    plan = make_plan(ScaleSchedule.of("1:1", 3), Sampling(), Dense(), num_layers=4)

    def run(model, text):
        condition = condition_on(model.transformer, text, guided=True)
        state = initial_state(model.transformer, plan.step(0), 1)
        state = state._replace(inputs=jnp.zeros((1, 4, 8), jnp.float32))
        uniforms = jnp.zeros((1, 4, 8), jnp.float32)
        state, _ = advance(model.transformer, condition, state, Sampling().for_scales(3), uniforms, step=plan.step(1))
        return model.image_tokenizer.decode(state.latents)

    with jax.default_matmul_precision("bfloat16"):
        program = jax.make_jaxpr(run)(model, text)
    products = list(_matrix_products(program.jaxpr))
    assert len(products) > 20
    highest = jax.lax.Precision.HIGHEST
    for product in products:
        assert product.params["precision"] in (highest, (highest, highest)), product.source_info


def test_19_epsilons_are_visible_at_small_magnitudes_only(conditioned, other_epsilon, pieces):
    transformer, condition, arrays = conditioned
    heads = [m.head(arrays["head_in"], condition.head_modulation) for m in (transformer, other_epsilon)]
    assert distance(*heads) < findings.BLOCK_BOUND
    for name in ("text_norm_small_in", "head_small_in", "block0_small_in", "vae_resblock_small_in"):
        assert np.abs(pieces[name]).max() < 0.05, name


def test_20_the_level_is_added_to_the_first_scale_too():
    transformer, schedule = tiny.transformer(), ScaleSchedule.of("1:1", 2)
    text = tiny.text(1)
    form = jax.jit(lambda m: m.parallel_logits(jnp.zeros((1, 4, 8), jnp.float32), *text[:2], schedule))
    for level in (0, 1):
        moved = with_parameter(transformer, "level_embedding", lambda table, i=level: table.at[i].add(table[i + 5]))
        change = np.abs(np.asarray(form(moved) - form(transformer))).max(axis=(0, 2, 3))
        assert (change[0] > 1e-3) == (level == 0), "the first token sees its own level and no later one"
        assert change[1:].min() > 1e-3
