"""Helpers of the pitfall tests."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from toprovar_jax.model.rope import RotaryTable
from toprovar_jax.schedule import ScaleSchedule

SQUARE = ScaleSchedule.of("1:1", 7)


def distance(ours, theirs) -> float:
    """Largest absolute difference."""
    return float(np.max(np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64))))


def assert_tells_apart(reference, right, wrong, bound: float, by: float = 10.0):
    """``right`` is within the bound of ``reference``; ``wrong`` is ``by`` times as far and more."""
    assert distance(right, reference) <= bound
    assert distance(wrong, reference) > by * bound


def channels_last(x) -> jax.Array:
    return jnp.asarray(np.moveaxis(x, 1, -1))


def arrays_of(path) -> dict[str, np.ndarray]:
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files}


def with_parameter(module, path: str, change):
    """A copy of ``module`` with one parameter changed."""
    copy = jax.tree.map(lambda x: x, module)
    *parents, leaf = path.split(".")
    parameter = getattr(functools.reduce(getattr, parents, copy), leaf)
    parameter[...] = change(parameter[...])
    return copy


def first_layer(transformer):
    return jax.tree.map(lambda x: x[0], transformer.layers)


def projected_queries(attend, x, rope):
    """Queries as the reference stores them, ``[B, N, T, H]``."""
    return attend.project(x, rope)[0].transpose(0, 2, 1, 3)


def unrotated(tokens: int, head_dim: int) -> RotaryTable:
    return RotaryTable(np.ones((tokens, head_dim // 2), np.float32), np.zeros((tokens, head_dim // 2), np.float32))
