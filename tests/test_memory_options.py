"""What memory options do to a pipeline: the same pictures, and nothing on the device that is not needed there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from toprovar_jax.acceleration import Dense
from toprovar_jax.drivers import Drivers, TokenArrays
from toprovar_jax.generation import InfinityModel, make_plan
from toprovar_jax.loading import load_model
from toprovar_jax.memory_options import MemoryOptions
from toprovar_jax.sampling import Sampling
from toprovar_jax.text_placement import TEXT_PATHS, host_device

from .tiny_model import CARD, SCALES, TEXT_LENGTH, networks, write_tiny_model

NUMBERS = Sampling(2.0, 1.0, 0, 1.0)
ON_DEMAND, ON_HOST = MemoryOptions(text_encoder="on_demand"), MemoryOptions(text_encoder="host")


@pytest.fixture(scope="module")
def model():
    return networks()


def at_rest(model: InfinityModel) -> InfinityModel:
    """The text encoder in host memory."""
    return model._replace(text_encoder=jax.tree.map(np.asarray, model.text_encoder))


def arguments(batch: int = 1, negative: bool = False):
    ids = np.arange(batch * TEXT_LENGTH, dtype=np.int32).reshape(batch, TEXT_LENGTH) % 40
    lengths = np.arange(2, 2 + batch, dtype=np.int32)
    tokens = TokenArrays(ids, lengths, ids[:, ::-1], lengths) if negative else TokenArrays(ids, lengths)
    plan = make_plan(CARD.schedule("1:1", None), Sampling(2.0), Dense(), num_layers=CARD.transformer.num_layers)
    return tokens, jax.random.split(jax.random.key(0), batch), NUMBERS.for_scales(SCALES), plan


def on_devices(shape: tuple[int, ...]) -> int:
    return sum(array.shape == shape for array in jax.live_arrays())


def large_of_five_axes() -> int:
    """Keys and values of the cache and of the text: layers, rows, places, heads, head dim. Networks have none."""
    return sum(array.ndim == 5 and array.size > 0 for array in jax.live_arrays())


@pytest.mark.parametrize("negative", [False, True])
def test_encoding_on_demand_draws_the_same_and_compiles_one_program_more(model, negative):
    usual, frugal = Drivers(model), Drivers(at_rest(model), memory=ON_DEMAND)
    (want,), (got,) = (drivers.stepwise(*arguments(negative=negative)) for drivers in (usual, frugal))
    assert all(np.array_equal(a, b) for a, b in zip(want.bits, got.bits, strict=True))
    np.testing.assert_allclose(got.images, want.images, atol=1e-5)
    assert frugal.num_executables == usual.num_executables + 1
    count = frugal.num_executables
    frugal.stepwise(*arguments(negative=negative))
    assert frugal.num_executables == count


@pytest.mark.parametrize("way", ["stepwise", "fused"])
def test_the_text_encoder_leaves_the_device_before_the_first_scale(model, monkeypatch, way):
    frugal = Drivers(at_rest(model), memory=ON_DEMAND)
    largest = model.text_encoder.layers.feed_forward.up[...].shape
    before, during, run = on_devices(largest), {}, Drivers._run

    def spy(self, part, kind, function, given, **options):
        during[kind if isinstance(kind, str) else kind[0]] = on_devices(largest) - before
        return run(self, part, kind, function, given, **options)

    monkeypatch.setattr(Drivers, "_run", spy)
    getattr(frugal, way)(*arguments())
    # Gate and up have one shape.
    assert during.pop("encode") == 2
    assert set(during.values()) == {0}
    assert len(during) >= 3


def test_the_text_encoder_leaves_the_device_when_encoding_fails(model):
    frugal = Drivers(at_rest(model), memory=ON_DEMAND)
    largest = model.text_encoder.layers.feed_forward.up[...].shape
    before = on_devices(largest)
    tokens, *others = arguments()
    with pytest.raises(TypeError):
        frugal.stepwise(tokens._replace(ids=tokens.ids.astype(np.float32)), *others)
    assert on_devices(largest) == before


def test_the_text_encoder_works_on_the_host_while_the_others_are_elsewhere(model):
    device = jax.devices()[1]
    parts = [jax.device_put(network, device) for network in model[:2]]
    encoder = jax.device_put(model.text_encoder, host_device())
    drivers = Drivers(InfinityModel(*parts, encoder), memory=ON_HOST)
    tokens, keys, numbers, plan = arguments(2)
    # What a pipeline puts on the default device stands on its networks' here.
    keys, numbers = jax.device_put((keys, numbers), device)
    (got,) = drivers.stepwise(tokens, keys, numbers, plan)
    (want,) = Drivers(model).stepwise(*arguments(2))
    assert got.images.devices() == {device}
    assert all(np.array_equal(a, b) for a, b in zip(want.bits, got.bits, strict=True))
    assert {leaf.device for leaf in jax.tree.leaves(drivers.model.text_encoder)} == {host_device()}


def test_where_the_device_is_the_host_its_programs_are_the_usual_ones(model):
    usual, host = Drivers(model), Drivers(model, memory=ON_HOST)
    (want,), (got,) = (drivers.stepwise(*arguments()) for drivers in (usual, host))
    assert host.num_executables == usual.num_executables
    assert jnp.array_equal(got.images, want.images)


@pytest.mark.parametrize("memory", [ON_DEMAND, MemoryOptions(decoder_strips=2)])
def test_what_is_prepared_is_not_compiled_again(model, memory):
    drivers = Drivers(at_rest(model), memory=memory)
    drivers.prepare(*arguments())
    count = drivers.num_executables
    drivers.stepwise(*arguments())
    assert drivers.num_executables == count


def test_a_decoder_in_strips_makes_the_same_picture(model):
    (want,), (got,) = (Drivers(model, memory=MemoryOptions(decoder_strips=n)).stepwise(*arguments(2)) for n in (1, 3))
    assert not np.array_equal(want.images, want.images[:1])
    np.testing.assert_allclose(got.images, want.images, atol=1e-5)


@pytest.mark.parametrize("way", ["stepwise", "fused"])
def test_neither_cache_nor_condition_is_there_when_pictures_are_decoded(model, monkeypatch, way):
    drivers, seen, run = Drivers(model), {}, Drivers._run

    def spy(self, part, kind, function, given, **options):
        if kind == "decode":
            seen["decode"] = large_of_five_axes()
        result = run(self, part, kind, function, given, **options)
        if kind == ("text", True):
            seen["text"] = large_of_five_axes()
        return result

    elsewhere = large_of_five_axes()
    monkeypatch.setattr(Drivers, "_run", spy)
    getattr(drivers, way)(*arguments())
    assert seen["text"] - elsewhere == 2
    assert seen["decode"] - elsewhere == 0


@pytest.mark.parametrize(("memory", "kind"), [(ON_DEMAND, np.ndarray), (ON_HOST, jax.Array)])
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_a_text_encoder_that_stays_off_the_device_is_never_placed_there(
    tmp_path_factory, monkeypatch, memory, kind, precision
):
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    usual = load_model(folder, precision=precision).networks.text_encoder
    loaded = load_model(folder, precision=precision, memory=memory).networks
    ours, theirs = jax.tree.leaves(loaded.text_encoder), jax.tree.leaves(usual)
    assert all(isinstance(leaf, kind) for leaf in ours)
    assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded.image_tokenizer))
    flat = {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(loaded[0]))}
    at_rest = {path for path, leaf in flat.items() if isinstance(leaf, np.ndarray)}
    assert at_rest == {path for path in flat if path.startswith(TEXT_PATHS)}
    assert any(path.startswith("layers.cross_attention") for path in at_rest)
