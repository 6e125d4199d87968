"""What a plan costs: floating-point operations and bytes, from the configuration alone.

Counted as XLA counts: a multiplication and an addition are two operations, everything elementwise is one, and
transcendental functions are none. Matrix products are exact. Elementwise work is counted per channel, per attention
score and per feed-forward unit with factors read off programs compiled for CPU at widths 256 and 512; it is about one
part in a hundred at those widths and less in wider models. Left out, since they do not grow with the model's width:
drawing bits, adding codes, sorting importances, resizing entropy maps, their spectra.
"""

from __future__ import annotations

from pallas_kernels.attention.block_mask import BLOCK
from toprovar_jax.acceleration.cache_budget import class_heads
from toprovar_jax.acceleration.key_masks import picked_keys, similar_keys, visible_tiles
from toprovar_jax.acceleration.key_patterns import KeyPattern, LocalKeys, SimilarKeys
from toprovar_jax.acceleration.plan import GenerationPlan
from toprovar_jax.acceleration.reduction import Projection, SharedTokens
from toprovar_jax.acceleration.step import GroupStep, ScaleStep
from toprovar_jax.config import InfinityConfig

_PER_CHANNEL = 50
"""Elementwise operations per computed token and channel of a block: norms, modulation, rotation, biases, residuals."""

_PER_UNIT = 9
"""Per computed token and hidden feed-forward unit: bias and tanh GELU."""

_PER_SCORE = 4
"""Per score of self-attention: maximum, subtraction, scale, sum."""

_PER_SCORE_ENTROPY = 2
"""What the entropy's moment adds to that."""

_PER_TEXT_SCORE = 9
"""Per score of cross-attention: as above, and the masks of ragged prompts."""

_PER_HEAD_CHANNEL = 10
"""Per token and channel once per scale: level embedding, and the head's norm and modulation."""

_PER_RESTORED_CHANNEL = 2
"""Per token and channel of a restored increment: its addition, which compilers repeat where the sum is read."""

_PER_MASKED_SCORE = 4
"""Per score in front of gathered keys, some of which only fill up: hiding them."""

_PER_PICKED_SCORE = 2
"""Per score that is summed up to pick keys: normaliser, sum."""

_PER_VARIANCE = 5
"""Per probability whose column's variance is taken."""

_PER_DRAW = 92
"""Per normal number: threefry's rounds and the inverse error function."""


_PER_CHANGED_CHANNEL = 3
"""Per computed token and channel where change is measured: difference, square, sum."""

_PER_COMPARED_SCORE = 11
"""Per token and score where tokens are compared: its square and quotient, and four products with their sums."""


def step_flops(step: ScaleStep, config: InfinityConfig) -> float:
    """Operations of the transformer at one scale and for one image: embedding, blocks, head, what pruning adds."""
    rows = 2 if step.guided else 1  # embedded alike, so once
    heads_rows = rows if 0 in step.guidance_at else 1
    embedding = 2.0 * step.tokens * config.token_bits * config.width if step.scale else 0.0
    head = step.tokens * config.width * (4.0 * config.token_bits + _PER_HEAD_CHANNEL)
    layers = sum((group.stop - group.start) * _layer_flops(group, step, config) for group in step.groups)
    mixed = sum(_mixing_flops(group, step, config, rows) for group in step.groups)
    return embedding + heads_rows * head + rows * layers + mixed + _sharing_flops(step, config, rows)


def _layer_flops(group: GroupStep, step: ScaleStep, config: InfinityConfig) -> float:
    """One layer, one row."""
    width, tokens = config.width, float(group.kept)
    hidden = config.feed_forward_width
    restored = 0.0
    if group.kept < step.tokens and step.restoration == "cached" and step.increments_from is not None:
        (height, across), (before_h, before_w) = step.grid, step.schedule.grids[step.increments_from]
        resized = height * before_h * before_w + height * across * before_w
        restored = width * (2.0 * resized + _PER_RESTORED_CHANNEL * step.tokens)
    if not group.kept:
        return restored
    products = tokens * (12.0 * width * width + 4.0 * width * hidden)
    visible = _visible_keys(group, config) if group.keys is None else _pattern_keys(group, step, group.keys)
    per_score = _PER_SCORE + (_PER_SCORE_ENTROPY if step.with_entropy else 0)
    attended = 4.0 * tokens * width * (visible + config.text_length)
    softmax = config.num_heads * tokens * (per_score * visible + _PER_TEXT_SCORE * config.text_length)
    elementwise = tokens * (_PER_CHANNEL * width + _PER_UNIT * hidden)
    return (
        products
        + attended
        + softmax
        + elementwise
        + restored
        + _voting_flops(group, step, config)
        + _pattern_flops(group, step, config)
    )


