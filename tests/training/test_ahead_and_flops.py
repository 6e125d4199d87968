import threading
import time

import jax
import jax.numpy as jnp
import pytest

from toprovar_jax.training.ahead import Ahead
from toprovar_jax.training.flops import count_flops


def test_batches_are_made_ahead_in_another_thread_and_only_where_steps_follow():
    made, threads = [], set()

    def make(number):
        made.append(number)
        threads.add(threading.get_ident())
        return 10 * number

    ahead = Ahead(make, 5)
    assert ahead(2) == 20
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert made == [2, 3, 4]
    assert [ahead(3), ahead(4)] == [30, 40]
    # A run that was resumed elsewhere asks for another number.
    assert ahead(0) == 0
    ahead.close()
    assert threading.get_ident() not in threads


def test_several_threads_make_several_batches_at_a_time():
    both = threading.Barrier(2)

    def make(number):
        both.wait(10)  # a lone thread would wait for the other one in vain
        return number * number

    ahead = Ahead(make, 4, depth=3, threads=2)
    assert [ahead(number) for number in range(4)] == [0, 1, 4, 9]
    ahead.close()


def test_a_failure_comes_where_its_batch_is_asked_for():
    def make(number):
        if number == 1:
            raise KeyError("no such word")
        return number

    ahead = Ahead(make, 9)
    assert ahead(0) == 0
    with pytest.raises(KeyError, match="no such word"):
        ahead(1)
    ahead.close()


def test_products_convolutions_and_loops_are_counted():
    a, b = jax.ShapeDtypeStruct((3, 5), jnp.float32), jax.ShapeDtypeStruct((5, 7), jnp.float32)
    assert count_flops(lambda a, b: jax.jit(jnp.matmul)(a, b), a, b) == 2 * 3 * 5 * 7

    def loop(a, b):
        return jax.lax.scan(lambda x, _: (x, jnp.sum(x @ b)), a, length=4)[1]

    assert count_flops(loop, a, b) == 4 * 2 * 3 * 5 * 7
    images, kernel = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), jax.ShapeDtypeStruct((3, 3, 3, 6), jnp.float32)

    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert count_flops(convolve, images, kernel) == 2 * (2 * 4 * 4 * 6) * (3 * 3 * 3)
    branches = lambda a, b: jax.lax.cond(a[0, 0] > 0, lambda: jnp.sum(a @ b), lambda: jnp.float32(0))
    assert count_flops(branches, a, b) == 2 * 3 * 5 * 7
