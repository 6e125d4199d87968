import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toprovar_jax.model.layer_scan import scan_layers

DEPTH = 5


def _body(carry, layer, index, own):
    x, seen = carry
    return (jnp.tanh(x @ layer["weight"] + layer["bias"]), seen.at[index].add(1)), (index, own)


def _last(carry, layers, start, stop):
    return scan_layers(_body, carry, layers, start, stop, DEPTH)[0]


@pytest.fixture(scope="module")
def layers():
    weight, bias = jax.random.split(jax.random.key(0))
    return {"weight": jax.random.normal(weight, (DEPTH, 4, 4)), "bias": jax.random.normal(bias, (DEPTH, 1, 4))}


@pytest.mark.parametrize(("start", "stop"), [(0, DEPTH), (0, 2), (2, DEPTH), (1, 4), (3, 4), (2, 2)])
def test_a_range_of_layers_is_what_a_loop_over_it_computes(layers, start, stop):
    carry = jnp.ones((1, 4)), jnp.zeros((DEPTH,), jnp.int32)
    x, seen = jax.jit(lambda c, s: _last(c, s, start, stop))(carry, layers)
    expected = carry
    for index in range(start, stop):
        expected = _body(expected, jax.tree.map(lambda a, i=index: a[i], layers), index, ())[0]
    np.testing.assert_allclose(x, expected[0], atol=1e-6)
    np.testing.assert_array_equal(seen, [int(start <= i < stop) for i in range(DEPTH)])


def test_ranges_chain(layers):
    carry = jnp.ones((1, 4)), jnp.zeros((DEPTH,), jnp.int32)
    whole, _ = _last(carry, layers, 0, DEPTH)
    parts = _last(_last(carry, layers, 0, 2), layers, 2, DEPTH)
    np.testing.assert_allclose(parts[0], whole, atol=1e-6)


def test_compiled_size_does_not_grow_with_depth(layers):
    def lines(repeat):
        stacked = jax.tree.map(lambda a: jnp.concatenate([a] * repeat), layers)
        depth = DEPTH * repeat
        carry = jnp.ones((1, 4)), jnp.zeros((depth,), jnp.int32)
        return len(jax.jit(lambda c, s: scan_layers(_body, c, s, 0, depth, depth)).lower(carry, stacked).as_text())

    assert lines(8) < 1.1 * lines(1)


@pytest.mark.parametrize(("start", "stop"), [(0, DEPTH), (1, 4)])
def test_layers_have_inputs_and_outputs_of_their_own(layers, start, stop):
    own = jnp.arange(stop - start) * 10
    carry = jnp.ones((1, 4)), jnp.zeros((DEPTH,), jnp.int32)
    _, (indices, passed) = scan_layers(_body, carry, layers, start, stop, DEPTH, own=own)
    np.testing.assert_array_equal(indices, np.arange(start, stop))
    np.testing.assert_array_equal(passed, own)
