"""How dominant the first pattern of a map is: the ratio of its two largest singular values."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SQUARINGS = 12
"""``G^(2^12)`` weighs a direction ``1 - d`` as strong as the strongest by ``exp(-8192 d)``: see :func:`_leading`."""

_SQUARINGS_PER_NORMALISATION = 3
"""A Gram matrix of trace 1 has an eigenvalue of at least ``1 / n``; ``n^-8`` is still a normal float32 at n = 4096."""


def entropy_spectrum_ratio(maps: Float[Array, "*B h w"], *, center: bool = False) -> Float[Array, "*B"]:
    """``sigma_1 / sigma_2`` of every map, in float32.

    Without a singular value decomposition, whose iterations run one small kernel after another: the largest singular
    value is found by repeated squaring of the Gram matrix and its pattern taken away (deflation); the largest one of
    what is left is the second. Taking it from the residual matters: maps of entropies are positive, so the first
    value stands far above the others, and the Gram matrix of the map itself would lose the second one to rounding.

    Relative error below 1e-3 for ratios up to 1e5, also where values coincide; 1e-6 is typical. Maps that vary by less
    than about 1e-4 of their magnitude are limited by their own float32 rounding. A fixed number of batched matrix
    products with no data-dependent loop, so it works the same under ``jit``, ``vmap`` and ``shard_map``.

    Args:
      maps: floating-point maps ``[..., h, w]``, finite.
      center: subtract every map's mean first.

    Returns:
      Ratios of at least 1, with the leading shape of ``maps``. Infinite for a map of rank one up to
      float32 rounding (a single row or column, a constant map that is not centred). 1 for a map of zeros (a constant
      map that is centred): all its singular values are equal.

    Raises:
      ValueError: fewer than two axes, an empty map, a dtype that is not floating.
    """
    if maps.ndim < 2 or 0 in maps.shape[-2:]:
        raise ValueError(f"maps {maps.shape}: must be [..., h, w] with at least one element; add the missing axes")
    if not jnp.issubdtype(maps.dtype, jnp.floating):
        raise ValueError(f"maps dtype {maps.dtype}: must be floating; cast them to float32")
    maps = maps.astype(jnp.float32)
    if center:
        # From the first element on: the mean of a constant is rounded, and what is left of it would pass for a pattern.
        maps = maps - maps[..., :1, :1]
        maps = maps - jnp.mean(maps, axis=(-2, -1), keepdims=True)
    if maps.shape[-1] > maps.shape[-2]:
        maps = jnp.swapaxes(maps, -1, -2)
    first, residual = _leading(maps)
    second, _ = _leading(residual)
    negligible = max(maps.shape[-2:]) * jnp.finfo(jnp.float32).eps
    ratio = jnp.maximum(first / jnp.where(second > 0, second, 1.0), 1.0)
    # Written so that a NaN map falls through both comparisons and stays visible.
    return jnp.where(first == 0, 1.0, jnp.where(second <= negligible * first, jnp.inf, ratio))


def _leading(maps: Float[Array, "*B h w"]) -> tuple[Float[Array, "*B"], Float[Array, "*B h w"]]:
    """``(largest singular value, the maps without its pattern)``.

    A power of the Gram matrix is dominated by its first eigenvector; the column with the largest diagonal element
    holds at least ``1 / w`` of its weight, so unlike with a start vector nothing can be orthogonal by bad luck. The
    value is then the length of ``maps @ column``: where the next values are too close to be separated the column is
    a mixture, but a mixture of values that are equal to within the exponent's resolution of about 1e-4.
    """
    largest = jnp.max(jnp.abs(maps), axis=(-2, -1), keepdims=True)
    maps = maps / jnp.where(largest == 0, 1.0, largest)
    power = _product(jnp.swapaxes(maps, -1, -2), maps)
    width = power.shape[-1]
    diagonal = jnp.eye(width, dtype=bool).reshape(*(1,) * (maps.ndim - 2), width, width)
    for squaring in range(SQUARINGS):
        if squaring % _SQUARINGS_PER_NORMALISATION == 0:
            trace = jnp.sum(jnp.where(diagonal, power, 0.0), axis=(-2, -1), keepdims=True)
            power = power / jnp.where(trace == 0, 1.0, trace)
        power = _product(power, power)
    best = jnp.argmax(jnp.sum(jnp.where(diagonal, power, 0.0), axis=-2, keepdims=True), axis=-1, keepdims=True)
    chosen = jnp.arange(width).reshape(*(1,) * (maps.ndim - 1), width) == best
    column = jnp.sum(jnp.where(chosen, power, 0.0), axis=-1, keepdims=True)
    length = jnp.sqrt(jnp.sum(column * column, axis=-2, keepdims=True))
    column = column / jnp.where(length == 0, 1.0, length)
    image = _product(maps, column)
    value = largest[..., 0, 0] * jnp.sqrt(jnp.sum(image * image, axis=(-2, -1)))
    return value, largest * (maps - image * jnp.swapaxes(column, -1, -2))


def _product(a: Float[Array, "*B m n"], b: Float[Array, "*B n p"]) -> Float[Array, "*B m p"]:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
