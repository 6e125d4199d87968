"""Low-rank adapters: start from nothing, merge to the same numbers, survive a file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import nnx

from toprovar_jax.config import InfinityConfig
from toprovar_jax.errors import UserInputError
from toprovar_jax.model import Infinity
from toprovar_jax.training.adapters import (
    ATTENTION,
    LINEAR_LAYERS,
    LowRank,
    adapt,
    chosen_layers,
    init_adapters,
    load_adapters,
    merge,
    save_adapters,
)

CONFIG = InfinityConfig(
    num_layers=2, width=64, num_heads=2, text_width=128, text_length=8, latent_channels=8, block_chunks=2
)
RANK, SCALE = 3, 2.0


@pytest.fixture(scope="module")
def transformer():
    """Gates far from zero, so that every map shows in the result."""
    made = Infinity(CONFIG, rngs=nnx.Rngs(0))
    noise = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + jnp.asarray(0.1 * noise.standard_normal(x.shape), x.dtype), made)


@pytest.fixture(scope="module")
def adapters():
    """Of all maps, as if trained."""
    noise = np.random.default_rng(1)
    fresh = init_adapters(CONFIG, jax.random.key(0), rank=RANK, patterns=("*",))
    return jax.tree.map(lambda x: jnp.asarray(0.1 * noise.standard_normal(x.shape), jnp.float32), fresh)


@pytest.fixture(scope="module")
def scores(schedule):
    noise = np.random.default_rng(2)
    inputs = jnp.asarray(noise.standard_normal((2, schedule.num_tokens - 1, 8)), jnp.float32)
    features = jnp.asarray(noise.standard_normal((2, 6, 128)), jnp.float32)
    lengths = jnp.array([3, 6], jnp.int32)

    @jax.jit
    def compute(transformer):
        return transformer.parallel_logits(inputs, features, lengths, schedule)

    return compute


def test_fresh_adapters_change_nothing(transformer, scores):
    fresh = init_adapters(CONFIG, jax.random.key(0), rank=RANK)
    assert all(float(jnp.std(factors.down)) > 0.05 for factors in fresh.values())
    np.testing.assert_array_equal(scores(adapt(transformer, fresh, SCALE)), scores(transformer))


def test_a_merged_model_computes_what_the_adapted_one_does(transformer, adapters, scores):
    adapted, merged = scores(adapt(transformer, adapters, SCALE)), scores(merge(transformer, adapters, SCALE))
    assert float(jnp.max(jnp.abs(adapted - scores(transformer)))) > 0.05
    np.testing.assert_allclose(merged, adapted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", LINEAR_LAYERS)
def test_every_map_that_can_be_adapted_is(transformer, adapters, scores, name):
    # All of them, to stay within two programs; those but one add nothing.
    alone = {
        other: LowRank(factors.down, factors.up if other == name else jnp.zeros_like(factors.up))
        for other, factors in adapters.items()
    }
    merged = scores(merge(transformer, alone, SCALE))
    assert float(jnp.max(jnp.abs(merged - scores(transformer)))) > 1e-4
    np.testing.assert_allclose(merged, scores(adapt(transformer, alone, SCALE)), rtol=0, atol=2e-5)


def test_an_adapted_map_matches_float64_numpy(transformer, adapters):
    layers = adapt(transformer, adapters, SCALE).layers.cross_attention.query
    x = np.random.default_rng(4).standard_normal((3, 64)).astype(np.float32)
    got = jax.jit(lambda layers, x: jax.lax.map(lambda layer: layer(x), layers))(layers, x)
    kernel, bias = (np.float64(value[...]) for value in (layers.base.kernel, layers.base.bias))
    down, up = (np.float64(part) for part in adapters["cross_attention.query"])
    np.testing.assert_allclose(got, x @ (kernel + SCALE * down @ up) + bias[:, None], rtol=2e-6, atol=4e-6)


def test_neither_adapting_nor_merging_touches_the_base(transformer, adapters):
    before = jax.device_get(nnx.split(transformer)[1])
    merge(transformer, adapters, SCALE)
    adapt(transformer, adapters, SCALE)
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(nnx.split(transformer)[1]))


def test_merging_keeps_the_dtype_of_the_kernels(transformer, adapters):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), transformer)
    merged = merge(half, adapters, SCALE).layers.self_attention.qkv.kernel[...]
    assert merged.dtype == jnp.bfloat16
    factors = adapters["self_attention.qkv"]
    kernel = np.asarray(half.layers.self_attention.qkv.kernel[...], np.float64)
    expected = kernel + SCALE * np.asarray(factors.down, np.float64) @ np.asarray(factors.up, np.float64)
    np.testing.assert_allclose(np.asarray(merged, np.float64), expected, rtol=2**-8, atol=1e-6)


def test_attention_is_what_is_adapted_by_default():
    names = chosen_layers(ATTENTION)
    assert set(names) == {name for name in LINEAR_LAYERS if "attention" in name}
    assert names == tuple(init_adapters(CONFIG, jax.random.key(0), rank=1))
    assert chosen_layers(("feed_forward.up", "*.qkv")) == ("self_attention.qkv", "feed_forward.up")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank 0: must be 1 to the model's width, 64"),
        ({"rank": 65}, "rank 65: must be 1 to the model's width, 64"),
        ({"rank": 1, "patterns": ("attn",)}, "adapters for 'attn': must match one of self_attention.qkv"),
    ],
)
def test_adapters_that_cannot_be_made_are_refused(options, message):
    with pytest.raises(UserInputError, match=message):
        init_adapters(CONFIG, jax.random.key(0), **options)


@pytest.fixture
def saved(tmp_path, adapters):
    path = tmp_path / "adapter.safetensors"
    save_adapters(path, adapters, CONFIG, alpha=RANK * SCALE, base="tiny", base_sha256="ab")
    return path


def test_a_file_gives_back_the_same_adapters(saved, adapters):
    loaded, scale = load_adapters(saved, CONFIG, base_sha256="ab")
    assert scale == SCALE
    assert loaded.keys() == adapters.keys()
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)


def test_a_file_has_the_names_and_layouts_of_diffusers(saved, adapters):
    with safetensors.safe_open(str(saved), framework="np") as file:
        names, metadata = set(file.keys()), file.metadata()
        down = file.get_tensor("transformer.block_chunks.1.module.0.sa.mat_qkv.lora_A.weight")
        up = file.get_tensor("transformer.block_chunks.1.module.0.sa.mat_qkv.lora_B.weight")
    np.testing.assert_array_equal(down, adapters["self_attention.qkv"].down[1].T)
    np.testing.assert_array_equal(up, adapters["self_attention.qkv"].up[1].T)
    assert len(names) == 2 * 2 * len(LINEAR_LAYERS)
    assert metadata["rank"] == "3"
    assert metadata["alpha"] == "6.0"
    assert metadata["base_model"] == "tiny"


def test_adapters_of_other_weights_or_another_shape_are_refused(saved, tmp_path):
    with pytest.raises(UserInputError, match="was trained beside other weights \\(of model tiny\\)"):
        load_adapters(saved, CONFIG, base_sha256="cd")
    deeper = InfinityConfig(4, 64, 2, 128, 8, 8, block_chunks=2)
    with pytest.raises(UserInputError, match="does not fit the model's layers"):
        load_adapters(saved, deeper)
    with pytest.raises(UserInputError, match="does not exist"):
        load_adapters(tmp_path / "none.safetensors", CONFIG)
