"""Taking images out of a batch whose arrays keep them on different axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from toprovar_jax.generation import State
from toprovar_jax.model.text_conditioning import TextCondition
from toprovar_jax.shapes import Array, Int, Key

T = TypeVar("T")


def partition(picked: Sequence[T]) -> list[tuple[T, list[int]]]:
    """Distinct values in order of appearance, each with the rows that have it."""
    parts: list[tuple[T, list[int]]] = []
    for row, value in enumerate(picked):
        for known, rows in parts:
            if known == value:
                rows.append(row)
                break
        else:
            parts.append((value, [row]))
    return parts


def take_images(
    whole: tuple[TextCondition, State, Key[Array, " B"]], rows: Int[Array, " K"]
) -> tuple[TextCondition, State, Key[Array, " K"]]:
    """Some images of a batch, with the conditional and unconditional rows of each.

    Args:
      whole: condition, state and keys of the batch.
      rows: which images, in which order; repeats are allowed. Traced, so only their number is static.
    """
    condition, state, keys = whole
    batch = keys.shape[0]
    copies = condition.pooled.shape[0] // batch
    guided = jnp.concatenate([rows + batch * copy for copy in range(copies)])

    def take(tree: Any, which: Array, axis: int) -> Any:
        return jax.tree.map(lambda array: jnp.take(array, which, axis=axis), tree)

    taken = TextCondition(
        *(take(field, guided, 1 if name in ("keys", "values") else 0) for name, field in condition._asdict().items())
    )
    memory = tuple(
        group._replace(
            cache=take(group.cache, guided, 1),
            maps=take(group.maps, rows, 1),
            increments=take(group.increments, guided, 1),
        )
        for group in state.memory
    )
    return taken, State(memory, take(state.latents, rows, 0), take(state.inputs, rows, 0)), keys[rows]
