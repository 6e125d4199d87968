"""The embedded world: scenes of simple solids, their pictures, their captions, and a judge who knows what it sees."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toprovar_jax.scenes.captions import VOCABULARY, caption, describe_world, unknown_to_world
    from toprovar_jax.scenes.judge import Judge, Verdicts, agreement
    from toprovar_jax.scenes.renderer import empty_scene_image, render
    from toprovar_jax.scenes.world import COLOURS, SHAPES, Scenes, sample_scenes

__all__ = [
    "COLOURS",
    "SHAPES",
    "VOCABULARY",
    "Judge",
    "Scenes",
    "Verdicts",
    "agreement",
    "caption",
    "describe_world",
    "empty_scene_image",
    "render",
    "sample_scenes",
    "unknown_to_world",
]

# Lazy, so that asking about a prompt does not load the judge and its optimiser.
_HOMES = {
    "captions": ("VOCABULARY", "caption", "describe_world", "unknown_to_world"),
    "judge": ("Judge", "Verdicts", "agreement"),
    "renderer": ("empty_scene_image", "render"),
    "world": ("COLOURS", "SHAPES", "Scenes", "sample_scenes"),
}


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
