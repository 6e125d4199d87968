"""The row arithmetic of the Hopper kernel, in the exponents of base 2 that the hardware has.

The recurrences are those of ``online``; the scale is folded into the exponent, ``p = 2 ** (s c - m)`` with
``c = scale * log2(e)``, which is one fused multiply-add per score. ``m`` is the largest ``s c``, rounded once, and the
same ``m`` enters the exponents, the cross term and the log-sum-exp: whatever its rounding did to all of them cancels.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.constants import LN_2, MASKED_SCORE, ONE, ZERO


class Rows(NamedTuple):
    """Running statistics of a warpgroup's rows, float32 ``[query_tile]``, base-2 exponents.

    Attributes:
      maximum: the largest dot product, times ``scale * log2(e)``, rounded once.
      total: sum of ``p = 2 ** x`` with ``x = s * scale * log2(e) - maximum``.
      moment: sum of ``p * x``; stays 0 where no entropy is asked for.
    """

    maximum: jax.Array
    total: jax.Array
    moment: jax.Array


def spread(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One value per row, along the row."""
    return lax.broadcast_in_dim(rows, shape, (0,))


def softmax_tile(
    products: jax.Array, rows: Rows, visible: jax.Array | None, factor: float, with_entropy: bool
) -> tuple[jax.Array, Rows, jax.Array]:
    """Takes in a tile of unscaled dot products ``[query_tile, key_tile]``.

    The same rounded maximum shifts the exponents and enters the cross term, so that the entropy does not depend on it.

    Returns:
      Unnormalised weights, the new statistics, and the factor for what was accumulated so far.
    """
    if visible is not None:
        products = jnp.where(visible, products, MASKED_SCORE)
    maximum = jnp.maximum(rows.maximum, jnp.max(products, axis=1) * factor)
    change = rows.maximum - maximum
    rescale = jnp.exp2(change)
    exponents = products * factor - spread(maximum, products.shape)
    weights = jnp.exp2(exponents)
    if visible is not None:
        weights = jnp.where(visible, weights, ZERO)
        exponents = jnp.where(visible, exponents, ZERO)
    moment = rows.moment
    if with_entropy:
        moment = rescale * (moment + change * rows.total) + jnp.sum(weights * exponents, axis=1)
    total = rescale * rows.total + jnp.sum(weights, axis=1)
    return weights, Rows(maximum, total, moment), rescale


def finish_rows(rows: Rows) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``(1 / total, log-sum-exp, entropy in nats)``; rows without a visible key give 1, MASKED, 0."""
    # Compared with zero, so that a NaN among the inputs stays one.
    empty = rows.total == 0.0
    total = jnp.where(empty, ONE, rows.total)
    log_total = jnp.log(total)
    inverse = 1.0 / total
    log_sum_exp = jnp.where(empty, MASKED_SCORE, rows.maximum * LN_2 + log_total)
    return inverse, log_sum_exp, jnp.maximum(log_total - LN_2 * (rows.moment * inverse), ZERO)
