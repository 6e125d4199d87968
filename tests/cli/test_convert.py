"""``python -m convert``: one command, one line for every mistake."""

import json
import os
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from convert.copying import copy_into
from convert.safetensors_io import save_safetensors
from toprovar_jax.cli.convert import main, size
from toprovar_jax.config import ImageTokenizerConfig, InfinityConfig
from toprovar_jax.loading import load_model
from toprovar_jax.model_card import ModelCard
from toprovar_jax.text_encoder import T5Config

from ..golden_cases.inputs import load_t5, load_tokenizer, load_transformer
from ..tiny_model import TOKENIZER_JSON, write_tiny_model


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def command(*words):
    return main([str(word) for word in words])


def refusal(capsys, *words) -> str:
    assert command(*words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err


def test_golden_weights_arrive_bit_for_bit(golden, tmp_path, capsys):
    """The networks are those that the recorded outputs are compared with, from the same files."""
    case = golden / "f_end_to_end"
    config = json.loads((case / "config.json").read_text())
    card = ModelCard(
        "golden",
        InfinityConfig.from_official(config["model"]),
        ImageTokenizerConfig.from_official(config["vae"]),
        T5Config.from_dict(config["t5"]),
        (("0.06M", 7),),
        "0.06M",
    )
    (tmp_path / "model.json").write_text(card.to_json())
    shutil.copy(case / "t5.safetensors", tmp_path / "t5.safetensors")
    (tmp_path / "tokenizer.json").write_text(TOKENIZER_JSON)
    sources = [case / "transformer.safetensors", case / "vae.safetensors", tmp_path / "t5.safetensors"]
    options = ["--model", tmp_path / "model.json", "--dtype", "float32", "--verify"]
    assert command(*sources, "--out", tmp_path / "out", *options) == 0
    assert re.search("verified 260 tensors in .* all equal bit for bit", capsys.readouterr().out)
    ours = load_model(tmp_path / "out", precision="exact", with_encoder=True).networks
    theirs = (
        load_transformer(config["model"], case / "transformer.safetensors"),
        load_tokenizer(config["vae"], case / "vae.safetensors"),
        load_t5(config["t5"], case / "t5.safetensors"),
    )
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


def test_a_dry_run_says_what_would_be_and_writes_nothing(originals, tmp_path, capsys):
    words = (originals / "transformer.safetensors", "--model", originals / "model.json", "--out", tmp_path / "out")
    assert command(*words, "--dry-run") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"transformer: {originals / 'transformer.safetensors'} (")
    assert said[1].startswith(f"  -> {tmp_path / 'out' / 'transformer'} (bfloat16, ")
    assert said[2:] == ["model: tiny"]
    assert list(tmp_path.iterdir()) == []


def test_quiet_says_nothing(originals, tmp_path, capsys):
    words = (originals / "text_encoder.safetensors", "--model", originals / "model.json", "--out", tmp_path / "out")
    assert command(*words, "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == TOKENIZER_JSON


def test_mistakes_are_one_line(originals, tmp_path, capsys):
    source, out = originals / "transformer.safetensors", ("--out", tmp_path / "out")
    assert "no source" in refusal(capsys, *out)
    assert "no folder" in refusal(capsys, source)
    assert "did you mean bfloat16" in refusal(capsys, source, *out, "--dtype", "bfloat15")
    assert "did you mean --verify" in refusal(capsys, source, *out, "--verity")
    assert "--model: needs a value" in refusal(capsys, source, *out, "--model")
    assert "did you mean infinity-2b" in refusal(capsys, source, *out, "--model", "infinity-2c")
    assert "does not exist" in refusal(capsys, tmp_path / "absent.pth", *out)
    assert "is the transformer of no known model; the nearest is" in refusal(capsys, source, *out)
    (tmp_path / "file").touch()
    assert "must be a directory" in refusal(
        capsys, source, "--model", originals / "model.json", "--out", tmp_path / "file" / "out"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_of_another_origin_is_refused_before_anything_is_said(originals, tmp_path, capsys):
    (tmp_path / "letter.txt").touch()
    words = (originals / "transformer.safetensors", "--model", originals / "model.json", "--out", tmp_path)
    assert "exists, and was not made by convert" in refusal(capsys, *words, "--force")


def test_foreign_tensors_are_one_line(tmp_path, capsys):
    save_safetensors(tmp_path / "m.safetensors", {"resnet.weight": np.zeros((2, 2), np.float32)}, {})
    assert "must be an Infinity transformer, its VAE or a T5 encoder" in refusal(
        capsys, tmp_path / "m.safetensors", "--out", tmp_path / "out"
    )


def test_help_names_every_option(capsys):
    assert command("--help") == 0
    said = capsys.readouterr().out
    for word in ("SOURCE...", "--out", "--dtype", "--model", "--ema", "--dry-run", "--verify", "--force"):
        assert word in said


def test_sizes_are_in_decimal_units():
    assert [size(n) for n in (999, 1500, 2_000_000, 17_340_000_000)] == ["999 B", "1.5 kB", "2.0 MB", "17.3 GB"]


def test_an_interrupted_conversion_leaves_nothing(originals, tmp_path, capsys, monkeypatch):
    sent = []

    def interrupted(out, part):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGINT))
            time.sleep(0.2)  # until the main thread has seen it
        copy_into(out, part)

    monkeypatch.setattr("convert.streaming.copy_into", interrupted)
    words = (originals / "transformer.safetensors", "--model", originals / "model.json", "--out", tmp_path / "out")
    assert command(*words) == 130
    assert capsys.readouterr().err.endswith("error: interrupted; nothing was written\n")
    assert list(tmp_path.iterdir()) == []
