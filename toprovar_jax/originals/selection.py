"""Which of the original files in a folder make up one model; they are recognised by what their headers say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from convert.recognise import IMAGE_TOKENIZER, TEXT_ENCODER, TRANSFORMER, Kind, Recognised, recognise
from convert.sources import SUFFIXES, open_source, sources_in
from toprovar_jax.errors import UserInputError, unknown_name
from toprovar_jax.model_card import ModelCard
from toprovar_jax.originals.released import (
    RELEASED,
    REPOSITORY,
    TEXT_ENCODER_REPOSITORY,
    Choice,
    preset_spelled,
    released_model,
    same_name,
    variants,
)
from toprovar_jax.text_encoder import TextTokenizer

TOKENIZER = "tokenizer.json"
_CHOOSE_VARIANT = "choose one with --variant or variant="
_CHOOSE_VAE = "choose one with --vae or vae="
_CHOOSE_TEXT_ENCODER = "choose one with --text-encoder or text_encoder="


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What may be one network.

    Attributes:
      name: of its file, or of the folder of its shards.
      paths: as :func:`convert.sources.open_source` takes them.
    """

    name: str
    paths: tuple[Path, ...]

    def is_called(self, name: str) -> bool:
        """Whether a user may mean it by ``name``."""
        return name in (self.name, Path(self.name).stem if self.paths[0].is_file() else self.name)


@dataclasses.dataclass(frozen=True)
class Selected:
    """The files of one model.

    Attributes:
      model: its preset.
      sources: as :func:`convert.conversion.make_plan` takes them.
      files: everything that will be read.
    """

    model: str
    sources: tuple[Path, ...]
    files: tuple[Path, ...]


@dataclasses.dataclass(frozen=True)
class _Folder:
    """A folder's candidates that are networks, and why the others are not."""

    path: Path
    networks: Mapping[Candidate, Recognised]
    failures: Mapping[Candidate, UserInputError]

    def of(self, kind: Kind) -> dict[Candidate, Recognised]:
        return {candidate: network for candidate, network in self.networks.items() if network.kind is kind}


def candidates(folder: Path) -> list[Candidate]:
    """Everything in a folder and one level below that may be a network.

    Raises:
      UserInputError: the folder cannot be read.
    """
    found = [_candidate(group, folder.name, "") for group in sources_in(folder)]
    for below in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        groups = sources_in(below)
        formats = [".safetensors" in group[0].name for group in groups]
        if len(set(formats)) < len(formats):  # else one network, perhaps in two formats, of which one is taken
            found += [_candidate(group, below.name, f"{below.name}/") for group in groups]
        elif groups:
            found.append(Candidate(below.name, (below,)))
    return found


def _candidate(group: tuple[Path, ...], folder: str, before: str) -> Candidate:
    alone = len(group) == 1 and group[0].suffix in SUFFIXES
    return Candidate(before + group[0].name if alone else folder, group)


def select(
    folder: Path, choice: Choice, cards: Mapping[str, ModelCard], find_text_encoder: Callable[[], Path | None]
) -> Selected:
    """The files of one model.

    Args:
      folder: the original files, those of other models perhaps among them.
      choice: what to take where there are several; a text encoder must be a path.
      cards: the models that come into question.
      find_text_encoder: where else one may be.

    Raises:
      UserInputError: nothing fits, several do, or files are damaged or incomplete.
    """
    here = _opened(folder, cards)
    transformer, model = _transformer(here, choice.variant, cards)
    chosen = here.networks[transformer]
    vae = _vae(here, choice.vae, transformer, model, cards)
    text_encoder = _text_encoder(here, choice.text_encoder, model, cards, find_text_encoder)
    networks = (chosen, vae[1], text_encoder[1])
    files = [file for network in networks for file in network.source.files]
    sources = (*transformer.paths, *vae[0].paths, *text_encoder[0].paths)
    return Selected(model, sources, (*files, _tokenizer(text_encoder[1])))


