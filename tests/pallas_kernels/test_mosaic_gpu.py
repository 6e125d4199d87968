"""The Hopper kernel without a GPU: its arithmetic everywhere, its data movement in JAX's GPU interpreter."""

import contextlib
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import mosaic_gpu
from pallas_kernels.attention import mosaic_gpu_kernel_sm90 as kernel
from pallas_kernels.attention.block_mask import BlockMask
from pallas_kernels.attention.constants import LOG2_E
from pallas_kernels.attention.mosaic_gpu import (
    SHARED_MEMORY,
    MosaicGpuConfig,
    candidates,
    default_config,
    mosaic_gpu_attention,
    why_not,
)
from pallas_kernels.attention.mosaic_gpu_rows import Rows, finish_rows, softmax_tile
from pallas_kernels.attention.problem import Problem
from pallas_kernels.attention.reference import MASKED
from pallas_kernels.attention.target import Target

from .twin import attend, draw, relative

HOPPER = Target("cuda", "NVIDIA H200", (9, 0))
SMALL = MosaicGpuConfig(key_tile=64, stages=2)
ALONE = dataclasses.replace(SMALL, compute_warpgroups=1, schedule="free")

needs_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="the GPU interpreter of jax < 0.11 does not know these kernels"
)


def problem(**changes):
    usual = Problem(2, 4096, 10521, 16, 128, np.dtype(jnp.bfloat16), with_entropy=True)
    return dataclasses.replace(usual, **changes)


@contextlib.contextmanager
def interpretable(monkeypatch, *, commit=True):
    """Replaces what the interpreter does not know: tensor-core operands in registers, and the order in which shared
    memory holds a tile. Copies, barriers, the ring, loops, masks and the way out are the kernel's own."""

    def read_done():
        # Ordinary reads, unlike those of the tensor cores, must be ordered before the copy engine's next write.
        if commit:
            plgpu.commit_smem()

    def dot(x, y):
        return jnp.dot(x, y, preferred_element_type=jnp.float32, precision=jax.lax.Precision.DEFAULT)

    def scores(q, k, launch, issued):
        products = sum(dot(q[chunk], k[chunk].T) for chunk in range(launch.chunks))
        read_done()
        issued()
        return products

    def add_values(out, weights, v, launch, issued):
        added = jnp.concatenate([dot(weights, v[chunk]) for chunk in range(launch.chunks)], axis=1)
        read_done()
        issued()
        return out + added

    def scores_beside_values(q, k, v, launch, state, before_values, issued, take_in, after):
        out, weights, _ = state
        products = scores(q, k, launch, before_values)
        out = add_values(out, weights, v, launch, issued)
        results = take_in(products)
        after()
        return out, results

    with monkeypatch.context() as patch:
        patch.setattr(
            kernel,
            "buffer",
            lambda slots, launch, rows, dtype: plgpu.SMEM((slots, launch.chunks, rows, kernel.CHUNK), dtype),
        )
        patch.setattr(kernel, "plain", lambda piece: piece)
        patch.setattr(kernel, "matrix", lambda piece: piece)
        patch.setattr(kernel, "block_of_rows", lambda piece, index: piece.at[pl.ds(index * kernel.ROWS, kernel.ROWS)])
        for replacement in (scores, add_values, scores_beside_values):
            patch.setattr(kernel, replacement.__name__, replacement)
        yield patch


