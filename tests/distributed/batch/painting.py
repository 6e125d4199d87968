"""A pipeline without a model, whose pictures depend on everything that pictures may depend on, and then some."""

from __future__ import annotations

import dataclasses
import threading
import types
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from toprovar_jax.errors import UserInputError
from toprovar_jax.memory_options import ON_DEVICE
from toprovar_jax.outputs import PipelineOutput, Timings

SIDE, TEXT_LENGTH = 8, 300
SETTINGS = {
    **dict.fromkeys(("negative_prompt", "pixels", "guidance", "tau", "top_k", "top_p", "stop_after_scale")),
    **{"seed": 0, "num_images": 1, "aspect_ratio": "1:1", "policy": "dense", "positive_prompt": False},
}


@dataclasses.dataclass(frozen=True)
class Plan:
    policy: str
    guidance: Any

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Request(types.SimpleNamespace):
    """What a call was resolved to."""


class PaintingPipeline:
    """Called like InfinityPipeline.

    A picture also depends on the others of its call that the same copy makes, as in a product of a whole batch: so
    other batches are seen.
    The word "nan" in a prompt spoils its picture, "refused" makes the call refuse; a prompt has a token per word.

    Args:
      precision: as the model's card says.
      copies: into how many parts a call is cut.
      before: is called before every call, with its number.
    """

    model_name = "paint"
    default_guidance, default_tau, default_top_k, default_top_p, default_pixels = 3.0, 1.0, 900, 0.97, "tiny"
    memory = ON_DEVICE

    def __init__(self, *, precision: str = "fast", copies: int = 1, before: Callable[[int], object] = int):
        self.copies = copies
        self.card = types.SimpleNamespace(transformer=types.SimpleNamespace(precision=precision))
        self.before = before
        self.calls: list[tuple[list[str], list[int], dict[str, Any]]] = []
        self._lock = threading.Lock()

    def resolve(self, prompt: Any, *, strict: bool = False, **options: Any) -> Any:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if options.get("pixels") not in (None, "tiny", "1M"):
            raise UserInputError(f"pixels {options['pixels']!r}", "must be one of tiny, 1M", "choose one")
        counts = [len(text.split()) + 1 for text in prompts]
        if strict and max(counts) > TEXT_LENGTH:
            raise UserInputError(f"prompt of {max(counts)} tokens", f"must have at most {TEXT_LENGTH}", "shorten it")
        negatives = options.get("negative_prompt")
        lengths = np.minimum(counts, TEXT_LENGTH)
        tokens = types.SimpleNamespace(
            ids=np.zeros((len(prompts), TEXT_LENGTH), np.int32),
            lengths=lengths,
            negative_lengths=None if negatives is None else np.array([len(text.split()) + 1 for text in negatives]),
        )
        guidance = options.get("guidance_scale")
        return Request(
            call=(prompts, options.pop("seed", None), options),
            plan=Plan(options["policy"], None),
            sampling=(self.default_guidance if guidance is None else guidance, options.get("tau")),
            size=(SIDE, SIDE if options["aspect_ratio"] == "1:1" else 2 * SIDE),
            negative_prompts=negatives,
            tokens=tokens,
            warnings=tuple(f"{text!r} is about cats" for text in prompts if "cat" in text),
        )

    def __call__(self, request: Request, *, output_type: str) -> PipelineOutput:
        prompts, seed, options = request.call
        self.before(len(self.calls))
        with self._lock:
            self.calls.append((prompts, seed, options))
        if any("refused" in prompt for prompt in prompts):
            raise UserInputError("1M", "needs more memory than there is", "choose less")
        width = SIDE if options["aspect_ratio"] == "1:1" else 2 * SIDE
        negatives = options.get("negative_prompt") or [None] * len(seed)
        others = {name: value for name, value in options.items() if name != "negative_prompt"}
        share, images = len(seed) // self.copies, []
        for start in range(0, len(seed), share):
            part = slice(start, start + share)
            own = (prompts[part], seed[part], negatives[part], sorted(others.items(), key=str))
            company = zlib.crc32(repr(own).encode())
            generators = (np.random.default_rng((company, place)) for place in range(share))
            images += [generator.random((SIDE, width, 3), np.float32) for generator in generators]
        images = np.stack(images)
        for place, prompt in enumerate(prompts):
            if "nan" in prompt:
                images[place, 0, 0, 0] = np.nan
        return PipelineOutput(images, tuple(seed), tuple(prompts), Timings(), Plan("dense", None))