def _opened(folder: Path, cards: Mapping[str, ModelCard]) -> _Folder:
    networks: dict[Candidate, Recognised] = {}
    failures: dict[Candidate, UserInputError] = {}
    seen = set()
    for candidate in candidates(folder):
        try:
            network = recognise(open_source(candidate.paths), cards)
        except UserInputError as error:
            failures[candidate] = error
            continue
        told_apart_by = (Path(candidate.name).stem, network.kind.name)
        if told_apart_by not in seen:  # else the same network in another format
            networks[candidate] = network
        seen.add(told_apart_by)
    return _Folder(folder, networks, failures)


def _transformer(here: _Folder, variant: str | None, cards: Mapping[str, ModelCard]) -> tuple[Candidate, str]:
    """The transformer, and the model that it is: the 8B at two sizes differ in nothing but their published names."""
    models: dict[Candidate, tuple[str, ...]] = {}
    for candidate, network in here.of(TRANSFORMER).items():
        published = released_model(candidate.name)
        models[candidate] = (published,) if published in network.models else network.models
    listed = ", ".join(f"{fits[0]} ({candidate.name})" for candidate, fits in models.items())
    if not models:
        _raise_failure(here, lambda name: "vae" not in name.lower() and "t5" not in name.lower())
        raise UserInputError(f"folder {here.path}", "holds no transformer", f"put one of these there: {variants()}")
    if variant is None:
        if len(models) > 1:
            raise UserInputError(f"folder {here.path}", f"holds several transformers: {listed}", _CHOOSE_VARIANT)
        return next((candidate, fits[0]) for candidate, fits in models.items())
    for candidate, fits in models.items():
        if candidate.is_called(variant):
            return candidate, fits[0]
    variant = preset_spelled(variant, cards)
    _raise_failure(here, lambda name: same_name(name, variant) or released_model(name) == variant)
    fitting = [candidate for candidate, fits in models.items() if variant in fits]
    named = [candidate for candidate in fitting if released_model(candidate.name) == variant]
    if len(named or fitting) == 1:
        return (named or fitting)[0], variant
    if fitting:
        names = ", ".join(candidate.name for candidate in fitting)
        remedy = "choose one by the name of its file or folder with --variant or variant="
        raise UserInputError(f"variant {variant} of folder {here.path}", f"may be any of {names}", remedy)
    if variant in cards:
        there = RELEASED[variant].transformer if variant in RELEASED else "its file"
        rule, remedy = f"is not among its transformers: {listed}", f"put {there} there, or choose another"
        raise UserInputError(f"variant {variant} of folder {here.path}", rule, remedy)
    raise unknown_name("variant", variant, dict.fromkeys([*cards, *(candidate.name for candidate in models)]))


def _vae(
    here: _Folder, named: str | None, transformer: Candidate, model: str, cards: Mapping[str, ModelCard]
) -> tuple[Candidate, Recognised]:
    """The VAE that was asked for, or was published with the model, or is the only one that fits."""
    fitting = {candidate: network for candidate, network in here.of(IMAGE_TOKENIZER).items() if model in network.models}
    official = RELEASED[model].vae if model in RELEASED else None
    published = [candidate for candidate in fitting if official is not None and same_name(candidate.name, official)]
    remedy = "name one that does with --vae or vae="
    if published or fitting:
        names = ", ".join(candidate.name for candidate in published or fitting)
        remedy = f"use {names}, which is in folder {here.path}"
    elif official is not None:
        remedy = f"use {official} (of {REPOSITORY})"
    if named is not None:
        candidate = _named(here, named, "VAE", _CHOOSE_VAE)
        return candidate, _read(candidate, IMAGE_TOKENIZER, model, cards, f"{transformer.name} ({model})", remedy)
    if published:
        return published[0], fitting[published[0]]
    if official is not None:
        _raise_failure(here, lambda name: same_name(name, official))
    if len(fitting) == 1:
        return next(iter(fitting.items()))
    if fitting:
        names = ", ".join(candidate.name for candidate in fitting)
        raise UserInputError(f"folder {here.path}", f"holds several VAEs that fit {model}: {names}", _CHOOSE_VAE)
    others = ", ".join(candidate.name for candidate in here.of(IMAGE_TOKENIZER))
    rule = f"holds no VAE that fits {transformer.name} ({model})" + f", only {others}" * bool(others)
    raise UserInputError(f"folder {here.path}", rule, f"{remedy}; beside the transformer, or with --vae or vae=")