def interpreted(monkeypatch, arrays, *, multiprocessors=132, commit=True, **options):
    """The result, and whether the interpreter saw a race; a barrier with phases that nobody saw is an error there."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # The detector's verdict has no public name.

    options = {"scale": 1.0, "key_length": None, "block_mask": None, "with_entropy": True, "config": SMALL} | options
    with interpretable(monkeypatch, commit=commit) as patch:
        patch.setattr(mosaic_gpu, "MULTIPROCESSORS", multiprocessors)
        parameters = plgpu.InterpretGPUParams(detect_races=True)  # pyright: ignore[reportAttributeAccessIssue]
        with plgpu.force_gpu_interpret_mode(parameters):  # pyright: ignore[reportAttributeAccessIssue]
            try:
                got = jax.block_until_ready(mosaic_gpu_attention(*arrays, **options))
                return got, gpu_callbacks.get_races().races_found
            except RuntimeError as error:
                # From jax 0.12 on a race stops the interpreter.
                if "RACE DETECTED" not in str(error):
                    raise
                return None, True
            finally:
                gpu_callbacks.reset_gpu_interpret_mode_state()


def check(monkeypatch, arrays, *, dtype=jnp.bfloat16, exact=None, **options):
    arrays = tuple(jnp.asarray(x, dtype) for x in arrays)
    got, raced = interpreted(monkeypatch, arrays, **options)
    assert got is not None
    assert not raced
    visible = {name: options.get(name) for name in ("key_length", "block_mask")}
    want = attend(*(arrays if exact is None else exact), scale=options.get("scale", 1.0), **visible)
    seen = np.isfinite(want.log_sum_exp)
    assert got.out.dtype == dtype
    assert got.out.shape == want.out.shape
    # The weights and the output are rounded to 8 or 11 bits, the statistics to 24.
    assert relative(got.out, want.out) < (4e-3 if dtype == jnp.bfloat16 else 1e-3)
    assert relative(np.asarray(got.log_sum_exp)[seen], want.log_sum_exp[seen]) < 2e-6
    np.testing.assert_array_equal(np.asarray(got.log_sum_exp)[~seen], np.float32(MASKED))
    np.testing.assert_array_equal(np.swapaxes(np.asarray(got.out, np.float32), 1, 2)[~seen], 0.0)
    if options.get("with_entropy", True):
        assert relative(got.entropy, want.entropy) < 2e-6
        assert np.all(np.asarray(got.entropy) >= 0.0)
        np.testing.assert_array_equal(np.asarray(got.entropy)[~seen], 0.0)
    else:
        assert got.entropy is None


@needs_interpreter
@pytest.mark.parametrize("schedule", ["pingpong", "overlap", "overlap_pingpong", "free"])
@pytest.mark.parametrize("multiprocessors", [1, 132], ids=["one block walks", "a block per tile"])
def test_every_schedule_agrees_and_is_free_of_races(monkeypatch, schedule, multiprocessors):
    config = dataclasses.replace(SMALL, schedule=schedule)
    check(monkeypatch, draw(0, 1, 200, 300, 1, 64), config=config, multiprocessors=multiprocessors)


@needs_interpreter
@pytest.mark.parametrize("schedule", ["pingpong", "overlap", "overlap_pingpong"])
def test_the_output_may_take_the_memory_of_the_queries(monkeypatch, schedule):
    monkeypatch.setattr(MosaicGpuConfig, "output_apart", lambda *_: False)
    config = dataclasses.replace(SMALL, schedule=schedule)
    check(monkeypatch, draw(13, 1, 200, 130, 2, 64), config=config, multiprocessors=2)


@needs_interpreter
@pytest.mark.parametrize(("length", "num_keys"), [(1, 1), (65, 64), (129, 130)])
def test_lengths_past_which_the_copy_engine_fills_in(monkeypatch, length, num_keys):
    check(monkeypatch, draw(1, 1, length, num_keys, 2, 64))


@needs_interpreter
@pytest.mark.parametrize("width", [8, 72, 100, 128, 160])
def test_head_dims_that_fill_no_chunk(monkeypatch, width):
    check(monkeypatch, draw(2, 1, 64, 130, 1, width), config=ALONE)


@needs_interpreter
def test_half_precision_agrees(monkeypatch):
    check(monkeypatch, draw(3, 1, 64, 130, 1, 64), config=ALONE, dtype=jnp.float16)


@needs_interpreter
def test_without_entropy_the_rest_is_the_same(monkeypatch):
    check(monkeypatch, draw(4, 1, 64, 130, 1, 64), config=ALONE, with_entropy=False)


@needs_interpreter
@pytest.mark.parametrize("compute_warpgroups", [1, 3])
def test_other_numbers_of_warpgroups(monkeypatch, compute_warpgroups):
    config = dataclasses.replace(ALONE, compute_warpgroups=compute_warpgroups, stages=3)
    check(monkeypatch, draw(5, 1, 200, 300, 1, 64), config=config)


@needs_interpreter
@pytest.mark.parametrize("schedule", ["pingpong", "overlap", "overlap_pingpong"])
def test_invisible_keys_and_values_may_be_nan(monkeypatch, schedule):
    arrays = tuple(jnp.asarray(x, jnp.bfloat16) for x in draw(6, 3, 64, 200, 1, 64))
    lengths = jnp.array([200, 77, 0], jnp.int32)
    hidden = (jnp.arange(200)[None] >= lengths[:, None])[..., None, None]
    dirty = arrays[0], *(jnp.where(hidden, jnp.asarray(jnp.nan, x.dtype), x) for x in arrays[1:])
    config = dataclasses.replace(SMALL, schedule=schedule)
    check(monkeypatch, dirty, exact=arrays, key_length=lengths, config=config, multiprocessors=2)


@needs_interpreter
@pytest.mark.parametrize("schedule", ["pingpong", "overlap", "overlap_pingpong"])
def test_block_mask_with_lengths(monkeypatch, schedule):
    pattern = np.array([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 1]], bool)
    lengths = jnp.array([600, 300], jnp.int32)
    config = dataclasses.replace(SMALL, schedule=schedule)
    arrays = draw(7, 2, 300, 600, 1, 64)
    mask = BlockMask.from_array(pattern)
    check(monkeypatch, arrays, block_mask=mask, key_length=lengths, config=config, multiprocessors=2)
    check(monkeypatch, arrays, block_mask=mask, config=config)


@needs_interpreter
def test_the_race_detector_sees_a_planted_race(monkeypatch):
    arrays = tuple(jnp.asarray(x, jnp.bfloat16) for x in draw(8, 1, 64, 300, 1, 64))
    _, raced = interpreted(monkeypatch, arrays, config=ALONE, commit=False)
    assert raced


@needs_interpreter
def test_nan_values_are_what_clearing_rows_is_for(monkeypatch):
    arrays = tuple(jnp.asarray(x, jnp.bfloat16) for x in draw(9, 1, 64, 100, 1, 64))
    dirty = arrays[0], arrays[1], arrays[2].at[:, 80:].set(jnp.nan)
    monkeypatch.setattr(kernel, "_clear_rows", lambda *_: None)
    got, _ = interpreted(monkeypatch, dirty, config=ALONE, key_length=jnp.array([80], jnp.int32))
    assert got is not None
    assert np.isnan(np.asarray(got.out, np.float32)).any()


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_row_arithmetic_over_tiles_agrees_with_float64(spread):
    q, k, v = (np.asarray(x) for x in draw(10, 1, 32, 256, 1, 64, spread=spread))
    scale, limit = 0.7, 200
    products = jnp.asarray(q[0, :, 0] @ k[0, :, 0].T)
    rows = Rows(jnp.full(32, MASKED), jnp.zeros(32), jnp.zeros(32))
    out = jnp.zeros((32, 64))
    for start in range(0, 256, 64):
        visible = jnp.broadcast_to(jnp.arange(start, start + 64)[None] < limit, (32, 64))
        tile = products[:, start : start + 64]
        masks = visible if start + 64 > limit else None
        weights, rows, rescale = softmax_tile(tile, rows, masks, scale * LOG2_E, True)
        out = out * rescale[:, None] + weights @ v[0, start : start + 64, 0]
    inverse, log_sum_exp, entropy = finish_rows(rows)
    want = attend(q, k, v, scale=scale, key_length=np.array([limit]))
    assert relative(out * inverse[:, None], want.out[0, :, 0]) < 5e-6
    assert relative(log_sum_exp, want.log_sum_exp[0, 0]) < 2e-6
    assert relative(entropy, want.entropy[0, 0]) < 5e-6


def test_a_common_shift_of_all_scores_cancels():
    products = jnp.asarray(np.random.default_rng(11).integers(-8, 8, (16, 64)), jnp.float32)
    rows = Rows(jnp.full(16, MASKED), jnp.zeros(16), jnp.zeros(16))
    near, far = (finish_rows(softmax_tile(products + shift, rows, None, 0.5, True)[1]) for shift in (0.0, -(2.0**20)))
    np.testing.assert_array_equal(near[2], far[2])
    np.testing.assert_allclose(far[1] - near[1], -(2.0**20) * 0.5 / LOG2_E, rtol=1e-6)


def test_rows_without_visible_keys_finish_as_zeros():
    inverse, log_sum_exp, entropy = finish_rows(Rows(jnp.full(2, MASKED), jnp.zeros(2), jnp.zeros(2)))
    np.testing.assert_array_equal(inverse, 1.0)
    np.testing.assert_array_equal(log_sum_exp, np.float32(MASKED))
    np.testing.assert_array_equal(entropy, 0.0)


def test_a_row_of_nan_stays_nan():
    rows = Rows(jnp.full(1, MASKED), jnp.zeros(1), jnp.zeros(1))
    _, rows, _ = softmax_tile(jnp.ones((1, 64)).at[0, 3].set(jnp.nan), rows, None, 0.3, True)
    assert all(np.isnan(x).all() for x in finish_rows(rows))


@pytest.mark.parametrize("persistent", [True, False], ids=["persistent", "a block per tile"])
@pytest.mark.parametrize("schedule", ["pingpong", "overlap", "overlap_pingpong", "free"])
def test_no_number_is_wider_where_64_bit_types_are_enabled(schedule, persistent):
    q, kv = (jax.ShapeDtypeStruct((8, length, 16, 64), jnp.bfloat16) for length in (512, 600))
    lengths = jax.ShapeDtypeStruct((8,), jnp.int32)
    config = dataclasses.replace(SMALL, schedule=schedule, persistent=persistent)

    def call(q, k, v, lengths, block_mask):
        options = {"scale": 0.1, "block_mask": block_mask, "with_entropy": True, "config": config}
        return mosaic_gpu_attention(q, k, v, key_length=lengths, **options)

    with jax.enable_x64(True):
        for block_mask, visible in (None, lengths), (BlockMask.from_array(np.eye(4, 5, dtype=bool)), None):
            traced = jax.make_jaxpr(call, static_argnums=4)(q, kv, kv, visible, block_mask)
            assert [str(x.dtype) for x in traced.out_avals] == ["bfloat16", "float32", "float32"]
            # Loops count in 64 bits there if their bounds are numbers; nothing computes in them.
            assert "f64" not in str(traced)


def test_rows_that_see_one_key_have_no_entropy():
    rows = Rows(jnp.full(1, MASKED), jnp.zeros(1), jnp.zeros(1))
    visible = (jnp.arange(64) == 3)[None]
    _, rows, _ = softmax_tile(jnp.full((1, 64), 1e4), rows, visible, 0.3, True)
    _, log_sum_exp, entropy = finish_rows(rows)
    assert float(entropy[0]) == 0.0
    assert math.isclose(float(log_sum_exp[0]), 1e4 * 0.3 / LOG2_E, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("target", "changes", "reason"),
    [
        (HOPPER, {}, None),
        (HOPPER, {"dtype": np.dtype(np.float16)}, None),
        (HOPPER, {"dtype": np.dtype(np.float32)}, "float32"),
        (HOPPER, {"head_dim": 257}, "257"),
        (Target("cuda", "NVIDIA A100", (8, 0)), {}, "A100"),
        (Target("cuda", "NVIDIA B200", (10, 0)), {}, "B200"),
        (Target("cuda", "unknown", None), {}, "unknown"),
        (Target("tpu", "TPU v5e"), {}, "TPU v5e"),
    ],
)
def test_why_not_names_the_value(target, changes, reason):
    got = why_not(problem(**changes), target)
    assert got is None if reason is None else reason in got


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("query_tile", 32),
        ("key_tile", 96),
        ("key_tile", 320),
        ("stages", 1),
        ("compute_warpgroups", 4),
        ("schedule", "serial"),
    ],
)
def test_a_config_outside_its_ranges_is_refused(field, value):
    with pytest.raises(ValueError, match=str(value)):
        MosaicGpuConfig(**{"compute_warpgroups": 2, "schedule": "free", field: value})


def test_taking_turns_needs_two():
    with pytest.raises(ValueError, match="3 compute warpgroups"):
        MosaicGpuConfig(compute_warpgroups=3)


@pytest.mark.parametrize("head_dim", [8, 64, 96, 128, 160, 192, 256])
@pytest.mark.parametrize("num_queries", [1, 64, 4096])
def test_default_and_candidates_fit_the_device(head_dim, num_queries):
    found = candidates(problem(head_dim=head_dim, num_queries=num_queries), HOPPER)
    assert found[0] == default_config(problem(head_dim=head_dim, num_queries=num_queries), HOPPER)
    assert len(set(found)) == len(found) >= 4
    assert all(config.shared_memory(head_dim) <= SHARED_MEMORY for config in found)


def test_candidates_divide_the_blocks_of_a_mask():
    mask = BlockMask.from_array(np.ones((2, 3), bool), query_block=128, key_block=384)
    found = candidates(problem(num_queries=256, num_keys=1100, block_mask=mask), HOPPER)
    assert found
    assert all(128 % config.block_queries == 0 and 384 % config.key_tile == 0 for config in found)


@pytest.mark.parametrize(
    ("config", "mask", "text"),
    [
        (MosaicGpuConfig(key_tile=256, stages=3), None, "bytes of shared memory"),
        (MosaicGpuConfig(compute_warpgroups=3, schedule="free"), BlockMask(((True,),)), "must divide"),
    ],
)
def test_a_config_that_does_not_fit_says_so(config, mask, text):
    arrays = tuple(jnp.asarray(x, jnp.bfloat16) for x in draw(12, 1, 128, 128, 1, 128))
    with pytest.raises(NotImplementedError, match=text):
        mosaic_gpu_attention(*arrays, scale=1.0, key_length=None, block_mask=mask, with_entropy=False, config=config)
