import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from convert import image_tokenizer as image_tokenizer_table
from convert import infinity as infinity_table
from convert import rules
from convert import t5 as t5_table
from convert.safetensors_io import open_safetensors
from toprovar_jax.config import ImageTokenizerConfig, InfinityConfig
from toprovar_jax.image_tokenizer import ImageTokenizer
from toprovar_jax.model import Infinity
from toprovar_jax.text_encoder import T5Config, T5Encoder


def test_written_and_read_back_every_parameter_is_the_same(kind, module, tensors, tmp_path, assert_equal):
    assert_equal(kind.through_file(tensors, tmp_path / "model.safetensors"), module)


def test_the_tables_name_every_parameter_once(kind, tensors):
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(kind.abstract())))
    assert sum(tensor.size for tensor in tensors.values()) == size
    names = [rule.official for rule in kind.table.rules(kind.config)]
    assert len(names) == len(set(names)) == len(tensors)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64], ids=lambda d: d.__name__)
def test_sources_of_any_floating_type_become_the_models_own(kind, module, dtype, tmp_path, assert_equal):
    tensors = kind.official(module, dtype)
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(dtype)}
    filled = kind.through_file(tensors, tmp_path / "model.safetensors")
    rounded = jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(dtype).astype(np.float32)), nnx.state(module))
    assert_equal(filled, nnx.merge(nnx.graphdef(module), rounded))


def test_weights_are_written_as_bfloat16_unless_told_otherwise(kind, module):
    tensors = rules.official_state_dict(module, kind.table.rules(kind.config))
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_the_dtype_of_every_parameter_can_be_chosen(infinity, infinity_tensors):
    choose = lambda target: jnp.bfloat16 if target.startswith("layers.") and target.endswith("kernel") else jnp.float32
    state = nnx.to_flat_state(nnx.state(infinity.fill(infinity_tensors, dtype=choose)))
    dtypes = {".".join(path): leaf.get_value().dtype for path, leaf in state}
    assert dtypes["layers.self_attention.qkv.kernel"] == jnp.bfloat16
    assert dtypes["layers.cross_norm.scale"] == dtypes["word_embedding.kernel"] == jnp.float32


def test_every_parameter_is_placed_by_the_callers_function(kind, tensors):
    device = jax.devices()[3]
    filled = kind.fill(tensors, place=lambda array: jax.device_put(array, device))
    assert {device} == set().union(*(leaf.devices() for leaf in jax.tree.leaves(nnx.state(filled))))


@pytest.mark.parametrize(
    ("folder", "weights", "section"),
    [
        ("a_transformer_2b_style", "weights", "model"),
        ("b_transformer_8b_style", "weights", "model"),
        ("e_blocks", "weights", "model"),
        ("f_end_to_end", "transformer", "model"),
        ("c_vae", "weights", "vae"),
        ("c_vae_stride8", "weights", "vae"),
        ("f_end_to_end", "vae", "vae"),
        ("d_t5_encoder", "weights", "t5"),
        ("f_end_to_end", "t5", "t5"),
    ],
)
def test_reference_files_load_and_are_written_back_as_they_were(golden, folder, weights, section):
    options = json.loads((golden / folder / "config.json").read_text())[section]
    source = open_safetensors(golden / folder / f"{weights}.safetensors")
    if section == "model":
        config = InfinityConfig.from_official(options)
        build, table, canonical = Infinity, infinity_table, infinity_table.canonical_names(source, config)
    elif section == "vae":
        config = ImageTokenizerConfig.from_official(options)
        build, table, canonical = ImageTokenizer, image_tokenizer_table, image_tokenizer_table.canonical_name
    else:
        config = T5Config.from_dict(options)
        build, table, canonical = T5Encoder, t5_table, t5_table.canonical_name
    abstract = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    module = rules.fill_module(abstract, table.rules(config), source, source=folder, canonical=canonical)
    written = rules.official_state_dict(module, table.rules(config), dtype=np.float32)
    assert written.keys() == {name for name in source if canonical(name) is not None}
    for name, tensor in written.items():
        np.testing.assert_array_equal(tensor, source[name](), err_msg=name)


def test_a_decoder_alone_is_filled_from_a_full_file(tokenizer, tokenizer_tensors):
    table = image_tokenizer_table
    decoder = rules.fill_module(
        nnx.eval_shape(lambda: ImageTokenizer(tokenizer.config, rngs=nnx.Rngs(0), with_encoder=False)),
        table.rules(tokenizer.config, with_encoder=False),
        {name: lambda tensor=tensor: tensor for name, tensor in tokenizer_tensors.items()},
        source="file",
        canonical=lambda name: table.canonical_name(name, with_encoder=False),
    )
    kernel = tokenizer_tensors["decoder.conv_out.conv.weight"]
    np.testing.assert_array_equal(decoder.decoder.conv_out.kernel[...], kernel.transpose(2, 3, 1, 0))
    with pytest.raises(ValueError, match="no encoder"):
        decoder.encode(jnp.zeros((1, 8, 8, 3), jnp.float32))
