"""The building-block case: every piece of the networks on its own, through the library's own functions."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert import image_tokenizer as tokenizer_table
from convert.rules import Rule, fill_module
from convert.safetensors_io import open_safetensors
from pallas_kernels import attention
from toprovar_jax.image_tokenizer import bits_to_codes, latents_to_bits
from toprovar_jax.image_tokenizer.blocks import Conv, ResBlock, upsample_nearest
from toprovar_jax.image_tokenizer.bsq import quantize_straight_through
from toprovar_jax.image_tokenizer.resize import pixel_shuffle, pixel_unshuffle, resize_area, resize_bilinear
from toprovar_jax.model import Infinity
from toprovar_jax.model.block import LayerText
from toprovar_jax.model.kv_cache import KVCache, empty_cache, extend
from toprovar_jax.model.rope import RotaryTable, full_rotary_table, rotary_table
from toprovar_jax.model.text_conditioning import TextCondition
from toprovar_jax.sampling import Sampling, bit_probability
from toprovar_jax.schedule import ASPECT_RATIOS, ScaleSchedule, parse_aspect_ratio

from .findings import BLOCK_BOUND, EXACT, RESIZED_BOUND, ROPE_BOUNDS, SCALED_QUERY_BOUND, Reference
from .inputs import load_transformer, padded

Arrays = dict[str, Any]


def run_blocks(config: Mapping[str, Any], folder: Path, file: str, reference: Reference) -> None:
    """Compare every array of the case; ``reference`` collects the findings."""
    transformer = load_transformer(config["model"], folder / "weights.safetensors")
    grids = tuple((height, width) for _, height, width in config["scale_schedule"])
    ratio = next(name for name, table in ASPECT_RATIOS.items() if table[: len(grids)] == grids)
    schedule = ScaleSchedule.of(ratio, len(grids), latent_per_token=transformer.config.latent_per_token)
    inputs = read_inputs(reference)
    condition = jax.jit(lambda m, f, n: m.condition(f, n))(transformer, inputs["features"], inputs["lengths"])

    ours = _rotary_tables(reference) | {"sos": condition.pooled, "gss": condition.modulation[:, None]}
    for part in (_text, _self_attention, _pieces, _chained_blocks):
        ours |= jax.jit(functools.partial(part, schedule=schedule))(transformer, condition, inputs)
    ours |= jax.jit(_convolutions)(load_parts(folder / "vae_parts.safetensors", reference), inputs)
    ours |= jax.jit(_resampling_and_quantiser)(inputs)
    cut_offs = Sampling(1.0, 1.0, config["top_k"], config["top_p"]).for_scales(1)
    ones = bit_probability(inputs["topp_logits"][None], cut_offs.top_k, cut_offs.top_p)[0]
    ours["topp_probs"] = jnp.stack([1.0 - ones, ones], axis=-1)

    visible = np.arange(inputs["features"].shape[1])[None] < reference["text_lens"][:, None]
    for name, array in ours.items():
        ragged = name in ("text_norm", "text_norm_small_out", "text_ca")
        reference.compare(name, np.asarray(array)[visible] if ragged else array, _bound(name))


def _bound(name: str) -> float:
    if mode := re.match(r"rope_dim\d+_mode(\d)", name):
        return ROPE_BOUNDS[int(mode[1])]
    if name == "lfq_bits":
        return EXACT
    if name.startswith("sa_q"):
        return SCALED_QUERY_BOUND
    return RESIZED_BOUND if name.startswith("resize") else BLOCK_BOUND


_INPUT = re.compile(r".*_in(_\d+|_\d+x\d+_to_\d+x\d+)?|topp_logits")


def read_inputs(reference: Reference) -> Arrays:
    """All inputs of the case: the arrays called so, and the texts, padded."""
    lengths = reference["text_lens"]
    text = {"features": reference["text_features"], "features_small": reference["text_norm_small_in"]}
    inputs = {name: padded(rows, lengths, int(lengths.max())) for name, rows in text.items()}
    inputs["lengths"] = jnp.asarray(lengths, jnp.int32)
    named = [name for name in reference.arrays if _INPUT.fullmatch(name) and name != "text_norm_small_in"]
    return inputs | {name: jnp.asarray(reference[name]) for name in named}


def _matching(names: Iterable[str], pattern: str) -> list[re.Match[str]]:
    """Names of the form ``pattern``; a case has at least one of every kind."""
    found = [match for match in (re.fullmatch(pattern, name) for name in names) if match]
    if not found:
        raise KeyError(f"no array is called {pattern}")
    return found


def _scales(inputs: Arrays, prefix: str) -> range:
    return range(len(_matching(inputs, rf"{prefix}_\d+")))


def _rotary_tables(reference: Reference) -> Arrays:
    ours = {}
    for match in _matching(reference.arrays, r"(rope_dim(\d+)_mode(\d)_ratio([\d.]+)_pn(.+))_cos"):
        name, dim, mode, ratio, pixels = match[1], int(match[2]), int(match[3]), match[4], match[5]
        table = full_rotary_table(ScaleSchedule.for_budget(parse_aspect_ratio(ratio), pixels), dim, mode)
        ours |= {f"{name}_cos": table.cos, f"{name}_sin": table.sin}
    return ours


def _text(transformer: Infinity, condition: TextCondition, inputs: Arrays, *, schedule: ScaleSchedule) -> Arrays:
    text = transformer.text
    ours = {"text_norm": text.norm(inputs["features"]), "text_norm_small_out": text.norm(inputs["features_small"])}
    ours["text_ca"] = text(inputs["features"], condition.lengths)[1]
    for k in _scales(inputs, "lvl_in"):
        ours[f"lvl_out_{k}"] = inputs[f"lvl_in_{k}"] + transformer.level_embedding[...][k][None, None]
    return ours


def _layer(transformer: Infinity, index: int) -> Any:
    return jax.tree.map(lambda x: x[index], transformer.layers)


def _self_attention(
    transformer: Infinity, condition: TextCondition, inputs: Arrays, *, schedule: ScaleSchedule
) -> Arrays:
    layer, config = _layer(transformer, 0).self_attention, transformer.config
    scales = _scales(inputs, "sa_in")
    cache = _cache(transformer, condition, schedule.offsets[len(scales)])
    ours = {}
    for k in scales:
        x, rope = inputs[f"sa_in_{k}"], rotary_table(schedule, k, config.head_dim, config.rope_mode)
        query, key, _ = layer.project(x, RotaryTable(np.ones_like(rope.cos), np.zeros_like(rope.sin)))
        ours |= {f"sa_q_scaled_{k}": _heads_first(query), f"sa_k_normed_{k}": _heads_first(key)}
        query, key, value = layer.project(x, rope)
        ours |= {f"sa_q_rot_{k}": _heads_first(query), f"sa_k_rot_{k}": _heads_first(key)}
        cache, keys, values = extend(cache, jnp.int32(0), schedule.offsets[k], key, value, write=True)
        ours[f"sa_out_{k}"] = layer.out(attention(query, keys, values, scale=1.0).out.reshape(x.shape))
    return ours


def _cache(transformer: Infinity, condition: TextCondition, length: int) -> KVCache:
    config = transformer.config
    rows = condition.pooled.shape[0]
    return empty_cache(config.num_layers, rows, length, config.num_heads, config.head_dim, jnp.float32)


def _heads_first(x: jax.Array) -> jax.Array:
    return x.transpose(0, 2, 1, 3)


def _pieces(transformer: Infinity, condition: TextCondition, inputs: Arrays, *, schedule: ScaleSchedule) -> Arrays:
    block, text = _layer(transformer, 0), LayerText(condition.keys[0], condition.values[0], condition.lengths)
    ours = {"ca_out": block.cross_attention(inputs["ca_in"], text), "ffn_out": block.feed_forward(inputs["ffn_in"])}
    for name in ("head", "head_small"):
        scores = transformer.head(inputs[f"{name}_in"], condition.head_modulation)
        ours[f"{name}_out"] = scores.reshape(*scores.shape[:2], -1)
    rope = rotary_table(schedule, 0, transformer.config.head_dim, transformer.config.rope_mode)

    def to_itself(query, key, value):
        return attention(query, key, value, scale=1.0).out, None

    ours["block0_small_out"] = block(inputs["block0_small_in"], text, condition.modulation, rope, to_itself)[0]
    return ours


def _chained_blocks(
    transformer: Infinity, condition: TextCondition, inputs: Arrays, *, schedule: ScaleSchedule
) -> Arrays:
    scales, config = _scales(inputs, "block_in"), transformer.config
    cache = _cache(transformer, condition, schedule.offsets[len(scales)])
    ours = {}
    for k in scales:
        rope = rotary_table(schedule, k, config.head_dim, config.rope_mode)
        x = inputs[f"block_in_{k}"]
        for index in range(config.num_layers):

            def through_cache(query, key, value, cache=cache, k=k, index=index):
                grown, keys, values = extend(cache, jnp.int32(index), schedule.offsets[k], key, value, write=True)
                return attention(query, keys, values, scale=1.0).out, grown

            text = LayerText(condition.keys[index], condition.values[index], condition.lengths)
            x, cache = _layer(transformer, index)(x, text, condition.modulation, rope, through_cache)
            ours[f"block{index}_out_{k}"] = x
    return ours


def load_parts(path: Path, reference: Reference) -> dict[str, ResBlock | Conv]:
    """The convolutional pieces by name, with their weights."""
    tensors, parts = open_safetensors(path), {}
    for part in {match[1] for match in _matching(reference.arrays, r"vae_(.+?)(?:_small)?_in")}:
        found = {name.removeprefix(f"{part}."): read for name, read in tensors.items() if name.startswith(f"{part}.")}
        if part.startswith("resblock"):
            width_out, width_in = found["conv1.conv.weight"]().shape[:2]
            create = functools.partial(_res_block, width_in, width_out)
        else:
            width, stride = found["conv.conv.weight"]().shape[0], 2 if part == "downsample" else 1
            create = functools.partial(_conv, width, stride)
        parts[part] = _filled(nnx.eval_shape(create), found)
    return parts


def _res_block(width_in: int, width_out: int) -> ResBlock:
    return ResBlock(width_in, width_out, precision="exact", rngs=nnx.Rngs(0))


def _conv(width: int, stride: int) -> Conv:
    return Conv(width, width, stride=stride, precision="exact", rngs=nnx.Rngs(0))


def _filled(module: nnx.Module, tensors: dict[str, Callable[[], np.ndarray]]) -> Any:
    """``module`` with the weights of one part: official names, in the wrapped spelling of the image tokenizer's."""
    table = []
    for name in tensors:
        *path, _wrapper, leaf = name.split(".")
        norm = "norm" in name
        ours = {"weight": "scale" if norm else "kernel", "bias": "bias"}[leaf]
        target = ["shortcut" if step == "nin_shortcut" else step for step in path if step != "conv"]
        layout = "conv" if leaf == "weight" and not norm else "as_is"
        table.append(Rule(name, ".".join([*target, ours]), layout))
    return fill_module(module, table, tensors, source="vae_parts", canonical=tokenizer_table.canonical_name)


