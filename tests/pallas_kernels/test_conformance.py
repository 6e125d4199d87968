"""One table of cases for all implementations, against the float64 twin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention.api import attention
from pallas_kernels.attention.xla_chunked import chunked_attention

from .twin import attend, draw, relative

IMPLEMENTATIONS = ("reference", "xla")


def check(arrays, *, bound, run=attention, **options):
    lengths = options.get("key_length")
    # Compiled: fusion may round differently from one operation at a time, and users compile.
    compiled = jax.jit(lambda *arrays: run(*arrays, with_entropy=True, **options))
    got = compiled(*(jnp.asarray(x) for x in arrays))
    out, log_sum_exp, entropy = attend(*arrays, scale=options["scale"], key_length=lengths)
    seen = np.isfinite(log_sum_exp)
    assert relative(got.out, out) < bound
    assert relative(np.asarray(got.log_sum_exp)[seen], log_sum_exp[seen]) < bound
    assert relative(got.entropy, entropy) < bound
    assert np.all(np.asarray(got.entropy) >= 0.0)
    assert np.all(np.asarray(got.log_sum_exp)[~seen] < -1e29)
    assert np.all(np.isfinite(got.log_sum_exp))


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return request.param


@pytest.mark.parametrize(
    ("length", "num_keys"), [(1, 1), (7, 7), (1, 513), (7, 513), (513, 7), (64, 512), (3, 1030)], ids=str
)
def test_float32_agrees_at_awkward_lengths(implementation, length, num_keys):
    arrays = draw(0, 2, length, num_keys, 3, 8)
    check(arrays, scale=0.7, implementation=implementation, bound=1e-6)


def test_bfloat16_inputs_keep_float32_statistics(implementation):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in draw(1, 2, 7, 513, 3, 16))
    got = attention(q, k, v, scale=1.0, with_entropy=True, implementation=implementation)
    out, log_sum_exp, entropy = attend(q, k, v, scale=1.0)
    assert (got.out.dtype, got.log_sum_exp.dtype, got.entropy.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    assert relative(got.out, out) < 2e-3
    assert relative(got.log_sum_exp, log_sum_exp) < 1e-6
    assert relative(got.entropy, entropy) < 1e-6


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.int8], ids=str)
def test_ragged_keys_of_any_integer_type(implementation, dtype):
    lengths = jnp.array([7, 0, 1, 3, 5], dtype)
    check(draw(2, 5, 7, 7, 2, 8), scale=1.0, key_length=lengths, implementation=implementation, bound=1e-6)


def test_invisible_keys_do_not_matter_whatever_they_hold(implementation):
    q, k, v = (jnp.asarray(x) for x in draw(3, 2, 5, 600, 2, 8))
    lengths = jnp.array([550, 3])
    hidden = (jnp.arange(600)[None] >= lengths[:, None])[:, :, None, None]
    options = {"scale": 1.0, "key_length": lengths, "with_entropy": True, "implementation": implementation}
    plain = attention(q, k, v, **options)
    other = attention(q, jnp.where(hidden, 1e4, k), jnp.where(hidden, -1e4, v), **options)
    for a, b in zip(plain, other, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_row_without_keys_is_zero_with_zero_entropy(implementation):
    arrays = (jnp.asarray(x) for x in draw(4, 2, 3, 600, 2, 8))
    got = attention(
        *arrays, scale=1.0, key_length=jnp.array([0, 600]), with_entropy=True, implementation=implementation
    )
    np.testing.assert_array_equal(got.out[0], 0.0)
    np.testing.assert_array_equal(got.entropy[0], 0.0)
    assert np.all(np.asarray(got.entropy[1]) > 0)


def test_gradients_with_rows_that_see_nothing_are_finite_at_every_step(implementation):
    arrays = tuple(jnp.asarray(x) for x in draw(5, 3, 4, 9, 2, 8))

    def loss(q, k, v):
        got = attention(
            *(q, k, v), scale=1.0, key_length=jnp.array([0, 9, 2]), with_entropy=True, implementation=implementation
        )
        seen = jnp.array([0.0, 1.0, 1.0])[:, None, None]
        return jnp.sum(got.out**2) + jnp.sum(got.entropy) + jnp.sum(got.log_sum_exp * seen)

    with jax.debug_nans(True):
        gradients = jax.grad(loss, argnums=(0, 1, 2))(*arrays)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient[0], 0.0)
        assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(gradients[1][2, 2:], 0.0)


def test_gradients_agree_with_finite_differences_of_the_twin(implementation):
    arrays = draw(6, 1, 2, 11, 1, 4, spread=2.0)
    weights = [np.random.default_rng(i).standard_normal(s) for i, s in enumerate([(1, 2, 1, 4), (1, 1, 2), (1, 1, 2)])]
    cotangents = [jnp.asarray(w, jnp.float32) for w in weights]

    def loss(q, k, v):
        got = attention(q, k, v, scale=0.9, with_entropy=True, implementation=implementation)
        return sum(jnp.sum(a * w) for a, w in zip(got, cotangents, strict=True))

    def slow(q, k, v):
        return sum(np.sum(a * w) for a, w in zip(attend(q, k, v, scale=0.9), weights, strict=True))

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*(jnp.asarray(x) for x in arrays))
    wide = [np.float64(x) for x in arrays]
    for which, gradient in enumerate(gradients):
        numeric = np.zeros(wide[which].shape)
        for at in np.ndindex(numeric.shape):
            shifted = []
            for sign in (1, -1):
                moved = [x.copy() for x in wide]
                moved[which][at] += sign * 1e-5
                shifted.append(slow(*moved))
            numeric[at] = (shifted[0] - shifted[1]) / 2e-5
        assert relative(gradient, numeric) < 1e-5


def test_gradients_of_all_implementations_agree_over_several_chunks():
    arrays = tuple(jnp.asarray(x) for x in draw(7, 2, 3, 1030, 2, 8))

    def loss(implementation, *arrays):
        got = attention(*arrays, scale=3.0, with_entropy=True, implementation=implementation)
        return jnp.sum(got.out**2) + jnp.sum(got.entropy**2) + jnp.sum(got.log_sum_exp)

    gradient = jax.jit(jax.grad(loss, argnums=(1, 2, 3)), static_argnums=0)
    reference, *others = (gradient(name, *arrays) for name in IMPLEMENTATIONS)
    for other in others:
        assert max(map(relative, other, reference)) < 1e-5


def test_sharp_rows_have_no_entropy_and_pick_one_value(implementation):
    q = jnp.eye(6, dtype=jnp.float32)[None, :, None, :]
    v = jnp.arange(6, dtype=jnp.float32)[None, :, None, None] * jnp.ones((1, 6, 1, 6), jnp.float32)
    got = attention(q, q, v, scale=100.0, with_entropy=True, implementation=implementation)
    np.testing.assert_array_equal(got.out[0, :, 0, 0], np.arange(6))
    np.testing.assert_allclose(got.entropy, 0.0, atol=1e-30)
    assert np.all(np.asarray(got.entropy) >= 0.0)
    np.testing.assert_allclose(got.log_sum_exp, 100.0, rtol=1e-6)


def test_entropy_stays_exact_between_sharp_and_uniform(implementation):
    arrays = draw(8, 1, 16, 700, 2, 8, spread=1.0)
    for scale in (0.01, 1.0, 10.0, 100.0):
        check(arrays, scale=scale, implementation=implementation, bound=4e-6)


@pytest.mark.parametrize("num_keys", [1, 2, 7, 512, 513, 1500])
def test_uniform_rows_have_the_entropy_of_the_number_of_keys(implementation, num_keys):
    q = jnp.zeros((1, 2, 1, 4), jnp.float32)
    kv = jnp.ones((1, num_keys, 1, 4), jnp.float32)
    got = attention(q, kv, kv, scale=1.0, with_entropy=True, implementation=implementation)
    np.testing.assert_allclose(got.entropy, np.log(num_keys), rtol=1e-6, atol=1e-30)
    np.testing.assert_allclose(got.out, 1.0, rtol=1e-5)


@pytest.mark.parametrize("level", [-1e30, -1e9, -1e4, 1e4, 1e9], ids=str)
def test_only_differences_of_scores_matter(implementation, level):
    q = jnp.ones((1, 2, 1, 1), jnp.float32)
    k = jnp.full((1, 600, 1, 1), level, jnp.float32)
    v = jnp.arange(600, dtype=jnp.float32)[None, :, None, None]
    got = attention(q, k, v, scale=1.0, with_entropy=True, implementation=implementation)
    np.testing.assert_allclose(got.out, 299.5, rtol=1e-5)
    np.testing.assert_allclose(got.entropy, np.log(600), rtol=1e-5)


def test_rising_and_falling_maxima_across_chunks_leave_no_trace():
    rising = np.linspace(-60.0, 60.0, 40, dtype=np.float32)
    q, v = np.ones((1, 1, 1, 1), np.float32), np.random.default_rng(9).standard_normal((1, 40, 1, 1), np.float32)
    for scores in (rising, rising[::-1], np.roll(rising, 20)):
        check(
            (q, scores[None, :, None, None], v),
            scale=1.0,
            bound=1e-5,
            run=lambda *a, **o: chunked_attention(*a, key_length=None, block_mask=None, chunk=7, **o),
        )


@pytest.mark.parametrize("chunk", [1, 2, 7, 12, 13, 14, 512])
def test_chunk_boundaries_do_not_show(chunk):
    lengths = jnp.array([13, 12, 7, 6])
    check(
        draw(10, 4, 3, 13, 2, 4),
        scale=2.0,
        key_length=lengths,
        bound=1e-5,
        run=lambda *a, **o: chunked_attention(*a, block_mask=None, chunk=chunk, **o),
    )


@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data(), implementation=st.sampled_from(IMPLEMENTATIONS))
def test_any_shape(data, implementation):
    batch, length, heads, width = (data.draw(st.integers(1, top)) for top in (3, 9, 3, 9))
    num_keys = data.draw(st.sampled_from([1, 2, 5, 511, 512, 513]))
    lengths = data.draw(st.none() | st.lists(st.integers(0, num_keys), min_size=batch, max_size=batch))
    check(
        draw(data.draw(st.integers(0, 99)), batch, length, num_keys, heads, width, spread=3.0),
        scale=data.draw(st.sampled_from([0.1, 1.0, 30.0])),
        key_length=None if lengths is None else jnp.array(lengths, jnp.int32),
        implementation=implementation,
        bound=1e-5,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_works_where_64_bits_are_enabled(implementation, dtype):
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(x, dtype) for x in draw(11, 2, 7, 600, 2, 8))
        lengths = jnp.array([600, 13])
        got = attention(q, k, v, scale=0.5, key_length=lengths, with_entropy=True, implementation=implementation)
        gradient = jax.grad(
            lambda q: jnp.sum(attention(q, k, v, scale=0.5, implementation=implementation).log_sum_exp)
        )(q)
    want = attend(q, k, v, scale=0.5, key_length=lengths)
    assert (got.out.dtype, got.entropy.dtype, gradient.dtype) == (q.dtype, jnp.float32, q.dtype)
    assert relative(got.out, want.out) < (1e-6 if dtype != "bfloat16" else 4e-3)
    assert relative(got.entropy, want.entropy) < 1e-6


@pytest.mark.parametrize("spec", [("x",), (None, None, "x")], ids=str)
def test_works_with_shardings_in_types(implementation, spec):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    arrays = draw(12, 2, 7, 600, 2, 8)
    with jax.set_mesh(mesh):
        q, k, v = (jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P(*spec))) for x in arrays)
        run = jax.jit(lambda q, k, v: attention(q, k, v, scale=0.5, with_entropy=True, implementation=implementation))
        got = run(q, k, v)
    want = attend(*arrays, scale=0.5)
    assert relative(got.out, want.out) < 1e-6
    assert relative(got.entropy, want.entropy) < 1e-6


def test_a_nan_among_the_inputs_stays_one(implementation):
    q, k, v = (jnp.asarray(x) for x in draw(13, 1, 3, 600, 1, 4))
    got = attention(q.at[0, 1].set(jnp.nan), k, v, scale=1.0, with_entropy=True, implementation=implementation)
    for part in (got.out[0, :, 0, 0], got.log_sum_exp[0, 0], got.entropy[0, 0]):
        np.testing.assert_array_equal(np.isnan(part), [False, True, False])
