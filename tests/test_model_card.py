"""Model cards: what is written comes back, and what is damaged is refused in one line that names the file."""

from __future__ import annotations

import json

import pytest

from toprovar_jax.errors import UserInputError
from toprovar_jax.model_card import ModelCard
from toprovar_jax.presets import PRESETS

from .tiny_model import CARD, SCENES_CARD


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.json"


@pytest.mark.parametrize("card", [CARD, SCENES_CARD, *PRESETS.values()], ids=lambda card: card.name)
def test_a_card_survives_its_file(path, card):
    path.write_text(card.to_json())
    assert ModelCard.read(path, PRESETS) == card


def test_precision_is_not_a_property_of_the_model(path):
    path.write_text(CARD.with_precision("fast").to_json())
    assert ModelCard.read(path, PRESETS) == CARD
    assert "precision" not in path.read_text()


def test_precision_reaches_all_three_networks():
    fast = CARD.with_precision("fast")
    assert (fast.transformer.precision, fast.image_tokenizer.precision) == ("fast", "fast")
    assert fast.text_encoder.compute_dtype == "bfloat16"
    assert fast.with_precision("exact") == CARD


@pytest.mark.parametrize("extra", [{}, {"format": 1}])
def test_a_preset_is_referred_to_by_name(path, extra):
    path.write_text(json.dumps({"preset": "infinity-8b", **extra}))
    assert ModelCard.read(path, PRESETS) == PRESETS["infinity-8b"]


def refusal(path) -> str:
    with pytest.raises(UserInputError) as refused:
        ModelCard.read(path, PRESETS)
    message = str(refused.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00binary", b"\x08\x00\x00\x00\x00\x00\x00\x00{}", b"[" * 200_000, b"not json\nat all"],
    ids=["empty", "cut", "binary", "safetensors", "nested", "text"],
)
def test_what_is_not_json_is_refused(path, content):
    path.write_bytes(content)
    assert "cannot be read" in refusal(path)


def test_a_missing_card_is_refused(path):
    assert "No such file" in refusal(path)
    path.mkdir()
    assert "cannot be read" in refusal(path)


@pytest.mark.parametrize("content", ["[]", "3", '"infinity-2b"', "null"])
def test_json_of_another_type_is_refused(path, content):
    path.write_text(content)
    assert "one JSON object" in refusal(path)


@pytest.mark.parametrize("given", [None, 0, 2, "1", []])
def test_another_format_is_refused(path, given):
    fields = json.loads(CARD.to_json()) | {"format": given}
    path.write_text(json.dumps(fields))
    assert "format" in refusal(path)


@pytest.mark.parametrize("preset", ["infinity-2", "scenes-small", None, 3, ["infinity-2b"]])
def test_an_unknown_preset_is_refused(path, preset):
    path.write_text(json.dumps({"preset": preset}))
    assert "infinity-2b" in refusal(path)


def test_a_preset_beside_a_description_is_refused(path):
    path.write_text(json.dumps({"preset": "infinity-2b", "name": "mine", "tau": 2}))
    assert "name, tau" in refusal(path)


def changed(**fields):
    return lambda card: card | fields


def within(part, **fields):
    return lambda card: card | {part: card[part] | fields}


def without(name):
    return lambda card: {key: value for key, value in card.items() if key != name}


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (changed(colour="red"), "colour"),
        (within("transformer", colour="red"), "colour"),
        (within("image_tokenizer", colour="red"), "colour"),
        (without("name"), "name"),
        (without("transformer"), "transformer"),
        (without("image_tokenizer"), "image_tokenizer"),
        (without("text_encoder"), "text_encoder"),
        (without("pixel_budgets"), "pixel_budgets"),
        (without("default_pixels"), "default_pixels"),
        (changed(transformer=[]), "describe a model"),
        (changed(text_encoder="t5"), "T5"),
        (changed(name=3), "name"),
        (changed(name=" "), "model name"),
        (changed(world="moon"), "moon"),
        (changed(pixel_budgets=[]), "describe a model"),
        (changed(pixel_budgets={}), "default_pixels"),
        (changed(pixel_budgets={"tiny": 14}), "14"),
        (changed(pixel_budgets={"tiny": "3"}), "'3'"),
        (changed(pixel_budgets={"tiny": True}), "True"),
        (changed(default_pixels="1M"), "1M"),
        (changed(default_pixels=["tiny"]), "tiny"),
        (changed(guidance=-1), "guidance"),
        (changed(guidance=[1, 2, 3]), "guidance"),
        (changed(guidance=float("nan")), "guidance"),
        (changed(tau=0), "tau"),
        (changed(top_k=1.5), "top_k"),
        (changed(top_p=0), "top_p"),
        (changed(training=3), "describe a model"),
        (within("transformer", num_layers=0), "num_layers"),
        (within("transformer", width="64"), "width"),
        (within("transformer", latent_channels=8), "latent_channels"),
        (within("transformer", text_width=256), "text"),
        (within("image_tokenizer", stride=3), "stride"),
        (within("image_tokenizer", width_multipliers=2), "describe a model"),
        (within("text_encoder", d_model=0), "d_model"),
    ],
)
def test_a_damaged_card_is_refused_by_what_is_wrong_with_it(path, damage, word):
    path.write_text(json.dumps(damage(json.loads(CARD.to_json()))))
    assert word in refusal(path)


def test_default_guidance_may_differ_by_scale_where_every_budget_has_as_many(path):
    alone = {"pixel_budgets": {"tiny": 3}, "guidance": [0, 1.5, 2], "tau": [1.2, 1, 1]}
    path.write_text(json.dumps(json.loads(CARD.to_json()) | alone))
    card = ModelCard.read(path, PRESETS)
    assert (card.guidance, card.tau) == ((0, 1.5, 2), (1.2, 1, 1))
    assert json.loads(card.to_json())["guidance"] == [0, 1.5, 2]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tau": [1, 1]}))
    assert "one per scale of every pixel budget (3)" in refusal(path)


def test_sizes_follow_from_budget_and_stride():
    assert CARD.schedule("1:1", None).pixel_size == (8, 8)
    assert CARD.schedule("1:1", "less").pixel_size == (4, 4)
    with pytest.raises(UserInputError, match=r"pixel budget of model tiny: 'lest'.*did you mean less"):
        CARD.schedule("1:1", "lest")
