import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from toprovar_jax.text_encoder import FLAN_T5_XL, T5Config, T5Encoder

from .golden_t5 import load_encoder

TINY = T5Config(vocab_size=50, width=16, head_dim=4, feed_forward_width=24, num_layers=2, num_heads=3)
# Absolute, what the reference recommends; 2.9e-6 was measured. Exact GELU is 1e-3 away, scaled attention 3.
TOLERANCE = 2e-5
# Relative, twice the measured 5.7e-3.
BF16_TOLERANCE = 1.2e-2


def _encode(encoder, tokens, lengths):
    return np.asarray(jax.jit(lambda module, *inputs: module(*inputs))(encoder, tokens, lengths))


def _error(case, features):
    return float(np.abs(features - case.features)[case.valid].max())


@pytest.fixture(scope="module")
def features(reference):
    return _encode(reference.encoder, reference.tokens, reference.lengths)


@pytest.fixture(scope="module")
def tiny():
    return T5Encoder(TINY, rngs=nnx.Rngs(3))


def test_features_equal_the_reference(reference, features):
    assert features.dtype == np.float32
    assert _error(reference, features) < TOLERANCE


def test_features_of_the_end_to_end_case_equal_the_reference(golden):
    folder = golden / "f_end_to_end"
    data = np.load(folder / "io.npz")
    lengths = data["attention_mask"].sum(axis=1).astype(np.int32)
    encoder = load_encoder(folder, "t5.safetensors")
    features = _encode(encoder, jnp.asarray(data["input_ids"]), jnp.asarray(lengths))
    valid = data["attention_mask"].astype(bool)
    np.testing.assert_allclose(features[valid], data["t5_hidden"][valid], rtol=0, atol=TOLERANCE)


def test_reference_rejects_scaled_attention(reference):
    """Dividing the logits by sqrt(H), as other transformers do, is seen by the reference."""
    encoder = nnx.clone(reference.encoder)
    query = encoder.layers.attention.query
    query[...] = query[...] / np.float32(np.sqrt(encoder.config.head_dim))
    assert _error(reference, _encode(encoder, reference.tokens, reference.lengths)) > 100 * TOLERANCE


def test_reference_rejects_exact_gelu(reference, monkeypatch):
    """The erf form of GELU is close to the tanh form, yet the reference tells them apart."""
    exact = jax.nn.gelu
    monkeypatch.setattr(jax.nn, "gelu", lambda x, approximate: exact(x, approximate=not approximate))
    assert _error(reference, _encode(reference.encoder, reference.tokens, reference.lengths)) > 3 * TOLERANCE


def test_reference_rejects_other_position_buckets(golden, reference):
    encoder = load_encoder(reference.folder, "weights.safetensors", relative_max_distance=127)
    assert _error(reference, _encode(encoder, reference.tokens, reference.lengths)) > 3 * TOLERANCE


def test_bfloat16_is_close_and_returns_float32(reference):
    encoder = load_encoder(reference.folder, "weights.safetensors", compute_dtype="bfloat16")
    features = _encode(encoder, reference.tokens, reference.lengths)
    assert features.dtype == np.float32
    error = np.linalg.norm((features - reference.features)[reference.valid])
    relative = error / np.linalg.norm(reference.features[reference.valid])
    assert 1e-4 < relative < BF16_TOLERANCE


def test_bfloat16_parameters_give_float32_features(tiny):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny)
    tokens, lengths = jnp.full((1, 4), 7, jnp.int32), jnp.array([3], jnp.int32)
    np.testing.assert_allclose(_encode(half, tokens, lengths), _encode(tiny, tokens, lengths), atol=0.1)


def test_a_prompt_does_not_see_its_padding(reference, features):
    """Neither what the padded ids are nor how many there are changes the features of a prompt."""
    garbage = jnp.where(jnp.asarray(reference.valid), reference.tokens, 99)
    np.testing.assert_array_equal(_encode(reference.encoder, garbage, reference.lengths), features)
    short = _encode(reference.encoder, reference.tokens[1:, :40], reference.lengths[1:])
    np.testing.assert_allclose(short, features[1:, :40], rtol=0, atol=TOLERANCE)


def test_rows_after_a_prompt_are_zero(reference, features):
    assert not reference.valid.all()
    assert (features[~reference.valid] == 0).all()


def test_a_prompt_does_not_depend_on_its_batch(reference, features):
    alone = _encode(reference.encoder, reference.tokens[1:2], reference.lengths[1:2])
    np.testing.assert_allclose(alone[0], features[1], rtol=0, atol=TOLERANCE)


def test_works_under_vmap(tiny):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 50, (4, 2, 6)), jnp.int32)
    lengths = jnp.asarray([[6, 2], [1, 3], [4, 4], [5, 6]], jnp.int32)
    mapped = jax.vmap(tiny)(tokens, lengths)
    looped = jnp.stack([tiny(*pair) for pair in zip(tokens, lengths, strict=True)])
    np.testing.assert_allclose(mapped, looped, rtol=0, atol=1e-5)


def test_gradients_reach_every_parameter(tiny):
    tokens, lengths = jnp.arange(1, 7, dtype=jnp.int32)[None], jnp.array([6], jnp.int32)
    gradients = jax.grad(lambda module: jnp.sum(jnp.square(module(tokens, lengths)) * jnp.arange(16.0)[None, None]))(
        tiny
    )
    for path, gradient in jax.tree.leaves_with_path(gradients):
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0, jax.tree_util.keystr(path)


def test_an_id_outside_the_vocabulary_is_not_silently_replaced(tiny):
    tokens = jnp.array([[3, 50, 1], [3, 4, 1]], jnp.int32)
    features = _encode(tiny, tokens, jnp.array([3, 3], jnp.int32))
    assert np.isnan(features[0]).all()
    assert np.isfinite(features[1]).all()


def test_fresh_layers_differ_and_keep_features_at_unit_scale(tiny):
    queries = np.asarray(tiny.layers.attention.query[...])
    assert queries.shape == (2, 16, 12)
    assert not np.array_equal(queries[0], queries[1])
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 50, (3, 20)), jnp.int32)
    features = _encode(tiny, tokens, jnp.array([20, 20, 20], jnp.int32))
    np.testing.assert_allclose(np.sqrt(np.mean(features**2)), 1.0, rtol=1e-3)


def test_the_released_encoder_is_built_without_memory():
    encoder = nnx.eval_shape(lambda: T5Encoder(FLAN_T5_XL, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(encoder)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    # 24 layers of 4 x 2048 x 2048 + 3 x 2048 x 5120 + 2 norms, the embedding, 32 x 32 biases and the last norm.
    per_layer = 4 * 2048**2 + 3 * 2048 * 5120 + 2 * 2048
    assert sum(leaf.size for leaf in leaves) == 24 * per_layer + 32128 * 2048 + 32 * 32 + 2048


def test_depth_does_not_grow_the_program(tiny):
    def lines(layers):
        config = dataclasses.replace(TINY, num_layers=layers)
        encoder = nnx.eval_shape(lambda: T5Encoder(config, rngs=nnx.Rngs(0)))
        return str(jax.make_jaxpr(lambda m, *i: m(*i))(encoder, *_abstract_inputs())).count("\n")

    assert lines(8) == lines(2)


def _abstract_inputs():
    return jax.ShapeDtypeStruct((1, 5), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
