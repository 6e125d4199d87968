"""The spellings, groupings and leftovers that checkpoints in the wild come with."""

import dataclasses
import itertools
import re

import ml_dtypes
import numpy as np
import pytest

from convert import rules, t5
from toprovar_jax.errors import UserInputError


def rechunked(tensors, size):
    """The state dict with its four blocks in chunks of ``size``, or in none."""

    def rename(name):
        match = re.match(r"block_chunks\.(\d)\.module\.(\d)\.(.*)", name)
        if not match:
            return name
        layer = 2 * int(match[1]) + int(match[2])
        prefix = f"block_chunks.{layer // size}.module.{layer % size}" if size else f"blocks.{layer}"
        return f"{prefix}.{match[3]}"

    return {rename(name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("size", [1, 2, 4, None])
@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_any_grouping_of_blocks_fills_the_same_model(infinity, infinity_tensors, models, assert_equal, size, chunks):
    module, _ = models[infinity.table.__name__]
    filled = infinity.fill(rechunked(infinity_tensors, size), config={"block_chunks": chunks})
    assert_equal(filled, module)


@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (1, 1, 2, 1), (2,)], ids=str)
def test_head_scales_are_read_in_every_layout(infinity, infinity_tensors, models, assert_equal, shape):
    scales = [name for name in infinity_tensors if name.endswith("scale_mul_1H11")]
    assert len(scales) == 4
    changed = infinity_tensors | {name: infinity_tensors[name].reshape(shape) for name in scales}
    assert_equal(infinity.fill(changed), models[infinity.table.__name__][0])


def test_derived_and_empty_buffers_are_ignored(infinity, infinity_tensors, models, assert_equal):
    stale = {
        "lvl_1L": np.zeros((1, 521), np.int64),
        "attn_bias_for_masking": np.zeros((1, 1, 8, 8), np.float32),
        "Infinity_visible_kvlen": np.zeros(3, np.int32),
        "Infinity_invisible_qlen": np.zeros(3, np.int32),
        "text_proj_for_sos.ca.zero_k_bias": np.zeros(32, np.float32),
        "block_chunks.0.module.1.sa.zero_k_bias": np.zeros(32, np.float32),
        "block_chunks.1.module.0.ca.zero_k_bias": np.zeros(32, np.float32),
    }
    assert_equal(infinity.fill(infinity_tensors | stale), models[infinity.table.__name__][0])


@pytest.mark.parametrize("keep", [0, 1], ids=["all plain", "half plain"])
def test_plain_tokenizer_names_mean_the_same_as_wrapped_ones(tokenizer, tokenizer_tensors, models, assert_equal, keep):
    plain = {}
    for i, (name, tensor) in enumerate(tokenizer_tensors.items()):
        plain[name if keep and i % 2 else re.sub(r"\.(conv|norm)\.(weight|bias)$", r".\2", name)] = tensor
    assert plain.keys() != tokenizer_tensors.keys()
    masks = {f"{name}.lfq.mask": np.zeros(5, np.int64) for name in ("quantizer", "quantize")}
    assert_equal(tokenizer.fill(plain | masks), models[tokenizer.table.__name__][0])


def test_a_full_t5_gives_its_encoder():
    for name in ("encoder.embed_tokens.weight", "decoder.block.0.layer.0.SelfAttention.q.weight", "lm_head.weight"):
        assert t5.canonical_name(name) is None
    assert t5.canonical_name("encoder.final_layer_norm.weight") == "encoder.final_layer_norm.weight"


def refusal(kind, tensors, **changes) -> str:
    with pytest.raises(UserInputError) as caught:
        kind.fill(tensors, **changes)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("checkpoint file.safetensors: does not fit the model: ")
    return message


def test_unknown_missing_and_repeated_names_are_listed_together(tokenizer, tokenizer_tensors):
    del tokenizer_tensors["decoder.conv_in.conv.bias"], tokenizer_tensors["encoder.mid.block_1.norm2.norm.weight"]
    tokenizer_tensors["decoder.conv_out.bias"] = tokenizer_tensors["decoder.conv_out.conv.bias"]
    tokenizer_tensors |= {"loss.logvar": np.zeros(1, np.float32), "decoder.extra": np.zeros(1, np.float32)}
    assert refusal(tokenizer, tokenizer_tensors).endswith(
        "unknown: decoder.extra, loss.logvar; "
        "missing: decoder.conv_in.conv.bias, encoder.mid.block_1.norm2.norm.weight; "
        "given twice: decoder.conv_out.bias, decoder.conv_out.conv.bias; choose the matching model"
    )


