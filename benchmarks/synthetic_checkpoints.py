"""Random weights in files like the released ones: official names, shapes and layouts, streamed to disk.

    python benchmarks/synthetic_checkpoints.py OUT --scale tiny|full [--only NAME ...]

writes the files of :data:`FILES` below OUT: for ``full`` as large as the released ones (about 50 GB in all, so one at a
time is wise), for ``tiny`` with few and narrow layers, which no preset has; ``OUT/model-2b.json`` and
``OUT/model-8b.json`` describe those for ``python -m convert --model``. No torch is needed, and never more than one
tensor is in memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from convert.recognise import IMAGE_TOKENIZER, TEXT_ENCODER, TRANSFORMER, Kind, parameter_shapes
from toprovar_jax.model_card import ModelCard
from toprovar_jax.presets import PRESETS

BFLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
_SAFETENSORS = {BFLOAT16: "BF16", FLOAT32: "F32"}
_STORAGES = {BFLOAT16: "BFloat16Storage", FLOAT32: "FloatStorage"}
_PIECE = 1 << 22


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    seed: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def write(self, file: BinaryIO) -> None:
        """Random numbers of all signs and of sizes around 2**-5, piece by piece: none of them infinite."""
        random = np.random.Generator(np.random.SFC64(self.seed))
        for start in range(0, math.prod(self.shape), _PIECE):
            count = min(_PIECE, math.prod(self.shape) - start)
            if self.dtype == BFLOAT16:
                # Sign and seven bits of fraction are random, the exponent is one of sixteen.
                bits = random.integers(0, 1 << 16, count, dtype=np.uint16)
                file.write(((bits & 0x87FF) | 0x3800).tobytes())
            else:
                bits = random.integers(0, 1 << 32, count, dtype=np.uint32)
                file.write(((bits & 0x87FFFFFF) | 0x38000000).tobytes())


@dataclasses.dataclass(frozen=True)
class File:
    """A file, or a folder of shards, and what is in it."""

    name: str
    kind: Kind
    model: str
    dtype: np.dtype
    write: Callable[[Path, Sequence[Tensor]], None]


def save_pth(path: Path, tensors: Sequence[Tensor], *, wrap: Sequence[str] = ()) -> None:
    """As ``torch.save`` writes a state dict, under the keys ``wrap``."""
    parts = [b"\x80\x02", b"".join(b"}" + _text(key) for key in wrap), b"}("]
    for i, tensor in enumerate(tensors):
        strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
        storage = f"ctorch\n{_STORAGES[tensor.dtype]}\n".encode() + _text(str(i)) + _text("cpu")
        parts += [_text(tensor.name), b"ctorch._utils\n_rebuild_tensor_v2\n((", _text("storage"), storage]
        parts += [_integer(math.prod(tensor.shape)), b"tQ", _integer(0)]
        parts += [b"(", *map(_integer, tensor.shape), b"t(", *map(_integer, strides), b"t\x89"]
        parts += [b"ccollections\nOrderedDict\n)RtR"]
    parts += [b"u", b"s" * len(wrap), b"."]
    root = path.stem
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.writestr(f"{root}/data.pkl", b"".join(parts))
        archive.writestr(f"{root}/byteorder", "little")
        for i, tensor in enumerate(tensors):
            entry = zipfile.ZipInfo(f"{root}/data/{i}")
            # torch starts every storage at a multiple of 64 bytes; an extra field of zeros fills the gap.
            entry.file_size = tensor.nbytes
            header = 30 + len(entry.filename) + (20 if tensor.nbytes * 1.05 > zipfile.ZIP64_LIMIT else 0)
            gap = -(archive.fp.tell() + header + 4) % 64
            entry.extra = struct.pack("<HH", 0x4246, gap) + bytes(gap)
            with archive.open(entry, "w") as file:
                tensor.write(file)
        archive.writestr(f"{root}/version", "3\n")


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value) if value < 1 << 31 else b"\x8a\x08" + struct.pack("<q", value)


def save_safetensors(path: Path, tensors: Sequence[Tensor]) -> None:
    """One safetensors file."""
    header, offset = {}, 0
    for tensor in tensors:
        span = [offset, offset := offset + tensor.nbytes]
        header[tensor.name] = {"dtype": _SAFETENSORS[tensor.dtype], "shape": tensor.shape, "data_offsets": span}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            tensor.write(file)


def save_shards(
    folder: Path, tensors: Sequence[Tensor], *, count: int, stem: str, save: Callable[[Path, Sequence[Tensor]], None]
) -> None:
    """A folder of ``count`` shards of about the same size, and the index that places every tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(tensor.nbytes for tensor in tensors)
    shards: list[list[Tensor]] = [[] for _ in range(count)]
    before = 0
    for tensor in tensors:
        shards[min(count - 1, before * count // total)].append(tensor)
        before += tensor.nbytes
    suffix = ".safetensors" if save is save_safetensors else ".bin"
    placed = {}
    for i, shard in enumerate(shards):
        name = f"{stem}-{i + 1:05d}-of-{count:05d}{suffix}"
        save(folder / name, shard)
        placed |= {tensor.name: name for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))


def _vae(path: Path, tensors: Sequence[Tensor]) -> None:
    save_pth(path, tensors, wrap=["vae"])


def _safetensors_shards(folder: Path, tensors: Sequence[Tensor]) -> None:
    save_shards(folder, tensors, count=4, stem="model", save=save_safetensors)


def _bin_shards(folder: Path, tensors: Sequence[Tensor]) -> None:
    save_shards(folder, tensors, count=2, stem="pytorch_model", save=save_pth)


FILES = (
    File("infinity_2b_reg.pth", TRANSFORMER, "2b", BFLOAT16, save_pth),
    File("infinity_2b_reg.safetensors", TRANSFORMER, "2b", BFLOAT16, save_safetensors),
    File("infinity_8b_weights", TRANSFORMER, "8b", BFLOAT16, _safetensors_shards),
    File("infinity_vae_d32reg.pth", IMAGE_TOKENIZER, "2b", FLOAT32, _vae),
    File("infinity_vae_d56_f8_14_patchify.pth", IMAGE_TOKENIZER, "8b", FLOAT32, _vae),
    File("flan-t5-xl", TEXT_ENCODER, "2b", FLOAT32, _bin_shards),
)


def cards(scale: str) -> dict[str, ModelCard]:
    """The two released models, or small ones of the same build."""
    full = {name: PRESETS[f"infinity-{name}"] for name in ("2b", "8b")}
    return full if scale == "full" else {name: _tiny(card) for name, card in full.items()}


def _tiny(card: ModelCard) -> ModelCard:
    return dataclasses.replace(
        card,
        name=f"{card.name}-tiny",
        transformer=dataclasses.replace(card.transformer, num_layers=8, width=128, num_heads=4, text_width=128),
        image_tokenizer=dataclasses.replace(card.image_tokenizer, base_width=32, num_res_blocks=1),
        text_encoder=dataclasses.replace(
            card.text_encoder, vocab_size=256, width=128, head_dim=16, feed_forward_width=64, num_layers=2, num_heads=2
        ),
    )


def official_tensors(kind: Kind, card: ModelCard, dtype: np.dtype) -> Iterator[Tensor]:
    """The tensors of a network in the order of its table."""
    config = kind.config(card)
    shapes = parameter_shapes(kind, config)
    for i, rule in enumerate(kind.rules(config)):
        shape = shapes[rule.target]
        yield Tensor(rule.official, rule.expected_shape(shape if rule.layer is None else shape[1:]), dtype, seed=i)


def write_files(folder: Path, scale: str, only: Sequence[str] = ()) -> list[Path]:
    """Writes the files (those named in ``only``, or all) and returns their paths."""
    models, paths = cards(scale), []
    folder.mkdir(parents=True, exist_ok=True)
    for name, card in models.items():
        (folder / f"model-{name}.json").write_text(card.to_json())
    for file in FILES:
        if not only or file.name in only:
            file.write(folder / file.name, list(official_tensors(file.kind, models[file.model], file.dtype)))
            paths.append(folder / file.name)
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write random weights in files like the released ones.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--scale", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--only", nargs="*", default=(), choices=[file.name for file in FILES])
    options = parser.parse_args(arguments)
    for path in write_files(options.out, options.scale, options.only):
        files = [path] if path.is_file() else sorted(path.iterdir())
        print(f"{sum(file.stat().st_size for file in files):>15,} bytes  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