def _convolutions(parts: dict[str, ResBlock | Conv], inputs: Arrays) -> Arrays:
    ours = {}
    for name, x in inputs.items():
        if match := re.fullmatch(r"(vae_(.+?)(_small)?)_in", name):
            x = jnp.moveaxis(x, 1, -1)
            x = upsample_nearest(x) if match[2] == "upsample" else x
            ours[f"{match[1]}_out"] = jnp.moveaxis(parts[match[2]](x), -1, 1)
    return ours


def _resampling_and_quantiser(inputs: Arrays) -> Arrays:
    ours = {}
    for match in _matching(inputs, r"resize_in_(\d+x\d+_to_(\d+)x(\d+))"):
        size = (int(match[2]), int(match[3]))
        for kind, resize in (("trilinear", resize_bilinear), ("area", resize_area)):
            x = resize(jnp.moveaxis(inputs[match[0]][:, :, 0], 1, -1), size)
            ours[f"resize_{kind}_{match[1]}"] = jnp.moveaxis(x, -1, 1)[:, :, None]
    for name, function in (("pixel_shuffle", pixel_shuffle), ("pixel_unshuffle", pixel_unshuffle)):
        ours[f"{name}_out"] = jnp.moveaxis(function(jnp.moveaxis(inputs[f"{name}_in"], 1, -1), 2), -1, 1)
    latents = jnp.moveaxis(inputs["lfq_in"], 1, -1)
    bits = latents_to_bits(latents)
    codes = {"lfq_quantized": quantize_straight_through(latents), "lfq_codes_from_bits": bits_to_codes(bits)}
    return ours | {"lfq_bits": bits} | {name: jnp.moveaxis(code, -1, 1) for name, code in codes.items()}
