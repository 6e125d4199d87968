"""Telling from tensor names and shapes alone which network a state dict is, and of which released model."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from convert import image_tokenizer as image_tokenizer_table
from convert import infinity as infinity_table
from convert import t5 as t5_table
from convert.rules import Reader, Rule, match_tensors, rules_by_target
from convert.sources import LazyTensor, Source
from toprovar_jax.errors import UserInputError, unknown_name
from toprovar_jax.image_tokenizer import ImageTokenizer
from toprovar_jax.model import Infinity
from toprovar_jax.model_card import ModelCard
from toprovar_jax.text_encoder import T5Encoder

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of network.

    Attributes:
      name: of its folder in a model folder, and of its configuration in a :class:`ModelCard`.
      title: in messages.
      tells: matches names that this kind has and no other.
      build: makes the module of a configuration.
      rules: its table.
      canonical: the reading of names as found, given all of them.
    """

    name: str
    title: str
    tells: re.Pattern[str]
    build: Callable[[Any], nnx.Module]
    rules: Callable[[Any], list[Rule]]
    canonical: Callable[[Iterable[str], Any], Callable[[str], str | None]]

    def config(self, card: ModelCard) -> Any:
        """The configuration of this network in a model."""
        return getattr(card, self.name)


TRANSFORMER = Kind(
    "transformer",
    "transformer",
    re.compile(r"(cfg_uncond|pos_start|word_embed\.\w+|head_nm\..*|text_norm\.\w+)$|block(s|_chunks)\.\d"),
    lambda config: Infinity(config, rngs=nnx.Rngs(0)),
    infinity_table.rules,
    infinity_table.canonical_names,
)
IMAGE_TOKENIZER = Kind(
    "image_tokenizer",
    "VAE",
    re.compile(r"(encoder|decoder)\.(conv_in|conv_out|norm_out|mid|up|down)\."),
    lambda config: ImageTokenizer(config, rngs=nnx.Rngs(0)),
    image_tokenizer_table.rules,
    lambda names, config: image_tokenizer_table.canonical_name,
)
TEXT_ENCODER = Kind(
    "text_encoder",
    "T5 encoder",
    re.compile(r"shared\.weight$|encoder\.(block\.\d|final_layer_norm|embed_tokens)"),
    lambda config: T5Encoder(config, rngs=nnx.Rngs(0)),
    t5_table.rules,
    lambda names, config: t5_table.canonical_name,
)
KINDS = (TRANSFORMER, IMAGE_TOKENIZER, TEXT_ENCODER)


@dataclasses.dataclass(frozen=True)
class Recognised:
    """A state dict that is known to fill a network.

    Attributes:
      source: where it is.
      kind: which network.
      models: names of all models whose network of this kind is just this one.
      config: its configuration.
      rules: the table, by the path of the parameter.
      shapes: of the parameters.
      reading: the tensors that fill them, by their official names.
      left_out: tensors that no model has a place for, by names as found.
    """

    source: Source
    kind: Kind
    models: tuple[str, ...]
    config: Any
    rules: Mapping[str, list[Rule]]
    shapes: Shapes
    reading: Mapping[str, Reader]
    left_out: tuple[str, ...]


def recognise(source: Source, cards: Mapping[str, ModelCard], model: str | None = None) -> Recognised:
    """Which network of which model ``source`` holds.

    Both halves of a VAE are needed: a converted one is made for training as well.

    Args:
      source: the state dict.
      cards: the models that come into question, by name.
      model: the one of ``cards`` that it must be; None for any.

    Raises:
      UserInputError: no network of these kinds, none of these models (the nearest is named, with every difference), or
        a ``model`` that is not one of ``cards``.
    """
    if model is not None and model not in cards:
        raise unknown_name("model", model, cards)
    kind = _kind_of(source)
    by_config: dict[Any, list[str]] = {}
    for name, card in cards.items():
        if model in (None, name):
            by_config.setdefault(kind.config(card), []).append(name)
    config = min(by_config, key=lambda config: _distance(source, kind, config))
    rules = rules_by_target(kind.rules(config), parameter_shapes(kind, config))
    shapes = parameter_shapes(kind, config)
    canonical = kind.canonical(source.tensors, config)
    tensors, left_out = _without_strangers(source.tensors, canonical, rules)
    _check_single(source, kind, left_out)
    names = by_config[config]
    try:
        reading = match_tensors(rules, shapes, tensors, source=source.label, canonical=canonical)
    except UserInputError as error:
        what = f"the {kind.title} of {names[0]}"
        if model is None:
            rule = f"is the {kind.title} of no known model; the nearest is {names[0]}, but it {error.rule}"
            raise UserInputError(
                error.value, rule, "describe the model in a model.json and pass that as --model"
            ) from None
        raise UserInputError(error.value, f"is not {what}: it {error.rule}", "leave out --model to find it") from None
    return Recognised(source, kind, tuple(names), config, rules, shapes, reading, left_out)


