"""From a model folder to networks on the device."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert import image_tokenizer as image_tokenizer_table
from convert import infinity as infinity_table
from convert import t5 as t5_table
from convert.dtypes import fast_dtype
from convert.rules import Rule, official_state_dict, prepare_filling
from convert.safetensors_io import open_safetensors, save_safetensors
from pallas_kernels.attention.api import choose
from pallas_kernels.attention.problem import Problem
from pallas_kernels.attention.target import current_target
from toprovar_jax.acceleration.calibration import Calibration
from toprovar_jax.checkpoint import restore_arrays, restore_layers
from toprovar_jax.config import InfinityConfig, Precision
from toprovar_jax.errors import UserInputError
from toprovar_jax.generation import InfinityModel
from toprovar_jax.hub import CARD
from toprovar_jax.image_tokenizer import ImageTokenizer
from toprovar_jax.memory_options import ON_DEVICE, MemoryOptions
from toprovar_jax.model import Infinity
from toprovar_jax.model.quantization import Int8Matrix
from toprovar_jax.model_card import ModelCard
from toprovar_jax.placement import Placement, Shardings
from toprovar_jax.presets import PRESETS
from toprovar_jax.text_encoder import T5Encoder, TextTokenizer

TRANSFORMER, IMAGE_TOKENIZER, TEXT_ENCODER = (
    f"{name}.safetensors" for name in ("transformer", "image_tokenizer", "text_encoder")
)
TOKENIZER = "tokenizer.json"
CALIBRATION = "calibration.json"

Network = TypeVar("Network", bound=nnx.Module)
Tensors = Mapping[str, Callable[[], np.ndarray]]
Canonical = Callable[[Iterable[str]], Callable[[str], str | None]]
"""From all names as found to the reading of each."""


class LoadedModel(NamedTuple):
    """A model ready to run, with its calibration for ToProVAR if the folder holds one.

    ``quantization_error`` is that of :class:`~toprovar_jax.placement.Placement`; empty where nothing is quantised.
    """

    card: ModelCard
    networks: InfinityModel
    tokenizer: TextTokenizer
    calibration: Calibration | None = None
    quantization_error: Mapping[str, float] = types.MappingProxyType({})


def load_model(
    folder: Path,
    *,
    precision: Precision,
    attention: tuple[str, ...] = (),
    with_encoder: bool = False,
    shardings: Shardings | None = None,
    tensor_parts: int = 1,
    memory: MemoryOptions = ON_DEVICE,
) -> LoadedModel:
    """Load a model folder: ``model.json``, ``tokenizer.json`` and three networks.

    Each network is a folder that ``python -m convert`` has made, or a safetensors file under the official names.

    Parameters are float32 for ``exact``; for ``fast``, what enters matrix products of the blocks, the text encoder
    and the image tokenizer is bfloat16 and the rest float32.

    Args:
      folder: the model's files.
      precision: how it will be computed.
      attention: see :meth:`ModelCard.with_attention`.
      with_encoder: also load the image tokenizer's encoder, which generation does not need.
      shardings: where each parameter goes; default: the first device.
      tensor_parts: see :class:`~toprovar_jax.config.InfinityConfig`; needs shardings to match.
      memory: what of the networks stays off the device, and in which form.

    Raises:
      UserInputError: a file that is missing, cut short or foreign, tensors that do not fit the description, or
        attention that does not exist or cannot run here.
    """
    card = ModelCard.read(folder / CARD, PRESETS).with_precision(precision).with_attention(*attention)
    card = card.with_tensor_parts(tensor_parts)
    _check_attention(card.transformer)
    _check_networks(folder)
    tokenizer = TextTokenizer.from_file(folder / TOKENIZER)
    calibration = Calibration.read(folder / CALIBRATION) if (folder / CALIBRATION).is_file() else None
    if calibration is not None:
        _check_calibration(calibration, card)
    if tokenizer.vocab_size > card.text_encoder.vocab_size:
        raise UserInputError(
            f"tokenizer {folder / TOKENIZER} with {tokenizer.vocab_size} entries",
            f"must have at most the text encoder's {card.text_encoder.vocab_size}",
            "use the tokenizer that belongs to the model",
        )

    placements: dict[str, Placement] = {}

    def prepared(file: str, build: Callable[[], Network], rules: list[Rule], canonical: Canonical):
        placements[file] = Placement(Path(file).stem, shardings, memory)
        return _prepared(folder / file, build, rules, canonical, precision, placements[file])

    transformer = prepared(
        TRANSFORMER,
        lambda: Infinity(card.transformer, rngs=nnx.Rngs(0)),
        infinity_table.rules(card.transformer),
        lambda names: infinity_table.canonical_names(names, card.transformer),
    )
    image_tokenizer = prepared(
        IMAGE_TOKENIZER,
        lambda: ImageTokenizer(card.image_tokenizer, rngs=nnx.Rngs(0), with_encoder=with_encoder),
        image_tokenizer_table.rules(card.image_tokenizer, with_encoder=with_encoder),
        lambda names: lambda name: image_tokenizer_table.canonical_name(name, with_encoder=with_encoder),
    )
    text_encoder = prepared(
        TEXT_ENCODER,
        lambda: T5Encoder(card.text_encoder, rngs=nnx.Rngs(0)),
        t5_table.rules(card.text_encoder),
        lambda names: t5_table.canonical_name,
    )
    # Files under the official names have been checked by now; only then is anything placed.
    networks = InfinityModel(transformer(), image_tokenizer(), text_encoder())
    return LoadedModel(card, networks, tokenizer, calibration, placements[TRANSFORMER].errors)


def _check_networks(folder: Path) -> None:
    """Refuses a folder into which only some of the networks have been converted so far."""
    names = [Path(file).stem for file in (TRANSFORMER, IMAGE_TOKENIZER, TEXT_ENCODER)]
    lacking = [name for name in names if not (folder / name).is_dir() and not (folder / f"{name}.safetensors").exists()]
    if lacking and any((folder / name).is_dir() for name in names):
        raise UserInputError(
            f"model folder {folder}",
            f"lacks {' and '.join(lacking)}",
            f"add to it with python -m convert SOURCE... --out {folder}",
        )


def _check_calibration(calibration: Calibration, card: ModelCard) -> None:
    theirs, ours = (calibration.model, calibration.num_layers), (card.name, card.transformer.num_layers)
    if theirs != ours:
        raise UserInputError(
            f"calibration of model {theirs[0]} with {theirs[1]} layers",
            f"cannot be used with model {ours[0]} of {ours[1]}",
            "remove the file, or calibrate this model",
        )


def _check_attention(config: InfinityConfig) -> None:
    dtype = np.dtype(jnp.bfloat16 if config.precision == "fast" else jnp.float32)
    # Lengths do not matter: implementations take all of them.
    problem = Problem(1, 1, 1, config.num_heads, config.head_dim, dtype)
    try:
        choose(problem, current_target(), config.attention)
    except (ValueError, NotImplementedError) as error:
        named = ", ".join(config.attention or ())
        raise UserInputError(f"attention {named}", str(error), "leave it out to choose by device") from None


def _prepared(
    file: Path,
    build: Callable[[], Network],
    rules: list[Rule],
    canonical: Canonical,
    precision: Precision,
    placement: Placement,
) -> Callable[[], Network]:
    """What makes the network of ``build`` from ``file``, or from the converted folder beside it."""
    name = file.stem
    abstract = nnx.eval_shape(build)

    def dtype(target: str) -> np.dtype:
        return fast_dtype(name, target) if precision == "fast" else np.dtype(jnp.float32)

    if file.with_suffix("").is_dir():
        return lambda: _restored(file.with_suffix(""), abstract, dtype, placement)
    tensors = open_safetensors(file)
    fill = prepare_filling(
        abstract,
        rules,
        tensors,
        source=str(file),
        canonical=canonical(tensors),
        dtype=dtype,
        place_named=placement.place,
    )
    return cast(Callable[[], Network], fill)


def _restored(folder: Path, abstract: Network, dtype: Callable[[str], np.dtype], placement: Placement) -> Network:
    """The network from its orbax checkpoint, every parameter straight to where it belongs."""
    graph, state = nnx.split(abstract)
    filled = []
    for path, variable in nnx.to_flat_state(state):
        target, shape = ".".join(map(str, path)), tuple(variable.get_value().shape)
        if placement.quantises(target):
            wanted = jax.ShapeDtypeStruct(shape, dtype(target))
            value = placement.quantised(target, shape, restore_layers(folder, target, wanted))
        else:
            wanted = jax.ShapeDtypeStruct(shape, dtype(target), sharding=placement.sharding(target, shape))
            apart = placement.columns(target, shape)
            value = restore_arrays(folder, {target: wanted}, columns=lambda name, apart=apart: apart)[target]
        filled.append((path, variable.replace(value)))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def save_model(folder: Path, card: ModelCard, networks: InfinityModel, tokenizer_json: str) -> None:
    """Write a model folder that :func:`load_model` reads; weights are bfloat16 under the official names.

    Args:
      folder: made if it is not there.
      card: written last, so that a folder with a card is complete.
      networks: all three, the image tokenizer with its encoder.
      tokenizer_json: the text of a ``tokenizer.json``.

    Raises:
      ValueError: there is no text encoder, or the transformer is quantised.
    """
    if networks.text_encoder is None:
        raise ValueError("a model without text encoder cannot be saved: load_model needs all three networks")
    variables = nnx.to_flat_state(nnx.state(networks.transformer))
    if any(isinstance(variable.get_value(), Int8Matrix) for _, variable in variables):
        raise ValueError("a quantised model cannot be saved: load it without quantization")
    folder.mkdir(parents=True, exist_ok=True)
    parts = (
        (TRANSFORMER, networks.transformer, infinity_table.rules(card.transformer)),
        (IMAGE_TOKENIZER, networks.image_tokenizer, image_tokenizer_table.rules(card.image_tokenizer)),
        (TEXT_ENCODER, networks.text_encoder, t5_table.rules(card.text_encoder)),
    )
    for name, module, rules in parts:
        save_safetensors(folder / name, official_state_dict(module, rules), {"format": "pt", "model": card.name})
    (folder / TOKENIZER).write_text(tokenizer_json, encoding="utf-8")
    (folder / CARD).write_text(card.to_json(), encoding="utf-8")
