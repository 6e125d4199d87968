"""Infinity's transformer: the incremental form for generation and the parallel form for training.

Both run the same blocks. They differ in how queries meet keys: generation goes scale by scale through the cache,
training sees all scales at once, each attending to itself and to the ones before.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels import attention
from toprovar_jax.acceleration.reduction import SharedTokens
from toprovar_jax.acceleration.selection import gather_rotary, gather_tokens
from toprovar_jax.acceleration.step import ScaleStep
from toprovar_jax.config import InfinityConfig
from toprovar_jax.distributed.parts import TensorParts
from toprovar_jax.model.block import LayerText, stack_layers
from toprovar_jax.model.head import BitHead
from toprovar_jax.model.layer_memory import LayerMemory
from toprovar_jax.model.layer_scan import scan_layers
from toprovar_jax.model.layers import Linear
from toprovar_jax.model.rope import RotaryTable, full_rotary_table, rotary_table
from toprovar_jax.model.scale_layers import GroupTrace, LayerInputs, run_group
from toprovar_jax.model.shared_tokens import TokenHints, carried_change, choose_tokens, restore_shared
from toprovar_jax.model.text_conditioning import TextCondition, TextConditioning
from toprovar_jax.schedule import ScaleSchedule
from toprovar_jax.shapes import Array, Bool, Float, Int, Key

LEVELS = 15
"""Rows of the level-embedding table (13 scales are used at most)."""


class ScaleOutput(NamedTuple):
    """What the blocks make of one scale.

    Attributes:
      hidden: the head's input, ``[R, T, D]``.
      memory: for the next scale.
      traces: what the layer groups measured.
      change: how much each token changed, ``[B, T]``; T is 0 unless the step measures it.
      served: false for tokens whose codes are to be left out of the picture, ``[B, T]``; None where all count.
    """

    hidden: Float[Array, "R T D"]
    memory: LayerMemory
    traces: tuple[GroupTrace, ...]
    change: Float[Array, "B T"]
    served: Bool[Array, "B T"] | None


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

    def run_scale(
        self,
        tokens: Float[Array, "R T D"],
        condition: TextCondition,
        memory: LayerMemory,
        step: ScaleStep,
        *,
        guidance: Float[Array, ""] | None = None,
        selection_keys: Key[Array, " B"] | None = None,
        hints: TokenHints | None = None,
    ) -> ScaleOutput:
        """All blocks on one scale's tokens.

        Args:
          tokens: embedded tokens without level embedding.
          condition: from :meth:`condition`.
          memory: what the scale before left (:func:`~toprovar_jax.model.layer_memory.empty_memory` at first).
          step: which scale this is, and what of it is computed; static.
          guidance: weight of the blend of the two halves of the rows after the blocks that ``step.guidance_at`` names;
            needed where there is one.
          selection_keys: one key per image, for selections that draw.
          hints: what the scale before told of its tokens, for scales whose layers all compute the same few.

        Returns:
          The head's input, the memory for the next scale, and what was measured.
        """
        schedule, config = step.schedule, self.config
        inputs = LayerInputs(
            (self.layers, condition.keys, condition.values),
            condition,
            rotary_table(schedule, step.scale, config.head_dim, config.rope_mode),
            selection_keys,
            config.attention,
            parts=TensorParts(config.tensor_parts),
        )
        level = self.level_embedding[...].astype(jnp.float32)[step.scale][None, None]
        depth, every_chunk = config.num_layers, config.level_embedding == "every_chunk"
        starts = set(range(0, depth, depth // config.block_chunks)) if every_chunk else {0}
        blend_after = step.guided_blocks(depth) if step.guided else ()

        x = tokens.astype(jnp.float32)
        chosen = served = None
        if isinstance(step.reduction, SharedTokens) and hints is not None:
            chosen = choose_tokens(hints, step)
            x = gather_tokens(x, chosen)
            inputs = inputs._replace(rope=gather_rotary(inputs.rope, chosen, x.shape[0]), shared=chosen)
        watched = () if step.measures_change is None else (step.measures_change.start, step.measures_change.stop)
        seen: dict[int, Array] = {}

        def between(x: Array, layer: int) -> Array:
            if layer - 1 in blend_after and guidance is not None:
                conditional, unconditional = jnp.split(x, 2)
                blended = guidance * conditional + (1.0 - guidance) * unconditional
                # At guidance 1 the halves stay apart: the unconditional rows keep their own keys and values.
                x = jnp.where(guidance == 1.0, x, jnp.concatenate([blended, blended]))
            # A level embedding is no change of the layers between: it counts to what enters the first of them.
            if layer in watched[1:]:
                seen[layer] = x
            x = x + level if layer in starts else x
            if layer in watched[:1]:
                seen[layer] = x
            return x

        splits = sorted(starts | {block + 1 for block in blend_after} | set(watched))
        memories, traces = [], []
        for group, own in zip(step.groups, memory, strict=True):
            x, own, trace = run_group(x, own, inputs, step, group, between=between, splits=splits)
            memories.append(own)
            traces.append(trace)
        x = between(x, depth)
        images = memory[0].maps.shape[1]
        change = jnp.zeros((images, 0), jnp.float32)
        if step.measures_change is not None:
            first, last = (seen[layer] for layer in watched)
            squares = jnp.mean(jnp.square(last - first), axis=-1)
            change = jnp.mean(squares.reshape(-1, images, x.shape[1]), axis=0)
        if chosen is not None and hints is not None:
            change = carried_change(hints, change, chosen, step)
            x, served = restore_shared(tokens.astype(jnp.float32) + level, x, chosen, hints, step)
        return ScaleOutput(x, tuple(memories), tuple(traces), change, served)

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
        remat: bool = False,
        unroll: bool = False,
    ) -> Float[Array, "B S Z 2"]:
        """Scores of every bit of every scale in one pass; scale i sees the scales up to i (MODEL_SPEC 9.4).

        Args:
          inputs: resized code sums of scales 1 to the last, concatenated.
          features, lengths: text features (conditional or dropped), padded, and their visible rows.
          schedule: the scales.
          keep: stochastic-depth factors of every layer's two gated branches.
          remat: gradient checkpointing: on the way back every layer's activations are computed anew from its input,
            which costs a third more operations and leaves one layer's activations in memory instead of all.
          unroll: compile every layer instead of a loop over them, which takes longer once; a CPU then trains faster.
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

        def body(x, layer, index, own):
            del own
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
            )[0], None

        factors = jnp.ones((depth, 2, tokens.shape[0]), jnp.float32) if keep is None else keep
        stacked = (self.layers, condition.keys, condition.values, factors)
        x = tokens if every_chunk else tokens + level
        x, _ = scan_layers(body, x, stacked, 0, depth, depth, data=(condition, factors), remat=remat, unroll=unroll)
        return self.head(x, condition.head_modulation)
