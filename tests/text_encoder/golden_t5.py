"""Reads the reference encoders of tests/golden into our modules."""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from toprovar_jax.text_encoder import T5Config, T5Encoder

_LAYER_NAMES = {
    "layer.0.layer_norm": "attention_norm.scale",
    "layer.0.SelfAttention.q": "attention.query",
    "layer.0.SelfAttention.k": "attention.key",
    "layer.0.SelfAttention.v": "attention.value",
    "layer.0.SelfAttention.o": "attention.output",
    "layer.1.layer_norm": "feed_forward_norm.scale",
    "layer.1.DenseReluDense.wi_0": "feed_forward.gate",
    "layer.1.DenseReluDense.wi_1": "feed_forward.up",
    "layer.1.DenseReluDense.wo": "feed_forward.down",
}


def load_encoder(folder: pathlib.Path, weights: str, **changes) -> T5Encoder:
    """The encoder of a golden case; ``changes`` replace fields of its configuration."""
    config = T5Config.from_dict(json.loads((folder / "config.json").read_text())["t5"])
    config = dataclasses.replace(config, **changes)
    source = load_file(folder / weights)
    encoder = T5Encoder(config, rngs=nnx.Rngs(0))

    def fill(path: str, value: np.ndarray):
        *parents, leaf = path.split(".")
        module = encoder
        for parent in parents:
            module = getattr(module, parent)
        parameter = getattr(module, leaf)
        assert parameter[...].shape == value.shape, path
        parameter[...] = jnp.asarray(value)

    for official, ours in _LAYER_NAMES.items():
        names = [f"encoder.block.{layer}.{official}.weight" for layer in range(config.num_layers)]
        stacked = np.stack([source.pop(name) for name in names])
        fill(f"layers.{ours}", stacked if stacked.ndim == 2 else stacked.transpose(0, 2, 1))
    fill("embedding", source.pop("shared.weight"))
    fill("relative_bias", source.pop("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"))
    fill("final_norm.scale", source.pop("encoder.final_layer_norm.weight"))
    assert set(source) <= {"encoder.embed_tokens.weight"}, source.keys()
    return encoder
