"""What attention entropy says about a scale, a layer and a token: the three signals of the paper.

Entropies are in nats, float32. A low one is a query that looks at few keys: salient, to be kept.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import entropy_spectrum_ratio
from toprovar_jax.errors import unknown_name
from toprovar_jax.image_tokenizer.resize import blend_neighbours
from toprovar_jax.schedule import Grid
from toprovar_jax.shapes import Array, Float

Ratio = TypeVar("Ratio", float, np.ndarray, jax.Array)


def head_mean(entropy: Float[Array, "R N T"], batch: int) -> Float[Array, "B T"]:
    """Entropy per token: the mean over heads of the first ``batch`` rows, the conditional ones.

    Our choice: the paper averages over heads without saying how, and does not mention guidance. The mean of the
    heads' entropies is taken, not the entropy of their mean attention, and unconditional rows follow the others.
    """
    return jnp.mean(entropy[:batch].astype(jnp.float32), axis=1)


def salient_share(entropy: Float[Array, "B T"]) -> Float[Array, " B"]:
    """rho_s: the share of tokens whose entropy is below the image's mean, in [0, 1).

    0 where all are equal, as at the first scale, whose only token is never below its own mean.
    """
    # From the first token on: the rounded mean of equal values can lie above all of them.
    relative = entropy - entropy[:, :1]
    below = relative < jnp.mean(relative, axis=1, keepdims=True)
    return jnp.mean(below, axis=1, dtype=jnp.float32)


def resize_map(maps: Float[Array, "*B T"], grid_in: Grid, grid_out: Grid) -> Float[Array, "*B out_T"]:
    """Token maps of one grid on another: bilinear, corners not aligned, no antialiasing; equal grids: unchanged."""
    if grid_in == grid_out:
        return maps
    spatial, rows = maps.reshape(*maps.shape[:-1], *grid_in), maps.ndim - 1
    resized = blend_neighbours(blend_neighbours(spatial, rows, grid_out[0]), rows + 1, grid_out[1])
    return resized.reshape(*maps.shape[:-1], grid_out[0] * grid_out[1])


def normalise(entropy: Float[Array, "B T"], how: str) -> Float[Array, "B T"]:
    """H-hat: entropies on a common scale, so that one budget means the same in every image, layer and scale.

    Args:
      entropy: at least 0.
      how: ``"rank"``: the token's place among the image's, 0 lowest to 1 highest, equal entropies share the mean of
        their places; the mean is 0.5 whatever the distribution. ``"minmax"``: linear from 0 at the lowest to 1 at the
        highest. ``"count"``: over the image's mean. ``"sum"``: over the image's sum, as Eq. 5 of the paper is printed;
        all values are then of the order of 1/T, and Eq. 6 treats practically all tokens alike.

    Returns:
      Float32. Where all entropies are equal: 0.5, 0.5, 1 and 1/T.

    Raises:
      UserInputError: an unknown ``how``.
    """
    if how not in _NORMALISATIONS:
        raise unknown_name("entropy normalisation", how, _NORMALISATIONS)
    return _NORMALISATIONS[how](entropy.astype(jnp.float32))


def keep_probability(
    entropy: Float[Array, "B T"], weight: float, alpha_min: float, alpha_max: float, how: str
) -> Float[Array, "B T"]:
    """P_keep of Eq. 6: ``1 - clip(alpha_min + (alpha_max - alpha_min) weight H-hat, 0, 1)``.

    Args:
      entropy: per token.
      weight: phi(s) R(l): the scale's place in (0, 1] times the layer's detail score in [0, 1].
      alpha_min, alpha_max: pruning ratio at H-hat 0, and where weight and H-hat are 1.
      how: see :func:`normalise`.
    """
    pruned = alpha_min + (alpha_max - alpha_min) * weight * normalise(entropy, how)
    return 1.0 - jnp.clip(pruned, 0.0, 1.0)


def spectrum_ratio(maps: Float[Array, "L B T"], grid: Grid, center: bool = True) -> Float[Array, "B L"]:
    """varrho = sigma_1 / sigma_2 of every layer's entropy map, at least 1 and possibly infinite.

    Args:
      maps: per layer and image.
      grid: their height and width.
      center: subtract the map's mean first. Our choice: an entropy map is positive, so its first singular value is
        otherwise little more than its mean, and no layer comes near the ratio 1 that the paper calls detail.
    """
    layers, batch, _ = maps.shape
    return entropy_spectrum_ratio(maps.reshape(layers, batch, *grid), center=center).T


def detail_score(ratio: Ratio, beta: float) -> Ratio:
    """R = exp(-beta (varrho - 1)) of Eq. 4: 1 for a detail layer, which may be pruned, 0 for a global one.

    Args:
      ratio: varrho, a number or an array; infinite gives 0.
      beta: how fast the score falls, above 0.
    """
    if isinstance(ratio, jax.Array):
        return jnp.exp(-beta * (ratio - 1.0))
    if isinstance(ratio, np.ndarray):
        return np.exp(-beta * (ratio - 1.0))
    return math.exp(-beta * (ratio - 1.0))


def _by_rank(entropy: Float[Array, "B T"]) -> Float[Array, "B T"]:
    tokens = entropy.shape[1]
    if tokens == 1:
        return jnp.full_like(entropy, 0.5)
    ordered = jnp.sort(entropy, axis=1)
    place = lambda side: jax.vmap(functools.partial(jnp.searchsorted, side=side, method="scan_unrolled"))
    lower, upper = place("left")(ordered, entropy), place("right")(ordered, entropy)
    return (lower + upper - 1).astype(jnp.float32) / (2 * (tokens - 1))


def _by_range(entropy: Float[Array, "B T"]) -> Float[Array, "B T"]:
    lowest = jnp.min(entropy, axis=1, keepdims=True)
    spread = jnp.max(entropy, axis=1, keepdims=True) - lowest
    return jnp.where(spread > 0, (entropy - lowest) / jnp.where(spread > 0, spread, 1.0), 0.5)


def _by_mean(entropy: Float[Array, "B T"]) -> Float[Array, "B T"]:
    mean = jnp.mean(entropy, axis=1, keepdims=True)
    return jnp.where(mean > 0, entropy / jnp.where(mean > 0, mean, 1.0), 1.0)


def _by_sum(entropy: Float[Array, "B T"]) -> Float[Array, "B T"]:
    return _by_mean(entropy) / entropy.shape[1]


_NORMALISATIONS: Mapping[str, Callable[[Array], Array]] = {
    "rank": _by_rank,
    "minmax": _by_range,
    "count": _by_mean,
    "sum": _by_sum,
}
