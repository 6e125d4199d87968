"""The tile arithmetic of one-pass attention with entropy: rescale, accumulate, finalise.

Per row the running state is the maximum ``m`` of the dot products ``s``, the sum ``l`` of ``p = exp(a (s - m))`` with
the scale ``a``, the sum ``u`` of ``p * (s - m)`` and the weighted values ``o``. When the maximum moves from ``m`` to
``m'``, with ``c = exp(a (m - m'))``::

    l' = c l + sum p        u' = c (u + (m - m') l) + sum p (s - m')        o' = c o + p V

and at the end ``H = log l - a u / l``. ``u`` is kept relative to the maximum, which stays exact where
scores are large; all terms are finite because masked scores are. The scale comes after the subtraction: a compiler may
fuse ``a s - m`` into one rounding, and then the largest score no longer cancels and sharp rows get negative entropy.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.attention.reference import MASKED


class RowState(NamedTuple):
    """Running statistics of every row, float32 ``[B, N, T, 1]``."""

    maximum: Array
    total: Array
    moment: Array


class Tile(NamedTuple):
    """One tile's unnormalised weights ``[B, N, T, S]`` and the factor ``[B, N, T, 1]`` for what was accumulated."""

    weights: Array
    rescale: Array


def initial_rows(zeros: Float[Array, "B N T 1"]) -> RowState:
    """The state before any key was seen, sharded as ``zeros`` is."""
    return RowState(zeros + MASKED, zeros, zeros)


def accumulate(
    rows: RowState, products: Float[Array, "B N T S"], visible: Bool[Array, "#B 1 #T S"], scale: float
) -> tuple[RowState, Tile]:
    """Take in a tile of unscaled dot products."""
    products = jnp.where(visible, products, MASKED)
    maximum = jnp.maximum(rows.maximum, jnp.max(products, axis=-1, keepdims=True))
    change = rows.maximum - maximum
    rescale = jnp.exp(scale * change)
    shifted = products - maximum
    weights = jnp.where(visible, jnp.exp(scale * shifted), 0.0)
    total = rescale * rows.total + jnp.sum(weights, axis=-1, keepdims=True)
    added = jnp.sum(weights * jnp.where(visible, shifted, 0.0), axis=-1, keepdims=True)
    moment = rescale * (rows.moment + change * rows.total) + added
    return RowState(maximum, total, moment), Tile(weights, rescale)


def finalise(
    rows: RowState, scale: float
) -> tuple[Float[Array, "B N T 1"], Float[Array, "B N T 1"], Float[Array, "B N T 1"]]:
    """``(1 / total, log-sum-exp, entropy)``; a row without visible keys has accumulated zeros and stays at them."""
    # Not max(total, tiny): the gradient squares the divisor, and a tiny one underflows to 0 / 0.
    divisor = jnp.where(rows.total != 0, rows.total, 1.0)
    log_sum_exp = jnp.where(rows.total != 0, scale * rows.maximum + jnp.log(divisor), MASKED)
    entropy = jnp.log(divisor) - scale * (rows.moment / divisor)
    return 1.0 / divisor, log_sum_exp, jnp.maximum(entropy, 0.0)
