"""What a model is: its networks' configurations, the sizes it makes and its default sampling."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toprovar_jax.config import ImageTokenizerConfig, InfinityConfig, Precision
from toprovar_jax.errors import UserInputError, unknown_name
from toprovar_jax.schedule import MAX_SCALES, ScaleSchedule
from toprovar_jax.settings import check_setting
from toprovar_jax.text_encoder.config import T5Config

FORMAT = 1
WORLDS = ("scenes", "scenes-single")


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """A model's description, in Python or as ``model.json``.

    Attributes:
      name: what it is called.
      transformer, image_tokenizer, text_encoder: configurations.
      pixel_budgets: name of each size it makes and the number of scales that takes.
      default_pixels: one of ``pixel_budgets``.
      guidance, tau, top_k, top_p: default sampling; the first two are one number, or one per scale in a model whose
        pixel budgets all have so many scales.
      world: ``"scenes"`` for a model that knows the embedded world only, ``"scenes-single"`` for one that knows single
        objects of it, None for one that knows everything.
      training: how it was made, for the record.

    Raises:
      UserInputError: parts that do not fit each other, or defaults that nobody could ask for.
    """

    name: str
    transformer: InfinityConfig
    image_tokenizer: ImageTokenizerConfig
    text_encoder: T5Config
    pixel_budgets: tuple[tuple[str, int], ...]
    default_pixels: str
    guidance: float | tuple[float, ...] = 3.0
    tau: float | tuple[float, ...] = 1.0
    top_k: int = 900
    top_p: float = 0.97
    world: str | None = None
    training: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        _check_name(self.name, self.world)
        _check_budgets(self.pixel_budgets, self.default_pixels)
        for name in ("guidance", "tau"):
            value = check_setting(name, getattr(self, name))
            counts = {count for _, count in self.pixel_budgets}
            if isinstance(value, tuple) and counts != {len(value)}:
                listed = " or ".join(map(str, sorted(counts)))
                rule = f"must have one per scale of every pixel budget ({listed})"
                raise UserInputError(f"default {name} list of {len(value)} numbers", rule, "or give one number")
        check_setting("top_k", self.top_k)
        check_setting("top_p", self.top_p)
        _same("latent_channels", self.transformer.latent_channels, self.image_tokenizer.latent_channels)
        _same("text width", self.transformer.text_width, self.text_encoder.width)

    def schedule(self, aspect_ratio: str, pixels: str | None) -> ScaleSchedule:
        """The scales of one size.

        Raises:
          UserInputError: an aspect ratio that is not a template, or a budget that this model does not make.
        """
        budgets = dict(self.pixel_budgets)
        pixels = self.default_pixels if pixels is None else pixels
        if pixels not in budgets:
            raise unknown_name(f"pixel budget of model {self.name}:", pixels, budgets)
        factor = self.transformer.latent_per_token
        stride = self.image_tokenizer.stride * factor
        return ScaleSchedule.of(aspect_ratio, budgets[pixels], latent_per_token=factor, token_stride=stride)

    def with_precision(self, precision: Precision) -> ModelCard:
        """The same model computed at another precision."""
        dtype = "float32" if precision == "exact" else "bfloat16"
        return dataclasses.replace(
            self,
            transformer=dataclasses.replace(self.transformer, precision=precision),
            image_tokenizer=dataclasses.replace(self.image_tokenizer, precision=precision),
            text_encoder=dataclasses.replace(self.text_encoder, compute_dtype=dtype),
        )

    def with_attention(self, *implementations: str) -> ModelCard:
        """The same model with the first of these attention implementations that can run; with none, by device."""
        chosen = implementations or None
        return dataclasses.replace(self, transformer=dataclasses.replace(self.transformer, attention=chosen))

    def with_tensor_parts(self, count: int) -> ModelCard:
        """The same model with its heads spread over so many devices."""
        return dataclasses.replace(self, transformer=dataclasses.replace(self.transformer, tensor_parts=count))

    def to_json(self) -> str:
        """``model.json``."""
        exact = self.with_precision("exact")
        fields = dataclasses.asdict(exact)
        fields |= {
            "pixel_budgets": dict(self.pixel_budgets),
            "training": dict(self.training),
            "text_encoder": exact.text_encoder.to_dict(),
        }
        # How it is computed is chosen at loading, not a property of the model.
        del fields["transformer"]["attention"]
        del fields["transformer"]["precision"], fields["image_tokenizer"]["precision"]
        del fields["text_encoder"]["compute_dtype"]
        return json.dumps({"format": FORMAT, **fields}, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path, presets: Mapping[str, ModelCard]) -> ModelCard:
        """From a ``model.json``: a full description, or ``{"preset": "infinity-2b"}``.

        Raises:
          UserInputError: not JSON, another format, or fields that do not fit.
        """
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or "not JSON"
            raise UserInputError(f"file {path}", f"cannot be read ({reason})", "restore it") from None
        if not isinstance(fields, dict):
            raise UserInputError(f"file {path}", "must hold one JSON object", "restore it")
        fields.pop("conversion", None)  # what the weights were converted from: the model is the same without it
        if "preset" in fields:
            others = sorted(fields.keys() - {"preset", "format"})
            if others:
                raise UserInputError(
                    f"file {path} with preset and {', '.join(others)}",
                    "must name a preset or describe a model",
                    "remove one of them",
                )
            if not isinstance(fields["preset"], str) or fields["preset"] not in presets:
                raise unknown_name(f"preset in {path}:", fields["preset"], presets)
            return presets[fields["preset"]]
        if fields.get("format") != FORMAT:
            raise UserInputError(
                f"file {path}, format {fields.get('format')!r}", f"must be {FORMAT}", "upgrade toprovar_jax"
            )
        try:
            return cls._from_fields({key: value for key, value in fields.items() if key != "format"})
        except UserInputError as error:
            raise UserInputError(f"file {path}: {error.value}", error.rule, error.remedy) from None
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise UserInputError(f"file {path}", f"does not describe a model ({error})", "restore it") from None

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> ModelCard:
        tokenizer = dict(fields.pop("image_tokenizer"))
        tokenizer["width_multipliers"] = tuple(tokenizer["width_multipliers"])
        lists = [name for name in ("guidance", "tau") if isinstance(fields.get(name), list)]
        fields |= {name: check_setting(name, fields[name]) for name in lists}
        return cls(
            transformer=InfinityConfig(**fields.pop("transformer")),
            image_tokenizer=ImageTokenizerConfig(**tokenizer),
            text_encoder=T5Config.from_dict(fields.pop("text_encoder")),
            pixel_budgets=tuple(fields.pop("pixel_budgets").items()),
            training=tuple(fields.pop("training", {}).items()),
            **fields,
        )


def _check_name(name: object, world: object) -> None:
    if not isinstance(name, str) or not name.strip():
        raise UserInputError(f"model name {name!r}", "must be text", "name the model")
    if world is not None and world not in WORLDS:
        raise unknown_name("world", world, WORLDS)


def _check_budgets(budgets: tuple[tuple[str, int], ...], default: str) -> None:
    for pixels, count in budgets:
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_SCALES:
            raise UserInputError(
                f"pixel budget {pixels} of {count!r} scales", f"must be 1 to {MAX_SCALES}", "correct the number"
            )
    if default not in dict(budgets):
        raise unknown_name("default_pixels", default, dict(budgets))


def _same(what: str, transformer: int, other: int) -> None:
    if transformer != other:
        raise UserInputError(
            f"{what} {transformer} of the transformer and {other} of the network beside it",
            "must be the same",
            "use networks that belong together",
        )
