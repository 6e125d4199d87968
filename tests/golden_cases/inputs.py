"""Networks, schedules and texts of a golden case, from the files of its folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert import image_tokenizer as tokenizer_table
from convert import infinity as transformer_table
from convert import t5 as t5_table
from convert.rules import fill_module
from convert.sources import open_source
from toprovar_jax.acceleration import Dense, GenerationPlan
from toprovar_jax.config import ImageTokenizerConfig, InfinityConfig
from toprovar_jax.generation import Text, make_plan
from toprovar_jax.image_tokenizer import ImageTokenizer
from toprovar_jax.model import Infinity
from toprovar_jax.sampling import Sampling
from toprovar_jax.schedule import ASPECT_RATIOS, PIXEL_BUDGETS, ScaleSchedule, parse_aspect_ratio
from toprovar_jax.text_encoder import T5Config, T5Encoder

from .findings import EXACT, Reference


def weights_of(path: Path) -> Mapping[str, Callable[[], np.ndarray]]:
    """The tensors of ``path``, or of what stands in its place: a ``.pth`` file or a folder of shards of that name."""
    places = (path.with_suffix(".pth"), path.with_suffix(""))
    return open_source([next((place for place in places if place.exists() and not path.exists()), path)]).tensors


def load_transformer(config: Mapping[str, Any], path: Path) -> Infinity:
    """The transformer of a case, from its ``model`` options and a weights file."""
    ours = InfinityConfig.from_official(config)
    tensors = weights_of(path)
    return fill_module(
        nnx.eval_shape(lambda: Infinity(ours, rngs=nnx.Rngs(0))),
        transformer_table.rules(ours),
        tensors,
        source=path.name,
        canonical=transformer_table.canonical_names(tensors, ours),
    )


def load_tokenizer(config: Mapping[str, Any], path: Path) -> ImageTokenizer:
    """The image tokenizer of a case; without its encoder where the file has none."""
    ours = ImageTokenizerConfig.from_official(config)
    tensors = weights_of(path)
    with_encoder = any(name.startswith("encoder.") for name in tensors)
    return fill_module(
        nnx.eval_shape(lambda: ImageTokenizer(ours, rngs=nnx.Rngs(0), with_encoder=with_encoder)),
        tokenizer_table.rules(ours, with_encoder=with_encoder),
        tensors,
        source=path.name,
        canonical=tokenizer_table.canonical_name,
    )


def load_t5(config: Mapping[str, Any], path: Path) -> T5Encoder:
    """The text encoder of a case."""
    ours = T5Config.from_dict(config)
    return fill_module(
        nnx.eval_shape(lambda: T5Encoder(ours, rngs=nnx.Rngs(0))),
        t5_table.rules(ours),
        weights_of(path),
        source=path.name,
        canonical=t5_table.canonical_name,
    )


def schedule_of(run: Mapping[str, Any], latent_per_token: int, reference: Reference | None = None) -> ScaleSchedule:
    """The run's grids; a difference from the library's own table for that ratio and size is a finding."""
    grids = tuple((height, width) for _, height, width in run["scale_schedule"])
    name = parse_aspect_ratio(str(run["ratio"]))
    schedule = ScaleSchedule(name, grids, ASPECT_RATIOS[name][-1], latent_per_token)
    if reference is not None:
        pixels = run.get("pn")
        table = ASPECT_RATIOS[name][: PIXEL_BUDGETS.get(pixels, len(grids))]
        different = len(set(enumerate(table)) ^ set(enumerate(grids)))
        latents = run.get("vae_scale_schedule")
        if latents is not None:
            different += len(set(enumerate((h, w) for _, h, w in latents)) ^ set(enumerate(schedule.latent_grids)))
        reference.state("scale_schedule", different, EXACT)
    return schedule


def padded(rows: np.ndarray, lengths: np.ndarray, longest: int) -> jax.Array:
    """Ragged rows ``[sum of lengths, E]`` as ``[B, longest, E]``. Padding is not zero: it must not matter."""
    out = np.full((len(lengths), longest, rows.shape[1]), 7.0, np.float32)
    for i, part in enumerate(np.split(rows, np.cumsum(lengths)[:-1])):
        out[i, : len(part)] = part
    return jnp.asarray(out)


def read_text(reference: Reference) -> Text:
    """The recorded text features, with those of the negative prompt if there is one."""
    lengths = reference["text_lens"].astype(np.int32)
    negative = reference["neg_text_lens"].astype(np.int32) if "neg_text_lens" in reference else None
    longest = int(max(lengths.max(), 0 if negative is None else negative.max()))
    text = Text(padded(reference["text_features"], lengths, longest), jnp.asarray(lengths))
    if negative is None:
        return text
    features = padded(reference["neg_text_features"], negative, longest)
    return text._replace(negative_features=features, negative_lengths=jnp.asarray(negative))


def sampling_of(run: Mapping[str, Any]) -> Sampling:
    """Guidance, temperature and cut-offs of a run; the original's ``top_p`` 0 means none."""
    return Sampling(run["cfg_list"], run["tau_list"], run.get("top_k", 0), run.get("top_p", 0) or 1.0)


def plan_of(run: Mapping[str, Any], schedule: ScaleSchedule, num_layers: int) -> GenerationPlan:
    """The dense plan of a run. Position 1 ("on probabilities") is accepted by the original and does nothing."""
    where = [position for position in run.get("cfg_insertion_layer", [0]) if position != 1]
    return make_plan(schedule, sampling_of(run), Dense(), num_layers=num_layers, guidance_at=where)


def runs_of(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The generations that a configuration describes."""
    return [*config.get("runs", []), *([config["run"]] if "run" in config else [])]
