"""Which files of a folder make up a model, and what is said where that is not plain."""

from __future__ import annotations

import shutil

import pytest

from convert.conversion import make_plan
from toprovar_jax.errors import UserInputError
from toprovar_jax.originals.released import Choice
from toprovar_jax.originals.selection import candidates, select
from toprovar_jax.presets import PRESETS

from .conftest import FILES_2B, FILES_8B, T5


def chosen(folder, find=lambda: None, **choice):
    """The model, and the names of what its networks are read from."""
    selected = select(folder, Choice(**choice), PRESETS, find)
    return selected.model, [path.name for path in selected.sources]


def refusal(folder, **choice) -> str:
    with pytest.raises(UserInputError) as refused:
        select(folder, Choice(**choice), PRESETS, lambda: None)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_files_of_one_model_need_no_choice(folder_of):
    assert chosen(folder_of(*FILES_2B)) == ("infinity-2b", list(FILES_2B))


def test_what_is_read_is_named_down_to_the_tokenizer(folder_of):
    selected = select(folder_of(*FILES_8B), Choice(), PRESETS, lambda: None)
    names = [path.name for path in selected.files]
    assert names[:3] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert names[-1] == "tokenizer.json"
    plan = make_plan(selected.sources, PRESETS, model=selected.model)
    assert [path.name for network in plan.networks for path in network.source.files] == names[:-1]


@pytest.mark.parametrize(
    ("variant", "model", "transformer", "vae"),
    [
        ("infinity-2b", "infinity-2b", "infinity_2b_reg.pth", "infinity_vae_d32reg.pth"),
        ("infinity_2b_reg", "infinity-2b", "infinity_2b_reg.pth", "infinity_vae_d32reg.pth"),
        ("Infinity-2B", "infinity-2b", "infinity_2b_reg.pth", "infinity_vae_d32reg.pth"),
        ("infinity_2b", "infinity-2b", "infinity_2b_reg.pth", "infinity_vae_d32reg.pth"),
        ("infinity-8b", "infinity-8b", "infinity_8b_weights", "infinity_vae_d56_f8_14_patchify.pth"),
        ("infinity-8b-512", "infinity-8b-512", "infinity_8b_512x512_weights", "infinity_vae_d56_f8_14_patchify.pth"),
        (
            "infinity_8b_512x512_weights",
            "infinity-8b-512",
            "infinity_8b_512x512_weights",
            "infinity_vae_d56_f8_14_patchify.pth",
        ),
    ],
)
def test_a_variant_is_chosen_by_preset_or_file_and_brings_its_own_vae(released, variant, model, transformer, vae):
    assert chosen(released, variant=variant) == (model, [transformer, vae, T5])


def test_several_transformers_without_a_choice_are_listed(released):
    message = refusal(released)
    for words in ("infinity-2b (infinity_2b_reg.pth)", "infinity-8b-512 (infinity_8b_512x512_weights)", "--variant"):
        assert words in message


def test_equal_shapes_are_told_apart_by_the_published_name_and_otherwise_by_the_variant(folder_of):
    folder = folder_of("infinity_8b_512x512_weights", *FILES_8B[1:])
    assert chosen(folder)[0] == "infinity-8b-512"
    assert "infinity-8b-512 (infinity_8b_512x512_weights)" in refusal(folder, variant="infinity-8b")
    (folder / "infinity_8b_512x512_weights").rename(folder / "mine")
    assert chosen(folder)[0] == "infinity-8b"
    assert chosen(folder, variant="infinity-8b-512")[0] == "infinity-8b-512"
    assert chosen(folder, variant="mine")[0] == "infinity-8b"


def test_a_preset_that_several_files_may_be_asks_for_a_file(folder_of):
    folder = folder_of("infinity_vae_d56_f8_14_patchify.pth", T5, one="infinity_8b_weights", two="infinity_8b_weights")
    assert "may be any of one, two" in refusal(folder, variant="infinity-8b")
    assert chosen(folder, variant="two") == ("infinity-8b", ["two", "infinity_vae_d56_f8_14_patchify.pth", T5])


def test_a_variant_that_is_not_there_says_what_is(folder_of):
    folder = folder_of(*FILES_2B)
    message = refusal(folder, variant="infinity-8b")
    assert "infinity-2b (infinity_2b_reg.pth)" in message
    assert "put infinity_8b_weights there" in message
    assert "must be one of infinity-2b, infinity-8b, infinity-8b-512, infinity_2b_reg.pth" in refusal(
        folder, variant="3b"
    )


def test_the_same_network_in_two_formats_counts_once(folder_of, released):
    folder = folder_of("infinity_vae_d56_f8_14_patchify.pth", T5, model="infinity_8b_weights")
    for path in (folder / "model").iterdir():
        path.rename(folder / path.name)
    shutil.copytree(released / T5, folder, dirs_exist_ok=True)
    (folder / "model").rmdir()
    shutil.rmtree(folder / T5)
    assert chosen(folder)[1] == [
        "model.safetensors.index.json",
        "infinity_vae_d56_f8_14_patchify.pth",
        "pytorch_model.bin.index.json",
    ]


