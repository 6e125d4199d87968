import types

import jax.numpy as jnp
import numpy as np
import pytest

from .golden_t5 import load_encoder


@pytest.fixture(scope="session")
def reference(golden):
    """Case d: an encoder of three layers, prompts of 208, 31 and 2 tokens, and the features they must give."""
    folder = golden / "d_t5_encoder"
    data = np.load(folder / "io.npz")
    mask = data["attention_mask"]
    return types.SimpleNamespace(
        folder=folder,
        encoder=load_encoder(folder, "weights.safetensors"),
        tokens=jnp.asarray(data["input_ids"]),
        lengths=jnp.asarray(mask.sum(axis=1).astype(np.int32)),
        valid=mask.astype(bool),
        features=data["last_hidden_state"],
    )
