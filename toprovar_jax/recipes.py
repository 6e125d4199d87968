"""Recipes: everything needed to make a picture again, as it travels inside the picture."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
from collections.abc import Mapping
from typing import Any

from toprovar_jax.memory_options import ON_DEVICE


def recipe_of(
    pipeline: Any, prompt: str, seed: int, size: tuple[int, int], arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """The recipe of one picture; what was left to the model is filled in with its defaults.

    Args:
      pipeline: what made the picture.
      prompt: its text, as the model read it.
      seed: its own.
      size: height and width in pixels.
      arguments: of the pipeline's call, by their names there.
    """
    recipe = {
        "prompt": prompt,
        "negative_prompt": arguments["negative_prompt"],
        "seed": seed,
        "model": pipeline.model_name,
        "height": size[0],
        "width": size[1],
        "aspect_ratio": arguments["aspect_ratio"],
        "pixels": arguments["pixels"],
        "guidance": arguments["guidance_scale"],
        **{name: arguments[name] for name in ("tau", "top_k", "top_p", "policy", "stop_after_scale")},
    }
    for name, value in recipe.items():
        if value is None:
            recipe[name] = getattr(pipeline, f"default_{name}", None)
    # Of the ways to save memory this one changes what is computed.
    quantization = getattr(pipeline, "memory", ON_DEVICE).quantization
    if quantization is not None:
        recipe["quantization"] = quantization
    return {**recipe, "toprovar_jax_version": _version("toprovar-jax"), "jax_version": _version("jax")}


@functools.cache
def _version(package: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return "not installed"
