"""The spellings, groupings and leftovers that checkpoints in the wild come with."""

import re

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
    assert re.search(r"missing: (block_chunks\.0\.module\.1\.[\w.]+, ){8}and \d+ more;", message)


def test_too_many_blocks_are_unknown(infinity, infinity_tensors):
    message = refusal(infinity, rechunked(infinity_tensors, None), config={"num_layers": 2, "block_chunks": 1})
    assert "unknown: blocks.2." in message
    assert "missing" not in message


def test_hundreds_of_names_stay_readable(kind, tensors):
    message = refusal(kind, {f"{name}.other": tensor for name, tensor in tensors.items()})
    hidden = len(tensors) - 8
    assert message.count(f"and {hidden} more") == 2
    assert len(message) < 2000


def test_wrong_shapes_are_listed_with_both_shapes_and_the_official_layout(infinity, infinity_tensors):
    message = refusal(infinity, infinity_tensors, config={"latent_channels": 5})
    assert "word_embed.weight has shape (32, 3), the model needs (32, 5)" in message
    assert "head.weight has shape (6, 32), the model needs (10, 32)" in message
    assert "head.bias has shape (6,), the model needs (10,)" in message
    assert "; and" not in message


def test_one_wrong_layer_is_named_among_its_stack(infinity, infinity_tensors):
    name = "block_chunks.1.module.0.sa.scale_mul_1H11"
    message = refusal(infinity, infinity_tensors | {name: np.zeros((1, 3, 1, 1), np.float32)})
    assert f"model: {name} has shape (1, 3, 1, 1), the model needs (1, 2, 1, 1); choose" in message


def test_many_wrong_shapes_are_counted(infinity, infinity_tensors):
    message = refusal(infinity, infinity_tensors, config={"width": 64, "feed_forward_ratio": 4.0})
    assert message.count(" has shape ") == 8
    assert re.search(r"; and \d\d+ more; choose", message)


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
