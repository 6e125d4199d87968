"""Infinity's transformer: the incremental form for generation and the parallel form for training.

Both run the same blocks. They differ in how queries meet keys: generation goes scale by scale through the cache,
training sees all scales at once, each attending to itself and to the ones before.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import attention
from toprovar_jax.config import InfinityConfig
from toprovar_jax.model.block import LayerText, stack_layers
from toprovar_jax.model.head import BitHead
from toprovar_jax.model.kv_cache import KVCache, empty_cache, extend
from toprovar_jax.model.layer_scan import scan_layers
from toprovar_jax.model.layers import Linear, compute_dtype
from toprovar_jax.model.rope import RotaryTable, full_rotary_table, rotary_table
from toprovar_jax.model.text_conditioning import TextCondition, TextConditioning
from toprovar_jax.schedule import ScaleSchedule
from toprovar_jax.shapes import Array, Float, Int

LEVELS = 15
"""Rows of the level-embedding table (13 scales are used at most)."""


class Infinity(nnx.Module):
    """The transformer's parameters. ``layers`` is one :class:`Block` whose parameters are stacked over layers."""

    def __init__(self, config: InfinityConfig, *, rngs: nnx.Rngs):
        width = config.width
        options: dict[str, Any] = {"model_width": width, "precision": config.precision, "rngs": rngs}
        deviation = math.sqrt(1 / (3 * width))
        self.config = config
        self.text = TextConditioning(config, rngs=rngs)
        self.start = nnx.Param(deviation * jax.random.normal(rngs.params(), (width,), jnp.float32))
        self.level_embedding = nnx.Param(deviation * jax.random.normal(rngs.params(), (LEVELS, width), jnp.float32))
        self.word_embedding = Linear(config.token_bits, width, **options)
        self.shared_modulation = Linear(width, 6 * width, model_width=width, precision="exact", rngs=rngs)
        self.layers = stack_layers(config, rngs)
        self.head = BitHead(config, rngs=rngs)

    def condition(self, features: Float[Array, "R P E"], lengths: Int[Array, " R"]) -> TextCondition:
        """Everything the blocks and the head need of the text, for all scales (MODEL_SPEC 2.4, 4.2)."""
        pooled, text = self.text(features, lengths)
        heads = self.config.num_heads
        keys, values = jax.lax.map(lambda layer: layer.project_text(text, heads), self.layers.cross_attention)
        modulation = self.shared_modulation(jax.nn.silu(pooled)).reshape(pooled.shape[0], 6, -1)
        return TextCondition(pooled, modulation, self.head.condition(pooled), keys, values, lengths)

    def start_tokens(self, condition: TextCondition) -> Float[Array, "R 1 D"]:
        """Scale 0's single token: the pooled text and a learned vector."""
        return (condition.pooled + self.start[...].astype(jnp.float32)[None])[:, None]

    def embed(self, inputs: Float[Array, "R T Z"]) -> Float[Array, "R T D"]:
        """Tokens of a later scale from its resized code sum."""
        return self.word_embedding(inputs).astype(jnp.float32)

    def new_cache(self, rows: int, length: int) -> KVCache:
        """A cache for ``length`` tokens: those of all scales but the last that is run."""
        config = self.config
        dtype = compute_dtype(config.precision)
        return empty_cache(config.num_layers, rows, length, config.num_heads, config.head_dim, dtype)

    def run_scale(
        self,
        tokens: Float[Array, "R T D"],
        condition: TextCondition,
        cache: KVCache,
        schedule: ScaleSchedule,
        scale: int,
        *,
        write_cache: bool,
        blend_after: Sequence[int] = (),
        guidance: Float[Array, ""] | None = None,
    ) -> tuple[Float[Array, "R T D"], KVCache]:
        """All blocks on one scale's tokens.

        Args:
          tokens: embedded tokens without level embedding.
          condition: from :meth:`condition`.
          cache: keys and values of the scales before.
          schedule, scale: which scale this is; static.
          write_cache: whether a later scale will read this one.
          blend_after: blocks after whose output the two halves of the rows are blended by ``guidance`` and made equal.
          guidance: the blend's weight; needed where ``blend_after`` is not empty.

        Returns:
          The head's input and the extended cache.
        """
        offset = schedule.offsets[scale]
        rope = rotary_table(schedule, scale, self.config.head_dim, self.config.rope_mode)

        def attend(cache, layer):
            def through_cache(q, k, v):
                extended, keys, values = extend(cache, layer, offset, k, v, write=write_cache)
                return self._attend(q, keys, values), extended

            return through_cache

        def body(carry, layer, index):
            x, cache = carry
            block, keys, values = layer
            text = LayerText(keys, values, condition.lengths)
            return block(x, text, condition.modulation, rope, attend(cache, index))

        level = self.level_embedding[...].astype(jnp.float32)[scale][None, None]
        stacked = (self.layers, condition.keys, condition.values)
        depth, every_chunk = self.config.num_layers, self.config.level_embedding == "every_chunk"
        chunk = depth // self.config.block_chunks
        starts = set(range(0, depth, chunk)) if every_chunk else {0}
        boundaries = sorted({depth} | starts | {block + 1 for block in blend_after})
        x = tokens.astype(jnp.float32)
        for start, stop in itertools.pairwise(boundaries):
            if start in starts:
                x = x + level
            x, cache = scan_layers(body, (x, cache), stacked, start, stop, depth, data=condition)
            if stop - 1 in blend_after and guidance is not None:
                conditional, unconditional = jnp.split(x, 2)
                blended = guidance * conditional + (1.0 - guidance) * unconditional
                # At guidance 1 the halves stay apart: the unconditional rows keep their own keys and values.
                x = jnp.where(guidance == 1.0, x, jnp.concatenate([blended, blended]))
        return x, cache

    def _attend(self, q: Float[Array, "R T N H"], k: Float[Array, "R S N H"], v: Float[Array, "R S N H"]) -> Array:
        return attention(q, k, v, scale=1.0, implementation=self.config.attention).out

    def parallel_logits(
        self,
        inputs: Float[Array, "B T Z"],
        features: Float[Array, "B P E"],
        lengths: Int[Array, " B"],
        schedule: ScaleSchedule,
        *,
        keep: Float[Array, "L 2 B"] | None = None,
    ) -> Float[Array, "B S Z 2"]:
        """Scores of every bit of every scale in one pass; scale i sees the scales up to i (MODEL_SPEC 9.4).

        Args:
          inputs: resized code sums of scales 1 to the last, concatenated.
          features, lengths: text features (conditional or dropped), padded, and their visible rows.
          schedule: the scales.
          keep: stochastic-depth factors of every layer's two gated branches.
        """
        condition = self.condition(features, lengths)
        tokens = jnp.concatenate([self.start_tokens(condition), self.embed(inputs)], axis=1)
        levels = jnp.repeat(
            jnp.arange(len(schedule)), jnp.array(schedule.token_counts), total_repeat_length=tokens.shape[1]
        )
        level = self.level_embedding[...].astype(jnp.float32)[levels][None]
        rope: RotaryTable = full_rotary_table(schedule, self.config.head_dim, self.config.rope_mode)
        depth, chunk = self.config.num_layers, self.config.num_layers // self.config.block_chunks
        every_chunk = self.config.level_embedding == "every_chunk"

        def block_causal(q, k, v):
            spans = itertools.pairwise(schedule.offsets)
            parts = [self._attend(q[:, a:b], k[:, :b], v[:, :b]) for a, b in spans]
            return jnp.concatenate(parts, axis=1), None

        def body(x, layer, index):
            block, keys, values, factors = layer
            if every_chunk:
                x = jnp.where(index % chunk == 0, x + level, x)
            return block(
                x,
                LayerText(keys, values, lengths),
                condition.modulation,
                rope,
                block_causal,
                None if keep is None else factors,
            )[0]

        factors = jnp.ones((depth, 2, tokens.shape[0]), jnp.float32) if keep is None else keep
        stacked = (self.layers, condition.keys, condition.values, factors)
        x = tokens if every_chunk else tokens + level
        x = scan_layers(body, x, stacked, 0, depth, depth, data=(condition, factors))
        return self.head(x, condition.head_modulation)
