"""Collectives read off the text of compiled programs."""

from __future__ import annotations

import textwrap

import pytest

from toprovar_jax.distributed.collectives import collectives_of, count

PROGRAM = """\
HloModule jit_local, is_scheduled=true, num_partitions=8

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %r = f32[] add(%a, %b)
}

%all-reduce-scatter.3 (p: bf16[2,64,128]) -> bf16[2,16,128] {
  %p = bf16[2,64,128]{2,1,0} parameter(0)
  %all-reduce.9 = bf16[2,64,128]{2,1,0} all-reduce(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
  ROOT %slice = bf16[2,16,128]{2,1,0} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={2,16,128}
}

%inner (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %x = f32[4]{0} parameter(0)
  ROOT %permuted = f32[4]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
}

%body.1 (arguments: (s32[], bf16[2,16,128])) -> (s32[], bf16[2,16,128]) {
  %h = bf16[2,16,128]{2,1,0} parameter(0)
  %all-gather-start = (bf16[2,16,128]{2,1,0:T(8)}, bf16[2,64,128]) all-gather-start(%h), replica_groups=[2,4]<=[8]
  %all-gather-done = bf16[2,64,128]{2,1,0} all-gather-done(%all-gather-start)
  %scattered = bf16[2,16,128]{2,1,0} fusion(%all-gather-done), kind=kCustom, calls=%all-reduce-scatter.3
  %alone = f32[7]{0} all-reduce(%z), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%sum
  %loop = (s32[], f32[4]) while(%q), condition=%cond, body=%inner
  ROOT %t = (s32[], bf16[2,16,128]) tuple(%i, %scattered)
}

ENTRY %main (p0: f32[]) -> f32[] {
  %w = (s32[], bf16[2,16,128]) while(%init), condition=%cond, body=%body.1
  ROOT %everywhere = f32[10]{0} all-reduce(%p0), replica_groups={}, to_apply=%sum
}
"""


def test_a_start_and_its_end_are_one_collective():
    gathered = [each for each in collectives_of(PROGRAM) if each.kind == "all-gather"]
    assert [(each.size, each.group, each.loop) for each in gathered] == [(2 * 64 * 128 * 2, 4, "body.1")]


def test_a_sum_that_is_sliced_at_once_is_a_reduce_scatter_of_the_loop_that_calls_it():
    found = [each for each in collectives_of(PROGRAM) if each.kind == "reduce-scatter"]
    assert [(each.group, each.loop) for each in found] == [(4, "body.1")]


def test_what_one_device_does_alone_does_not_count():
    assert all(each.size != 7 * 4 for each in collectives_of(PROGRAM))


def test_loops_are_counted_apart():
    loops, outside = count(collectives_of(PROGRAM))
    assert sorted(map(sorted, map(dict.items, loops))) == [
        [("all-gather", 1), ("reduce-scatter", 1)],
        [("collective-permute", 1)],
    ]
    assert outside == {"all-reduce": 1}


def test_all_devices_take_part_where_no_groups_are_named():
    (found,) = [each for each in collectives_of(PROGRAM) if each.loop is None]
    assert (found.group, found.size) == (8, 40)


def test_the_steps_of_one_that_goes_on_beside_other_work_are_one_collective():
    steps = "".join(
        f'  %s{step} = f32[16] all-gather(%x), replica_groups={{{{0,1}}}}, frontend_attributes={{chain_id="{chain}"}}\n'
        for step, chain in enumerate((0, 0, 0, 1, 1))
    )
    assert len(collectives_of(f"ENTRY %main (x: f32[4]) -> f32[4] {{\n{steps}}}\n")) == 2


@pytest.mark.parametrize(
    ("operation", "size", "sent"),
    [
        ("f32[4,8]{1,0} reduce-scatter(%x), replica_groups={{0,1,2,3}}, dimensions={0}", 512, 384),
        ("(f32[16,8], f32[4,8]) reduce-scatter-start(%x), replica_groups={{0,1,2,3}}", 512, 384),
        ("f32[16,8]{1,0} all-gather(%x), replica_groups={{0,1,2,3}}, dimensions={0}", 512, 384),
        ("f32[16,8]{1,0} all-reduce(%x), replica_groups={{0,1,2,3}}", 512, 768),
        ("(f32[16], s8[8], pred[8]) all-reduce(%x, %y, %z), replica_groups={{0,1}}", 80, 80),
        ("(f32[16], f32[16]) collective-permute-start(%x), source_target_pairs={{0,1},{1,2}}", 64, 64),
    ],
)
def test_sizes_are_of_the_whole_array_and_what_is_sent_goes_round_a_ring(operation, size, sent):
    (found,) = collectives_of(f"ENTRY %main (x: f32[4]) -> f32[4] {{\n  %r = {operation}\n}}\n")
    assert (found.size, found.sent) == (size, sent)


def test_a_program_without_any_has_none():
    text = textwrap.dedent("""\
        ENTRY %main (x: f32[4]) -> f32[4] {
          %x = f32[4]{0} parameter(0)
          ROOT %r = f32[4]{0} add(%x, %x), metadata={op_name="all-gather(not one)"}
        }
        """)
    assert collectives_of(text) == ()
    assert count(()).total == 0
