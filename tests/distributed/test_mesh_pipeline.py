"""Pictures made on meshes of fake devices, beside those made on one."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from toprovar_jax import InfinityPipeline
from toprovar_jax.acceleration import Dense, ToProVAR
from toprovar_jax.distributed.mesh import MeshSpec, make_mesh

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
