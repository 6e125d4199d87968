"""Programs of meshes compiled ahead of time, here for eight fake devices."""

from __future__ import annotations

import dataclasses
import functools

import jax
import pytest

from toprovar_jax.acceleration import Dense, ToProVAR
from toprovar_jax.distributed.choosing import parameter_parts
from toprovar_jax.distributed.collectives import count
from toprovar_jax.distributed.mesh import MeshSpec, make_mesh
from toprovar_jax.distributed.pod_costs import block_exchanges
from toprovar_jax.distributed.pod_programs import PodPrograms
from toprovar_jax.generation import make_plan
from toprovar_jax.memory import predict
from toprovar_jax.memory_options import ON_DEVICE, MemoryOptions
from toprovar_jax.sampling import Sampling

from ..tiny_model import CARD

DEEPER = dataclasses.replace(CARD, transformer=dataclasses.replace(CARD.transformer, num_layers=4), training=())
"""Two layers in each group of a pruned plan, so that each group is a loop."""

POLICIES = {
    "dense": Dense(),
    "toprovar": ToProVAR(depth_rule="fixed", depth=2, guard_first=0.0, guard_last=0.5),
}
LAST = "scale 3 (4x4)"
PAIRS = {"reduce-scatter": 2, "all-gather": 2}
COPIES, HEADS, PARTS = MeshSpec(data=8), MeshSpec(data=2, tensor=2), MeshSpec(fsdp=4)
BATCH = 3


def plan_of(policy):
    return make_plan(DEEPER.schedule("1:1", None), Sampling(guidance=2.0), POLICIES[policy], num_layers=4)


@functools.cache
def traced(policy, spec, memory=ON_DEVICE):
    return PodPrograms(DEEPER, plan_of(policy), make_mesh(spec, jax.devices()[: spec.size]), batch=BATCH, memory=memory)


@functools.cache
def facts(policy, spec, name, memory=ON_DEVICE):
    return traced(policy, spec, memory).facts(name)


def bytes_on_chip(spec, *, networks=("transformer", "image_tokenizer", "text_encoder")):
    return sum(part for network, _, part, _ in parameter_parts(DEEPER, ON_DEVICE, spec) if network in networks)


def test_programs_are_named_as_the_memory_report_names_them():
    report = predict(DEEPER, plan_of("dense"), 1, "tiny", ON_DEVICE, driver="stepwise")
    names = [name for name in traced("dense", COPIES).names if name != "state"]
    assert names == [phase.name for phase in report.phases]


@pytest.mark.parametrize(
    ("policy", "name"), [("dense", LAST), ("toprovar", LAST), ("dense", "text"), ("dense", "decoder")]
)
def test_copies_of_the_model_exchange_nothing(policy, name):
    assert facts(policy, COPIES, name).collectives == ()


@pytest.mark.parametrize("policy", POLICIES)
def test_heads_in_parts_take_two_pairs_in_every_block(policy):
    found = facts(policy, HEADS, LAST).collectives
    groups = plan_of(policy).step(2).groups
    assert count(found) == ((PAIRS,) * len(groups), {})
    assert {each.group for each in found} == {2}


def test_the_scale_that_measures_importance_sums_it_up_over_the_heads_once():
    loops, outside = count(facts("toprovar", HEADS, "scale 1 (1x1)").collectives)
    assert plan_of("toprovar").step(0).with_entropy
    assert loops == (PAIRS,) * 2
    assert outside == {"all-reduce": 1}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_block_sends_what_the_estimate_says(policy):
    step = plan_of(policy).step(2)
    layers = {group.stop - group.start for group in step.groups}
    assert len(layers) == 1  # so that every loop turns as often
    sent = layers.pop() * sum(each.sent for each in facts(policy, HEADS, LAST).collectives)
    assert sent == block_exchanges(DEEPER, step, HEADS.tensor, BATCH)


def test_parameters_in_parts_are_gathered_in_the_blocks():
    loops, _ = count(facts("dense", PARTS, LAST).collectives)
    assert [set(loop) for loop in loops] == [{"all-gather"}]


@pytest.mark.parametrize("spec", [COPIES, HEADS, PARTS], ids=str)
def test_all_parameters_lie_on_a_chip_while_a_scale_is_computed(spec):
    found = facts("dense", spec, LAST)
    assert bytes_on_chip(spec) < found.peak < 2 * bytes_on_chip(COPIES)
    assert found.memory < found.peak


def test_a_text_encoder_in_host_memory_has_a_program_of_its_own_and_leaves_room_for_scales():
    memory = MemoryOptions(text_encoder="on_demand")
    assert "text encoder" in traced("dense", COPIES, memory).names
    spared = facts("dense", COPIES, LAST).peak - facts("dense", COPIES, LAST, memory).peak
    assert spared > bytes_on_chip(COPIES, networks=("text_encoder",))


def test_a_plan_with_alternatives_is_refused():
    plan = make_plan(DEEPER.schedule("1:1", None), Sampling(guidance=2.0), ToProVAR(min_depth=2), num_layers=4)
    assert plan.alternatives
    with pytest.raises(ValueError, match="alternatives"):
        PodPrograms(DEEPER, plan, make_mesh(COPIES), batch=1)
