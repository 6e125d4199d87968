"""Converting: from files under the official names to a model folder of orbax checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import toprovar_jax
from convert.orbax_writer import StreamedArray, write_checkpoint
from convert.recognise import Recognised, read_cards, recognise
from convert.sources import group_sources, open_source
from convert.streaming import Dtype, streamed_arrays, verify
from convert.target import CARD, RECORD, building, check_target, leftover_bytes
from toprovar_jax.errors import UserInputError
from toprovar_jax.files import check_output_dir, replace_file
from toprovar_jax.model_card import FORMAT, ModelCard
from toprovar_jax.presets import PRESETS

TOKENIZER = "tokenizer.json"
"""What belongs to a text encoder beside its weights; taken along where it lies in the same folder."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will be converted.

    Attributes:
      networks: each in its own kind.
      cards: the models that were looked through.
      models: those of them that all ``networks`` belong to.
      dtype: see :func:`convert.streaming.stored_dtype`.
    """

    networks: tuple[Recognised, ...]
    cards: Mapping[str, ModelCard]
    models: tuple[str, ...]
    dtype: Dtype

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the networks."""
        return tuple(network.kind.name for network in self.networks)

    def arrays(self) -> dict[str, dict[str, StreamedArray]]:
        """What would be written, by network and path."""
        return {network.kind.name: streamed_arrays(network, self.dtype) for network in self.networks}

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays that would be written."""
        return sum(array.nbytes for arrays in self.arrays().values() for array in arrays.values())


def make_plan(
    sources: Sequence[Path],
    presets: Mapping[str, ModelCard],
    *,
    model: str | None = None,
    dtype: Dtype = "bfloat16",
    ema: bool = False,
) -> Plan:
    """Recognise all sources.

    Args:
      sources: files, folders, indices; shards that belong together count as one.
      presets: the models that come into question.
      model: the one that it must be, by name or as a ``model.json`` file.
      dtype: of the weights to be written.
      ema: take the averaged weights of training checkpoints.

    Raises:
      UserInputError: sources that cannot be read or recognised, two of one kind, or some that do not belong together.
    """
    cards, wanted = read_cards(model, presets)
    networks: dict[str, Recognised] = {}
    for group in group_sources(sources):
        network = recognise(open_source(group, ema=ema), cards, wanted)
        name = network.kind.name
        if name in networks:
            labels = f"{networks[name].source.label} and {network.source.label}"
            raise UserInputError(labels, f"are both a {network.kind.title}", "convert them into two folders")
        networks[name] = network
    models = tuple(cards)
    for network in networks.values():
        models = _common(models, network)
    return Plan(tuple(networks.values()), cards, models, dtype)


def _common(models: Sequence[str], network: Recognised) -> tuple[str, ...]:
    """The ``models`` that a further network belongs to as well."""
    common = tuple(name for name in models if name in network.models)
    if not common:
        raise UserInputError(
            f"checkpoint {network.source.label}",
            f"is the {network.kind.title} of {' or '.join(network.models)}, the rest is of {' or '.join(models)}",
            f"convert it into another folder, or take the {network.kind.title} of {models[0]}",
        )
    return common


def check_plan(plan: Plan, out: Path, *, force: bool = False) -> tuple[str, ...]:
    """The models that ``out`` would hold networks of.

    Raises:
      UserInputError: ``out`` is no place for this plan, see :func:`convert.target.building`; or what is there is of
        another model.
    """
    models = _models_with(plan, check_target(out, plan.kinds, force=force))
    check_output_dir(out.resolve().parent)
    _check_space(plan, out)
    return models


def _check_space(plan: Plan, out: Path) -> None:
    parent = next(folder for folder in out.resolve().parents if folder.is_dir())
    free = shutil.disk_usage(parent).free + leftover_bytes(out)
    if plan.nbytes > free:
        raise UserInputError(
            f"--out {out}",
            f"needs {plan.nbytes / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there",
            "choose another disk or make room",
        )


def _models_with(plan: Plan, record: Mapping[str, Any]) -> tuple[str, ...]:
    others = record.get("parts", {}).keys() - set(plan.kinds)
    models = [name for name in record["models"] if name in plan.cards] if others else plan.models
    if not models:
        raise UserInputError(
            f"the folder's model {' or '.join(record['models'])}",
            f"is not {' or '.join(plan.models)}",
            "choose another folder with --out",
        )
    for network in plan.networks:
        models = _common(models, network)
    return tuple(models)


def convert(
    plan: Plan,
    out: Path,
    *,
    force: bool = False,
    verified: bool = False,
    progress: Callable[[str, int], None] = lambda stage, nbytes: None,
) -> int:
    """Write the model folder ``out``, or add to one of earlier conversions.

    Args:
      plan: what to convert.
      out: the folder; see :func:`convert.target.building` for what happens to one that exists.
      force: replace networks that are there already.
      verified: read both sides again and compare before the folder takes its name.
      progress: told ``"write"`` or ``"verify"`` and the bytes of each piece that is done.

    Returns:
      How many tensors were compared.

    Raises:
      UserInputError: see :func:`check_plan`; or numbers that are not finite.
      DifferenceError: what was written is not what was read.
      OSError: the disk is full or cannot be written.
    """
    count = 0
    with building(out, plan.kinds, force=force) as (place, record), _hashing(plan) as hashes:
        models = _models_with(plan, record)
        for network in plan.networks:
            arrays = streamed_arrays(network, plan.dtype, lambda nbytes: progress("write", nbytes))
            write_checkpoint(place / network.kind.name, arrays)
            tokenizer = network.source.files[0].parent / TOKENIZER
            if network.kind.name == "text_encoder" and tokenizer.is_file():
                shutil.copyfile(tokenizer, place / TOKENIZER)
        if verified:
            for network in plan.networks:
                path = place / network.kind.name
                count += verify(path, network, plan.dtype, lambda nbytes: progress("verify", nbytes))
        parts = dict(record.get("parts", {}))
        for network in plan.networks:
            parts[network.kind.name] = _entry(
                network, plan.dtype, [hashes[path].result() for path in network.source.files]
            )
        described = {RECORD: {"models": models, "parts": parts}}
        replace_file(place / CARD, (json.dumps(_card_fields(plan, models) | described, indent=1) + "\n").encode())
    return count


def _card_fields(plan: Plan, models: Sequence[str]) -> dict[str, Any]:
    card = plan.cards[models[0]]
    if PRESETS.get(card.name) == card:
        return {"format": FORMAT, "preset": card.name}
    return json.loads(card.to_json())


def _entry(network: Recognised, dtype: Dtype, hashes: Sequence[str]) -> dict[str, Any]:
    source = network.source
    files = [
        {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(source.files, hashes, strict=True)
    ]
    return {
        "files": files,
        "wrapped_in": source.wrapped_in,
        "averaged": source.averaged,
        "left_out": network.left_out,
        "tensors": len(network.reading),
        "dtype": dtype,
        "tool": f"toprovar_jax {toprovar_jax.__version__}",
    }


@contextlib.contextmanager
def _hashing(plan: Plan) -> Iterator[dict[Path, Future[str]]]:
    """Hashes of all files, computed beside the conversion."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            files = [path for network in plan.networks for path in network.source.files]
            yield {path: pool.submit(_sha256, path, stop) for path in files}
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _sha256(path: Path, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while not stop.is_set() and (piece := file.read(1 << 22)):
            digest.update(piece)
    return digest.hexdigest()