def test_blocks_given_in_two_groupings_are_refused(infinity, infinity_tensors):
    again = infinity_tensors["block_chunks.1.module.0.ada_gss"]
    message = refusal(infinity, infinity_tensors | {"blocks.2.ada_gss": again})
    assert "given twice: block_chunks.1.module.0.ada_gss, blocks.2.ada_gss;" in message


def test_a_missing_block_is_named_and_no_other(infinity, infinity_tensors):
    left = {name: tensor for name, tensor in infinity_tensors.items() if ".module.1." not in name}
    message = refusal(infinity, left)
    assert "unknown" not in message
    assert "given twice" not in message
    assert "block_chunks.0.module.0." not in message
    assert set(expanded(message, "missing")) == infinity_tensors.keys() - left.keys()


def test_too_many_blocks_are_unknown(infinity, infinity_tensors):
    message = refusal(infinity, rechunked(infinity_tensors, None), config={"num_layers": 2, "block_chunks": 1})
    assert "unknown: blocks.{2..3}.ada_gss (2 tensors), blocks.{2..3}." in message
    assert "missing" not in message


def expanded(message: str, problem: str) -> list[str]:
    """The names that a message gives for a problem, one by one."""
    names = []
    listed = re.search(rf"{problem}: (.*?)(?:;|$)", message)
    assert listed, message
    for entry in listed[1].split(", "):
        pattern, _, count = entry.partition(" ")
        ranges = []
        for piece in re.findall(r"{(.*?)}", pattern):
            ends = [part.split("..") for part in piece.split(",")]
            ranges.append([str(n) for end in ends for n in range(int(end[0]), int(end[-1]) + 1)])
        slots = re.sub(r"{.*?}", "{}", pattern)
        these = [slots.format(*numbers) for numbers in itertools.product(*ranges)]
        assert count == (f"({len(these)} tensors)" if len(these) > 1 else "")
        names += these
    return names


def test_hundreds_of_names_are_all_listed_in_a_readable_line(infinity):
    deep = {"num_layers": 32, "block_chunks": 8}
    names = [rule.official for rule in infinity.table.rules(dataclasses.replace(infinity.config, **deep))]
    message = refusal(infinity, {f"{name}.other": np.zeros(1, np.float32) for name in names}, config=deep)
    assert sorted(expanded(message, "missing")) == sorted(names)
    assert sorted(expanded(message, "unknown")) == sorted(f"{name}.other" for name in names)
    assert "block_chunks.{0..7}.module.{0..3}.sa.q_bias (32 tensors), " in message
    assert len(names) > 500
    assert len(message) < 6000


def test_every_kind_of_model_lists_all_of_its_names(kind, tensors):
    message = refusal(kind, {f"{name}.other": tensor for name, tensor in tensors.items()})
    assert sorted(expanded(message, "missing")) == sorted(tensors)


def test_names_that_leave_holes_are_listed_exactly(infinity):
    numbers = [(0, 0), (0, 1), (0, 2), (0, 5), (2, 0), (2, 1), (2, 2), (2, 5), (3, 7)]
    strange = {f"x.{i}.y.{j}.z": np.zeros(1, np.float32) for i, j in numbers}
    strange |= {"x.01.y.2.z": np.zeros(1, np.float32), "x.y": np.zeros(1, np.float32)}
    message = refusal(infinity, strange)
    assert "unknown: x.{0,2}.y.{0..2,5}.z (8 tensors), x.3.y.7.z, x.01.y.2.z, x.y; " in message


def test_wrong_shapes_are_listed_with_both_shapes_and_the_official_layout(infinity, infinity_tensors):
    message = refusal(infinity, infinity_tensors, config={"latent_channels": 5})
    assert "word_embed.weight has shape (32, 3), the model needs (32, 5)" in message
    assert "head.weight has shape (6, 32), the model needs (10, 32)" in message
    assert "head.bias has shape (6,), the model needs (10,)" in message


def test_one_wrong_layer_is_named_among_its_stack(infinity, infinity_tensors):
    name = "block_chunks.1.module.0.sa.scale_mul_1H11"
    message = refusal(infinity, infinity_tensors | {name: np.zeros((1, 3, 1, 1), np.float32)})
    assert f"model: {name} has shape (1, 3, 1, 1), the model needs (1, 2, 1, 1); choose" in message


