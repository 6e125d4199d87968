"""Where models are looked for, and what is said when they are not there."""

from __future__ import annotations

import pathlib

import pytest

from toprovar_jax import list_models
from toprovar_jax.errors import UserInputError
from toprovar_jax.hub import EMBEDDED, EMBEDDED_MODELS, embedded_folder, find_model, models_folder
from toprovar_jax.presets import PRESETS


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """An empty folder of named models, in an empty working directory."""
    monkeypatch.setenv("TOPROVAR_MODELS", str(tmp_path / "shelf"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "shelf"


def put(folder, name="model.json"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("{}")
    return folder


def test_the_embedded_model_is_the_default_and_has_a_name():
    assert find_model(None) == find_model(EMBEDDED) == embedded_folder()
    assert list_models() == (*EMBEDDED_MODELS, *PRESETS)


@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_embedded_models_travel_with_the_package(name):
    assert find_model(name) == embedded_folder(name)
    files = {path.name: path.stat().st_size for path in embedded_folder(name).iterdir()}
    weights = {f"{name}.safetensors" for name in ("transformer", "image_tokenizer", "text_encoder")}
    assert {"model.json", "tokenizer.json"} | weights <= files.keys()
    assert sum(files.values()) <= 16 * 2**20


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["text", "path"])
def test_a_folder_with_a_card_is_a_model(tmp_path, kind):
    folder = put(tmp_path / "my model")
    assert find_model(kind(folder)) == folder


def test_home_is_written_as_usual(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = put(tmp_path / "weights")
    assert find_model("~/weights") == folder
    monkeypatch.setenv("TOPROVAR_MODELS", "~/shelf")
    assert models_folder() == tmp_path / "shelf"
    monkeypatch.delenv("TOPROVAR_MODELS")
    assert models_folder() == tmp_path / ".cache" / "toprovar_jax" / "models"


def test_a_named_model_is_taken_from_the_shelf(shelf):
    folder = put(shelf / "infinity-2b")
    assert find_model("infinity-2b") == folder


def test_a_folder_at_hand_goes_before_the_shelf(shelf):
    put(shelf / "infinity-2b")
    put(shelf.parent / "infinity-2b")
    assert find_model("infinity-2b").resolve() == shelf.parent / "infinity-2b"


def refusal(given) -> str:
    with pytest.raises(UserInputError) as refused:
        find_model(given)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_an_empty_folder_says_what_belongs_into_one(tmp_path):
    message = refusal(tmp_path)
    assert str(tmp_path) in message
    assert "model.json or original files, such as infinity_2b_reg.pth" in message


@pytest.mark.parametrize("there", [None, "README.md"])
def test_a_named_model_without_weights_says_where_they_belong_and_where_they_are(shelf, there):
    if there:
        put(shelf / "infinity-8b", there)
    message = refusal("infinity-8b")
    assert str(shelf / "infinity-8b") in message
    assert "FoundationVision/Infinity with variant infinity-8b" in message
    assert EMBEDDED in message


@pytest.mark.usefixtures("shelf")
def test_a_preset_that_was_never_released_is_not_said_to_be_on_the_hub():
    message = refusal("infinity-layer12")
    assert "was never released" in message
    assert "pass the folder that holds them" in message
    assert "FoundationVision" not in message


def test_a_named_model_with_a_damaged_file_says_which(shelf):
    path = put(shelf / "infinity-8b", "transformer.safetensors") / "transformer.safetensors"
    assert str(path) in refusal("infinity-8b")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("infinity-2", ["did you mean", "infinity-2b"]),
        ("Infinity-2B", ["must be one of", "infinity-2b"]),
        ("dalle", ["must be one of", EMBEDDED, "infinity-8b-512"]),
        ("no/such/folder", ["must be a folder or a model name", "check the path"]),
        ("", ["must be a folder or a model name"]),
        (" ", ["must be a folder or a model name"]),
        ("x" * 300, ["cannot be looked up"]),
        ("~no-such-user/weights", ["cannot be looked up"]),
        ("a\0b", ["model"]),
    ],
)
@pytest.mark.usefixtures("shelf")
def test_an_unknown_model_is_refused_in_one_line(given, words):
    message = refusal(given)
    assert [word for word in words if word not in message] == []


def test_a_shelf_in_an_unknown_home_names_the_variable(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOPROVAR_MODELS", "~no-such-user/shelf")
    assert "TOPROVAR_MODELS '~no-such-user/shelf': must name the folder" in refusal("infinity-2b")

    def homeless(_self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TOPROVAR_MODELS")
    monkeypatch.setattr(pathlib.Path, "expanduser", homeless)
    with pytest.raises(UserInputError, match="TOPROVAR_MODELS is not set and the home directory is unknown"):
        models_folder()


def test_a_file_is_not_a_folder(tmp_path):
    path = put(tmp_path, "transformer.safetensors") / "transformer.safetensors"
    assert "must be a folder" in refusal(path)
