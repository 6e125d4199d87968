"""Derivatives of kernels that only have a forward pass, against differentiating the reference itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import AttentionOutput, BlockMask, attention
from pallas_kernels.attention.differentiable import attention_gradients, with_derivatives
from pallas_kernels.attention.xla_chunked import chunked_attention

from .twin import draw, relative

PATTERN = BlockMask.from_array(np.array([[True, False, True], [False, False, False]]))


def fused(q, k, v, *, scale, key_length=None, block_mask=None, with_entropy=True) -> AttentionOutput:
    """A stand-in for a kernel: its inside is hidden from differentiation, as a kernel's is."""

    def forward(q, k, v, key_length):
        q, k, v = (jax.lax.optimization_barrier(x) for x in (q, k, v))
        options = {"key_length": key_length, "block_mask": block_mask, "with_entropy": with_entropy}
        return chunked_attention(q, k, v, scale=scale, **options)

    return with_derivatives(forward, q, k, v, key_length, scale=scale, block_mask=block_mask)


def weighted_sum(got: AttentionOutput, seed: int = 0):
    """A scalar that depends on every result; rows that see nothing have a constant log-sum-exp, which is left out."""
    total = jnp.zeros((), jnp.float32)
    for index, leaf in enumerate(jax.tree.leaves(got)):
        weights = np.random.default_rng(seed + index).standard_normal(leaf.shape, np.float32)
        leaf = leaf.astype(jnp.float32)
        total += jnp.sum(jnp.where(leaf > -1e29, leaf * weights, 0.0))
    return total


def gradients(run, arrays, **options):
    return jax.jit(jax.grad(lambda *x: weighted_sum(run(*x, **options)), argnums=(0, 1, 2)))(*arrays)


def reference(*arrays, **options) -> AttentionOutput:
    return attention(*arrays, implementation="reference", **options)


@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize(
    ("lengths", "mask"), [(None, None), ([300, 0], None), (None, PATTERN), ([140, 300], PATTERN)], ids=str
)
def test_gradients_are_those_of_the_reference(with_entropy, lengths, mask):
    arrays = tuple(jnp.asarray(x) for x in draw(1, 2, 150, 300, 2, 8, spread=2.0))
    lengths = None if lengths is None else jnp.array(lengths)
    options = {"scale": 0.7, "key_length": lengths, "block_mask": mask, "with_entropy": with_entropy}
    for got, want in zip(gradients(fused, arrays, **options), gradients(reference, arrays, **options), strict=True):
        assert np.any(np.asarray(want) != 0)
        assert relative(got, want) < 2e-6


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    chunk=st.integers(1, 40), num_keys=st.integers(1, 40), length=st.integers(1, 9), scale=st.sampled_from([0.1, 5.0])
)
def test_chunks_of_keys_do_not_show(chunk, num_keys, length, scale):
    @jax.jit
    def both(*arrays):
        got, pull_back = jax.vjp(lambda *x: reference(*x, scale=scale, with_entropy=True), *arrays)
        cotangent = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), got)
        options = {"scale": scale, "key_length": None, "block_mask": None}
        return attention_gradients(*arrays, got, cotangent, chunk=chunk, **options), pull_back(cotangent)

    for a, b in zip(*both(*(jnp.asarray(x) for x in draw(2, 2, length, num_keys, 2, 4))), strict=True):
        assert relative(a, b) < 3e-6


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=str)
def test_gradients_have_the_dtype_of_the_inputs(dtype):
    wide = draw(3, 1, 33, 65, 2, 16)
    narrow = tuple(jnp.asarray(x, dtype) for x in wide)
    got = gradients(fused, narrow, scale=0.5)
    want = gradients(reference, tuple(x.astype(jnp.float32) for x in narrow), scale=0.5, with_entropy=True)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert relative(a, b) < 8 * float(jnp.finfo(dtype).eps)