def test_wrong_shapes_of_many_layers_are_one_sentence(infinity, infinity_tensors):
    message = refusal(infinity, infinity_tensors, config={"width": 64, "feed_forward_ratio": 4.0})
    stack = "block_chunks.{0..1}.module.{0..1}"
    assert f"{stack}.ffn.fc1.weight (4 tensors) have shape (256, 32), the model needs (256, 64)" in message
    assert f"{stack}.sa.q_bias (4 tensors), " in message
    sentences = re.findall(r"shape [^;]*", message)
    assert len(sentences) == len(set(sentences)) > 5


def test_names_and_shapes_are_reported_together(infinity, infinity_tensors):
    del infinity_tensors["head.bias"]
    infinity_tensors["head.weight"] = np.zeros((7, 32), np.float32)
    message = refusal(infinity, infinity_tensors)
    assert "missing: head.bias; head.weight has shape (7, 32), the model needs (6, 32);" in message


def test_a_longer_unconditional_text_is_cut_to_the_models(infinity, infinity_tensors, models, assert_equal):
    longer = np.concatenate([infinity_tensors["cfg_uncond"], np.ones((3, 256), np.float32)])
    assert_equal(infinity.fill(infinity_tensors | {"cfg_uncond": longer}), models[infinity.table.__name__][0])


@pytest.mark.parametrize("shape", [(5, 256), (9, 255), (9, 1, 256)], ids=str)
def test_a_shorter_or_narrower_unconditional_text_is_refused(infinity, infinity_tensors, shape):
    message = refusal(infinity, infinity_tensors | {"cfg_uncond": np.zeros(shape, np.float32)})
    assert f"model: cfg_uncond has shape {shape}, the model needs (6, 256); choose" in message


def test_more_rows_than_the_model_has_are_cut_nowhere_else(infinity, infinity_tensors):
    message = refusal(infinity, infinity_tensors | {"head.bias": np.zeros(9, np.float32)})
    assert "head.bias has shape (9,), the model needs (6,)" in message


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.bool_, np.complex64], ids=lambda dtype: dtype.__name__)
def test_weights_that_are_not_floating_are_refused(kind, tensors, dtype):
    name = list(tensors)[-1]
    message = refusal(kind, tensors | {name: tensors[name].astype(bool).astype(dtype)})
    assert f"model: {name} has type {np.dtype(dtype)}, the model needs floating-point numbers; choose" in message


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64], ids=lambda d: d.__name__)
def test_numbers_that_are_not_finite_are_refused_with_every_name(infinity, infinity_tensors, dtype, number):
    spoilt = ["cfg_uncond", *(f"block_chunks.{i}.module.1.ffn.fc2.weight" for i in range(2))]
    for name in spoilt:
        infinity_tensors[name] = infinity_tensors[name].astype(dtype)
        infinity_tensors[name].flat[-1] = number
    with pytest.raises(UserInputError) as caught:
        infinity.fill(infinity_tensors)
    message = str(caught.value)
    assert message.startswith("checkpoint file.safetensors: has numbers that are not finite in ")
    assert sorted(expanded(message.replace(" in ", ": ", 1), "finite")) == sorted(spoilt)


def test_numbers_too_large_for_the_models_dtype_are_refused(infinity, infinity_tensors):
    infinity_tensors["head.bias"] = np.full(6, 1e5, np.float32)
    with pytest.raises(UserInputError, match=r"not finite in head\.bias;"):
        infinity.fill(infinity_tensors, dtype=lambda target: np.float16)


def test_kernels_of_another_size_show_their_official_shape(tokenizer, tokenizer_tensors):
    name = "encoder.conv_in.conv.weight"
    wrong = tokenizer_tensors | {name: np.zeros((24, 4, 3, 3), np.float32)}
    assert f"{name} has shape (24, 4, 3, 3), the model needs (24, 3, 3, 3)" in refusal(tokenizer, wrong)


def test_problems_are_found_before_anything_is_placed(kind, tensors):
    placed = []
    name = list(tensors)[-1]
    refusal(kind, tensors | {name: np.zeros((7, 7, 7), np.float32)}, place=placed.append)
    assert not placed


def test_a_table_that_does_not_match_its_module_is_the_programmers_mistake(tokenizer, tokenizer_tensors):
    table = [rule for rule in tokenizer.table.rules(tokenizer.config) if rule.target != "decoder.conv_in.bias"]
    del tokenizer_tensors["decoder.conv_in.conv.bias"]
    readers = {name: lambda tensor=tensor: tensor for name, tensor in tokenizer_tensors.items()}
    with pytest.raises(KeyError, match=r"decoder\.conv_in\.bias"):
        rules.fill_module(tokenizer.abstract(), table, readers, source="file")
