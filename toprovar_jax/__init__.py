"""Fast visual-autoregressive image generation in JAX: Infinity on TPU and GPU.

    from toprovar_jax import InfinityPipeline
    pipe = InfinityPipeline.from_pretrained()
    pipe("a red sphere", seed=1).images[0].save("sphere.png")

Names are imported when first used, so that ``import toprovar_jax`` touches neither jax nor a device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toprovar_jax.acceleration import (
        HACK,
        POLICIES,
        Candidates,
        Composite,
        Dense,
        FastVAR,
        FixedPlan,
        GenerationPlan,
        GuidanceOffLate,
        RandomTokens,
        ScaleKV,
        SkipLast,
        SkipVAR,
        SparseVAR,
        SparVAR,
        StageVAR,
        ToProVAR,
        policy_named,
        register_score,
    )
    from toprovar_jax.errors import UserInputError
    from toprovar_jax.generation import Generation, InfinityModel, Text, encode_text, generate
    from toprovar_jax.hub import list_models
    from toprovar_jax.memory import MemoryReport, memory_report
    from toprovar_jax.memory_options import MemoryOptions
    from toprovar_jax.pipeline import InfinityPipeline
    from toprovar_jax.sampling import Sampling
    from toprovar_jax.schedule import ScaleSchedule

__version__ = "0.1.0"

_WHERE = {
    "Candidates": "acceleration",
    "Composite": "acceleration",
    "Dense": "acceleration",
    "FastVAR": "acceleration",
    "FixedPlan": "acceleration",
    "GenerationPlan": "acceleration",
    "GuidanceOffLate": "acceleration",
    "HACK": "acceleration",
    "POLICIES": "acceleration",
    "RandomTokens": "acceleration",
    "ScaleKV": "acceleration",
    "SkipLast": "acceleration",
    "SkipVAR": "acceleration",
    "SparVAR": "acceleration",
    "SparseVAR": "acceleration",
    "StageVAR": "acceleration",
    "ToProVAR": "acceleration",
    "policy_named": "acceleration",
    "register_score": "acceleration",
    "UserInputError": "errors",
    "Generation": "generation",
    "InfinityModel": "generation",
    "Text": "generation",
    "encode_text": "generation",
    "generate": "generation",
    "list_models": "hub",
    "MemoryOptions": "memory_options",
    "MemoryReport": "memory",
    "memory_report": "memory",
    "InfinityPipeline": "pipeline",
    "Sampling": "sampling",
    "ScaleSchedule": "schedule",
}

__all__ = [
    "HACK",
    "POLICIES",
    "Candidates",
    "Composite",
    "Dense",
    "FastVAR",
    "FixedPlan",
    "Generation",
    "GenerationPlan",
    "GuidanceOffLate",
    "InfinityModel",
    "InfinityPipeline",
    "MemoryOptions",
    "MemoryReport",
    "RandomTokens",
    "Sampling",
    "ScaleKV",
    "ScaleSchedule",
    "SkipLast",
    "SkipVAR",
    "SparVAR",
    "SparseVAR",
    "StageVAR",
    "Text",
    "ToProVAR",
    "UserInputError",
    "encode_text",
    "generate",
    "list_models",
    "memory_report",
    "policy_named",
    "register_score",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
