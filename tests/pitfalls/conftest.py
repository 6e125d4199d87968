"""Recorded outputs, and the networks that made them, for the pitfall tests."""

from __future__ import annotations

import functools
import json

import jax
import pytest

from pallas_kernels import attention
from toprovar_jax.model.block import LayerText
from toprovar_jax.model.rope import rotary_table

from .. import tiny
from ..golden_cases import findings, inputs
from ..golden_cases.blocks import read_inputs
from .common import SQUARE, arrays_of


@pytest.fixture(scope="module")
def pieces(golden):
    """Arrays of the building-block case."""
    return arrays_of(golden / "e_blocks" / "io.npz")


@pytest.fixture(scope="module")
def transformer_of(golden):
    """The transformer of a case, by folder."""

    @functools.cache
    def load(case):
        folder = golden / case
        return inputs.load_transformer(
            json.loads((folder / "config.json").read_text())["model"], folder / "weights.safetensors"
        )

    return load


@pytest.fixture(scope="module")
def generated(golden):
    """Arrays of a generation: square, two images, guided."""
    return arrays_of(golden / "a_transformer_2b_style" / "io.npz")


@pytest.fixture(scope="module")
def encoded(golden):
    """Arrays of the image tokenizer, 16 pixels per cell."""
    return arrays_of(golden / "c_vae" / "io.npz")


@pytest.fixture(scope="module")
def conditioned(pieces, transformer_of):
    """The building-block transformer, its text condition, and its inputs by name."""
    transformer = transformer_of("e_blocks")
    arrays = read_inputs(findings.Reference(pieces))
    condition = jax.jit(lambda m, f, n: m.condition(f, n))(transformer, arrays["features"], arrays["lengths"])
    return transformer, condition, arrays


@pytest.fixture(scope="module")
def other_epsilon(conditioned):
    """The building-block transformer with the epsilon of many other models."""
    transformer, _, _ = conditioned
    return tiny.with_config(transformer, norm_epsilon=1e-5)


def _block_out(block, condition, x):
    text = LayerText(condition.keys[0], condition.values[0], condition.lengths)
    rope = rotary_table(SQUARE, 0, condition.keys.shape[-1], 2)

    def to_itself(q, k, v):
        return attention(q, k, v, scale=1.0).out, None

    return block(x, text, condition.modulation, rope, to_itself)[0]


@pytest.fixture(scope="module")
def block_out():
    return jax.jit(_block_out)