def _visible_keys(group: GroupStep, config: InfinityConfig) -> float:
    """Keys in front of a query, mean over heads."""
    heads = class_heads(group.arriving_share, config.num_heads)
    return sum(number * seen for number, seen in zip(heads, group.visible, strict=True)) / config.num_heads


def _voting_flops(group: GroupStep, step: ScaleStep, config: InfinityConfig) -> float:
    """What choosing the keys to be held adds to one layer and row; 0 where nothing or everything is held."""
    budget = group.budget
    if budget is None:
        return 0.0
    voters, per_head = len(budget.voters(step.grid, group.kept)), 2.0 * config.head_dim + 1.0
    total = 0.0
    if group.arrives is None and budget.classes == 2:
        total += config.num_heads * voters * group.visible[0] * (per_head + _PER_SCORE + _PER_VARIANCE)
    seen = group.visible * budget.classes if len(group.visible) == 1 else group.visible
    for heads, keys, held in zip(budget.heads(config.num_heads), seen, group.held, strict=True):
        if held < keys:
            softmax = _PER_SCORE if budget.votes == "probabilities" else 0
            total += heads * keys * (voters * (per_head + softmax) + (budget.pool if budget.pool > 1 else 0))
    return total


def _held_bytes(step: ScaleStep, config: InfinityConfig, item: int) -> int:
    """Keys and values that a scale hands on, plain buffers at their whole length, and the order of head classes."""
    total = 0
    for group in step.groups:
        layer_rows = (group.stop - group.start) * (2 if step.guided else 1)
        if group.budget is not None:
            heads, keys = group.budget.heads(config.num_heads), group.held
        elif group.arrives is not None and not step.last:
            heads, keys = class_heads(group.arriving_share, config.num_heads), group.arrives
        else:
            total += layer_rows * 2 * group.cache_length * config.width * item
            continue
        held = sum(number * each for number, each in zip(heads, keys, strict=True))
        order = 4 * config.num_heads if len(heads) == 2 else 0
        total += layer_rows * (2 * held * config.head_dim * item + order)
    return total


def _pattern_keys(group: GroupStep, step: ScaleStep, pattern: KeyPattern) -> float:
    """Keys in front of a query of a layer with a key pattern, as computed: whole tiles and whole query groups."""
    everything = float(group.written + group.kept)
    if isinstance(pattern, LocalKeys):
        tiles = visible_tiles(step.schedule, step.scale, pattern)
        return everything if tiles is None else tiles * BLOCK * min(BLOCK, group.kept) / group.kept
    if step.scale == pattern.decision:
        return everything
    seen = similar_keys(step.schedule, step.scale, pattern)
    return seen * _whole_groups(step, pattern) / group.kept


def _pattern_flops(group: GroupStep, step: ScaleStep, config: InfinityConfig) -> float:
    """What key patterns add to one row's attention: masks, and what similar keys do around it."""
    pattern = group.keys
    width, heads = config.width, config.num_heads
    if pattern is None:
        return 0.0
    everything = float(group.written + group.kept)
    keys = _pattern_keys(group, step, pattern)
    masks = 0.0 if keys == everything else _PER_MASKED_SCORE * heads * group.kept * keys
    if isinstance(pattern, LocalKeys):
        return masks
    if step.scale != pattern.decision:
        (height, across), (before_h, before_w) = step.grid, step.schedule.grids[pattern.decision]
        resized = height * before_h * before_w + height * across * before_w
        return masks + (width * (2.0 * resized + step.tokens) if pattern.restores else 0.0)
    if not group.keeps_keys:
        return 0.0
    queries = _whole_groups(step, pattern)
    picking = queries * everything * (2.0 * width + _PER_PICKED_SCORE * heads)
    if not pattern.restores:
        return picking
    again = queries * picked_keys(int(everything), pattern.share, pattern.multiple)
    return picking + again * (4.0 * width + _PER_SCORE * heads) + step.tokens * width


