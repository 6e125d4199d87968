"""The blocks at one scale: every token, a selection of them, or none, as the step says layer group by layer group.

A pruned layer gathers its tokens once, runs self-attention, cross-attention and feed-forward on them, and scatters
once. The others get what :mod:`toprovar_jax.acceleration.restoration` says, and write no keys and values. Guidance rows
share the selection. Where the tokens were reduced before (:class:`~toprovar_jax.acceleration.reduction.SharedTokens`),
or are mixed for a whole group (``Projection``), its layers compute all that they are given.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from toprovar_jax.acceleration.entropy import keep_probability, resize_map
from toprovar_jax.acceleration.reduction import Projection
from toprovar_jax.acceleration.restoration import resize_increments
from toprovar_jax.acceleration.scores import Candidates, score_named
from toprovar_jax.acceleration.selection import gather_rotary, gather_tokens, scatter_tokens, select_tokens
from toprovar_jax.acceleration.step import GroupStep, ScaleStep
from toprovar_jax.distributed.parts import TensorParts
from toprovar_jax.model.block import LayerText
from toprovar_jax.model.kv_cache import KVCache, emptied
from toprovar_jax.model.layer_memory import GroupMemory
from toprovar_jax.model.layer_scan import scan_layers
from toprovar_jax.model.projected_layers import mix_tokens, restore_tokens
from toprovar_jax.model.rope import RotaryTable
from toprovar_jax.model.scale_attention import LayerState, attend_keys
from toprovar_jax.model.text_conditioning import TextCondition
from toprovar_jax.shapes import Array, Bool, Float, Int, Key


class LayerInputs(NamedTuple):
    """What all layers of one scale share.

    Attributes:
      stacked: all blocks and their text keys and values, with a leading layer axis.
      condition: the text.
      rope: the table of the tokens that are given.
      keys: one PRNG key per image; only selections that draw look at them.
      attention: see :class:`~toprovar_jax.config.InfinityConfig`.
      shared: which tokens are given, ``[B, K]``, where all layers compute the same few; None for all.
      parts: the devices that have the heads.
    """

    stacked: Any
    condition: TextCondition
    rope: RotaryTable
    keys: Key[Array, " B"] | None
    attention: tuple[str, ...] | None
    shared: Int[Array, "B K"] | None = None
    parts: TensorParts = TensorParts()


class GroupTrace(NamedTuple):
    """What a group's layers measured: entropy maps and computed tokens, ``[L, B, T]``, T is 0 where nothing was."""

    maps: Float[Array, "L B T"]
    kept: Bool[Array, "L B T"]


Body = Callable[[Any, Any, Int[Array, ""], Any], tuple[Any, Any]]


