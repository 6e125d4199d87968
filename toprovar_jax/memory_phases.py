"""The programs of a generation, one after the other, with what each finds, makes and needs on the way."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, Literal

from toprovar_jax.acceleration import GenerationPlan
from toprovar_jax.acceleration.budgets import padded_sizes
from toprovar_jax.acceleration.step import ScaleStep
from toprovar_jax.memory_options import MemoryOptions
from toprovar_jax.memory_parts import (
    condition_bytes,
    decoder_working_set,
    first_state,
    image_bytes,
    latents_bytes,
    result_bytes,
    reused_bytes,
    sampling_bytes,
    state_after,
    text_working_set,
    weight_bytes,
    working_set,
)
from toprovar_jax.model_card import ModelCard

Driver = Literal["fused", "stepwise"]
"""All scales in one program, or a program per scale."""

AttentionKind = Literal["kernel", "xla", "reference"]
"""Kernels and cuDNN, which hold no scores; plain XLA, chunk by chunk of keys; plain XLA with the whole score matrix."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """One program, and what else lies on the device while it runs; bytes.

    Attributes:
      name: what is done.
      beside: what the program neither reads nor writes.
      arguments, outputs: what it reads and returns.
      reused: outputs that take the place of arguments.
      temporaries: what it needs on the way.
    """

    name: str
    beside: int
    arguments: int
    outputs: int
    reused: int
    temporaries: int

    @property
    def program(self) -> int:
        """The program alone, as XLA's ``memory_analysis`` counts it."""
        return self.arguments + self.outputs - self.reused + self.temporaries

    @property
    def peak(self) -> int:
        """All of the device."""
        return self.beside + self.program


def text_phases(
    card: ModelCard, plan: GenerationPlan, batch: int, memory: MemoryOptions, staying: int, negative: bool
) -> Iterator[Phase]:
    """Text encoder and conditioning, in one program or two; ``staying``: bytes of weights that never leave."""
    weights, length = weight_bytes(card, memory), card.transformer.text_length
    texts = batch * (2 if negative else 1)
    tokens, features = texts * (4 * length + 4), texts * (4 * length * card.text_encoder.width + 4)
    condition = sum(condition_bytes(card, batch, guided=plan.guided))
    if memory.text_encoder == "device":
        read = weights.text + weights.text_encoder
        needed = text_working_set(card, texts, encodes=True) + weights.moving
        yield Phase("text", staying - read, read + tokens, condition, 0, needed)
        return
    if memory.text_encoder == "on_demand":
        needed = text_working_set(card, texts, encodes=True)
        yield Phase("text encoder", staying, weights.text_encoder + tokens, features, 0, needed)
    needed = text_working_set(card, texts, encodes=False) + weights.moving
    yield Phase("text", staying, weights.lent + features, condition, 0, needed)


def scale_phases(
    card: ModelCard,
    plan: GenerationPlan,
    batch: int,
    memory: MemoryOptions,
    staying: int,
    driver: Driver,
    attention: AttentionKind,
) -> Iterator[Phase]:
    """The scales, each or all; between them images that go different ways part, at most as widely as they can."""
    weights = weight_bytes(card, memory)
    condition = condition_bytes(card, batch, guided=plan.guided)
    everywhere = weights.blocks + weights.moving + weights.frame
    states = _states(card, plan, batch)
    if driver == "fused":
        read = everywhere + weights.start + weights.word_embedding
        results = sum(result_bytes(card, step, batch) for step, _, _ in states)
        latents = latents_bytes(card, plan.step(0), batch)
        arguments = read + sum(condition) + sampling_bytes(plan.step(0), batch)
        temporaries = max(
            max(before.total, after.total) + working_set(card, step, batch, attention) for step, before, after in states
        )
        yield Phase("scales", staying - read, arguments, results + latents, 0, temporaries)
        return
    apart = _apart(batch, len(plan.alternatives) + 1) if plan.alternatives else batch
    for step, before, after in states:
        read = everywhere + (weights.word_embedding if step.scale else weights.start)
        shown = condition.rest if step.scale else sum(condition)
        # Images that have gone another way wait with their states, which are padded to powers of two.
        waiting = 0
        if plan.decisions and step.scale >= plan.decisions[0]:
            waiting = (apart - batch) * (before.total + sum(condition)) // batch
        yield Phase(
            f"scale {step.scale + 1} ({step.grid[0]}x{step.grid[1]})",
            staying - read + sum(condition) - shown + waiting,
            read + shown + before.total + sampling_bytes(step, batch),
            after.total + result_bytes(card, step, batch),
            reused_bytes(card, step, before, after),
            working_set(card, step, batch, attention),
        )
        if batch > 1 and step.scale + 1 in plan.decisions:
            whole, parts = after.total + sum(condition), apart * (after.total + sum(condition)) // batch
            yield Phase(f"parting after scale {step.scale + 1}", staying, whole, parts, 0, 0)


def _states(card: ModelCard, plan: GenerationPlan, batch: int) -> list[tuple[ScaleStep, Any, Any]]:
    """Every scale's step with the state before and after it; of a plan with alternatives, the way that takes most."""
    ways = (plan, *plan.alternatives)
    best: dict[int, tuple[ScaleStep, Any, Any]] = {}
    for way in ways:
        state = first_state(card, way.step(0), batch)
        for scale in range(way.num_run):
            step = way.step(scale)
            after = state_after(card, step, batch)
            found = (step, state, after)
            if scale not in best or _weight(card, found, batch) > _weight(card, best[scale], batch):
                best[scale] = found
            state = after
    return [best[scale] for scale in sorted(best)]


def _weight(card: ModelCard, found: tuple[ScaleStep, Any, Any], batch: int) -> int:
    step, before, after = found
    return before.total + after.total - reused_bytes(card, *found) + working_set(card, step, batch, "kernel")


@functools.cache
def _apart(batch: int, ways: int) -> int:
    """The most rows that ``batch`` images take once they go at most so many ways, each padded to a size there is."""

    def padded(count: int) -> int:
        return next(size for size in padded_sizes(batch) if size >= count)

    if ways == 1 or batch == 0:
        return padded(batch) if batch else 0
    most = {0: 0}
    for _ in range(min(ways, batch)):
        nxt = dict(most)
        for done, rows in most.items():
            for count in range(1, batch - done + 1):
                nxt[done + count] = max(nxt.get(done + count, 0), rows + padded(count))
        most = nxt
    return most[batch]


def decoder_phase(card: ModelCard, plan: GenerationPlan, batch: int, memory: MemoryOptions, staying: int) -> Phase:
    """From codes to pictures; the text's contribution is still there, the cache is not."""
    weights = weight_bytes(card, memory)
    step = plan.step(0)
    condition = sum(condition_bytes(card, batch, guided=plan.guided))
    grid = plan.schedule.latent_grids[-1]
    return Phase(
        "decoder",
        staying - weights.image_tokenizer + condition,
        weights.image_tokenizer + latents_bytes(card, step, batch),
        image_bytes(plan.schedule.pixel_size, batch),
        0,
        decoder_working_set(card, grid, batch, memory.decoder_strips),
    )
