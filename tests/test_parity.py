"""The recorded outputs of the reference implementation, and proof that comparing with them finds mistakes."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import infinity as transformer_table
from convert.rules import official_state_dict

from . import golden_cases, parity, tiny
from .golden_cases.transformer import run_transformer

GOLDEN = pathlib.Path(__file__).parent / "golden"


@pytest.mark.parametrize("unit", golden_cases.find_units(GOLDEN), ids=str)
def test_outputs_equal_the_reference(unit):
    reference = golden_cases.run_unit(unit)
    assert not [measured for measured in reference.measured if not measured.ok]
    assert reference.measured
    assert not reference.unused, "arrays that nothing was compared with"


def test_all_kinds_of_cases_are_there():
    kinds = [unit.kind for unit in golden_cases.find_units(GOLDEN)]
    assert sorted(kinds) == [*["blocks"], "end_to_end", "t5", "tokenizer", "tokenizer", *["transformer"] * 4]


@pytest.fixture
def text_case(tmp_path):
    return shutil.copytree(GOLDEN / "d_t5_encoder", tmp_path / "cases" / "renamed")


@pytest.fixture
def block_case(tmp_path):
    return shutil.copytree(GOLDEN / "e_blocks", tmp_path / "cases" / "blocks")


def _change_arrays(path, change):
    arrays = dict(np.load(path))
    change(arrays)
    np.savez(path, **arrays)


def _change_tensors(path, name, factor):
    tensors = load_file(path)
    tensors[name] = tensors[name] * np.float32(factor)
    save_file(tensors, path)


class Recorder(golden_cases.Reference):
    """Keeps what it is asked to compare: the outputs of a case that nobody recorded yet."""

    def compare(self, name, ours, bound, *, note=""):
        self.arrays[name] = np.asarray(ours)


def test_a_case_of_another_shape_is_run(tmp_path, capsys):
    """Three images, negative prompts, guidance in two places and 1 at a scale, another ratio, ungrouped blocks.

    Our own outputs stand in for recorded ones: this holds the reading of a case, not the numbers.
    """
    module = tiny.transformer(block_chunks=1, num_layers=2, spatial_patchify=True)
    grids = [[1, height, width] for height, width in ((1, 1), (2, 2))]
    run = {
        **{
            "file": "io_neg.npz",
            "ratio": 0.75,
            "scale_schedule": grids,
            "cfg_list": [3, 1, 2],
            "tau_list": [1, 0.5, 1],
        },
        **{"top_k": 0, "top_p": 0, "cfg_insertion_layer": [0, -1, 1], "B": 3},
    }
    options = {
        **{"depth": 2, "embed_dim": 64, "num_heads": 4, "text_channels": 128, "text_maxlen": 12},
        **{"vae_codebook_dim": 8, "apply_spatial_patchify": 1},
    }
    random = np.random.default_rng(0)
    arrays = {"text_lens": np.array([3, 7, 2], np.int32), "neg_text_lens": np.array([9, 1, 4], np.int32)}
    arrays["text_features"] = random.standard_normal((12, 128)).astype(np.float32)
    arrays["neg_text_features"] = random.standard_normal((14, 128)).astype(np.float32)
    for k, tokens in enumerate((1, 4)):
        arrays[f"uniform_{k}"] = random.random((3, tokens, 32)).astype(np.float32)
    case = tmp_path / "another"
    case.mkdir()
    (case / "config.json").write_text(json.dumps({"model": options, "runs": [run]}))
    tensors = official_state_dict(module, transformer_table.rules(module.config), dtype=np.float32)
    save_file(tensors, case / "weights.safetensors")
    np.savez(case / "io_neg.npz", **arrays)
    assert parity.main([str(case)]) == 1
    assert "missing" in capsys.readouterr().out

    recorder = Recorder(dict(arrays))
    run_transformer({"model": options, "runs": [run]}, case, "io_neg.npz", recorder)
    for name in ("hidden_0", "logits_raw_0"):  # the original drops the unconditional rows where guidance is 1
        recorder.arrays[name] = recorder.arrays[name][:3]
    np.savez(case / "io_neg.npz", **recorder.arrays)
    assert parity.main([str(case)]) == 0
    out = capsys.readouterr().out
    assert "not compared" not in out
    assert "summed_codes" in out
    recorder.arrays["neg_text_features"][0] += 0.1
    np.savez(case / "io_neg.npz", **recorder.arrays)
    assert parity.main([str(case)]) == 1


def test_the_command_accepts_a_folder_of_any_name(text_case, capsys):
    assert parity.main([str(text_case.parent)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["renamed", "io.npz", "last_hidden_state"]
    assert "ok" in lines[0]
    assert parity.main([str(text_case), "--quiet"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_file_of_another_name_is_run_too(text_case, capsys):
    (text_case / "io.npz").rename(text_case / "io_other.npz")
    assert parity.main([str(text_case)]) == 0
    assert "io_other.npz" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["encoder.block.1.layer.1.DenseReluDense.wi_1.weight", "encoder.final_layer_norm.weight"]
)
def test_a_weight_that_is_off_by_two_percent_fails(text_case, capsys, name):
    _change_tensors(text_case / "weights.safetensors", name, 1.02)
    assert parity.main([str(text_case)]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_transformer_weight_that_is_off_by_two_percent_fails(block_case, capsys):
    _change_tensors(block_case / "weights.safetensors", "block_chunks.1.module.0.sa.v_bias", 1.02)
    assert parity.main([str(block_case), "--quiet"]) == 1
    failed = capsys.readouterr().out
    assert "block1_out_0" in failed
    assert "block0_out_0" not in failed


def test_a_file_that_is_cut_short_fails(text_case, capsys):
    path = text_case / "io.npz"
    path.write_bytes(path.read_bytes()[:1000])
    assert parity.main([str(text_case)]) == 1
    assert "unreadable" in capsys.readouterr().out


def test_weights_that_are_cut_short_fail(text_case, capsys):
    path = text_case / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert parity.main([str(text_case)]) == 1
    assert "cannot be run" in capsys.readouterr().out


def test_an_array_that_is_missing_fails(text_case, capsys):
    _change_arrays(text_case / "io.npz", lambda arrays: arrays.pop("last_hidden_state"))
    assert parity.main([str(text_case)]) == 1
    assert "missing" in capsys.readouterr().out


def test_not_a_number_fails(text_case, capsys):
    def spoil(arrays):
        arrays["last_hidden_state"][0, 3, 5] = np.nan

    _change_arrays(text_case / "io.npz", spoil)
    assert parity.main([str(text_case)]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_single_other_bit_fails():
    reference = golden_cases.Reference({"bits": np.zeros((1, 4, 16), np.uint8)})
    ours = np.zeros((1, 4, 16), np.uint8)
    ours[0, 1, 7] = 1
    reference.compare("bits", ours, golden_cases.EXACT)
    reference.compare("bits", ours[:, :2], golden_cases.EXACT)
    assert [(measured.error, measured.ok) for measured in reference.measured] == [(1.0, False), (np.inf, False)]


def test_an_array_that_nothing_is_compared_with_is_named(text_case, capsys):
    _change_arrays(text_case / "io.npz", lambda arrays: arrays.update(novelty=np.zeros(3)))
    assert parity.main([str(text_case)]) == 0
    assert "not compared: novelty" in capsys.readouterr().out


@pytest.mark.parametrize("config", [None, "{", '{"other": 1}'])
def test_a_case_without_a_usable_description_fails(text_case, capsys, config):
    path = text_case / "config.json"
    path.unlink() if config is None else path.write_text(config)
    assert parity.main([str(text_case)]) == 1
    assert "config.json" in capsys.readouterr().out


def test_a_run_whose_file_is_not_there_fails(tmp_path, capsys):
    case = tmp_path / "a"
    case.mkdir()
    (case / "config.json").write_text(json.dumps({"model": {}, "runs": [{"file": "io_gone.npz"}]}))
    assert parity.main([str(tmp_path)]) == 1
    assert "io_gone.npz" in capsys.readouterr().out


def test_an_empty_folder_fails(tmp_path, capsys):
    assert parity.main([str(tmp_path)]) == 1
    assert "no case found" in capsys.readouterr().out


def test_a_folder_that_does_not_exist_is_refused(tmp_path, capsys):
    assert parity.main([str(tmp_path / "nowhere")]) == 2
    assert "not a folder" in capsys.readouterr().err


def test_the_script_runs_from_anywhere(text_case, tmp_path):
    command = [sys.executable, str(pathlib.Path(parity.__file__)), str(text_case)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "1 files, 1 comparisons, 0 over their bound" in result.stdout
