"""Pitfalls of the text path, by their number in MODEL_SPEC 13: ours is right, and the wrong way would be seen.

Where the recorded outputs can tell the two apart, a test computes both and shows that they reject the wrong one.
Number 14, the text encoder's, is held by ``tests/text_encoder/test_t5.py`` (attention without scaling, tanh GELU,
position buckets) and ``tests/text_encoder/test_tokenizer.py`` (the end token and the length).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toprovar_jax.config import InfinityConfig
from toprovar_jax.generation import condition_on
from toprovar_jax.model.block import LayerText
from toprovar_jax.presets import PRESETS

from ..golden_cases import findings, inputs
from .common import (
    assert_tells_apart,
    distance,
    first_layer,
    with_parameter,
)


def _unconditional_pooled(transformer, lengths, *, rows, norm=True):
    features = transformer.text.unconditional_rows(len(lengths), rows)
    seen = transformer.text.norm(features) if norm else features
    return transformer.text.pool(seen, jnp.asarray(lengths, jnp.int32))


def test_3_unconditional_text_is_as_long_as_the_prompt(generated, transformer_of):
    transformer, lengths = transformer_of("a_transformer_2b_style"), generated["text_lens"]
    reference = generated["cond"][len(lengths) :]
    right = _unconditional_pooled(transformer, lengths, rows=int(max(lengths)))
    all_rows = _unconditional_pooled(transformer, np.full_like(lengths, 64), rows=64)
    assert_tells_apart(reference, right, all_rows, findings.TEXT_BOUND, by=1000)
    guided = jax.jit(functools.partial(condition_on, guided=True))
    condition = guided(transformer, inputs.read_text(findings.Reference(generated)))
    np.testing.assert_array_equal(condition.lengths, np.concatenate([lengths, lengths]))
    assert distance(condition.pooled, generated["cond"]) <= findings.TEXT_BOUND


def test_3_unconditional_text_passes_the_text_norm(generated, transformer_of):
    transformer, lengths = transformer_of("a_transformer_2b_style"), generated["text_lens"]
    options = {"rows": int(max(lengths))}
    right, wrong = (_unconditional_pooled(transformer, lengths, norm=norm, **options) for norm in (True, False))
    assert_tells_apart(generated["cond"][len(lengths) :], right, wrong, findings.TEXT_BOUND, by=100)


@pytest.mark.parametrize(("name", "width"), [("infinity-2b", 128), ("infinity-8b", 224), ("infinity-layer12", 48)])
def test_4_pooling_has_sixteen_heads_however_wide(name, width):
    config = PRESETS[name].transformer
    assert (config.pool_heads, config.width // config.pool_heads) == (16, width)


def test_4_a_very_wide_model_pools_with_more_heads():
    wide = InfinityConfig(
        num_layers=58, width=4608, num_heads=36, text_width=2048, text_length=512, latent_channels=32, block_chunks=2
    )
    assert wide.pool_heads == 32


def test_4_pooling_is_scaled_by_its_own_head_width(conditioned, pieces):
    transformer, condition, arrays = conditioned
    head_dim = transformer.text.pool.query.shape[-1]
    wrong = with_parameter(transformer.text, "pool.query", lambda q: q * math.sqrt(head_dim / 128))
    pooled = jax.jit(lambda m, f, n: m(f, n)[0])(wrong, arrays["features"], arrays["lengths"])
    assert_tells_apart(pieces["sos"], condition.pooled, pooled, findings.BLOCK_BOUND)


def test_4_cross_attention_is_scaled_by_its_head_width(conditioned, pieces):
    transformer, condition, arrays = conditioned
    text = LayerText(condition.keys[0], condition.values[0], condition.lengths)
    right = first_layer(transformer).cross_attention
    unscaled = math.sqrt(transformer.config.head_dim)
    wrong = with_parameter(right, "query.kernel", lambda w: w * unscaled)
    wrong = with_parameter(wrong, "query.bias", lambda b: b * unscaled)
    out = [attend(arrays["ca_in"], text) for attend in (right, wrong)]
    assert_tells_apart(pieces["ca_out"], *out, findings.BLOCK_BOUND)


def test_13_the_text_norm_does_not_subtract_the_mean(conditioned, pieces):
    transformer, _, arrays = conditioned
    visible = np.arange(arrays["features"].shape[1])[None] < pieces["text_lens"][:, None]
    right = np.asarray(transformer.text.norm(arrays["features"]))[visible]
    centred = arrays["features"] - jnp.mean(arrays["features"], axis=-1, keepdims=True)
    wrong = np.asarray(transformer.text.norm(centred))[visible]
    assert_tells_apart(pieces["text_norm"], right, wrong, findings.BLOCK_BOUND, by=100)


def test_18_the_scale_of_text_features_cancels_but_their_rows_do_not(conditioned):
    """Why recorded outputs cannot catch a wrong scale, and do catch wrong rows."""
    transformer, condition, arrays = conditioned
    pool = jax.jit(lambda m, f, n: m(f, n)[0])
    scaled = pool(transformer.text, 2.0 * arrays["features"], arrays["lengths"])
    assert distance(scaled, condition.pooled) < findings.TEXT_BOUND
    shifted = pool(transformer.text, arrays["features"][:, ::-1], arrays["lengths"])
    assert distance(shifted, condition.pooled) > 0.1
