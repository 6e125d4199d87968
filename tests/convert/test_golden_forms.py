"""The reference weights in every form that weights are published in are the same networks."""

import dataclasses
import functools
import json
import pathlib
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from convert.recognise import recognise
from convert.safetensors_io import open_safetensors, save_safetensors
from convert.sources import open_source
from convert.streaming import streamed_arrays
from toprovar_jax.config import ImageTokenizerConfig, InfinityConfig
from toprovar_jax.presets import PRESETS
from toprovar_jax.text_encoder import T5Config

from .. import golden_cases
from ..golden_cases.inputs import load_t5, load_tokenizer, load_transformer

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
BFLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
LOADERS = {"model": load_transformer, "vae": load_tokenizer, "t5": load_t5}
WEIGHTS = [
    ("a_transformer_2b_style", "weights", "model"),
    ("b_transformer_8b_style", "weights", "model"),
    ("c_vae", "weights", "vae"),
    ("c_vae_stride8", "weights", "vae"),
    ("e_blocks", "weights", "model"),
    ("f_end_to_end", "transformer", "model"),
    ("f_end_to_end", "vae", "vae"),
    ("f_end_to_end", "t5", "t5"),
]
FORMS = ("safetensors", "pth", "wrapped pth", "shards", "bin shards")
WRAPS = {"model": ("trainer", "gpt_fsdp"), "vae": ("vae",), "t5": ("state_dict",)}


def other_spelling(tensors):
    """The VAE's plain names, and the scales of attention heads in the layout of fused attention."""

    def plain(name):
        return re.sub(r"^((?:en|de)coder\.(?!block).*)\.(?:conv|norm)\.(weight|bias)$", r"\1.\2", name)

    return {
        plain(name): np.ascontiguousarray(array.reshape(1, 1, -1, 1)) if name.endswith("scale_mul_1H11") else array
        for name, array in tensors.items()
    }


def write(form, path, tensors, wrap, files):
    """Writes ``tensors`` in a form, at ``path`` with the suffix of that form, and returns where."""
    if form == "safetensors":
        save_safetensors(path.with_suffix(".safetensors"), tensors, {})
        return path.with_suffix(".safetensors")
    if form in ("pth", "wrapped pth"):
        keys = {name: str(number) for number, name in enumerate(tensors)}
        value = {name: files.tensor(keys[name], array) for name, array in tensors.items()}
        for key in reversed(wrap if form == "wrapped pth" else ()):
            value = {key: value}
        storages = {keys[name]: array.tobytes() for name, array in tensors.items()}
        path.with_suffix(".pth").write_bytes(files.pth(value, storages))
        return path.with_suffix(".pth")
    suffix, stem = (".bin", "pytorch_model") if form == "bin shards" else (".safetensors", "model")
    path.mkdir()
    placed = {name: f"{stem}-{1 + i % 3:05d}-of-00003{suffix}" for i, name in enumerate(tensors)}
    for shard in set(placed.values()):
        part = {name: array for name, array in tensors.items() if placed[name] == shard}
        if stem == "model":
            save_safetensors(path / shard, part, {})
        else:
            (path / shard).write_bytes(files.pth_of(part))
    (path / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": placed}))
    return path


def card_of(section, options):
    """A model in which one network is that of a case and the others fit it."""
    base = PRESETS["infinity-2b"]
    transformer, tokenizer, encoder = base.transformer, base.image_tokenizer, base.text_encoder
    if section == "model":
        transformer = InfinityConfig.from_official(options)
    elif section == "vae":
        tokenizer = ImageTokenizerConfig.from_official(options)
        transformer = dataclasses.replace(transformer, latent_channels=tokenizer.latent_channels)
    else:
        encoder = T5Config.from_dict(options)
    tokenizer = dataclasses.replace(tokenizer, latent_channels=transformer.latent_channels)
    width = encoder.width if section == "t5" else transformer.text_width
    transformer = dataclasses.replace(transformer, text_width=width)
    encoder = dataclasses.replace(encoder, width=width)
    return dataclasses.replace(
        base, name="golden", transformer=transformer, image_tokenizer=tokenizer, text_encoder=encoder
    )


@functools.cache
def original(case, stem, section):
    """The tensors of a case's file, the options of its network, and the network as its outputs are tested."""
    path = GOLDEN / case / f"{stem}.safetensors"
    options = json.loads((GOLDEN / case / "config.json").read_text())[section]
    tensors = {name: np.array(read()) for name, read in open_safetensors(path).items()}
    return tensors, options, LOADERS[section](options, path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("case", "stem", "section"), WEIGHTS, ids=[f"{case}-{stem}" for case, stem, _ in WEIGHTS])
def test_converted_parameters_are_the_same_from_every_form(case, stem, section, form, files, tmp_path):
    tensors, options, network = original(case, stem, section)
    flat = nnx.to_flat_state(nnx.state(network))
    wanted = {".".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in flat}
    for number, dtype in enumerate((FLOAT32, BFLOAT16)):
        cast = {name: array.astype(dtype) if array.dtype == FLOAT32 else array for name, array in tensors.items()}
        spelled = other_spelling(cast) if FORMS.index(form) % 2 != number else cast
        path = write(form, tmp_path / dtype.name, spelled, WRAPS[section], files)
        recognised = recognise(open_source([path]), {"golden": card_of(section, options)})
        arrays = streamed_arrays(recognised, "float32")
        assert arrays.keys() == wanted.keys()
        for target, array in arrays.items():
            whole = np.full(array.shape, np.nan, np.float32)
            for index, make in array.pieces():
                whole[index] = make()
            np.testing.assert_array_equal(whole, wanted[target].astype(dtype).astype(np.float32), err_msg=target)


@pytest.mark.parametrize(
    ("case", "form"),
    [
        ("a_transformer_2b_style", "wrapped pth"),
        ("b_transformer_8b_style", "bin shards"),
        ("c_vae", "wrapped pth"),
        ("c_vae_stride8", "pth"),
        ("d_t5_encoder", "bin shards"),
        ("e_blocks", "shards"),
        ("f_end_to_end", "pth"),
    ],
)
def test_outputs_from_other_forms_equal_the_reference(case, form, files, tmp_path):
    folder = tmp_path / case
    shutil.copytree(GOLDEN / case, folder)
    for other, stem, section in (*WEIGHTS, ("d_t5_encoder", "weights", "t5")):
        if other == case:
            path = folder / f"{stem}.safetensors"
            tensors = {name: np.array(read()) for name, read in open_safetensors(path).items()}
            path.unlink()
            write(form, path.with_suffix(""), other_spelling(tensors), WRAPS[section], files)
    unit = golden_cases.find_units(folder)[0]
    reference = golden_cases.run_unit(unit)
    assert reference.measured
    assert not [measured for measured in reference.measured if not measured.ok]