def _whole_groups(step: ScaleStep, pattern: SimilarKeys) -> int:
    """Queries that are computed where the last group is filled up."""
    size = min(pattern.group, step.tokens)
    return -(-step.tokens // size) * size


def _mixing_flops(group: GroupStep, step: ScaleStep, config: InfinityConfig, rows: int) -> float:
    """Mixing a layer group's tokens and restoring them, all rows; 0 where it computes them as they are.

    Mixing is a product per row with numbers drawn once per image. Restoration resizes the output of the scale before,
    and weighs the tokens of the conditional row by their norms.
    """
    if not isinstance(step.reduction, Projection) or group.kept == step.tokens or step.outputs_from is None:
        return 0.0
    (height, across), (before_h, before_w) = step.grid, step.schedule.grids[step.outputs_from]
    resized = height * before_h * before_w + height * across * before_w
    per_row = 2.0 * config.width * (step.tokens * group.kept + resized)
    return rows * per_row + step.tokens * (_PER_DRAW * group.kept + 2.0 * config.width)


def _sharing_flops(step: ScaleStep, config: InfinityConfig, rows: int) -> float:
    """Measuring how much tokens change, and the cosines by which others take their features; gathering is free."""
    measured = 0.0
    if step.measures_change is not None:
        measured = float(rows * step.groups[0].kept * config.width * _PER_CHANGED_CHANNEL)
    if not isinstance(step.reduction, SharedTokens):
        return measured
    return measured + step.tokens * (2.0 * config.token_bits * _PER_COMPARED_SCORE + rows * config.width)


def plan_flops(plan: GenerationPlan, config: InfinityConfig) -> tuple[float, ...]:
    """Operations of every computed scale, for one image."""
    return tuple(step_flops(plan.step(scale), config) for scale in range(plan.num_run))


def plan_bytes(plan: GenerationPlan, config: InfinityConfig) -> dict[str, int]:
    """Device memory of one image while it is made, by purpose; the largest there is at any time.

    Returns:
      ``parameters``, the blocks' matrices (shared by all images), and what :func:`state_bytes` tells.
    """
    block = 8 * config.width * config.width + 2 * config.width * config.feed_forward_width
    states = [state_bytes(plan.step(scale), config) for scale in range(plan.num_run)]
    largest = {name: max(state[name] for state in states) for name in states[0]}
    return {"parameters": block * config.num_layers * _item_bytes(config), **largest}


def state_bytes(step: ScaleStep, config: InfinityConfig) -> dict[str, int]:
    """What the layers hand on after a scale, for one image.

    Returns:
      ``cache``, ``maps``, ``increments``, ``outputs`` and ``patterns``, what similar keys remember.
    """
    item, rows = _item_bytes(config), 2 if step.guided else 1
    increments = 0
    recorded_at = step.scale if step.records_increments else step.increments_from
    if recorded_at is not None:
        layers = sum(group.stop - group.start for group in step.groups if group.keeps_increments)
        increments = layers * step.schedule.token_counts[recorded_at] * rows * config.width * item
    return {
        "cache": _held_bytes(step, config, item),
        "maps": (step.tokens if step.keeps_maps else 0) * config.num_layers * 4,
        "increments": increments,
        "outputs": _output_bytes(step, config.width),
        "patterns": _pattern_bytes(step, config, item),
    }


def _item_bytes(config: InfinityConfig) -> int:
    return 4 if config.precision == "exact" else 2


def _pattern_bytes(step: ScaleStep, config: InfinityConfig, item: int) -> int:
    """Picked keys, four bytes each, and remainders that a scale hands on, all rows."""
    total = 0
    for group in step.groups:
        pattern = group.keys
        if not isinstance(pattern, SimilarKeys) or not group.keeps_keys:
            continue
        schedule, layer_rows = step.schedule, (group.stop - group.start) * (2 if step.guided else 1)
        tokens = schedule.token_counts[pattern.decision]
        picked = picked_keys(schedule.offsets[pattern.decision + 1], pattern.share, pattern.multiple)
        indices = config.num_heads * -(-tokens // min(pattern.group, tokens)) * picked
        total += layer_rows * (4 * indices + (tokens * config.width * item if pattern.restores else 0))
    return total


def _output_bytes(step: ScaleStep, width: int) -> int:
    """The layer groups' outputs that a scale hands on, float32, all rows."""
    return step.tokens * width * 4 * len(step.groups) * (2 if step.guided else 1) if step.keeps_outputs else 0