def _text_encoder(
    here: _Folder,
    named: str | None,
    model: str,
    cards: Mapping[str, ModelCard],
    find: Callable[[], Path | None],
) -> tuple[Candidate, Recognised]:
    remedy = f"use {TEXT_ENCODER_REPOSITORY}"
    if named is not None:
        candidate = _named(here, named, "text encoder", _CHOOSE_TEXT_ENCODER)
        return candidate, _read(candidate, TEXT_ENCODER, model, cards, model, remedy)
    fitting = {candidate: network for candidate, network in here.of(TEXT_ENCODER).items() if model in network.models}
    if len(fitting) == 1:
        return next(iter(fitting.items()))
    if fitting:
        names = ", ".join(candidate.name for candidate in fitting)
        raise UserInputError(f"folder {here.path}", f"holds several text encoders: {names}", _CHOOSE_TEXT_ENCODER)
    _raise_failure(here, lambda name: "t5" in name.lower())
    elsewhere = find()
    if elsewhere is None:
        raise UserInputError(
            f"folder {here.path}",
            f"holds no text encoder for {model}",
            f"put a folder flan-t5-xl there with {TOKENIZER}, model.safetensors.index.json and the shards it names (of "
            f"{TEXT_ENCODER_REPOSITORY}), or name such a folder with --text-encoder or text_encoder=",
        )
    candidate = Candidate(TEXT_ENCODER_REPOSITORY, (elsewhere,))
    return candidate, _read(candidate, TEXT_ENCODER, model, cards, model, remedy)


def _named(here: _Folder, name: str, what: str, remedy: str) -> Candidate:
    """The candidate that is called so, or what lies at that path."""
    there = [candidate for candidate in (*here.networks, *here.failures) if candidate.is_called(name)]
    if there:
        return there[0]
    path = Path(name).expanduser()
    if not path.exists():
        raise UserInputError(f"{what} {name}", f"is not in folder {here.path}, and no path either", remedy)
    return Candidate(path.name, (path,))


def _read(
    candidate: Candidate, kind: Kind, model: str, cards: Mapping[str, ModelCard], partner: str, remedy: str
) -> Recognised:
    """The network of a candidate, which must be of this kind and of this model."""
    source = open_source(candidate.paths)
    what, rule = f"{kind.title} {candidate.name}", f"does not fit {partner}"
    try:
        network = recognise(source, {model: cards[model]}, model)
    except UserInputError as error:
        raise UserInputError(what, f"{rule}: it {error.rule}", remedy) from None
    if network.kind is not kind:
        raise UserInputError(what, f"is a {network.kind.title}", remedy)
    return network


def _tokenizer(text_encoder: Recognised) -> Path:
    folder = text_encoder.source.files[0].parent
    if not (folder / TOKENIZER).is_file():
        instead = " (spiece.model is no substitute)" * (folder / "spiece.model").is_file()
        remedy = f"fetch {TOKENIZER} of {TEXT_ENCODER_REPOSITORY} into it"
        raise UserInputError(f"text encoder folder {folder}", f"lacks {TOKENIZER}{instead}", remedy)
    TextTokenizer.from_file(folder / TOKENIZER)  # a bad one is told of before minutes of conversion, not after
    return folder / TOKENIZER


def _raise_failure(here: _Folder, concerns: Callable[[str], bool]) -> None:
    """Say why a file is of no use where it is the one that is needed."""
    for candidate, error in here.failures.items():
        if concerns(candidate.name):
            raise error