def run_group(
    x: Float[Array, "R T D"],
    memory: GroupMemory,
    inputs: LayerInputs,
    step: ScaleStep,
    group: GroupStep,
    *,
    between: Callable[[Array, int], Array],
    splits: Sequence[int],
) -> tuple[Float[Array, "R T D"], GroupMemory, GroupTrace]:
    """One layer group at one scale.

    Args:
      x: residual stream.
      memory: what the scale before handed on.
      inputs: what all groups share.
      step, group: static.
      between: ``(x, layer) -> x``, applied before a layer of ``splits`` and, for what follows the last one, after it.
      splits: layers before which ``between`` has something to do, in ascending order.

    Returns:
      The residual stream after the group, its memory, and what was measured.
    """
    batch = memory.maps.shape[1]
    maps = memory.maps
    if step.maps_from is not None:
        maps = resize_map(maps, step.schedule.grids[step.maps_from], step.grid)
    elif step.with_entropy and group.kept < step.tokens:
        maps = jnp.zeros((maps.shape[0], batch, step.tokens), jnp.float32)
    x = between(x, group.start)
    mixes = isinstance(step.reduction, Projection) and group.kept < step.tokens
    entered = x
    if mixes:
        x, inputs = mix_tokens(x, inputs, step, group)
    body = _body(inputs, step, group, batch, given=x.shape[1], dtype=memory.increments.dtype)
    boundaries = sorted({group.start, group.stop} | {s for s in splits if group.start < s < group.stop})
    cache, outputs = memory.cache, []
    for start, stop in itertools.pairwise(boundaries):
        if start > group.start:
            x = between(x, start)
        part = slice(start - group.start, stop - group.start)
        own = jax.tree.map(
            lambda array, part=part: array[part], LayerState(maps, memory.increments, memory.similar, memory.held)
        )
        depth = jax.tree.leaves(inputs.stacked)[0].shape[0]
        (x, cache), output = scan_layers(
            body, (x, cache), inputs.stacked, start, stop, depth, own=own, data=(inputs.condition, own)
        )
        outputs.append(output)
    after, kept = outputs[0]
    if len(outputs) > 1:
        after, kept = jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)
    if step.with_entropy and group.kept:
        # Each device has averaged over the heads that it has.
        after = after._replace(maps=inputs.parts.mean(after.maps))
    if mixes:
        x = restore_tokens(x, entered, memory.outputs, inputs, step, group)
        after = after._replace(maps=maps if step.with_entropy else maps[:, :, :0])
        # Mixtures stand for no token in particular, so none counts as computed and no map is renewed.
        kept = jnp.zeros(maps.shape if step.observe else kept.shape, jnp.bool_)
    if inputs.shared is not None and step.with_entropy:
        after = after._replace(maps=_scattered(maps, inputs.shared, after.maps))
        kept = _scattered(jnp.zeros(maps.shape, jnp.bool_), inputs.shared, kept) if step.observe else kept
    increments = after.increments
    if not group.keeps_increments:
        increments = memory.increments[:, :, :0]
    elif not step.records_increments:
        increments = memory.increments
    handed_on = GroupMemory(
        # What is compressed is held elsewhere from now on.
        emptied(cache) if after.held is not None else cache,
        after.maps if step.keeps_maps else after.maps[:, :, :0],
        increments,
        x if step.keeps_outputs else x[:, :0],
        after.similar,
        after.held,
    )
    return x, handed_on, GroupTrace(after.maps, kept)


def _scattered(whole: Array, shared: Int[Array, "B K"], part: Array) -> Array:
    """``whole`` ``[L, B, T]`` with ``part`` ``[L, B, K]`` at the shared tokens."""
    return whole.at[:, jnp.arange(shared.shape[0])[:, None], shared].set(part)


def _body(inputs: LayerInputs, step: ScaleStep, group: GroupStep, batch: int, *, given: int, dtype: Any) -> Body:
    if group.kept == given:
        return _dense_body(inputs, step, group, batch, dtype)
    if group.kept == 0:
        return _skipped_body(step, batch, dtype)
    return _pruned_body(inputs, step, group, batch, dtype)


def _dense_body(inputs: LayerInputs, step: ScaleStep, group: GroupStep, batch: int, dtype: Any) -> Body:
    recorded = group.keeps_increments and step.records_increments

    def body(carry, layer, index, own):
        x, cache = carry
        block, keys, values = layer
        text = LayerText(keys, values, inputs.condition.lengths)
        attend = _attention(inputs, step, group, batch, cache, index, own)
        after, (cache, entropy, similar, held) = block(x, text, inputs.condition.modulation, inputs.rope, attend)
        increments = (after - x).astype(dtype) if recorded else _nothing(x, dtype)
        kept = jnp.ones((batch, group.kept if step.observe else 0), jnp.bool_)
        return (after, cache), (LayerState(entropy, increments, similar, held), kept)

    return body


def _skipped_body(step: ScaleStep, batch: int, dtype: Any) -> Body:
    def body(carry, layer, index, own):
        del layer, index
        x, cache = carry
        kept = jnp.zeros((batch, step.tokens if step.observe else 0), jnp.bool_)
        maps = own.maps if step.with_entropy else own.maps[:, :0]
        x = _restored(x, own.increments, step)
        return (x, cache), (LayerState(maps, _nothing(x, dtype), own.similar, own.held), kept)

    return body


