"""What a slice of chips is estimated to make of a model."""

from __future__ import annotations

import dataclasses

import pytest

from toprovar_jax.acceleration import Dense
from toprovar_jax.acceleration.cost import step_flops
from toprovar_jax.distributed.chips import CHIPS, parse_topology
from toprovar_jax.distributed.mesh import MEMORY_SHARE, MeshSpec
from toprovar_jax.distributed.parts import FSDP, TENSOR
from toprovar_jax.distributed.pod_costs import ProgramCost, Seconds, block_exchanges, program_costs
from toprovar_jax.distributed.pod_plan import Request, plan_pod, request_of
from toprovar_jax.distributed.pod_text import plan_text
from toprovar_jax.errors import UserInputError
from toprovar_jax.generation import make_plan
from toprovar_jax.memory_options import ON_DEVICE
from toprovar_jax.sampling import Sampling

from ..tiny_model import CARD

TINY = dataclasses.replace(CARD, training=())
PLAN = make_plan(TINY.schedule("1:1", None), Sampling(guidance=2.0), Dense(), num_layers=2)
REQUEST = Request(TINY, PLAN, parse_topology("v5e-8"), "tiny")


def costs(batch=1, **sizes):
    return program_costs(TINY, PLAN, ON_DEVICE, MeshSpec(**sizes), batch)


@pytest.mark.parametrize(
    ("text", "chips", "shape"),
    [
        ("v5e-16", 16, "4x4"),
        ("V5E-256", 256, "16x16"),
        ("v6e-8", 8, "2x4"),
        ("v5p-32", 16, "2x2x4"),
        ("h100-64", 64, None),
        ("a100-3", 3, None),
    ],
)
def test_topologies_have_so_many_chips(text, chips, shape):
    topology = parse_topology(text)
    assert (topology.count, topology.shape, topology.name) == (chips, shape, text.lower())


@pytest.mark.parametrize("text", ["v5e", "v5e-17", "v5p-3", "v5p-31", "v4-8", "h100-0", "h100-12", "16", "v5e-16-4"])
def test_slices_that_are_not_made_are_refused(text):
    with pytest.raises(UserInputError):
        parse_topology(text)


def test_a_name_that_counts_cores_says_how_many_chips_there_are():
    assert str(parse_topology("v5p-32")) == "v5p-32: 16 chips, 2x2x4 (v5p-32 counts cores, 2 to a chip)"


def test_time_is_the_longer_of_computing_and_memory_and_then_what_is_sent():
    cost = ProgramCost("scale", flops=197e12 * 0.4 * 2, traffic=819e9 * 3, sent={TENSOR: 25e9, FSDP: 5e9})
    seconds = cost.seconds(CHIPS["v5e"], MeshSpec(tensor=4), 0.4)
    assert (seconds.computing, seconds.memory, seconds.exchanging) == pytest.approx((2.0, 3.0, 0.6))
    assert seconds.total == pytest.approx(3.6)
    assert Seconds(4.0, 3.0, 0.5).total == 4.5


def test_gpus_of_several_hosts_send_over_the_network():
    cost = ProgramCost("scale", flops=0.0, traffic=0.0, sent={TENSOR: 450e9, FSDP: 0.0})
    assert cost.seconds(CHIPS["h100"], MeshSpec(tensor=8), 0.4).exchanging == pytest.approx(1.0)
    assert cost.seconds(CHIPS["h100"], MeshSpec(tensor=16), 0.4).exchanging == pytest.approx(9.0)


def test_a_scale_sends_each_of_its_tokens_four_times_in_every_block():
    # Two rows of 16 tokens, 64 channels, float32, two layers; half of everything goes to the other chip.
    assert block_exchanges(TINY, PLAN.step(2), 2, 1) == 2 * 16 * 64 * 4 * 4 * 2 / 2


def test_a_copy_on_one_chip_sends_nothing():
    assert all(sum(cost.sent.values()) == 0 for cost in costs(batch=4, data=8))