def test_no_gradient_comes_from_what_is_invisible_whatever_it_holds():
    q, k, v = (jnp.asarray(x) for x in draw(4, 2, 5, 9, 1, 4))
    lengths = jnp.array([6, 0])
    hidden = (jnp.arange(9)[None] >= lengths[:, None])[..., None, None]
    arrays = (q, jnp.where(hidden, jnp.nan, k), jnp.where(hidden, jnp.inf, v))
    for gradient in gradients(fused, arrays, scale=1.0, key_length=lengths)[1:]:
        np.testing.assert_array_equal(np.where(hidden, gradient, 0.0), 0.0)
        assert np.all(np.isfinite(gradient))


def test_gradients_under_vmap():
    q, k, v = (jnp.asarray(x) for x in draw(5, 2, 5, 9, 1, 4))
    several = jnp.stack([q, -q, 3 * q])

    def gradient(run, q):
        return jax.grad(lambda q, k: weighted_sum(run(q, k, v, scale=1.0, with_entropy=True)), argnums=(0, 1))(q, k)

    got, want = (jax.jit(jax.vmap(functools.partial(gradient, run)))(several) for run in (fused, reference))
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < 2e-6


def test_gradients_under_shard_map():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    arrays = tuple(jnp.asarray(x) for x in draw(6, 2, 5, 600, 1, 4))

    def loss(*arrays):
        return jax.lax.psum(weighted_sum(fused(*arrays, scale=1.0)), "x")

    specs = jax.sharding.PartitionSpec("x")
    run = jax.shard_map(jax.grad(loss, argnums=(0, 1, 2)), mesh=mesh, in_specs=specs, out_specs=specs)
    rows = [gradients(reference, tuple(x[i : i + 1] for x in arrays), scale=1.0, with_entropy=True) for i in range(2)]
    for found, *want in zip(jax.jit(run)(*arrays), *rows, strict=True):
        assert relative(found, np.concatenate(want)) < 3e-6


def test_memory_of_chunked_gradients_is_linear_in_the_keys():
    def temporary(num_keys: int) -> int:
        q = jax.ShapeDtypeStruct((1, 2048, 1, 8), jnp.float32)
        kv = jax.ShapeDtypeStruct((1, num_keys, 1, 8), jnp.float32)
        run = jax.grad(lambda *x: weighted_sum(attention(*x, scale=1.0, implementation="xla")), argnums=(0, 1, 2))
        return jax.jit(run).lower(q, kv, kv).compile().memory_analysis().temp_size_in_bytes

    # Keeping the weights would add 2048 numbers per key.
    assert (temporary(8192) - temporary(2048)) / (8192 - 2048) < 2048


@pytest.mark.parametrize("implementation", ["reference", "xla", "fused"])
def test_small_and_large_cotangents_survive_float16(implementation):
    arrays = tuple(jnp.asarray(x, jnp.float16) for x in draw(8, 1, 7, 4096, 1, 16))
    run = fused if implementation == "fused" else functools.partial(attention, implementation=implementation)

    def gradients_of(run, arrays, size):
        def loss(*arrays):
            got = run(*arrays, scale=0.25, with_entropy=True)
            return size * (jnp.sum(got.entropy) + jnp.sum(got.log_sum_exp))

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(*arrays)

    for size in (1e-1, 3e3):
        want = gradients_of(reference, tuple(x.astype(jnp.float32) for x in arrays), size)
        for a, b in zip(gradients_of(run, arrays, size), want, strict=True):
            assert np.max(np.abs(np.float32(a) - b)) < 5e-3 * np.max(np.abs(b))


def test_gradients_of_gradients_are_those_of_the_reference():
    arrays = tuple(jnp.asarray(x) for x in draw(9, 1, 5, 600, 1, 4))

    def twice(implementation):
        def inner(*arrays):
            return weighted_sum(attention(*arrays, scale=0.5, with_entropy=True, implementation=implementation))

        def squares(*arrays):
            return sum(jnp.sum(g**2) for g in jax.grad(inner, argnums=(0, 1, 2))(*arrays))

        return jax.jit(jax.grad(squares, argnums=(0, 1)))

    for a, b in zip(twice("xla")(*arrays), twice("reference")(*arrays), strict=True):
        assert relative(a, b) < 1e-4
