"""The TPU kernel on CPU: JAX's TPU interpreter, with uninitialised memory full of NaN and its race detector on."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # The race detector's verdict has no public name.
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention import mosaic_tpu
from pallas_kernels.attention.block_mask import BlockMask
from pallas_kernels.attention.mosaic_tpu import MosaicTpuConfig, mosaic_tpu_attention
from pallas_kernels.attention.mosaic_tpu_kernel import Shape, visited_tile

from .twin import attend, draw, relative

SMALL = MosaicTpuConfig(128, 128, 128)


@contextlib.contextmanager
def interpreter(cores: int):
    """One core is fast. With two, the axes said to be parallel are."""
    parameters = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=cores, random_seed=0)
    try:
        with pltpu.force_tpu_interpret_mode(parameters):
            yield
    finally:
        pltpu.reset_tpu_interpret_mode_state()


# The interpreter is a large program that runs for a moment: compiling it dominates.
@functools.partial(
    jax.jit,
    static_argnames=("scale", "block_mask", "with_entropy", "config"),
    compiler_options={"xla_backend_optimization_level": 0},
)
def compiled(q, k, v, key_length, **options):
    return mosaic_tpu_attention(q, k, v, key_length=key_length, **options)


@pytest.fixture
def sabotage(monkeypatch):
    """Replace something of a module for one test, with nothing compiled before or after it reused."""

    def replace(module, name, value):
        compiled.clear_cache()
        monkeypatch.setattr(module, name, value)

    yield replace
    compiled.clear_cache()


def run(*arrays, config=None, key_length=None, block_mask=None, scale=1.0, with_entropy=True, cores=1):
    options = {"scale": scale, "block_mask": block_mask, "with_entropy": with_entropy, "config": config}
    with interpreter(cores):
        got = jax.block_until_ready(compiled(*(jnp.asarray(x) for x in arrays), key_length, **options))
        assert not interpret_pallas_call.races.races_found
    return got


def check(arrays, bound, *, dtype=jnp.float32, entropy_bound=None, **options):
    arrays = tuple(jnp.asarray(x, dtype) for x in arrays)
    got = run(*arrays, **options)
    exact = {name: options.get(name) for name in ("key_length", "block_mask")}
    want = attend(*arrays, scale=options.get("scale", 1.0), **exact)
    seen = np.isfinite(want.log_sum_exp)
    assert got.out.dtype == dtype
    assert relative(got.out, want.out) < bound
    assert relative(np.asarray(got.log_sum_exp)[seen], want.log_sum_exp[seen]) < 1e-6
    assert relative(got.entropy, want.entropy) < (bound if entropy_bound is None else entropy_bound)
    assert np.all(np.asarray(got.entropy) >= 0.0)
    np.testing.assert_array_equal(np.asarray(got.log_sum_exp)[~seen], np.float32(-1e30))
    np.testing.assert_array_equal(np.swapaxes(np.asarray(got.out), 1, 2)[~seen], 0.0)
    np.testing.assert_array_equal(np.asarray(got.entropy)[~seen], 0.0)


@pytest.mark.parametrize(
    ("length", "num_keys", "config"),
    [
        (1, 1, None),
        (7, 513, None),
        (513, 7, None),
        (300, 700, MosaicTpuConfig(128, 512, 256)),
        (128, 256, SMALL),
    ],
    ids=lambda value: "default" if value is None else str(value) if isinstance(value, int) else "tiled",
)
def test_float32_agrees_at_awkward_lengths(length, num_keys, config):
    check(draw(0, 2, length, num_keys, 2, 64, spread=3.0), 2e-6, config=config)


@pytest.mark.parametrize("width", [64, 80, 96, 104, 112, 120, 128, 160, 256])
def test_every_head_dim_agrees(width):
    check(draw(1, 1, 20, 150, 1, width, spread=3.0), 2e-6, config=MosaicTpuConfig(32, 128, 128))


@pytest.mark.parametrize("width", [64, 128])
def test_bfloat16_rounds_weights_and_values_but_not_the_statistics(width):
    arrays = draw(2, 1, 130, 700, 2, width, spread=3.0)
    check(arrays, 4e-3, dtype=jnp.bfloat16, entropy_bound=1e-6, config=MosaicTpuConfig(256, 512, 256))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.int8], ids=str)
def test_ragged_keys_end_anywhere(dtype):
    lengths = jnp.array([0, 1, 127, 120, 100], dtype)
    check(draw(3, 5, 7, 127, 1, 64), 2e-6, key_length=lengths, config=MosaicTpuConfig(16, 128, 128))


def test_ragged_keys_end_on_tiles_and_beyond_the_array():
    lengths = jnp.array([128, 256, 257, 384, 1000, -3])
    check(draw(4, 6, 7, 600, 1, 64), 2e-6, key_length=lengths, config=MosaicTpuConfig(16, 256, 128))


def test_what_invisible_keys_hold_does_not_matter_even_if_it_is_nan():
    q, k, v = (jnp.asarray(x) for x in draw(5, 2, 9, 300, 1, 64))
    lengths = jnp.array([140, 3])
    hidden = (jnp.arange(300)[None] >= lengths[:, None])[:, :, None, None]
    options = {"key_length": lengths, "config": MosaicTpuConfig(16, 256, 128)}
    plain = run(q, k, v, **options)
    other = run(q, jnp.where(hidden, jnp.nan, k), jnp.where(hidden, jnp.nan, v), **options)
    for a, b in zip(plain, other, strict=True):
        np.testing.assert_array_equal(a, b)


PATTERN = BlockMask.from_array(np.array([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1]], bool))
WIDE = BlockMask.from_array(np.array([[0, 1], [1, 0]], bool), query_block=256, key_block=384)


@pytest.mark.parametrize(
    ("mask", "length", "num_keys", "key_length"),
    [
        (PATTERN, 300, 450, None),
        (PATTERN, 300, 450, [450, 256, 129, 0]),
        (WIDE, 300, 700, [700, 384]),
    ],
    ids=["pattern", "ragged-pattern", "ragged-wide"],
)
def test_block_masks_hide_what_they_say(mask, length, num_keys, key_length):
    lengths = None if key_length is None else jnp.array(key_length)
    check(
        draw(6, 1 if key_length is None else len(key_length), length, num_keys, 1, 64),
        2e-6,
        block_mask=mask,
        key_length=lengths,
    )


def test_tiles_finer_than_the_mask_give_the_same():
    check(draw(7, 1, 300, 700, 1, 64), 2e-6, block_mask=WIDE, config=SMALL)


def test_hidden_tiles_are_neither_fetched_nor_computed():
    table = PATTERN.tiles(300, 450, 128, 128)
    shape = Shape(3, 3, 128, 128, 1.0, False, True)

    def fetched(query_tile, visits, tiles):
        return [int(visited_tile(shape, 0, query_tile, step, visits, tiles)) for step in range(3)]

    tiles = jnp.asarray(table.indices.reshape(-1))
    assert [fetched(tile, jnp.asarray(table.counts), tiles) for tile in range(3)] == [[0, 2, 2], [0, 0, 0], [1, 2, 3]]
    assert fetched(0, jnp.array([2, 2, 2]), None) == [0, 1, 1]
    q, k, v = (jnp.asarray(x) for x in draw(8, 1, 300, 450, 1, 64))
    hidden = ~PATTERN.array[0].repeat(128)[None, :450, None, None]
    plain = run(q, k, v, block_mask=PATTERN)
    other = run(q, jnp.where(hidden, jnp.nan, k), v, block_mask=PATTERN)
    np.testing.assert_array_equal(plain.out[:, :256], other.out[:, :256])
    assert np.all(np.isnan(other.out[:, 256:]))


def test_sharp_rows_have_no_entropy_and_pick_one_value():
    # The least and the largest score of each row are 100 apart.
    q = jnp.eye(64, dtype=jnp.float32)[None, :, None, :]
    v = jnp.arange(64, dtype=jnp.float32)[None, :, None, None] * jnp.ones((1, 64, 1, 64), jnp.float32)
    got = run(q, q, v, scale=100.0)
    np.testing.assert_array_equal(got.out[0, :, 0, 0], np.arange(64))
    np.testing.assert_allclose(got.entropy, 0.0, atol=1e-30)
    np.testing.assert_allclose(got.log_sum_exp, 100.0, rtol=1e-6)


def test_entropy_stays_exact_between_sharp_and_uniform():
    q, k, v = draw(9, 3, 16, 700, 1, 64)
    q *= np.float32([0.01, 10.0, 100.0])[:, None, None, None] / 10.0
    got = run(q, k, v, scale=10.0, config=MosaicTpuConfig(16, 256, 128))
    want = attend(q, k, v, scale=10.0)
    for row, bound in enumerate([1e-6, 2e-6, 2e-5]):
        assert relative(got.out[row], want.out[row]) < bound
        assert relative(got.entropy[row], want.entropy[row]) < bound


def test_uniform_rows_have_the_entropy_of_the_number_of_keys():
    lengths = np.array([1, 128, 300])
    kv = jnp.ones((3, 300, 1, 64), jnp.float32)
    q = jnp.zeros((3, 2, 1, 64), jnp.float32)
    got = run(q, kv, kv, key_length=jnp.asarray(lengths), config=MosaicTpuConfig(16, 128, 128))
    want = np.broadcast_to(np.log(lengths)[:, None, None], (3, 1, 2))
    np.testing.assert_allclose(got.entropy, want, rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(got.out, 1.0, rtol=1e-6)


def test_only_differences_of_scores_matter():
    levels = jnp.array([-1e30, -1e9, 1e9])[:, None, None]
    q = jnp.zeros((3, 2, 1, 64), jnp.float32).at[..., 0].set(1.0)
    k = jnp.zeros((3, 300, 1, 64), jnp.float32).at[..., 0].set(levels)
    v = jnp.arange(300, dtype=jnp.float32)[None, :, None, None] * jnp.ones((3, 1, 1, 64), jnp.float32)
    got = run(q, k, v, config=MosaicTpuConfig(16, 128, 128))
    np.testing.assert_allclose(got.out, 149.5, rtol=1e-6)
    np.testing.assert_allclose(got.entropy, np.log(300), rtol=1e-6)


def test_no_scale_turns_what_is_invisible_or_far_into_nan():
    # Differences of the scores overflow once they are multiplied by the scale.
    levels = jnp.where(jnp.arange(300) < 150, 0.0, -1e30)[None, :, None]
    q = jnp.zeros((1, 2, 1, 64), jnp.float32).at[..., 0].set(1.0)
    k = jnp.zeros((1, 300, 1, 64), jnp.float32).at[..., 0].set(levels)
    got = run(q, k, jnp.ones_like(k), scale=1e9, config=MosaicTpuConfig(16, 128, 128))
    np.testing.assert_allclose(got.entropy, np.log(150), rtol=1e-6)
    np.testing.assert_allclose(got.log_sum_exp, np.log(150), rtol=1e-6)
    np.testing.assert_allclose(got.out, 1.0, rtol=1e-6)


def test_rising_and_falling_maxima_across_tiles_leave_no_trace():
    rising = np.linspace(-60.0, 60.0, 400, dtype=np.float32)
    q = np.zeros((1, 3, 1, 64), np.float32)
    k = np.zeros((1, 400, 1, 64), np.float32)
    q[0, :, 0] = np.eye(3, 64)
    k[0, :, 0, :3] = np.stack([rising, rising[::-1], np.roll(rising, 200)], axis=-1)
    v = np.random.default_rng(9).standard_normal((1, 400, 1, 64), np.float32)
    check((q, k, v), 2e-6, config=MosaicTpuConfig(16, 128, 128))


def test_results_repeat_bit_for_bit_and_do_not_depend_on_the_wish_for_entropy():
    arrays = draw(10, 1, 130, 300, 2, 64)
    first, again = (run(*arrays, config=SMALL) for _ in range(2))
    plain = run(*arrays, config=SMALL, with_entropy=False)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert plain.entropy is None
    np.testing.assert_array_equal(first.out, plain.out)
    np.testing.assert_array_equal(first.log_sum_exp, plain.log_sum_exp)


def test_without_the_mask_of_the_tail_the_memory_past_the_end_would_be_seen(sabotage):
    arrays = draw(11, 1, 16, 300, 1, 64)
    assert np.all(np.isfinite(run(*arrays, config=MosaicTpuConfig(16, 256, 128)).out))
    sabotage(mosaic_tpu, "Shape", lambda **fields: Shape(**(fields | {"cut": False})))
    assert np.any(np.isnan(run(*arrays, config=MosaicTpuConfig(16, 256, 128)).out))


def test_with_keys_on_a_parallel_axis_the_detector_would_find_the_race(sabotage):
    run(*draw(12, 1, 140, 300, 2, 64), config=SMALL, cores=2)
    wrong = {"dimension_semantics": ("parallel",) * 4}
    right = pltpu.CompilerParams
    sabotage(pltpu, "CompilerParams", lambda **fields: right(**(fields | wrong)))
    # From jax 0.12 on the interpreter stops there itself.
    with pytest.raises((AssertionError, RuntimeError), match=r"races_found|RACE DETECTED"):
        run(*draw(12, 1, 16, 600, 1, 64), config=MosaicTpuConfig(16, 128, 128), cores=2)


def lowered(*, dtype=jnp.bfloat16, with_entropy=True, wrap=lambda call: call, **options) -> str:
    """The program for a TPU, which needs none to be written."""
    q, kv = (jax.ShapeDtypeStruct((4, length, 2, 128), dtype) for length in (1024, 2521))
    lengths = jax.ShapeDtypeStruct((4,), jnp.int32)
    options = {"scale": 1.0, "block_mask": None, "with_entropy": with_entropy} | options

    def call(q, k, v, lengths):
        return mosaic_tpu_attention(q, k, v, key_length=lengths, **options)

    return jax.jit(wrap(call)).trace(q, kv, kv, lengths).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("precision", [None, "highest", "default"])
def test_lowers_for_tpu_to_the_same_kernel_whatever_the_default_precision(dtype, precision):
    with jax.default_matmul_precision("highest"):
        wanted = lowered(dtype=dtype)
    assert wanted.count("tpu_custom_call") == 1
    with jax.default_matmul_precision(precision) if precision else contextlib.nullcontext():
        assert lowered(dtype=dtype) == wanted


@pytest.mark.parametrize("block_mask", [None, WIDE], ids=["dense", "pattern"])
def test_the_kernel_has_no_64_bit_numbers_where_they_are_enabled(block_mask):
    q, kv = (jax.ShapeDtypeStruct((2, length, 1, 64), jnp.float32) for length in (300, 700))
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)

    def call(q, k, v, lengths):
        options = {"scale": 0.1, "block_mask": block_mask, "with_entropy": True}
        return mosaic_tpu_attention(q, k, v, key_length=lengths, **options)

    with jax.enable_x64(True):
        traced = jax.make_jaxpr(call)(q, kv, kv, lengths)
    (kernel,) = [equation for equation in traced.eqns if equation.primitive.name == "pallas_call"]
    programs = kernel.params["jaxpr"], *(x.index_map_jaxpr for x in kernel.params["grid_mapping"].block_mappings)
    assert not [wide for wide in ("f64", "i64") for program in programs if wide in str(program)]


def test_entropy_costs_nothing_where_it_is_not_asked_for():
    def operations(with_entropy):
        q, kv = (jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float32) for length in (256, 512))
        options = {"scale": 1.0, "key_length": None, "block_mask": None, "with_entropy": with_entropy}
        return str(jax.make_jaxpr(lambda q, k, v: mosaic_tpu_attention(q, k, v, **options))(q, kv, kv))

    plain, full = operations(False), operations(True)
    assert plain.count(" mul ") < full.count(" mul ")


def test_shard_map_with_its_checks_takes_sharded_and_replicated_arrays():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharded = P("data", None, "tensor")
    rows = P("data", "tensor")

    def wrap(call):
        specs = (sharded, sharded, sharded, P())

        # Lengths are replicated: every shard takes its own rows.
        def local(q, k, v, lengths):
            mine = jax.lax.axis_index("data") * q.shape[0] + jnp.arange(q.shape[0])
            return tuple(call(q, k, v, lengths[mine]))

        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(sharded, rows, rows))

    assert lowered(wrap=wrap).count("tpu_custom_call") == 1
