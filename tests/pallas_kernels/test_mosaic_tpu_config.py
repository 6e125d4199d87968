"""Tile sizes of the TPU kernel: what they refuse, and what they cost."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.block_mask import BlockMask
from pallas_kernels.attention.mosaic_tpu import MosaicTpuConfig, candidates, default_config, why_not
from pallas_kernels.attention.mosaic_tpu_config import VMEM_BUDGET
from pallas_kernels.attention.problem import Problem
from pallas_kernels.attention.target import Target

V5E = Target("tpu", "TPU v5 lite")
PROBLEM = Problem(2, 4096, 10521, 16, 128, np.dtype(jnp.bfloat16), with_entropy=True)


@pytest.mark.parametrize(
    ("change", "target", "told"),
    [
        ({}, V5E, None),
        ({"dtype": np.dtype(np.float32)}, V5E, None),
        ({"head_dim": 256}, Target("tpu", "TPU v6 lite"), None),
        ({"head_dim": 264}, V5E, "head dim 264.*at most 256"),
        ({"dtype": np.dtype(np.float16)}, V5E, "float16.*bfloat16 or float32"),
        ({"batch": 100_000}, V5E, "batch 100000.*786432 bytes of scalar memory"),
        ({}, Target("cpu", "cpu"), "cpu.*must be a TPU"),
        ({}, Target("tpu", "TPU v4"), "TPU v4.*v5 or later"),
    ],
)
def test_refusals_name_the_value_and_the_rule(change, target, told):
    reason = why_not(dataclasses.replace(PROBLEM, **change), target)
    assert (reason is None) == (told is None)
    assert told is None or re.search(told, reason)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ((100, 128, 128), "query_tile 100.*multiple of 16.*round it up"),
        ((200, 128, 128), "query_tile 200.*multiple of 128.*round it up"),
        ((0, 128, 128), "query_tile 0"),
        ((128, 130, 130), "key_tile 130.*multiple of 128.*round it up"),
        ((128, 512, 384), "compute_tile 384.*divides key_tile 512.*use 128"),
    ],
)
def test_configurations_check_themselves(fields, told):
    with pytest.raises(ValueError, match=told):
        MosaicTpuConfig(*fields)


@pytest.mark.parametrize(
    ("config", "mask", "told"),
    [
        (MosaicTpuConfig(4096, 4096, 1024), None, "vector memory.*smaller tiles"),
        (MosaicTpuConfig(64, 512, 512), None, "query_tile 64.*4096 queries.*use 128"),
        (MosaicTpuConfig(256, 512, 512), BlockMask.from_array(np.ones((32, 83), bool)), "query tile 256.*divide"),
    ],
)
def test_configurations_are_checked_against_the_problem(config, mask, told):
    with pytest.raises(ValueError, match=told):
        config.check(dataclasses.replace(PROBLEM, block_mask=mask))


def test_a_batch_whose_tables_do_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"batch 100000 in tiles of 512.*3600000 bytes.*split the batch"):
        MosaicTpuConfig(512, 512, 512).check(dataclasses.replace(PROBLEM, batch=100_000))


SHAPES = [(1, 1), (7, 513), (144, 265), (1600, 3121), (2304, 6425), (4096, 10521), (4096, 16384)]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(("length", "num_keys"), SHAPES, ids=str)
def test_all_candidates_are_legal_and_the_default_is_the_first(length, num_keys, dtype):
    for width in (64, 128, 256):
        problem = Problem(2, length, num_keys, 16, width, np.dtype(dtype), with_entropy=True)
        found = candidates(problem, V5E)
        assert found[0] == default_config(problem, V5E)
        assert len(set(found)) == len(found)
        for config in found:
            config.check(problem)
            assert config.vmem_bytes(problem) <= VMEM_BUDGET


def test_the_default_wastes_little_of_its_last_tiles():
    for length, num_keys in SHAPES[2:]:
        config = default_config(Problem(2, length, num_keys, 16, 128, np.dtype(jnp.bfloat16)), V5E)
        covered = (
            -(-length // config.query_tile) * config.query_tile * -(-num_keys // config.key_tile) * config.key_tile
        )
        assert covered < 1.5 * max(length, 128) * max(num_keys, 512)


def test_masked_problems_get_tiles_that_divide_their_blocks():
    for query_block, key_block in ((128, 128), (256, 384), (1536, 2048)):
        mask = BlockMask.from_array(np.ones((2, 3), bool), query_block=query_block, key_block=key_block)
        lengths = (2 * query_block - 1, 3 * key_block - 1)
        problem = Problem(2, *lengths, 2, 64, np.dtype(np.float32), block_mask=mask)
        for config in candidates(problem, V5E):
            assert mask.query_block % config.query_tile == mask.key_block % config.key_tile == 0
