"""Rule table of the transformer (MODEL_SPEC 10.1)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from convert.rules import Rule
from toprovar_jax.config import InfinityConfig
from toprovar_jax.model.transformer import LEVELS

_STALE = re.compile(
    r"(lvl_1L|attn_bias_for_masking|Infinity_visible_kvlen|Infinity_invisible_qlen)$|(^|\.)zero_k_bias$"
)
"""Buffers that carry no information: they are derived from the configuration, or zero."""


def rules(config: InfinityConfig) -> list[Rule]:
    """Official name to parameter path."""
    return [*_outside_blocks(config), *_blocks(config)]


def canonical_names(names: Iterable[str], config: InfinityConfig) -> Callable[[str], str | None]:
    """A function from a name as found to the table's spelling, None for a stale buffer.

    Files group their blocks in ``block_chunks.{j}.module.{i}`` (any number of chunks) or as ``blocks.{l}``; the chunk
    size is read off the names, so the preset's grouping need not be the file's.
    """
    chunked = [match for match in map(_CHUNKED.match, names) if match]
    # The model's depth over the file's chunks as well: names that are missing must not make chunks look smaller.
    size = max((int(match[2]) + 1 for match in chunked), default=1)
    size = max(size, config.num_layers // max((int(match[1]) + 1 for match in chunked), default=config.num_layers))

    def canonical(name: str) -> str | None:
        if _STALE.search(name):
            return None
        if match := _CHUNKED.match(name):
            return _block(config, int(match[1]) * size + int(match[2])) + match[3]
        if match := re.match(r"blocks\.(\d+)\.(.*)$", name):
            return _block(config, int(match[1])) + match[2]
        return name

    return canonical


_CHUNKED = re.compile(r"block_chunks\.(\d+)\.module\.(\d+)\.(.*)$")


def _block(config: InfinityConfig, layer: int) -> str:
    if config.block_chunks == 1:
        return f"blocks.{layer}."
    size = config.num_layers // config.block_chunks
    return f"block_chunks.{layer // size}.module.{layer % size}."


def _linear(official: str, target: str, layer: int | None = None, *, bias: bool = True) -> Iterator[Rule]:
    yield Rule(f"{official}.weight", f"{target}.kernel", "linear", layer=layer)
    if bias:
        yield Rule(f"{official}.bias", f"{target}.bias", layer=layer)


def _outside_blocks(config: InfinityConfig) -> Iterator[Rule]:
    width, heads = config.width, config.pool_heads
    yield Rule("cfg_uncond", "text.unconditional", truncate=True)
    yield Rule("pos_start", "start", "reshape", (1, 1, width))
    yield Rule("text_norm.weight", "text.norm.scale")
    yield Rule("text_proj_for_sos.ca.mat_q", "text.pool.query", "reshape", (1, heads, width // heads))
    yield from _linear("text_proj_for_sos.ca.mat_kv", "text.pool.key_value", bias=False)
    yield Rule("text_proj_for_sos.ca.v_bias", "text.pool.value_bias")
    yield from _linear("text_proj_for_sos.ca.proj", "text.pool.out")
    yield from _linear("text_proj_for_ca.0", "text.project_in")
    yield from _linear("text_proj_for_ca.2", "text.project_out")
    yield Rule("lvl_embed.weight", "level_embedding", "reshape", (LEVELS, width))
    yield from _linear("word_embed", "word_embedding")
    yield from _linear("shared_ada_lin.1", "shared_modulation")
    yield from _linear("head_nm.ada_lin.1", "head.modulation")
    yield from _linear("head", "head.scores")


def _blocks(config: InfinityConfig) -> Iterator[Rule]:
    for layer in range(config.num_layers):
        name = _block(config, layer)
        yield Rule(f"{name}ada_gss", "layers.modulation", "reshape", (1, 1, 6, config.width), layer=layer)
        scale_shape = (1, config.num_heads, 1, 1)
        attention = "layers.self_attention"
        yield Rule(f"{name}sa.scale_mul_1H11", f"{attention}.log_scale", "reshape", scale_shape, layer=layer)
        yield from _linear(f"{name}sa.mat_qkv", f"{attention}.qkv", layer, bias=False)
        yield Rule(f"{name}sa.q_bias", f"{attention}.query_bias", layer=layer)
        yield Rule(f"{name}sa.v_bias", f"{attention}.value_bias", layer=layer)
        yield from _linear(f"{name}sa.proj", f"{attention}.out", layer)
        attention = "layers.cross_attention"
        yield from _linear(f"{name}ca.mat_q", f"{attention}.query", layer)
        yield from _linear(f"{name}ca.mat_kv", f"{attention}.key_value", layer, bias=False)
        yield Rule(f"{name}ca.v_bias", f"{attention}.value_bias", layer=layer)
        yield from _linear(f"{name}ca.proj", f"{attention}.out", layer)
        yield Rule(f"{name}ca_norm.weight", "layers.cross_norm.scale", layer=layer)
        yield Rule(f"{name}ca_norm.bias", "layers.cross_norm.bias", layer=layer)
        yield from _linear(f"{name}ffn.fc1", "layers.feed_forward.up", layer)
        yield from _linear(f"{name}ffn.fc2", "layers.feed_forward.down", layer)
