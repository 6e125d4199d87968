"""Blocks as 8-bit integers and blocks in host memory: what is loaded, what is drawn with it, what it takes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from convert.conversion import convert, make_plan
from convert.dtypes import fast_dtype
from toprovar_jax import InfinityPipeline
from toprovar_jax.acceleration import Dense, FastVAR, ToProVAR
from toprovar_jax.errors import UserInputError
from toprovar_jax.loading import load_model, save_model
from toprovar_jax.memory_options import MemoryOptions
from toprovar_jax.model import Infinity
from toprovar_jax.model.quantization import Int8Matrix, dequantise
from toprovar_jax.placement import Placement, describe

from .tiny_model import CARD, TOKENIZER_JSON, write_tiny_model

INT8, STREAMED = MemoryOptions(quantization="int8"), MemoryOptions(stream_blocks=True)
BOTH = MemoryOptions(stream_blocks=True, quantization="int8")
MATRICES = {
    *("self_attention.qkv", "self_attention.out", "feed_forward.up", "feed_forward.down"),
    *(f"cross_attention.{name}" for name in ("query", "key_value", "out")),
}
PROMPTS = ["a red sphere", "the blue cube on the left"]
POLICIES = [
    Dense(),
    # Some layers of a scale prune, the others do not.
    FastVAR(ratios=(0.4, 0.5), skip_last=0, guard_first=0.0, guard_last=0.5),
    ToProVAR(depth_rule="fixed", depth=2, guard_first=0.0, guard_last=0.5),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "tiny"
    names = ("transformer", "image_tokenizer", "text_encoder")
    sources = [folder / f"{name}.safetensors" for name in names]
    convert(make_plan(sources, {}, model=str(folder / "model.json"), dtype="float32"), out)
    return out


@pytest.fixture(scope="module")
def pipelines(folder):
    kinds = {"plain": MemoryOptions(), "int8": INT8, "streamed": STREAMED, "both": BOTH}
    return {name: InfinityPipeline.from_pretrained(folder, memory=memory) for name, memory in kinds.items()}


def variables(transformer) -> dict[str, object]:
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(transformer))}


def matrix_bytes(transformer) -> int:
    kept = {name: value for name, value in variables(transformer.layers).items() if name.endswith(".kernel")}
    assert {name.removesuffix(".kernel") for name in kept} == MATRICES
    return sum(leaf.nbytes for leaf in jax.tree.leaves(kept))


@pytest.mark.parametrize(("precision", "times"), [("fast", 2), ("exact", 4)])
def test_the_blocks_matrices_take_a_byte_per_number(folder, precision, times):
    floats, bytes_ = (
        matrix_bytes(load_model(folder, precision=precision, memory=memory).networks.transformer)
        for memory in (MemoryOptions(), INT8)
    )
    # The scales are what is missing: 4 bytes per column of at least 64 numbers.
    assert floats / times < bytes_ <= floats / times * (1 + 4 / 64)


@pytest.mark.parametrize("source", ["folder", "converted"])
def test_all_other_parameters_are_as_without_and_each_matrix_is_near_its_own(source, request):
    source = request.getfixturevalue(source)
    plain = variables(load_model(source, precision="exact").networks.transformer)
    loaded = load_model(source, precision="exact", memory=INT8)
    ours = variables(loaded.networks.transformer)
    assert ours.keys() == plain.keys()
    worst = {}
    for name, value in ours.items():
        if isinstance(value, Int8Matrix):
            exact, near = np.asarray(plain[name]), dequantise(value)
            errors = np.linalg.norm(near - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2))
            worst[name.removeprefix("layers.").removesuffix(".kernel")] = errors.max()
        else:
            np.testing.assert_array_equal(np.asarray(value), np.asarray(plain[name]), name)
    assert worst.keys() == MATRICES
    assert loaded.quantization_error == pytest.approx(worst, rel=1e-4)
    assert max(worst.values()) < 0.01


def test_files_and_converted_folders_give_the_same_integers(folder, converted):
    ours, theirs = (load_model(f, precision="exact", memory=INT8).networks.transformer for f in (folder, converted))
    for left, right in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


def test_pictures_with_integers_are_nearly_those_without():
    pipelines = [InfinityPipeline.from_pretrained("scenes-small", memory=memory) for memory in (MemoryOptions(), INT8)]
    plain, ours = (pipeline("a red sphere on a blue floor", seed=3, output_type="np") for pipeline in pipelines)
    differing = [np.mean(a != b) for a, b in zip(plain.bits, ours.bits, strict=True)]
    # Each scale starts from what the ones before have made different already.
    assert max(differing[:2]) < 0.04
    assert 0 < max(differing) < 0.13
    assert np.mean(np.abs(plain.images - ours.images)) < 0.012
    assert pipelines[0].quantization_error == {}
    assert pipelines[1].quantization_error.keys() == MATRICES
    assert max(pipelines[1].quantization_error.values()) < 0.01


@pytest.mark.parametrize(
    ("kept", "streamed", "policy"),
    [("plain", "streamed", POLICIES[0]), *(("int8", "both", policy) for policy in POLICIES)],
)
def test_streaming_changes_no_bit_whatever_the_policy(pipelines, kept, streamed, policy):
    here, there = (pipelines[name](PROMPTS[0], seed=5, policy=policy, output_type="np") for name in (kept, streamed))
    assert all(np.array_equal(a, b) for a, b in zip(here.bits, there.bits, strict=True))
    np.testing.assert_array_equal(here.images, there.images)


def test_neither_needs_more_programs(folder):
    counts = {
        memory: InfinityPipeline.from_pretrained(folder, memory=memory).warmup() for memory in (MemoryOptions(), BOTH)
    }
    assert counts[MemoryOptions()] == counts[BOTH]


@pytest.mark.parametrize("source", ["folder", "converted"])
@pytest.mark.parametrize(("memory", "part"), [(STREAMED, ""), (BOTH, ".values")])
def test_only_the_blocks_matrices_lie_in_host_memory(source, memory, part, request):
    networks = load_model(request.getfixturevalue(source), precision="fast", memory=memory).networks
    on_host = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(networks)
        if leaf.sharding.memory_kind == "pinned_host"
    }
    assert on_host == {f".transformer.layers.{name}.kernel.value{part}" for name in MATRICES}


def test_a_batch_in_one_program_streams_too(folder):
    pictures = [
        InfinityPipeline.from_pretrained(folder, precision="fast", memory=memory)(PROMPTS, seed=1, output_type="np")
        for memory in (INT8, BOTH)
    ]
    np.testing.assert_array_equal(*(picture.images for picture in pictures))


def test_integers_and_streams_go_into_shardings(folder):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def columns(name, shape):
        axes = [None] * len(shape)
        if shape and shape[-1] % 8 == 0:
            axes[-1] = "x"
        return NamedSharding(mesh, PartitionSpec(*axes))

    loaded = load_model(folder, precision="exact", shardings=columns, memory=BOTH).networks.transformer
    plain = load_model(folder, precision="exact", memory=INT8).networks.transformer
    up, expected = (model.layers.feed_forward.up.kernel.get_value() for model in (loaded, plain))
    np.testing.assert_array_equal(np.asarray(up.values), np.asarray(expected.values))
    for part in up:
        assert part.addressable_shards[0].data.size * 8 == part.size
    assert (up.values.sharding.memory_kind, up.scale.sharding.memory_kind) == ("pinned_host", "device")


@pytest.mark.parametrize("memory", [MemoryOptions(), INT8, STREAMED, BOTH])
def test_a_description_has_the_shapes_dtypes_and_places_of_what_is_loaded(folder, memory):
    loaded = load_model(folder, precision="fast", memory=memory).networks.transformer
    abstract = nnx.eval_shape(lambda: Infinity(loaded.config, rngs=nnx.Rngs(0)))
    described = describe(
        abstract, Placement("transformer", None, memory), lambda target: fast_dtype("transformer", target)
    )
    assert jax.tree.structure(described) == jax.tree.structure(loaded)
    for ours, theirs in zip(jax.tree.leaves(described), jax.tree.leaves(loaded), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.sharding.memory_kind == theirs.sharding.memory_kind


def test_a_device_that_cannot_read_host_memory_is_refused(folder, monkeypatch):
    monkeypatch.setattr("toprovar_jax.placement.HOST_MEMORY", "elsewhere")
    with pytest.raises(UserInputError, match="stream_blocks on cpu: needs a device that can read host memory"):
        load_model(folder, precision="exact", memory=STREAMED)


def test_a_quantised_model_is_not_saved_as_if_it_were_whole(folder, tmp_path):
    networks = load_model(folder, precision="exact", with_encoder=True, memory=INT8).networks
    with pytest.raises(ValueError, match="quantised"):
        save_model(tmp_path / "out", CARD, networks, TOKENIZER_JSON)
    assert not (tmp_path / "out").exists()


def test_a_layer_in_host_memory_is_copied_to_the_device_inside_the_loop(pipelines):
    transformer = pipelines["streamed"].networks.transformer
    features = jnp.zeros((1, 3, CARD.transformer.text_width), jnp.float32)
    traced = jax.jit(lambda model, *text: model.condition(*text)).trace(transformer, features, jnp.array([3]))
    loops = [equation for equation in traced.jaxpr.eqns if equation.primitive.name == "scan"]
    assert any("device_put" in str(loop.params["jaxpr"]) for loop in loops)
