"""The embedded world: scenes of simple solids, their pictures, their captions, and a judge who knows what it sees."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toprovar_jax.scenes.captions import VOCABULARY, caption
    from toprovar_jax.scenes.judge import Detections, Judge
    from toprovar_jax.scenes.reading import Reading, describe_world, read_prompt
    from toprovar_jax.scenes.renderer import empty_scene_image, render
    from toprovar_jax.scenes.sampling import sample_scenes
    from toprovar_jax.scenes.tasks import TASKS, TaskPrompt, Wanted, read_task_prompts, task_prompts, to_json_line
    from toprovar_jax.scenes.world import COLOURS, SHAPES, Scenes

__all__ = [
    "COLOURS",
    "SHAPES",
    "TASKS",
    "VOCABULARY",
    "Detections",
    "Judge",
    "Reading",
    "Scenes",
    "TaskPrompt",
    "Wanted",
    "caption",
    "describe_world",
    "empty_scene_image",
    "read_prompt",
    "read_task_prompts",
    "render",
    "sample_scenes",
    "task_prompts",
    "to_json_line",
]

# Lazy, so that asking about a prompt does not load the judge and its optimiser.
_HOMES = {
    "captions": ("VOCABULARY", "caption"),
    "judge": ("Detections", "Judge"),
    "reading": ("Reading", "describe_world", "read_prompt"),
    "renderer": ("empty_scene_image", "render"),
    "sampling": ("sample_scenes",),
    "tasks": ("TASKS", "TaskPrompt", "Wanted", "read_task_prompts", "task_prompts", "to_json_line"),
    "world": ("COLOURS", "SHAPES", "Scenes"),
}


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
