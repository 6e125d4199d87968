"""Rule table of the T5 encoder (MODEL_SPEC 2.1)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from convert.rules import Rule
from toprovar_jax.text_encoder.config import T5Config


def rules(config: T5Config) -> list[Rule]:
    """Official name to parameter path."""
    return list(_rules(config))


def canonical_name(name: str) -> str | None:
    """The table's spelling of ``name``; None for the embedding's alias and for the decoder that full files carry."""
    if name == "encoder.embed_tokens.weight" or re.match(r"decoder\.|lm_head\.", name):
        return None
    return name


def _rules(config: T5Config) -> Iterator[Rule]:
    yield Rule("shared.weight", "embedding")
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    yield Rule(bias, "relative_bias")
    yield Rule("encoder.final_layer_norm.weight", "final_norm.scale")
    for i in range(config.num_layers):
        attention, feed_forward = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        yield Rule(f"{attention}.layer_norm.weight", "layers.attention_norm.scale", layer=i)
        for official, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output")):
            yield Rule(f"{attention}.SelfAttention.{official}.weight", f"layers.attention.{ours}", "linear", layer=i)
        yield Rule(f"{feed_forward}.layer_norm.weight", "layers.feed_forward_norm.scale", layer=i)
        for official, ours in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")):
            name = f"{feed_forward}.DenseReluDense.{official}.weight"
            yield Rule(name, f"layers.feed_forward.{ours}", "linear", layer=i)