def _kind_of(source: Source) -> Kind:
    counts = {kind: sum(bool(kind.tells.match(name)) for name in source.tensors) for kind in KINDS}
    kind = max(KINDS, key=lambda kind: counts[kind])
    if not counts[kind]:
        names = ", ".join(f"{name[:60]!a}" for name in list(source.tensors)[:5])
        kinds = "an Infinity transformer, its VAE or a T5 encoder"
        raise UserInputError(
            f"checkpoint {source.label} with {names}", f"must be {kinds}", "pass the file of one of these networks"
        )
    return kind


@functools.cache
def parameter_shapes(kind: Kind, config: Any) -> Shapes:
    """Shapes of a network's parameters by path."""
    state = nnx.state(nnx.eval_shape(lambda: kind.build(config)))
    return {".".join(map(str, path)): tuple(leaf.get_value().shape) for path, leaf in nnx.to_flat_state(state)}


def _distance(source: Source, kind: Kind, config: Any) -> int:
    """How many of a model's tensors are missing or of another shape, or not the model's."""
    shapes = parameter_shapes(kind, config)
    canonical = kind.canonical(source.tensors, config)
    found = {canonical(name): tensor for name, tensor in source.tensors.items()}
    wrong = 0
    for rule in kind.rules(config):
        wanted = shapes[rule.target] if rule.layer is None else shapes[rule.target][1:]
        tensor = found.pop(rule.official, None)
        # Reshaped and truncated tensors have several right shapes; others tell models apart well enough.
        loose = rule.layout == "reshape" or rule.truncate
        wrong += tensor is None or (not loose and tuple(tensor.shape) != rule.expected_shape(wanted))
    return wrong + len(found.keys() - {None})


def _without_strangers(
    tensors: Mapping[str, LazyTensor], canonical: Callable[[str], str | None], rules: Mapping[str, list[Rule]]
) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """What belongs to the network, and the names of what is another module's, such as a discriminator's.

    A name inside one of the network's own modules stays: if the table does not know it, the network is another one.
    """
    modules = {rule.official.split(".")[0] for group in rules.values() for rule in group}
    strangers = {
        name for name in tensors if (ours := canonical(name)) is not None and ours.split(".")[0] not in modules
    }
    return {name: tensor for name, tensor in tensors.items() if name not in strangers}, tuple(sorted(strangers))


def _check_single(source: Source, kind: Kind, left_out: Sequence[str]) -> None:
    """Refuses a file in which another network lies among the tensors that ``kind`` has no place for."""
    for other in KINDS:
        found = [name for name in left_out if other is not kind and other.tells.match(name)]
        if len(found) > 2:
            raise UserInputError(
                f"checkpoint {source.label}",
                f"holds a {kind.title} and a {other.title} ({found[0][:60]!a} and {len(found) - 1} more)",
                "save each into a file of its own",
            )


def read_cards(model: str | None, presets: Mapping[str, ModelCard]) -> tuple[Mapping[str, ModelCard], str | None]:
    """The models that ``--model`` leaves, and the name of the one it asks for: a preset, or a ``model.json``.

    Raises:
      UserInputError: neither; or a file that does not describe a model.
    """
    if model is None or model in presets:
        return presets, model
    path = Path(model)
    if path.suffix != ".json":
        raise unknown_name("model", model, presets)
    card = ModelCard.read(path, presets)
    return {card.name: card}, card.name
