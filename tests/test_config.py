import dataclasses
import json
import math

import jax
import jaxtyping
import pytest
from flax import nnx

from toprovar_jax.config import ImageTokenizerConfig, InfinityConfig
from toprovar_jax.errors import UserInputError
from toprovar_jax.image_tokenizer import ImageTokenizer
from toprovar_jax.presets import PRESETS

TINY = InfinityConfig(
    num_layers=4, width=64, num_heads=4, text_width=256, text_length=8, latent_channels=16, block_chunks=2
)
TOKENIZER = ImageTokenizerConfig(latent_channels=16)


@pytest.fixture
def unchecked(monkeypatch):
    """As users run it: the annotations of the dataclasses are not executed."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize(
    ("name", "layers", "width", "heads", "head_dim", "hidden"),
    [
        ("infinity-2b", 32, 2048, 16, 128, 8192),
        ("infinity-8b", 40, 3584, 28, 128, 14336),
        ("infinity-8b-512", 40, 3584, 28, 128, 14336),
        ("infinity-layer12", 12, 768, 8, 96, 3072),
        ("infinity-layer16", 16, 1152, 12, 96, 4608),
        ("infinity-layer24", 24, 1536, 16, 96, 6144),
        ("infinity-layer32", 32, 2080, 20, 104, 8192),  # 32.5 rounds to 32
        ("infinity-layer40", 40, 2688, 24, 112, 10752),
        ("infinity-layer48", 48, 3360, 28, 120, 13312),  # 52.5 rounds to 52
    ],
)
def test_presets_have_the_published_sizes(name, layers, width, heads, head_dim, hidden):
    config = PRESETS[name].transformer
    assert (config.num_layers, config.width, config.num_heads) == (layers, width, heads)
    assert (config.head_dim, config.feed_forward_width) == (head_dim, hidden)
    assert (config.text_width, config.text_length, config.pool_heads) == (2048, 512, 16)
    assert config.rope_mode == 2
    assert config.level_embedding == "first_block"


def test_feed_forward_widths_round_half_to_even():
    widths = {width: dataclasses.replace(TINY, width=width).feed_forward_width for width in (96, 160, 224, 288)}
    assert widths == {96: 512, 160: 512, 224: 1024, 288: 1024}


@pytest.mark.parametrize(("name", "bits", "cells", "stride"), [("infinity-2b", 32, 1, 16), ("infinity-8b", 56, 2, 8)])
def test_token_bits_and_strides_of_the_released_models(name, bits, cells, stride):
    card = PRESETS[name]
    assert (card.transformer.token_bits, card.transformer.latent_per_token) == (bits, cells)
    assert card.image_tokenizer.stride == stride
    assert card.image_tokenizer.latent_channels == card.transformer.latent_channels


@pytest.mark.parametrize(
    ("folder", "section", "hidden", "bits"),
    [("a_transformer_2b_style", "model", 256, 16), ("b_transformer_8b_style", "model", 256, 56)],
)
def test_official_transformer_options_are_understood(golden, folder, section, hidden, bits):
    options = json.loads((golden / folder / "config.json").read_text())[section]
    config = InfinityConfig.from_official(options)
    assert (config.num_layers, config.width, config.num_heads, config.block_chunks) == (4, 64, 4, 2)
    assert (config.text_width, config.text_length, config.norm_epsilon) == (256, 64, 1e-6)
    assert (config.feed_forward_width, config.token_bits) == (hidden, bits)
    assert (config.rope_mode, config.level_embedding, config.precision) == (2, "first_block", "exact")
    assert InfinityConfig.from_official(options, precision="fast").precision == "fast"


def test_official_options_that_are_not_defaults_are_heeded():
    options = {
        **{"depth": 2, "embed_dim": 8, "num_heads": 1, "text_channels": 128, "text_maxlen": 3, "vae_codebook_dim": 5},
        **{"block_chunks": 2, "mlp_ratio": 64, "norm_eps": 1e-5, "rope2d_normalized_by_hw": 1},
        **{"add_lvl_embeding_only_first_block": 0, "apply_spatial_patchify": 1},
    }
    config = InfinityConfig.from_official(options)
    assert (config.feed_forward_width, config.norm_epsilon, config.rope_mode) == (512, 1e-5, 1)
    assert (config.level_embedding, config.token_bits) == ("every_chunk", 20)


@pytest.mark.parametrize(
    ("folder", "widths", "stride"),
    [("c_vae", (32, 32, 64, 32, 32), 16), ("c_vae_stride8", None, 8), ("f_end_to_end", None, 16)],
)
def test_official_tokenizer_options_are_understood(golden, folder, widths, stride):
    options = json.loads((golden / folder / "config.json").read_text())["vae"]
    config = ImageTokenizerConfig.from_official(options)
    assert config.widths == (widths or tuple(options["base_ch"] * m for m in options["ch_mult"]))
    assert config.latent_channels == options["codebook_dim"]
    assert (config.stride, 2**config.num_downsamples) == (stride, stride)


def test_missing_official_options_are_named():
    with pytest.raises(UserInputError, match="given with num_heads, text_channels, text_maxlen, vae_codebook_dim"):
        InfinityConfig.from_official({"depth": 2, "embed_dim": 8})
    with pytest.raises(UserInputError, match="given with patch_size as well"):
        ImageTokenizerConfig.from_official({"codebook_dim": 2, "ch_mult": [1]})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_heads": 5}, "width=64: must be a multiple of num_heads=5"),
        ({"num_heads": 32}, "head dimension=2: must be a multiple of 4"),
        ({"num_heads": 0}, "num_heads=0: must be a positive integer"),
        ({"num_layers": -4}, "num_layers=-4: must be a positive integer"),
        ({"num_layers": 4.0}, r"num_layers=4\.0: must be a positive integer"),
        ({"block_chunks": 3}, "num_layers=4: must be 3 even chunks"),
        ({"block_chunks": 0}, "block_chunks=0: must be a positive integer"),
        ({"text_width": 100}, "text_width=100: must be at least 128"),
        ({"text_width": 384}, "width=64: must be a multiple of 3 pool heads"),
        ({"latent_channels": 0}, "latent_channels=0: must be a positive integer"),
        ({"text_length": 0}, "text_length=0: must be a positive integer"),
        ({"feed_forward_ratio": 2.0}, r"feed_forward_ratio=2\.0: must be above 2 at this width"),
        ({"norm_epsilon": 0.0}, r"norm_epsilon=0\.0: must be between 0 and 1"),
        ({"rope_mode": 3}, "rope_mode=3: must be 0, 1 or 2"),
        ({"level_embedding": "never"}, "level_embedding=never: must be first_block or every_chunk"),
        ({"precision": "half"}, "precision=half: must be exact or fast"),
    ],
    ids=lambda case: "-".join(f"{k}={v}" for k, v in case.items()) if isinstance(case, dict) else "",
)
def test_transformers_that_cannot_be_are_refused(change, told, unchecked):
    with pytest.raises(UserInputError, match=told):
        dataclasses.replace(TINY, **change)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"stride": 12}, "stride=12: must be a power of two"),
        ({"stride": 0}, "stride=0: must be a positive integer"),
        ({"stride": 32}, "must be at least 6 levels for stride 32"),
        ({"base_width": 40}, "channel width=40: must be a multiple of 32 or of 24"),
        ({"width_multipliers": (1, 2, 0, 4, 4)}, "width_multipliers=.* must be positive"),
        ({"width_multipliers": ()}, "width_multipliers=.* must be positive"),
        ({"num_res_blocks": 0}, "num_res_blocks=0: must be a positive integer"),
        ({"latent_channels": -1}, "latent_channels=-1: must be a positive integer"),
        ({"precision": "half"}, "precision=half: must be exact or fast"),
    ],
    ids=lambda case: "-".join(f"{k}={v}" for k, v in case.items()) if isinstance(case, dict) else "",
)
def test_tokenizers_that_cannot_be_are_refused(change, told, unchecked):
    with pytest.raises(UserInputError, match=told):
        dataclasses.replace(TOKENIZER, **change)


def test_configurations_are_hashable_and_equal_by_value():
    assert hash(dataclasses.replace(TINY)) == hash(TINY)
    assert dataclasses.replace(TOKENIZER) == TOKENIZER
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.width = 3


def test_tokenizers_may_have_more_levels_than_halvings():
    assert dataclasses.replace(TOKENIZER, stride=4).num_downsamples == 2
    assert dataclasses.replace(TOKENIZER, stride=1).num_downsamples == 0


def parameter_count(module) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module)))


@pytest.mark.parametrize(
    ("name", "encoder", "decoder"),
    [("infinity-2b", 45_025_696, 65_092_355), ("infinity-8b", 33_139_598, 48_484_611)],
)
def test_released_tokenizers_have_the_published_number_of_parameters(name, encoder, decoder):
    config = PRESETS[name].image_tokenizer
    assert config.widths == (128, 256, 512, 512, 512)[: len(config.widths)]
    abstract = nnx.eval_shape(lambda: ImageTokenizer(config, rngs=nnx.Rngs(0)))
    assert parameter_count(abstract.encoder) == encoder
    assert parameter_count(abstract.decoder) == decoder
