"""The options that say which model a command loads; imports neither jax nor numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from toprovar_jax.cli.command_line import option

Model = Annotated[
    str | None,
    option(
        "MODEL",
        "A model by name or folder, a folder of original files, or a repository on the Hugging Face hub such as "
        "FoundationVision/Infinity; default: the small embedded one.",
    ),
]
Variant = Annotated[
    str | None,
    option("NAME", "Which model of several original files: infinity-2b, infinity-8b, or a file or folder by name."),
]
Vae = Annotated[
    str | None,
    option("FILE", "The VAE, among the original files or elsewhere; default: the one that belongs to the model."),
]
TextEncoder = Annotated[
    str | None,
    option("DIR", "The T5 encoder; default: the one among the original files, or the hub's copy of flan-t5-xl."),
]


def files_of(options: Any) -> dict[str, Any]:
    """What any command's options say about original files, as :func:`toprovar_jax.hub.find_model` takes it."""
    said = {name: getattr(options, name) for name in ("variant", "vae", "text_encoder")}
    return said | {"progress": not getattr(options, "quiet", False)}


def loader(options: Any) -> Callable[..., Any]:
    """Turns ``--model`` into a pipeline: ``InfinityPipeline.from_pretrained`` with :func:`files_of` the options."""

    def load(model: str | None, **settings: Any) -> Any:
        from toprovar_jax.pipeline import InfinityPipeline

        return InfinityPipeline.from_pretrained(model, **files_of(options), **settings)

    return load
