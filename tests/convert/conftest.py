"""Tiny models of every kind with random parameters, and the calls that write and read them."""

import dataclasses
import importlib
import pathlib
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import image_tokenizer as image_tokenizer_table
from convert import infinity as infinity_table
from convert import rules
from convert import t5 as t5_table
from convert.safetensors_io import open_safetensors, save_safetensors
from toprovar_jax.config import ImageTokenizerConfig, InfinityConfig
from toprovar_jax.image_tokenizer import ImageTokenizer
from toprovar_jax.model import Infinity
from toprovar_jax.text_encoder import T5Config, T5Encoder

INFINITY = InfinityConfig(
    num_layers=4,
    width=32,
    num_heads=2,
    text_width=256,
    text_length=6,
    latent_channels=3,
    block_chunks=2,
    feed_forward_ratio=8.0,
)
TOKENIZER = ImageTokenizerConfig(
    latent_channels=5, stride=4, base_width=24, width_multipliers=(1, 2, 2), num_res_blocks=1
)
T5 = T5Config(vocab_size=11, width=12, head_dim=3, feed_forward_width=20, num_layers=2, num_heads=2)


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of model: its configuration, how it is built, its table and its reading of names."""

    config: object
    build: Callable
    table: types.ModuleType
    canonical: Callable

    def abstract(self, **changes):
        config = dataclasses.replace(self.config, **changes)
        return nnx.eval_shape(lambda: self.build(config, rngs=nnx.Rngs(0)))

    def random(self):
        """The model with every parameter drawn afresh, so that none keeps a telling initial value."""
        graph, state = nnx.split(self.build(self.config, rngs=nnx.Rngs(0)))
        leaves, structure = jax.tree.flatten(state)
        draw = np.random.default_rng(0)
        leaves = [jnp.asarray(draw.standard_normal(leaf.shape, np.float32)) for leaf in leaves]
        return nnx.merge(graph, jax.tree.unflatten(structure, leaves))

    def official(self, module, dtype=np.float32):
        return rules.official_state_dict(module, self.table.rules(self.config), dtype=dtype)

    def fill(self, tensors, **changes):
        """From arrays, or from readers, by official name."""
        config = dataclasses.replace(self.config, **changes.pop("config", {}))
        readers = {name: t if callable(t) else lambda t=t: t for name, t in tensors.items()}
        return rules.fill_module(
            nnx.eval_shape(lambda: self.build(config, rngs=nnx.Rngs(0))),
            self.table.rules(config),
            readers,
            canonical=self.canonical(readers, config),
            **({"source": "file.safetensors"} | changes),
        )

    def through_file(self, tensors, path, **changes):
        save_safetensors(path, tensors, {"format": "pt"})
        return self.fill(open_safetensors(path), **changes)


KINDS = {
    "infinity": Kind(INFINITY, Infinity, infinity_table, infinity_table.canonical_names),
    "image tokenizer": Kind(
        TOKENIZER, ImageTokenizer, image_tokenizer_table, lambda *_: image_tokenizer_table.canonical_name
    ),
    "t5": Kind(T5, T5Encoder, t5_table, lambda *_: t5_table.canonical_name),
}


@pytest.fixture(scope="module")
def files():
    """The module that writes checkpoint files byte by byte, as torch does, without it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(pathlib.Path(__file__).parents[2] / "benchmarks"))
        yield importlib.import_module("checkpoint_files")


@pytest.fixture(scope="session", params=KINDS)
def kind(request) -> Kind:
    return KINDS[request.param]


@pytest.fixture(scope="session")
def infinity() -> Kind:
    return KINDS["infinity"]


@pytest.fixture(scope="session")
def tokenizer() -> Kind:
    return KINDS["image tokenizer"]


@pytest.fixture(scope="session")
def models() -> dict[str, tuple[nnx.Module, dict[str, np.ndarray]]]:
    """A random model of each kind (by table name), and its official state dict."""
    found = {}
    for kind in KINDS.values():
        module = kind.random()
        found[kind.table.__name__] = (module, kind.official(module))
    return found


@pytest.fixture
def module(models, kind):
    return models[kind.table.__name__][0]


@pytest.fixture
def tensors(models, kind):
    return dict(models[kind.table.__name__][1])


@pytest.fixture
def infinity_tensors(models, infinity):
    return dict(models[infinity.table.__name__][1])


@pytest.fixture
def tokenizer_tensors(models, tokenizer):
    return dict(models[tokenizer.table.__name__][1])


def parameters(module) -> dict[str, jax.Array]:
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(module))}


@pytest.fixture
def assert_equal():
    def check(got, want, dtype=jnp.float32):
        got, want = parameters(got), parameters(want)
        assert got.keys() == want.keys()
        for name in want:
            assert got[name].dtype == dtype, name
            np.testing.assert_array_equal(got[name], np.asarray(want[name]).astype(dtype), err_msg=name)

    return check
