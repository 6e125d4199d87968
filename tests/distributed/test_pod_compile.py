"""Plans compiled for TPU slices that are not there."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from pallas_kernels.ahead_of_time import TPU_ENVIRONMENT, why_no_tpu_compiler
from toprovar_jax.acceleration import Dense
from toprovar_jax.distributed import pod_compile
from toprovar_jax.distributed.chips import parse_topology
from toprovar_jax.distributed.collectives import count
from toprovar_jax.distributed.mesh import MeshSpec
from toprovar_jax.distributed.pod_compile import OUT_OF_MEMORY, chosen_programs, compile_plan, described_mesh
from toprovar_jax.distributed.pod_plan import Request, plan_pod
from toprovar_jax.distributed.pod_programs import ProgramFacts
from toprovar_jax.errors import UserInputError
from toprovar_jax.generation import make_plan
from toprovar_jax.sampling import Sampling

from ..tiny_model import CARD

TINY = dataclasses.replace(CARD, training=()).with_precision("fast")
PLAN = make_plan(TINY.schedule("1:1", None), Sampling(guidance=2.0), Dense(), num_layers=2)
REQUEST = Request(TINY, PLAN, parse_topology("v5e-4"), "tiny", attention="xla")

needs_libtpu = pytest.mark.skipif(why_no_tpu_compiler() is not None, reason=str(why_no_tpu_compiler()))


@pytest.fixture
def environment(monkeypatch):
    """An executable for a chip that is not there is written to the cache but cannot be read."""
    for name, value in TPU_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


class FakePrograms:
    """Programs of which the compiler refuses one."""

    names = ("text", "state", "scale 1 (1x1)", "scale 2 (2x2)", "scale 3 (4x4)", "decoder")

    def __init__(self, *_, **__):
        pass

    def facts(self, name):
        if name == "scale 3 (4x4)":
            raise RuntimeError(f"{OUT_OF_MEMORY}: of it all")
        return ProgramFacts(name, 1, 1, 0, 1, 0.0, ())


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(pod_compile, "described_mesh", lambda *_: None)
    monkeypatch.setattr(pod_compile, "PodPrograms", FakePrograms)


def test_the_programs_that_decide_are_compiled():
    predicted = dict.fromkeys(FakePrograms.names, 1)
    last = "scale 3 (4x4)"
    assert chosen_programs(FakePrograms.names, predicted | {last: 2}) == ("text", last)
    assert chosen_programs(FakePrograms.names, predicted | {"scale 2 (2x2)": 2}) == ("text", "scale 2 (2x2)", last)
    assert chosen_programs(FakePrograms.names, predicted | {"decoder": 2}) == ("text", last, "decoder")


def test_what_the_compiler_refuses_is_told_with_a_remedy(fake):
    said = []
    with pytest.raises(UserInputError, match=r"scale 3 \(4x4\): is refused by the compiler") as caught:
        compile_plan(plan_pod(REQUEST), said.append)
    assert caught.value.remedy == "--batch-size 4"
    assert said[-1] == "compiling scale 3 (4x4)"


def test_what_lies_beside_a_program_has_to_fit_as_well(fake, monkeypatch):
    full = ProgramFacts("text", 1, 1, 0, 1, 0.0, (), beside=2**40)
    monkeypatch.setattr(FakePrograms, "facts", lambda self, name: full)
    with pytest.raises(UserInputError, match=r"text: takes 1099\.51 GB of each chip's 16\.91"):
        compile_plan(plan_pod(REQUEST), lambda _: None)


def test_gpus_have_no_slice_to_compile_for():
    with pytest.raises(ValueError, match="must be of TPUs"):
        described_mesh(parse_topology("h100-8"), MeshSpec(data=8))


@needs_libtpu
@pytest.mark.parametrize(("mesh", "exchanges"), [("data=4", []), ("tensor=2", [4])])
def test_a_plan_is_compiled_for_its_slice(environment, mesh, exchanges):
    found = compile_plan(plan_pod(REQUEST, mesh=mesh), lambda _: None)
    assert {"text", "scale 3 (4x4)"} <= set(found)
    loops, outside = count(found["scale 3 (4x4)"].collectives)
    # Of arrays as small as these, sums are taken whole before they are cut.
    assert ([sum(loop.values()) for loop in loops], outside) == (exchanges, {})


@needs_libtpu
def test_a_single_chip_is_a_slice(environment):
    assert described_mesh(parse_topology("v5e-1"), MeshSpec()).size == 1