def _pruned_body(inputs: LayerInputs, step: ScaleStep, group: GroupStep, batch: int, dtype: Any) -> Body:
    selection = step.selection
    if selection is None:
        raise ValueError("a pruned scale needs a selection")

    def body(carry, layer, index, own):
        x, cache = carry
        maps, increments = own.maps, own.increments
        block, keys, values = layer
        text = LayerText(keys, values, inputs.condition.lengths)
        importance = _importance(x, maps, index, inputs, step, group)
        chosen = select_tokens(
            importance, step.grid, group.kept, regions=selection.regions, region_minimum=selection.region_minimum
        )
        rope = gather_rotary(inputs.rope, chosen, x.shape[0])
        attend = _attention(inputs, step, group, batch, cache, index, own)
        computed, (cache, entropy, similar, held) = block(
            gather_tokens(x, chosen), text, inputs.condition.modulation, rope, attend
        )
        x = scatter_tokens(_restored(x, increments, step), chosen, computed)
        refreshed = scatter_tokens(maps[..., None], chosen, entropy[..., None])[..., 0] if step.with_entropy else None
        maps = maps[:, :0] if refreshed is None else refreshed
        kept = jnp.zeros((batch, 0), jnp.bool_)
        if step.observe:
            kept = jnp.zeros(maps.shape, jnp.bool_).at[jnp.arange(batch)[:, None], chosen].set(True)
        return (x, cache), (LayerState(maps, _nothing(x, dtype), similar, held), kept)

    return body


def _attention(inputs: LayerInputs, step: ScaleStep, group: GroupStep, batch: int, cache: KVCache, layer, own):
    """:func:`attend_keys` as a block calls it."""

    def attend(q, k, v):
        within, options = layer - group.start, {"batch": batch, "implementation": inputs.attention}
        return attend_keys(q, k, v, cache, within, own, step, group, **options)

    return attend


def _importance(
    x: Float[Array, "R T D"],
    maps: Float[Array, "B _"],
    layer: Int[Array, ""],
    inputs: LayerInputs,
    step: ScaleStep,
    group: GroupStep,
) -> Float[Array, "B T"]:
    """The higher, the sooner a token is computed."""
    selection, batch = step.selection, maps.shape[0]
    if selection is None:
        raise ValueError("a pruned scale needs a selection")
    if selection.sampled:
        chance = keep_probability(maps, group.weight, selection.alpha_min, selection.alpha_max, selection.normalisation)
        return chance - selection_uniforms(inputs, step, layer)
    candidates = Candidates(x[:batch], maps, step.grid, lambda: selection_uniforms(inputs, step, layer))
    return score_named(selection.importance).importance(candidates)


_SELECTION_STREAM = 1 << 20
"""Keeps the numbers that select tokens apart from those that draw bits, which are numbered by scale."""


def selection_uniforms(inputs: LayerInputs, step: ScaleStep, layer: Int[Array, ""] | int) -> Float[Array, "B T"]:
    """One number in [0, 1) per token, of the image's key, the scale and the layer alone."""
    if inputs.keys is None:
        raise ValueError("a selection that draws needs keys: pass selection_keys")

    def one(key: Key[Array, ""]) -> Float[Array, " T"]:
        stream = jax.random.fold_in(jax.random.fold_in(key, _SELECTION_STREAM + step.scale), layer)
        return jax.random.uniform(stream, (step.tokens,), jnp.float32)

    return jax.vmap(one)(inputs.keys)


def _restored(x: Float[Array, "R T D"], increments: Float[Array, "R _ D"], step: ScaleStep) -> Float[Array, "R T D"]:
    """The residual stream after a layer as it is for tokens that the layer does not compute."""
    if step.restoration != "cached" or step.increments_from is None:
        return x
    grids = step.schedule.grids
    return x + resize_increments(increments, grids[step.increments_from], step.grid).astype(x.dtype)


def _nothing(x: Float[Array, "R T D"], dtype: Any) -> Float[Array, "R 0 D"]:
    return jnp.zeros((x.shape[0], 0, x.shape[2]), dtype)
