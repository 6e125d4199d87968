"""What a plan costs: floating-point operations and bytes, from the configuration alone.

Counted as XLA counts: a multiplication and an addition are two operations, everything elementwise is one, and
transcendental functions are none. Matrix products are exact. Elementwise work is counted per channel, per attention
score and per feed-forward unit with factors read off programs compiled for CPU at widths 256 and 512; it is about one
part in a hundred at those widths and less in wider models. Left out, since they do not grow with the model's width:
drawing bits, adding codes, sorting importances, resizing entropy maps, their spectra.
"""

from __future__ import annotations

from toprovar_jax.acceleration.plan import GenerationPlan
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


def step_flops(step: ScaleStep, config: InfinityConfig) -> float:
    """Operations of the transformer at one scale and for one image: embedding, blocks, head, what pruning adds."""
    rows = 2 if step.guided else 1  # embedded alike, so once
    heads_rows = rows if 0 in step.guidance_at else 1
    embedding = 2.0 * step.tokens * config.token_bits * config.width if step.scale else 0.0
    head = step.tokens * config.width * (4.0 * config.token_bits + _PER_HEAD_CHANNEL)
    layers = sum((group.stop - group.start) * _layer_flops(group, step, config) for group in step.groups)
    return embedding + heads_rows * head + rows * layers


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
    visible = float(group.written + group.kept)
    per_score = _PER_SCORE + (_PER_SCORE_ENTROPY if step.with_entropy else 0)
    attended = 4.0 * tokens * width * (visible + config.text_length)
    softmax = config.num_heads * tokens * (per_score * visible + _PER_TEXT_SCORE * config.text_length)
    elementwise = tokens * (_PER_CHANNEL * width + _PER_UNIT * hidden)
    return products + attended + softmax + elementwise + restored


def plan_flops(plan: GenerationPlan, config: InfinityConfig) -> tuple[float, ...]:
    """Operations of every computed scale, for one image."""
    return tuple(step_flops(plan.step(scale), config) for scale in range(plan.num_run))


def plan_bytes(plan: GenerationPlan, config: InfinityConfig) -> dict[str, int]:
    """Device memory of one image while it is made, by purpose; the largest there is at any time.

    Returns:
      ``parameters``, the blocks' matrices (shared by all images), ``cache``, ``maps`` and ``increments``.
    """
    item = 4 if config.precision == "exact" else 2
    width, rows = config.width, 2 if plan.guided else 1
    block = 8 * width * width + 2 * width * config.feed_forward_width
    steps = [plan.step(scale) for scale in range(plan.num_run)]
    cache = sum((g.stop - g.start) * g.cache_length for g in steps[0].groups) * 2 * rows * width * item
    maps = max((step.tokens if step.keeps_maps else 0) for step in steps) * config.num_layers * 4
    increments = 0
    for step in steps:
        layers = sum(group.stop - group.start for group in step.groups if group.keeps_increments)
        recorded = step.tokens if step.records_increments else 0
        increments = max(increments, layers * recorded * rows * width * item)
    return {
        "parameters": block * config.num_layers * item,
        "cache": cache,
        "maps": maps,
        "increments": increments,
    }
