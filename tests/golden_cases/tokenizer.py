"""The image tokenizer: encoder, multi-scale quantiser, decoder, and the self-correction inputs made from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toprovar_jax.image_tokenizer import encode_scales
from toprovar_jax.schedule import ScaleSchedule
from toprovar_jax.training.self_correction import self_correct

from .findings import CONVOLUTION_BOUND, EXACT, RESIZED_BOUND, Reference, channels_first
from .inputs import load_tokenizer, schedule_of


def run_tokenizer(config: Mapping[str, Any], folder: Path, file: str, reference: Reference) -> None:
    tokenizer = load_tokenizer(config["vae"], folder / "weights.safetensors")
    schedule = schedule_of(config, 2 if config["vae"].get("apply_spatial_patchify") else 1, reference)
    image = jnp.asarray(reference["image_u8"][None], jnp.float32) / 255.0
    features = jax.jit(lambda m, x: m.encode(x))(tokenizer, image)
    reference.compare("features", channels_first(features), CONVOLUTION_BOUND)
    names = [f"bits_{k}" for k in range(len(schedule))]
    quantized, note = encode_scales(features, schedule.latent_grids), "from the image"
    bits = [np.asarray(b)[:, None] for b in quantized.bits]
    recorded = all(name in reference for name in names) and "features" in reference
    if recorded and any(np.any(b != reference[name]) for b, name in zip(bits, names, strict=True)):
        # Signs of numbers within rounding of zero: the reference's own features decide.
        features = jnp.asarray(reference["features"].transpose(0, 2, 3, 1))
        quantized, note = encode_scales(features, schedule.latent_grids), "from the recorded features"
        bits = [np.asarray(b)[:, None] for b in quantized.bits]
    for name, ours in zip(names, bits, strict=True):
        reference.compare(name, ours, EXACT, note=note)
    reference.compare("quantized", channels_first(quantized.latents), RESIZED_BOUND)
    for k, area in enumerate(quantized.area_inputs):
        reference.compare(f"var_input_{k}", channels_first(area)[:, :, None], RESIZED_BOUND)
    decoded = jax.jit(lambda m, x: m.decode(x))(tokenizer, quantized.latents)
    reference.compare("reconstruction", channels_first(decoded) * 2.0 - 1.0, CONVOLUTION_BOUND)
    if "bsc" in config:
        _self_correction(config["bsc"], features, schedule, reference)


def _self_correction(
    options: Mapping[str, Any], features: jax.Array, schedule: ScaleSchedule, reference: Reference
) -> None:
    count = min(options["noise_apply_layers"], len(schedule))
    levels = np.arange(round(100 * options["noise_apply_strength"]) + 1) * 0.01
    probabilities = reference["bsc_flip_prob"]
    illegal = np.sum(np.min(np.abs(probabilities[:, None] - levels[None]), axis=1) > 1e-9)
    reference.state("bsc_flip_prob", illegal + abs(len(probabilities) - count), EXACT)
    flips = [jnp.asarray(reference[f"bsc_flip_{k}"][:, 0]) for k in range(count)]
    tokens = self_correct(features, schedule, flips if options.get("noise_apply_requant", 1) else [])
    targets = np.asarray(tokens.targets)
    for k in range(len(schedule)):
        reference.compare(f"bsc_target_{k}", targets[:, schedule.offsets[k] : schedule.offsets[k + 1]], EXACT)
    reference.compare("bsc_transformer_input", tokens.inputs, RESIZED_BOUND)
