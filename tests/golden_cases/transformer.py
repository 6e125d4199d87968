"""The text encoder, the transformer with its recorded random numbers, and everything end to end."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toprovar_jax.acceleration import GenerationPlan
from toprovar_jax.generation import Text, advance, condition_on, initial_state
from toprovar_jax.images import to_uint8
from toprovar_jax.model import Infinity
from toprovar_jax.schedule import ScaleSchedule
from toprovar_jax.text_encoder import T5Encoder

from .findings import (
    BLENDED_HIDDEN_BOUND,
    EXACT,
    GUIDED_BOUND,
    IMAGE_BOUND,
    PIXEL_SHARE_BOUND,
    RAW_BOUND,
    RESIZED_BOUND,
    TEXT_BOUND,
    Reference,
    channels_first,
)
from .inputs import load_t5, load_tokenizer, load_transformer, plan_of, read_text, runs_of, sampling_of, schedule_of

step = jax.jit(advance, static_argnames="step", donate_argnames="state")
"""One compiled scale; the numbers (guidance, uniforms, text) are arguments."""


def _matching_run(config: Mapping[str, Any], file: str, arrays: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
    """The run that ``file`` belongs to: the one that names it, else one whose scales have its number of tokens."""
    runs = runs_of(config)
    for run in runs:
        if run.get("file") == file:
            return run
    for run in runs:
        tokens = [height * width for _, height, width in run["scale_schedule"]]
        if [arrays[f"uniform_{k}"].shape[1] for k in range(len(tokens)) if f"uniform_{k}" in arrays] == tokens:
            return run
    raise KeyError(f"no entry of runs describes {file}")


def run_transformer(config: Mapping[str, Any], folder: Path, file: str, reference: Reference) -> None:
    run = _matching_run(config, file, reference.arrays)
    transformer = load_transformer(config["model"], folder / "weights.safetensors")
    schedule = schedule_of(run, transformer.config.latent_per_token, reference)
    text, plan = read_text(reference), plan_of(run, schedule, transformer.config.num_layers)
    reference.compare(
        "summed_codes", channels_first(run_scales(transformer, text, run, plan, reference)), RESIZED_BOUND
    )
    if all(position >= 0 for position in plan.guidance_at):
        _parallel(transformer, text, schedule, reference)


def run_scales(
    transformer: Infinity, text: Text, run: Mapping[str, Any], plan: GenerationPlan, reference: Reference
) -> jax.Array:
    """Generate on the recorded uniforms, scale by scale, and compare what every scale left behind."""
    sampling = sampling_of(run).for_scales(len(plan.schedule))
    condition = jax.jit(functools.partial(condition_on, guided=plan.guided))(transformer, text)
    whole = "text_features" in reference  # the end-to-end case records fewer arrays
    if whole:
        reference.compare("cond", condition.pooled, TEXT_BOUND)
    state = initial_state(transformer, plan.step(0), text.lengths.shape[0])
    blended = any(position < 0 for position in plan.guidance_at)
    last = plan.num_run - 1
    for k in range(plan.num_run):
        if k and (whole or f"next_in_{k}" in reference):
            reference.compare(f"next_in_{k}", state.inputs, RESIZED_BOUND)
        uniforms = jnp.asarray(reference[f"uniform_{k}"])
        state, trace = step(transformer, condition, state, sampling, uniforms, step=plan.step(k))
        if (whole and k <= 3) or f"hidden_{k}" in reference:
            bound = BLENDED_HIDDEN_BOUND if blended else RAW_BOUND
            reference.compare(f"hidden_{k}", _rows(trace.hidden, reference, f"hidden_{k}"), bound)
        raw = np.asarray(trace.raw_scores).reshape(*trace.raw_scores.shape[:2], -1)
        for name in [f"logits_raw_{k}"] * whole + ["logits_raw_last"] * (k == last and not whole):
            reference.compare(name, _rows(raw, reference, name), RAW_BOUND)
        if whole or f"logits_guided_{k}" in reference:
            guided = np.asarray(trace.guided_scores)
            reference.compare(f"logits_guided_{k}", guided.reshape(*guided.shape[:2], -1), GUIDED_BOUND)
        reference.compare(f"bits_{k}", trace.bits, EXACT)
    return state.latents


def _rows(ours: Any, reference: Reference, name: str) -> np.ndarray:
    """As many rows as were recorded: the original drops the unconditional ones at scales without guidance."""
    rows = reference.arrays[name].shape[0] if name in reference else len(ours)
    return np.asarray(ours)[:rows]


def _parallel(transformer: Infinity, text: Text, schedule: ScaleSchedule, reference: Reference) -> None:
    """The training form on the recorded inputs gives the conditional half of the recorded scores."""
    names = [f"next_in_{k}" for k in range(1, len(schedule))]
    if not all(name in reference for name in names):
        return  # already reported as missing
    bits = transformer.config.token_bits
    inputs = [jnp.zeros((text.lengths.shape[0], 0, bits), jnp.float32), *(jnp.asarray(reference[n]) for n in names)]
    form = jax.jit(lambda m, x, f, n: m.parallel_logits(x, f, n, schedule))
    scores = np.asarray(form(transformer, jnp.concatenate(inputs, axis=1), text.features, text.lengths))
    scores = scores.reshape(*scores.shape[:2], -1)
    for k in range(len(schedule)):
        name = f"logits_raw_{k}"
        if name in reference:
            conditional = Reference({name: reference[name][: len(scores)]})
            conditional.compare(name, scores[:, schedule.offsets[k] : schedule.offsets[k + 1]], RAW_BOUND)
            reference.measured.append(dataclasses.replace(conditional.measured[0], name=f"{name} (parallel form)"))


def run_t5(config: Mapping[str, Any], folder: Path, file: str, reference: Reference) -> None:
    encoder = load_t5(config["t5"], folder / "weights.safetensors")
    _text_features(encoder, reference, "last_hidden_state")


def _text_features(encoder: T5Encoder, reference: Reference, name: str) -> Text:
    mask = reference["attention_mask"]
    lengths = jnp.asarray(mask.sum(axis=1), jnp.int32)
    features = jax.jit(lambda m, *x: m(*x))(encoder, jnp.asarray(reference["input_ids"], jnp.int32), lengths)
    visible = mask.astype(bool)
    if name in reference:
        rows = Reference({name: reference[name][visible]})
        rows.compare(name, np.asarray(features)[visible], TEXT_BOUND, note="visible rows")
        reference.measured += rows.measured
    else:
        reference.compare(name, features, TEXT_BOUND)
    return Text(features, lengths)


def run_end_to_end(config: Mapping[str, Any], folder: Path, file: str, reference: Reference) -> None:
    run = _matching_run(config, file, reference.arrays)
    encoder = load_t5(config["t5"], folder / "t5.safetensors")
    transformer = load_transformer(config["model"], folder / "transformer.safetensors")
    tokenizer = load_tokenizer(config["vae"], folder / "vae.safetensors")
    schedule = schedule_of(run, transformer.config.latent_per_token, reference)
    text = _text_features(encoder, reference, "t5_hidden")
    latents = run_scales(transformer, text, run, plan_of(run, schedule, transformer.config.num_layers), reference)
    reference.compare("summed_codes", channels_first(latents), RESIZED_BOUND)
    image = np.asarray(jax.jit(lambda m, x: m.decode(x))(tokenizer, latents))
    reference.compare("image_pm1", channels_first(image) * 2.0 - 1.0, IMAGE_BOUND)
    _compare_pixels(to_uint8(image)[..., ::-1], reference)


def _compare_pixels(ours: np.ndarray, reference: Reference) -> None:
    """Truncation turns a rounding error into a step of one now and then: at most one, and rarely."""
    reference.compare("image_u8_bgr", ours, 1.0)
    if "image_u8_bgr" in reference and reference["image_u8_bgr"].shape == ours.shape:
        share = np.mean(ours != reference["image_u8_bgr"])
        reference.state("image_u8_bgr (share that differs)", share, PIXEL_SHARE_BOUND)
