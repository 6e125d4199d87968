"""Model folders: what is saved loads again, and a folder that does not hold together is refused by file and reason."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.safetensors_io import open_safetensors, save_safetensors
from toprovar_jax import InfinityPipeline
from toprovar_jax.errors import UserInputError
from toprovar_jax.generation import InfinityModel
from toprovar_jax.loading import load_model, save_model
from toprovar_jax.text_encoder import build_word_tokenizer

from .tiny_model import CARD, TOKENIZER_JSON, networks, write_tiny_model

WEIGHTS = ("transformer.safetensors", "image_tokenizer.safetensors", "text_encoder.safetensors")


@pytest.fixture(scope="module")
def original():
    return networks()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, original):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(folder, CARD, original, TOKENIZER_JSON)
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    """A copy to damage."""
    return shutil.copytree(pristine, tmp_path / "tiny")


def parameters(module) -> dict[str, jax.Array]:
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(module))}


def refusal(folder) -> str:
    with pytest.raises(UserInputError) as refused:
        InfinityPipeline.from_pretrained(folder)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_is_saved_is_loaded_in_bfloat16s_accuracy(pristine, original):
    loaded = load_model(pristine, precision="exact", with_encoder=True)
    assert loaded.card == CARD
    for ours, theirs in zip(loaded.networks, original, strict=True):
        expected = parameters(theirs)
        assert parameters(ours).keys() == expected.keys()
        for name, value in parameters(ours).items():
            assert value.dtype == jnp.float32
            assert np.array_equal(value, expected[name].astype(jnp.bfloat16).astype(jnp.float32)), name


def test_a_folder_holds_five_files_that_anyone_may_read(pristine):
    assert {path.name for path in pristine.iterdir()} == {"model.json", "tokenizer.json", *WEIGHTS}
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in pristine.iterdir())


def test_saving_again_replaces_the_files(folder, original):
    card = dataclasses.replace(CARD, name="second")
    save_model(folder, card, original, TOKENIZER_JSON)
    assert load_model(folder, precision="exact").card == card
    assert {path.name for path in folder.iterdir()} == {"model.json", "tokenizer.json", *WEIGHTS}


def test_the_encoder_of_pictures_is_left_out_unless_asked_for(pristine):
    kinds = {name.split(".")[0] for name in parameters(load_model(pristine, precision="exact").networks[1])}
    assert kinds == {"decoder"}
    both = parameters(load_model(pristine, precision="exact", with_encoder=True).networks[1])
    assert {name.split(".")[0] for name in both} == {"encoder", "decoder"}


def test_fast_keeps_what_is_delicate_in_float32(pristine):
    transformer, image_tokenizer, text_encoder = map(parameters, load_model(pristine, precision="fast").networks)
    halved = {name for name, value in transformer.items() if value.dtype == jnp.bfloat16}
    assert halved == {name for name in transformer if name.startswith("layers.") and name.endswith("kernel")}
    assert {value.dtype for name, value in image_tokenizer.items() if name.endswith("kernel")} == {jnp.bfloat16.dtype}
    assert {value.dtype for name, value in image_tokenizer.items() if "norm" in name} == {jnp.float32.dtype}
    assert text_encoder["embedding"].dtype == jnp.bfloat16
    assert text_encoder["layers.attention.query"].dtype == jnp.bfloat16
    assert text_encoder["final_norm.scale"].dtype == jnp.float32


def test_a_model_without_text_encoder_cannot_be_saved(tmp_path, original):
    with pytest.raises(ValueError, match="text encoder"):
        save_model(tmp_path / "half", CARD, InfinityModel(*original[:2]), TOKENIZER_JSON)
    assert not (tmp_path / "half").exists()


# Folders that do not hold together.


@pytest.mark.parametrize("name", [*WEIGHTS, "tokenizer.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    assert str(folder / name) in refusal(folder)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_file_that_is_cut_short_is_named(folder, name, keep):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:keep])
    message = refusal(folder)
    assert str(folder / name) in message
    assert "cut short" in message


@pytest.mark.parametrize("converted", [["transformer"], ["transformer", "text_encoder"]])
def test_a_folder_with_some_networks_converted_says_which_are_to_be_added(tmp_path, converted):
    (tmp_path / "model.json").write_text(CARD.to_json())
    for name in converted:
        (tmp_path / name).mkdir()
    lacking = [name for name in ("transformer", "image_tokenizer", "text_encoder") if name not in converted]
    message = refusal(tmp_path)
    assert f"{tmp_path}: lacks {' and '.join(lacking)}; add to it with python -m convert" in message
    assert f"--out {tmp_path}" in message


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_is_no_safetensors_file_is_named(folder, name):
    (folder / name).write_bytes(b"<html>not found</html>" * 100)
    assert str(folder / name) in refusal(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    assert str(folder / name) in refusal(folder)


@pytest.mark.parametrize(("name", "foreign"), [WEIGHTS[:2], WEIGHTS[1:], WEIGHTS[::-2]])
def test_another_models_file_is_named_with_the_tensors_that_do_not_belong(folder, name, foreign):
    shutil.copy(folder / foreign, folder / name)
    message = refusal(folder)
    assert str(folder / name) in message
    assert "unknown: " in message
    assert "missing: " in message
    assert any(tensor in message for tensor in open_safetensors(folder / foreign))


def resize(card, part, **sizes):
    return dataclasses.replace(card, **{part: dataclasses.replace(getattr(card, part), **sizes)})


@pytest.mark.parametrize(
    ("card", "name", "shapes"),
    [
        (resize(CARD, "transformer", width=128), WEIGHTS[0], ("(64,)", "(128,)")),
        (resize(CARD, "transformer", text_length=20), WEIGHTS[0], ("(12, 128)", "(20, 128)")),
        (resize(CARD, "image_tokenizer", base_width=48), WEIGHTS[1], ("(24,", "(48,")),
        (resize(CARD, "text_encoder", vocab_size=70), WEIGHTS[2], ("(64, 128)", "(70, 128)")),
    ],
    ids=["width", "text length", "tokenizer", "vocabulary"],
)
def test_weights_of_another_size_are_refused_with_both_shapes(folder, card, name, shapes):
    (folder / "model.json").write_text(card.to_json())
    message = refusal(folder)
    assert str(folder / name) in message
    assert [shape for shape in shapes if shape not in message] == []


def test_weights_of_another_depth_are_refused_by_name(folder):
    (folder / "model.json").write_text(resize(CARD, "transformer", num_layers=3).to_json())
    message = refusal(folder)
    assert str(folder / WEIGHTS[0]) in message
    assert "missing: " in message
    assert "blocks.2." in message


def test_weights_that_are_smaller_than_their_preset_are_refused(folder):
    (folder / "model.json").write_text(json.dumps({"preset": "infinity-layer12"}))
    message = refusal(folder)
    assert str(folder / WEIGHTS[0]) in message
    assert "missing: " in message


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"version": "1.0"}', "\0"])
def test_a_foreign_tokenizer_is_named(folder, content):
    (folder / "tokenizer.json").write_text(content)
    assert str(folder / "tokenizer.json") in refusal(folder)


def test_a_tokenizer_with_more_words_than_the_encoder_is_refused(folder):
    words = build_word_tokenizer([f"{a}{b}" for a in "abcdefgh" for b in "abcdefgh"])
    (folder / "tokenizer.json").write_text(words.to_str())
    message = refusal(folder)
    assert str(folder / "tokenizer.json") in message
    assert f"{words.get_vocab_size()} entries" in message
    assert "64" in message


def test_extra_tensors_are_refused_and_stale_buffers_are_not(folder):
    tensors = {name: read() for name, read in open_safetensors(folder / WEIGHTS[0]).items()}
    tensors["lvl_1L"] = np.zeros((1, 3), np.int32)
    save_safetensors(folder / WEIGHTS[0], tensors, {})
    load_model(folder, precision="exact")
    tensors["lora.weight"] = np.zeros((2, 2), np.float32)
    save_safetensors(folder / WEIGHTS[0], tensors, {})
    assert "unknown: lora.weight" in refusal(folder)


def test_extra_files_are_no_matter(folder):
    (folder / "README.md").write_text("a model")
    load_model(folder, precision="exact")


def test_the_helper_writes_a_complete_folder(tmp_path):
    assert load_model(write_tiny_model(tmp_path / "again"), precision="exact").card == CARD


def test_attention_is_chosen_at_loading_and_not_kept_in_the_model(pristine, tmp_path):
    loaded = load_model(pristine, precision="exact", attention=("mosaic_gpu", "xla"), with_encoder=True)
    assert loaded.card.transformer.attention == ("mosaic_gpu", "xla")
    assert loaded.networks.transformer.layers.cross_attention.implementation == ("mosaic_gpu", "xla")
    save_model(tmp_path / "copy", loaded.card, loaded.networks, TOKENIZER_JSON)
    assert load_model(tmp_path / "copy", precision="exact").card.transformer.attention is None


@pytest.mark.parametrize(
    ("attention", "told"),
    [
        ("flash", "attention flash: implementation 'flash': must be of reference, xla"),
        ("mosaic_tpu", "attention mosaic_tpu: cannot run on cpu: mosaic_tpu: "),
        (["cudnn", "triton"], "attention cudnn, triton: cannot run on cpu: cudnn: .*; triton: "),
    ],
)
def test_attention_that_cannot_run_is_refused_before_anything_is_read(folder, attention, told):
    for name in WEIGHTS:
        (folder / name).unlink()
    with pytest.raises(UserInputError, match=told) as refused:
        InfinityPipeline.from_pretrained(folder, attention=attention)
    assert "\n" not in str(refused.value)


def test_pictures_do_not_depend_on_how_attention_is_computed(pristine):
    def draw(attention):
        pipe = InfinityPipeline.from_pretrained(pristine, precision="exact", attention=attention)
        return np.asarray(pipe("a red cube", seed=3, output_type="np").images[0])

    np.testing.assert_allclose(draw("reference"), draw("xla"), atol=2e-5)