def test_networks_may_lie_together_in_a_folder_of_their_own(folder_of, released):
    folder = folder_of("infinity_2b_reg.pth", T5)
    (folder / "vae").mkdir()
    for name in ("infinity_vae_d32reg.pth", "infinity_vae_d32.pth"):
        shutil.copyfile(released / name, folder / "vae" / name)
    assert {candidate.name for candidate in candidates(folder)} >= {"vae/infinity_vae_d32.pth", T5}
    assert chosen(folder)[1] == ["infinity_2b_reg.pth", "infinity_vae_d32reg.pth", T5]


def test_without_the_published_vae_the_only_one_that_fits_is_taken(folder_of):
    folder = folder_of("infinity_2b_reg.pth", "infinity_vae_d32.pth", "infinity_vae_d56_f8_14_patchify.pth", T5)
    assert chosen(folder)[1][1] == "infinity_vae_d32.pth"


def test_several_unpublished_vaes_that_fit_must_be_chosen_from(folder_of):
    folder = folder_of("infinity_2b_reg.pth", T5, one="infinity_vae_d32.pth", two="infinity_vae_d32.pth")
    assert "one.pth, two.pth; choose one with --vae" in refusal(folder)
    assert chosen(folder, vae="two.pth")[1][1] == "two.pth"
    assert chosen(folder, vae=str(folder / "one.pth"))[1][1] == "one.pth"


def test_a_vae_that_does_not_fit_is_refused_and_the_right_one_named(released, folder_of):
    wrong = "infinity_vae_d56_f8_14_patchify.pth"
    message = refusal(released, variant="infinity-2b", vae=wrong)
    assert f"VAE {wrong}: does not fit infinity_2b_reg.pth (infinity-2b)" in message
    assert f"use infinity_vae_d32reg.pth, which is in folder {released}" in message
    folder = folder_of("infinity_2b_reg.pth", wrong, T5)
    assert "use infinity_vae_d32reg.pth (of FoundationVision/Infinity)" in refusal(folder, vae=wrong)
    message = refusal(folder)
    assert f"holds no VAE that fits infinity_2b_reg.pth (infinity-2b), only {wrong}" in message
    assert "use infinity_vae_d32reg.pth (of FoundationVision/Infinity)" in message
    assert "VAE infinity_2b_reg.pth: is a transformer; use" in refusal(folder, vae="infinity_2b_reg.pth")


def test_a_vae_that_is_nowhere_is_refused(folder_of):
    message = refusal(folder_of(*FILES_2B), vae="infinity_vae_d64.pth")
    assert "VAE infinity_vae_d64.pth: is not in folder" in message


def test_a_text_encoder_may_lie_elsewhere(folder_of, released):
    folder = folder_of(*FILES_2B[:2])
    assert chosen(folder, text_encoder=str(released / T5))[1][2] == T5
    assert chosen(folder, find=lambda: released / T5)[1][2] == T5


def test_a_missing_text_encoder_says_which_files_to_fetch(folder_of):
    message = refusal(folder_of(*FILES_2B[:2]))
    for words in ("holds no text encoder", "google/flan-t5-xl", "tokenizer.json", "index.json", "--text-encoder"):
        assert words in message


def test_another_network_is_no_text_encoder(folder_of):
    folder = folder_of(*FILES_2B)
    message = refusal(folder, text_encoder="infinity_vae_d32reg.pth")
    assert "T5 encoder infinity_vae_d32reg.pth: is a VAE; use google/flan-t5-xl" in message
    assert "is not in folder" in refusal(folder, text_encoder="flan-t5-xxl")


def test_a_text_encoder_without_tokenizer_says_what_to_fetch_and_that_spiece_will_not_do(folder_of):
    folder = folder_of(*FILES_2B)
    (folder / T5 / "tokenizer.json").unlink()
    message = refusal(folder)
    assert "lacks tokenizer.json (spiece.model is no substitute); fetch tokenizer.json of google/flan-t5-xl" in message


def test_damaged_files_are_told_where_they_are_needed_and_passed_over_elsewhere(folder_of):
    folder = folder_of(*FILES_2B, *FILES_8B[:2])
    (folder / "infinity_8b_weights" / "model-00002-of-00003.safetensors").unlink()
    (folder / "infinity_vae_d56_f8_14_patchify.pth").write_bytes(b"not a zip file")
    assert chosen(folder)[0] == "infinity-2b"
    assert "model-00002-of-00003.safetensors: is missing" in refusal(folder, variant="infinity-8b")
    (folder / "infinity_vae_d32reg.pth").write_bytes(b"not a zip file")
    assert str(folder / "infinity_vae_d32reg.pth") in refusal(folder)


def test_a_folder_without_transformer_says_which_there_are(folder_of):
    message = refusal(folder_of(*FILES_2B[1:]))
    assert "holds no transformer" in message
    assert "infinity-8b (infinity_8b_weights)" in message