def test_operations_of_scales_are_shared_and_those_of_texts_and_pictures_go_one_by_one():
    alone, shared = costs(), costs(batch=3, tensor=2)
    assert shared[3].flops == 3 * step_flops(PLAN.step(2), TINY.transformer) / 2
    assert shared[-1].flops == 2 * alone[-1].flops
    assert 2 * alone[0].flops < shared[0].flops < 3 * alone[0].flops


def test_parameters_in_parts_are_sent_by_every_program_that_reads_them():
    found = costs(fsdp=4)
    assert all(cost.sent[FSDP] > 0 and cost.sent[TENSOR] == 0 for cost in found)
    assert found[1].sent[FSDP] == found[2].sent[FSDP]
    assert found[1].traffic == costs()[1].traffic


def test_a_small_model_has_a_copy_on_every_chip():
    plan = plan_pod(REQUEST)
    assert (plan.spec, plan.batch, plan.together) == (MeshSpec(data=8), 8, 64)
    (way,) = plan.ways
    assert plan.rate(way) == 64 / sum(each.total for each in way.seconds)
    assert plan.hours(way, 65) == 2 * way.total / 3600


def test_twice_the_utilisation_halves_the_time_of_computing():
    slow, fast = (plan_pod(REQUEST, utilisation=share).ways[0].seconds for share in (0.3, 0.6))
    assert slow[1].computing == pytest.approx(2 * fast[1].computing)
    assert slow[1].memory == fast[1].memory


@pytest.mark.parametrize("utilisation", [0.0, 1.1, -1.0, float("nan")])
def test_a_utilisation_that_cannot_be_is_refused(utilisation):
    with pytest.raises(UserInputError, match="utilisation"):
        plan_pod(REQUEST, utilisation=utilisation)


def test_as_many_chips_share_a_copy_as_it_needs():
    plan = plan_pod(request_of("8b", "v5e-16"))
    limit = MEMORY_SHARE * CHIPS["v5e"].memory
    assert plan.spec.tensor > 1
    assert max(plan.memory.values()) <= limit < max(plan.request.programs(plan.spec, 2 * plan.batch).values())
    fewer = MeshSpec(data=2 * plan.spec.data, tensor=plan.spec.tensor // 2)
    assert max(plan.request.programs(fewer, 1).values()) > limit


def test_a_policy_that_decides_for_each_picture_has_a_slowest_and_a_quickest_way():
    slowest, quickest = plan_pod(request_of("8b", "v6e-16", policy="toprovar")).ways
    assert slowest.total > 1.5 * quickest.total
    assert slowest.plan.depth is None
    assert quickest.plan.depth is not None


@pytest.mark.parametrize(
    ("topology", "options", "remedy"),
    [
        ("v5e-1", {}, "v5e-4 with mesh tensor=4 fits"),
        ("v5e-16", {"mesh": "data=16"}, "--mesh data=4,tensor=4 fits"),
        ("v5e-16", {"mesh": "tensor=4", "batch": 8}, "--batch-size 2 fits"),
        ("a100-2", {"batch": 64}, "--batch-size 8 fits"),
    ],
)
def test_what_does_not_fit_says_what_would(topology, options, remedy):
    with pytest.raises(UserInputError) as caught:
        plan_pod(request_of("8b", topology), **options)
    assert caught.value.remedy == remedy


def test_a_policy_that_needs_all_heads_is_refused_where_chips_have_some():
    with pytest.raises(UserInputError, match="chooses among all heads"):
        plan_pod(request_of("8b", "v5e-16", policy="scalekv"))


def test_the_text_says_that_it_is_an_estimate_and_of_what():
    text = plan_text(plan_pod(REQUEST, mesh="data=4,tensor=2"), 1000, {}, "was asked for")
    for words in ("This is an estimate; nothing was measured", "40% of 197 TFLOP/s", "2 reduce-scatter", "predicted"):
        assert words in text
