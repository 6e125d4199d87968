import jax
import jax.numpy as jnp
import numpy as np

from toprovar_jax.model import kv_cache
from toprovar_jax.model.kv_cache import empty_cache

ROWS, HEADS, DIM = 2, 3, 4
extend = jax.jit(kv_cache.extend, static_argnames=("offset", "write"))


def _tokens(count, seed):
    key, value = jax.random.normal(jax.random.key(seed), (2, ROWS, count, HEADS, DIM))
    return key, value


def test_a_scale_sees_what_was_written_before_and_itself():
    cache = empty_cache(2, ROWS, 5, HEADS, DIM, jnp.float32)
    first, second, last = _tokens(1, 0), _tokens(4, 1), _tokens(6, 2)
    for layer in (0, 1):
        cache, keys, values = extend(cache, jnp.int32(layer), 0, *first, write=True)
        np.testing.assert_array_equal(keys, first[0])
        np.testing.assert_array_equal(values, first[1])
    cache, keys, _ = extend(cache, jnp.int32(1), 1, *second, write=True)
    np.testing.assert_array_equal(keys, jnp.concatenate([first[0], second[0]], axis=1))
    np.testing.assert_array_equal(cache.keys[0, :, 1:], 0)
    unchanged, keys, values = extend(cache, jnp.int32(1), 5, *last, write=False)
    np.testing.assert_array_equal(keys, jnp.concatenate([first[0], second[0], last[0]], axis=1))
    np.testing.assert_array_equal(values, jnp.concatenate([first[1], second[1], last[1]], axis=1))
    np.testing.assert_array_equal(unchanged.keys, cache.keys)


def test_the_only_scale_needs_no_cache():
    cache = empty_cache(1, ROWS, 0, HEADS, DIM, jnp.float32)
    key, value = _tokens(1, 0)
    _, keys, values = extend(cache, jnp.int32(0), 0, key, value, write=False)
    np.testing.assert_array_equal(keys, key)
    np.testing.assert_array_equal(values, value)


def test_keys_are_stored_in_the_type_of_the_cache():
    cache = empty_cache(1, ROWS, 1, HEADS, DIM, jnp.bfloat16)
    _, keys, values = extend(cache, jnp.int32(0), 0, *_tokens(1, 0), write=True)
    assert keys.dtype == values.dtype == jnp.bfloat16


def test_a_cache_that_lies_head_by_head_shows_the_same(monkeypatch):
    monkeypatch.setattr(kv_cache, "head_by_head", lambda: True)
    cache = empty_cache(2, ROWS, 5, HEADS, DIM, jnp.float32)
    assert cache.keys.shape == (2, ROWS, HEADS, 16, DIM), "whole tiles of tokens"
    first, second, last = _tokens(1, 0), _tokens(4, 1), _tokens(6, 2)
    cache, keys, _ = kv_cache.extend(cache, jnp.int32(1), 0, *first, write=True)
    np.testing.assert_array_equal(keys, first[0])
    cache, keys, _ = kv_cache.extend(cache, jnp.int32(1), 1, *second, write=True)
    np.testing.assert_array_equal(keys, jnp.concatenate([first[0], second[0]], axis=1))
    np.testing.assert_array_equal(cache.keys[0], 0)
    _, keys, values = kv_cache.extend(cache, jnp.int32(1), 5, *last, write=False)
    np.testing.assert_array_equal(keys, jnp.concatenate([first[0], second[0], last[0]], axis=1))
    np.testing.assert_array_equal(values, jnp.concatenate([first[1], second[1], last[1]], axis=1))
    assert kv_cache.emptied(cache).keys.shape == (2, ROWS, HEADS, 0, DIM)
