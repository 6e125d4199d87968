"""Running a generation from the host: compiled pieces, kept and counted, with compile and run time told apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from toprovar_jax.acceleration.plan import GenerationPlan
from toprovar_jax.generation import (
    InfinityModel,
    condition_on,
    encode_text,
    initial_state,
    run_scales,
    scale_step,
)
from toprovar_jax.model.text_conditioning import TextCondition
from toprovar_jax.sampling import ScaleSampling
from toprovar_jax.shapes import Array, Float, Key, UInt8

OnScaleEnd = Callable[[int, int, dict[str, Any]], object]
"""``(index, num_scales, info)`` after every scale; ``info`` holds ``grid``, ``seconds`` and the summed ``latents``."""


class TokenArrays(NamedTuple):
    """Token ids ``[B, P]`` and lengths ``[B]`` of prompts, and of negative prompts or None; host arrays."""

    ids: np.ndarray
    lengths: np.ndarray
    negative_ids: np.ndarray | None = None
    negative_lengths: np.ndarray | None = None

    def images(self, indices: Sequence[int]) -> TokenArrays:
        """The rows of some images, as a batch of their own."""
        return jax.tree.map(lambda array: array[list(indices)], self)


class Drawn(NamedTuple):
    """One batch's result: pictures ``[B, h, w, 3]``, bits per scale ``[B, T, Z]``, certainty ``[B, scales]``."""

    images: Float[Array, "B h w 3"]
    bits: tuple[UInt8[Array, "B T Z"], ...]
    certainty: Float[Array, "B scales"]


class Drivers:
    """Compiles every piece of a generation once per plan and batch size, and runs it.

    The pieces are the text (encoder and conditioning), the scales (one executable each, or all in one), and the
    decoder. Everything that is not static (guidance, temperature, top-p, keys, token ids) is an argument.

    Attributes:
      seconds: time spent so far in ``compile``, ``text``, ``transformer`` and ``decoder``.
    """

    def __init__(self, model: InfinityModel):
        self.model = model
        self.seconds: dict[str, float] = {"compile": 0.0, "text": 0.0, "transformer": 0.0, "decoder": 0.0}
        self._executables: dict[Hashable, Any] = {}

    @property
    def num_executables(self) -> int:
        """How many programs have been compiled."""
        return len(self._executables)

    def stepwise(
        self,
        tokens: TokenArrays,
        keys: Key[Array, " B"],
        sampling: ScaleSampling,
        plan: GenerationPlan,
        on_scale_end: OnScaleEnd | None = None,
    ) -> Drawn:
        """One executable per scale, called from the host; ``on_scale_end`` may stop it by raising."""
        condition = self._condition(tokens, plan)
        batch = keys.shape[0]
        transformer = self.model.transformer
        state = self._run("transformer", ("state", plan, batch), initial_state, (transformer,), plan=plan, batch=batch)
        bits, certainty = [], []
        for scale in range(plan.num_run):
            start = time.perf_counter()
            compiled_before = self.seconds["compile"]
            arguments = (transformer, condition, state, sampling, keys)
            state, drawn, sure = self._run(
                "transformer", (scale, plan, batch), scale_step, arguments, donate=(2,), plan=plan, scale=scale
            )
            bits.append(drawn)
            certainty.append(np.asarray(sure))
            if on_scale_end is not None:
                seconds = time.perf_counter() - start - (self.seconds["compile"] - compiled_before)
                info = {"grid": plan.scales[scale].grid, "seconds": seconds, "latents": np.asarray(state.latents)}
                on_scale_end(scale, plan.num_run, info)
        return Drawn(self._decode(state.latents), tuple(bits), jax.numpy.asarray(np.stack(certainty, axis=1)))

    def fused(
        self, tokens: TokenArrays, keys: Key[Array, " B"], sampling: ScaleSampling, plan: GenerationPlan
    ) -> Drawn:
        """All scales in one executable."""
        arguments = (self.model.transformer, self._condition(tokens, plan), keys, sampling)
        latents, bits, certainty = self._run(
            "transformer", ("scales", plan, keys.shape[0]), run_scales, arguments, plan=plan
        )
        return Drawn(self._decode(latents), bits, certainty)

    def _condition(self, tokens: TokenArrays, plan: GenerationPlan) -> TextCondition:
        def condition(model: InfinityModel, *arrays: Array) -> TextCondition:
            return condition_on(model.transformer, encode_text(model, *arrays), guided=plan.guided)

        negative = tokens.negative_ids is not None and plan.guided
        key = ("text", tokens.ids.shape, plan.guided, negative)
        arrays = tuple(tokens) if negative else (tokens.ids, tokens.lengths)
        return self._run("text", key, condition, (self.model, *arrays))

    def _decode(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B out_h out_w 3"]:
        def decode(tokenizer, latents: Array) -> Array:
            return tokenizer.decode(latents)

        return self._run("decoder", ("decode", latents.shape), decode, (self.model.image_tokenizer, latents))

    def _run(
        self, part: str, key: Hashable, function, arguments: tuple, *, donate: tuple[int, ...] = (), **static: Any
    ) -> Any:
        """Call the executable of ``key``, compiled at first use; time goes to ``part`` and to ``compile``."""
        start = time.perf_counter()
        if key not in self._executables:
            jitted = jax.jit(function, donate_argnums=donate, static_argnames=tuple(static))
            self._executables[key] = jitted.lower(*arguments, **static).compile()
            self.seconds["compile"] += time.perf_counter() - start
            start = time.perf_counter()
        result = jax.block_until_ready(self._executables[key](*arguments))
        self.seconds[part] += time.perf_counter() - start
        return result
