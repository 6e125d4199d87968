"""Names and shapes alone tell which network of which model a state dict is."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest

from convert.recognise import IMAGE_TOKENIZER, KINDS, TEXT_ENCODER, TRANSFORMER, parameter_shapes, read_cards, recognise
from convert.sources import Source
from toprovar_jax.errors import UserInputError
from toprovar_jax.presets import PRESETS


@dataclasses.dataclass
class Unread:
    """A tensor of some shape whose numbers take no memory."""

    shape: tuple[int, ...]
    dtype: np.dtype = dataclasses.field(default_factory=lambda: np.dtype(np.float16))

    def __call__(self):
        return np.broadcast_to(np.zeros((), self.dtype), self.shape)


def state_dict(kind, card):
    """What the official file of a model holds."""
    config = kind.config(card)
    shapes = parameter_shapes(kind, config)
    tensors = {}
    for rule in kind.rules(config):
        shape = shapes[rule.target]
        tensors[rule.official] = Unread(rule.expected_shape(shape if rule.layer is None else shape[1:]))
    return tensors


def source(tensors):
    return Source("file.pth", (), tensors)


def refusal(tensors, model=None) -> str:
    with pytest.raises(UserInputError) as caught:
        recognise(source(tensors), PRESETS, model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def transformer_2b():
    return state_dict(TRANSFORMER, PRESETS["infinity-2b"])


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_released_network_is_recognised(kind, name):
    found = recognise(source(state_dict(kind, PRESETS[name])), PRESETS)
    assert found.kind is kind
    assert set(found.models) == {n for n, card in PRESETS.items() if kind.config(card) == kind.config(PRESETS[name])}
    assert found.left_out == ()


def test_the_tables_count_the_parameters_of_released_models():
    blocks = {"infinity-2b": (32, 67_147_792), "infinity-8b": (40, 205_589_020)}
    for name, (layers, each) in blocks.items():
        tensors = state_dict(TRANSFORMER, PRESETS[name])
        inside = sum(math.prod(tensor.shape) for name, tensor in tensors.items() if name.startswith("block"))
        assert inside == layers * each


def test_either_layout_of_head_scales_and_either_spelling_of_vae_names_will_do(transformer_2b):
    changed = {
        name: Unread((1, 1, 16, 1)) if name.endswith("scale_mul_1H11") else tensor
        for name, tensor in transformer_2b.items()
    }
    changed["block_chunks.0.module.0.sa.zero_k_bias"] = Unread((2048,))
    assert recognise(source(changed), PRESETS).models == ("infinity-2b",)
    vae = state_dict(IMAGE_TOKENIZER, PRESETS["infinity-8b"])
    plain = {re.sub(r"\.(conv|norm)\.(weight|bias)$", r".\2", name): tensor for name, tensor in vae.items()}
    assert plain.keys() != vae.keys()
    assert recognise(source(plain), PRESETS).models == ("infinity-8b", "infinity-8b-512")


def test_whole_t5_files_give_their_encoder():
    tensors = state_dict(TEXT_ENCODER, PRESETS["infinity-2b"])
    rest = {name: Unread((2, 2)) for name in ("lm_head.weight", "decoder.block.0.layer.0.layer_norm.weight")}
    found = recognise(source(tensors | rest), PRESETS)
    assert found.kind is TEXT_ENCODER
    assert found.reading.keys() == tensors.keys()


def test_another_modules_tensors_are_left_out_and_named(transformer_2b):
    tensors = transformer_2b | {"discriminator.conv.weight": Unread((3, 3)), "step": Unread(())}
    found = recognise(source(tensors), PRESETS)
    assert found.left_out == ("discriminator.conv.weight", "step")
    assert found.reading.keys() == transformer_2b.keys()


def test_the_nearest_model_is_named_with_every_difference(transformer_2b):
    tensors = transformer_2b | {"head.bias": Unread((60,))}
    del tensors["pos_start"]
    assert refusal(tensors) == (
        "checkpoint file.pth: is the transformer of no known model; the nearest is infinity-2b, but it does not fit "
        "the model: missing: pos_start; head.bias has shape (60,), the model needs (64,); describe the model in a "
        "model.json and pass that as --model"
    )


def test_unknown_tensors_inside_the_networks_modules_are_refused(transformer_2b):
    assert "unknown: block_chunks.0.module.0.sa.extra" in refusal(
        transformer_2b | {"block_chunks.0.module.0.sa.extra": Unread((3,))}
    )


def test_a_named_model_is_checked(transformer_2b):
    assert recognise(source(transformer_2b), PRESETS, "infinity-2b").models == ("infinity-2b",)
    message = refusal(transformer_2b, "infinity-8b")
    assert "is not the transformer of infinity-8b: it does not fit the model: missing: " in message
    assert "(2048,), the model needs (3584,)" in message
    assert "did you mean infinity-2b" in refusal(transformer_2b, "infinity_2b")


def test_what_is_no_network_of_these_is_refused():
    message = refusal({"features.0.weight": Unread((3, 3)), "x\n": Unread(())})
    assert message.startswith("checkpoint file.pth with 'features.0.weight', 'x\\n': must be an Infinity transformer")


def test_a_model_may_be_described_in_a_file(tmp_path):
    card = PRESETS["infinity-2b"]
    card = dataclasses.replace(card, name="mine", transformer=dataclasses.replace(card.transformer, num_layers=8))
    path = tmp_path / "model.json"
    path.write_text(card.to_json())
    cards, model = read_cards(str(path), PRESETS)
    assert (dict(cards), model) == ({"mine": card}, "mine")
    assert recognise(source(state_dict(TRANSFORMER, card)), cards, model).models == ("mine",)
    path.write_text(json.dumps({"preset": "infinity-8b"}))
    assert read_cards(str(path), PRESETS)[1] == "infinity-8b"
    assert read_cards(None, PRESETS) == (PRESETS, None)
    with pytest.raises(UserInputError, match="did you mean infinity-8b"):
        read_cards("infinity-8", PRESETS)
