"""Two tiny models in files with the names and layouts of the released ones."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from convert.recognise import IMAGE_TOKENIZER, TEXT_ENCODER, TRANSFORMER, Kind, parameter_shapes
from convert.safetensors_io import save_safetensors
from toprovar_jax.model_card import ModelCard

from ..tiny_model import CARD, TOKENIZER_JSON

BFLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)

SMALL = dataclasses.replace(CARD, name="infinity-2b")
LARGE = dataclasses.replace(
    CARD,
    name="infinity-8b",
    transformer=dataclasses.replace(CARD.transformer, num_layers=3, latent_channels=6),
    image_tokenizer=dataclasses.replace(CARD.image_tokenizer, latent_channels=6),
)
CARDS = {card.name: card for card in (SMALL, LARGE, dataclasses.replace(LARGE, name="infinity-8b-512"))}
"""What stands for the presets: two of them have the same networks, as there."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor as the writers of synthetic checkpoints take it."""

    name: str
    array: np.ndarray

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)
    nbytes = property(lambda self: self.array.nbytes)

    def write(self, file: BinaryIO) -> None:
        file.write(self.array.tobytes())


def writers() -> Any:
    """The module that writes files like the released ones."""
    path = Path(__file__).parents[2] / "benchmarks" / "synthetic_checkpoints.py"
    spec = importlib.util.spec_from_file_location("synthetic_checkpoints", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def tensors_of(kind: Kind, card: ModelCard, dtype: np.dtype) -> list[Stored]:
    """Random tensors under the official names."""
    random = np.random.default_rng(len(kind.name) + card.transformer.num_layers)
    shapes = parameter_shapes(kind, kind.config(card))
    found = []
    for rule in kind.rules(kind.config(card)):
        shape = shapes[rule.target] if rule.layer is None else shapes[rule.target][1:]
        numbers = 0.2 * random.standard_normal(rule.expected_shape(shape), np.float32)
        found.append(Stored(rule.official, numbers.astype(dtype)))
    return found


def write_all(folder: Path) -> Path:
    """Every released file: two transformers of one size and one of another, their VAEs and a T5 encoder."""
    write = writers()
    folder.mkdir()
    write.save_pth(folder / "infinity_2b_reg.pth", tensors_of(TRANSFORMER, SMALL, BFLOAT16))
    large = tensors_of(TRANSFORMER, LARGE, BFLOAT16)
    for name in ("infinity_8b_weights", "infinity_8b_512x512_weights"):
        write.save_shards(folder / name, large, count=3, stem="model", save=write.save_safetensors)
    for card, names in (
        (SMALL, ("infinity_vae_d32reg.pth", "infinity_vae_d32.pth")),
        (LARGE, ("infinity_vae_d56_f8_14_patchify.pth",)),
    ):
        for name in names:
            write.save_pth(folder / name, tensors_of(IMAGE_TOKENIZER, card, FLOAT32), wrap=["vae"])
    place = folder / "flan-t5-xl"
    text_encoder = tensors_of(TEXT_ENCODER, SMALL, FLOAT32)
    write.save_shards(place, text_encoder, count=2, stem="pytorch_model", save=write.save_pth)
    (place / "tokenizer.json").write_text(TOKENIZER_JSON)
    (place / "spiece.model").write_bytes(b"sentencepiece")
    return folder


def write_ours(folder: Path) -> Path:
    """The smaller model as a folder of its own: the same tensors in safetensors files."""
    folder.mkdir()
    for kind, dtype in ((TRANSFORMER, BFLOAT16), (IMAGE_TOKENIZER, FLOAT32), (TEXT_ENCODER, FLOAT32)):
        tensors = {tensor.name: tensor.array for tensor in tensors_of(kind, SMALL, dtype)}
        save_safetensors(folder / f"{kind.name}.safetensors", tensors, {})
    (folder / "tokenizer.json").write_text(TOKENIZER_JSON)
    (folder / "model.json").write_text(SMALL.to_json())
    return folder
