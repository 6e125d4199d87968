"""Pictures made on meshes of fake devices, beside those made on one."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from convert.conversion import convert, make_plan
from toprovar_jax import InfinityPipeline, checkpoint
from toprovar_jax.acceleration import Dense, ToProVAR
from toprovar_jax.checkpoint import restore_arrays
from toprovar_jax.distributed.mesh import MeshSpec, make_mesh
from toprovar_jax.distributed.rules import ParameterShardings
from toprovar_jax.errors import UserInputError
from toprovar_jax.loading import load_model
from toprovar_jax.memory_options import MemoryOptions

from ..tiny_model import write_tiny_model

PROMPTS = ["a red sphere", "the blue cube on the left", "a cone", "two cubes", "a green sphere"]
FIXED = ToProVAR(depth_rule="fixed", depth=2, guard_first=0.0, guard_last=0.5)
POLICIES = {"dense": Dense(), "toprovar": FIXED}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def made(folder):
    """What one device makes, by policy."""
    alone = InfinityPipeline.from_pretrained(folder)
    return {name: draw(alone, policy) for name, policy in POLICIES.items()}


def draw(pipeline, policy, **options):
    return pipeline(PROMPTS, seed=list(range(len(PROMPTS))), policy=policy, output_type="np", **options)


def mesh_of(text):
    sizes = dict(word.split("=") for word in text.split(","))
    spec = MeshSpec(**{name: int(size) for name, size in sizes.items()})
    return make_mesh(spec, jax.devices()[: spec.size])


def assert_equal(got, wanted):
    for ours, theirs in zip(got.bits, wanted.bits, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(got.images, wanted.images)


@pytest.mark.parametrize("policy", POLICIES)
def test_copies_of_the_model_make_the_very_pictures_of_one_device(folder, made, policy):
    pipeline = InfinityPipeline.from_pretrained(folder, mesh="data=8")
    assert_equal(draw(pipeline, POLICIES[policy]), made[policy])


@pytest.mark.parametrize("policy", POLICIES)
def test_parameters_in_parts_make_the_very_pictures_of_one_device(folder, made, policy):
    pipeline = InfinityPipeline.from_pretrained(folder, mesh=mesh_of("data=1,fsdp=4"))
    assert_equal(draw(pipeline, POLICIES[policy]), made[policy])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mesh", ["tensor=2", "data=2,fsdp=2,tensor=2"])
def test_heads_in_parts_draw_the_same_tokens(folder, made, policy, mesh):
    got = draw(InfinityPipeline.from_pretrained(folder, mesh=mesh_of(mesh)), POLICIES[policy])
    for ours, theirs in zip(got.bits, made[policy].bits, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(got.images, made[policy].images, atol=1e-5)


def test_a_policy_that_decides_per_picture_lets_every_copy_go_its_own_way(folder):
    adaptive = ToProVAR(tau=0.4, guard_first=0.0, guard_last=0.5)
    wanted = draw(InfinityPipeline.from_pretrained(folder), adaptive)
    assert len({plan.num_run for plan in wanted.plans} | {plan.flops for plan in wanted.plans}) > 1
    got = draw(InfinityPipeline.from_pretrained(folder, mesh=mesh_of("data=2")), adaptive)
    assert_equal(got, wanted)
    assert got.plans == wanted.plans


def test_a_copy_in_parts_goes_every_way_that_one_of_its_pictures_goes(folder):
    adaptive = ToProVAR(tau=0.4, guard_first=0.0, guard_last=0.5)
    wanted = draw(InfinityPipeline.from_pretrained(folder), adaptive)
    got = draw(InfinityPipeline.from_pretrained(folder, mesh=mesh_of("fsdp=2")), adaptive)
    assert_equal(got, wanted)
    assert got.plans == wanted.plans


def test_fast_pictures_of_a_mesh_are_those_of_one_device_with_the_share_of_the_batch(folder):
    options = {"seed": [3, 4], "output_type": "np"}
    alone = InfinityPipeline.from_pretrained(folder, precision="fast")
    pipeline = InfinityPipeline.from_pretrained(folder, precision="fast", mesh=mesh_of("data=2"))
    got = pipeline(PROMPTS[:2], **options)
    for row, prompt in enumerate(PROMPTS[:2]):
        wanted = alone(prompt, seed=row + 3, output_type="np")
        np.testing.assert_array_equal(got.images[row], wanted.images[0])
    assert pipeline.drivers.num_executables == 3


def test_callers_hear_of_every_picture_once_per_scale(folder):
    heard = []
    pipeline = InfinityPipeline.from_pretrained(folder, mesh=mesh_of("data=4"))
    draw(pipeline, Dense(), callback_on_scale_end=lambda index, count, info: heard.append((index, info)))
    for scale in range(3):
        assert sorted(i for index, info in heard if index == scale for i in info["images"]) == list(range(5))
    assert all(len(info["latents"]) == len(info["images"]) for _, info in heard)


@pytest.mark.parametrize("mesh", ["fsdp=2", "tensor=2"])
def test_integers_lie_in_parts_as_well(folder, mesh):
    memory = MemoryOptions(quantization="int8")
    wanted = draw(InfinityPipeline.from_pretrained(folder, memory=memory), FIXED)
    pipeline = InfinityPipeline.from_pretrained(folder, memory=memory, mesh=mesh_of(mesh))
    values = pipeline.drivers.model.transformer.layers.self_attention.qkv.kernel.get_value().values
    assert 2 * values.addressable_shards[0].data.size == values.size
    for ours, theirs in zip(draw(pipeline, FIXED).bits, wanted.bits, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_text_encoder_on_demand_is_lent_to_the_whole_mesh(folder, made):
    memory = MemoryOptions(text_encoder="on_demand")
    pipeline = InfinityPipeline.from_pretrained(folder, memory=memory, mesh=mesh_of("data=2,fsdp=2"))
    assert_equal(draw(pipeline, FIXED), made["toprovar"])


def test_converted_parts_are_the_same_as_parts_of_the_official_files(folder, tmp_path):
    sources = [folder / f"{name}.safetensors" for name in ("transformer", "image_tokenizer", "text_encoder")]
    out = tmp_path / "converted"
    convert(make_plan(sources, {}, model=str(folder / "model.json"), dtype="float32"), out)
    mesh = mesh_of("fsdp=2,tensor=2")
    options = {"precision": "exact", "shardings": ParameterShardings(mesh), "tensor_parts": 2}
    official, converted = (load_model(source, **options).networks for source in (folder, out))
    ours, theirs = jax.tree.leaves(converted), jax.tree.leaves(official)
    assert any(not leaf.is_fully_replicated for leaf in ours)
    for one, other in zip(ours, theirs, strict=True):
        assert one.sharding == other.sharding
        for part, same in zip(one.addressable_shards, other.addressable_shards, strict=True):
            np.testing.assert_array_equal(part.data, same.data)


def test_a_part_of_a_converted_model_is_read_without_the_rest(folder, tmp_path, monkeypatch):
    out = tmp_path / "converted"
    convert(make_plan([folder / "transformer.safetensors"], {}, model=str(folder / "model.json"), dtype="float32"), out)
    read = []
    original = checkpoint._read
    monkeypatch.setattr(checkpoint, "_read", lambda *arguments: read.append(original(*arguments)) or read[-1])
    mesh, path = mesh_of("tensor=2"), "layers.self_attention.qkv.kernel"
    shardings, shape = ParameterShardings(mesh), (2, 64, 192)
    sharding = shardings(f"transformer.{path}", shape)
    wanted = {path: jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding)}
    restore_arrays(out / "transformer", wanted, columns=lambda name: (3, 2))
    assert max(part.size for part in read) == np.prod(shape) // 6


def test_a_policy_that_chooses_among_all_heads_is_refused_where_they_are_in_parts(folder):
    pipeline = InfinityPipeline.from_pretrained(folder, mesh=mesh_of("tensor=2"))
    with pytest.raises(UserInputError, match=r"tensor=2.*chooses among all heads"):
        pipeline("a cone", policy="hack")


def test_a_mesh_that_the_heads_cannot_be_cut_along_is_refused(folder):
    with pytest.raises(UserInputError, match=r"tensor=4: must divide the model's 2 heads .* take one of 1, 2"):
        InfinityPipeline.from_pretrained(folder, mesh="data=2,tensor=4")


def test_a_warm_mesh_compiles_nothing_more(folder, compiled):
    pipeline = InfinityPipeline.from_pretrained(folder, mesh=mesh_of("data=2"))
    adaptive = ToProVAR(tau=0.4, guard_first=0.0, guard_last=0.5)
    programs = pipeline.warmup(batch_size=2, policy=adaptive)
    draw(pipeline, adaptive)
    assert pipeline.drivers.num_executables == programs
