"""Makes the embedded models: ``python -m toprovar_jax.training.scenes all --directory runs/scenes``.

Three stages, each of which continues where it was when it is started again: the image tokenizer on freshly drawn
pictures; transformer and text encoder on encoded pictures whose captions are drawn anew at every use; and the export
of the newest checkpoint as a model folder.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from toprovar_jax.errors import UserInputError, unknown_name
from toprovar_jax.hub import CARD
from toprovar_jax.loading import IMAGE_TOKENIZER, TOKENIZER
from toprovar_jax.training.export_stage import export
from toprovar_jax.training.loop import Stopped
from toprovar_jax.training.parts import join, split
from toprovar_jax.training.placement import Placement
from toprovar_jax.training.recipes import RECIPES, Recipe
from toprovar_jax.training.tokenizer_stage import train_image_tokenizer
from toprovar_jax.training.transformer_stage import train_transformer

TOKENIZER_SHARE, TRANSFORMER_SHARE = 0.30, 0.62
"""Of the minutes given to all stages; the rest is for the export."""

_STEPS = 4000, 12000
"""Of the two stages where neither steps nor minutes are given."""

_SMALL_FILES = ("metrics.csv", "curves.png", "samples.png")


def pack(directory: Path, megabytes: float, carry: Literal["weights", "everything"]) -> list[Path]:
    """The folder's results as small files in ``directory/parts``.

    Args:
      directory: of a run.
      megabytes: of one file at most.
      carry: ``everything`` is what an exact continuation needs, the newest checkpoint of each stage; ``weights`` leaves
        out the optimiser, and a transformer that is continued from them starts a schedule of its own. They are those
        of finished tokenizers and of exported models: an image tokenizer that is still trained is in its checkpoints
        alone.
    """
    names = ["model", TOKENIZER, IMAGE_TOKENIZER]
    for stage in ("tokenizer", "transformer"):
        names += [f"{stage}/{name}" for name in _SMALL_FILES]
        if carry == "everything":
            newest = max(_checkpoints(directory / stage), default=None)
            names += [f"{stage}/recipe.json"] + ([] if newest is None else [f"{stage}/checkpoints/{newest}"])
    return split(directory, names, directory / "parts", megabytes)


def _checkpoints(stage: Path) -> list[int]:
    return [int(path.name) for path in stage.glob("checkpoints/*") if path.name.isdigit()]


def _report(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)


def main(arguments: list[str] | None = None, recipes: Mapping[str, Recipe] = RECIPES) -> int:
    """The command; returns its exit status."""

    def command(
        stage: Annotated[Literal["tokenizer", "transformer", "export", "all"], tyro.conf.Positional],
        directory: Path,
        recipe: str = next(iter(recipes)),
        tokenizer_steps: int | None = None,
        steps: int | None = None,
        minutes: float | None = None,
        devices: int | None = None,
        state_parts: int = 1,
        parts_mb: float | None = None,
        carry: Literal["weights", "everything"] = "weights",
        resume_parts: Path | None = None,
    ) -> Any:
        """Train and export an embedded model.

        Args:
          stage: what to do; what was finished before is not done again.
          directory: checkpoints, metrics and results.
          recipe: name of the model to make.
          tokenizer_steps: steps of the image tokenizer; default 4000.
          steps: steps of the transformer; default 12000.
          minutes: time for all stages together, in place of steps: their number is fixed after some have been timed.
          devices: how many to train on; default all.
          state_parts: devices that share one copy of parameters and optimiser.
          parts_mb: also pack the results into files of at most so many megabytes, in DIRECTORY/parts.
          carry: what is packed: weights of finished stages and records, or checkpoints too, for an exact continuation
            elsewhere, also of a first stage that was stopped.
          resume_parts: folder with such files, unpacked into DIRECTORY first.
        """
        if recipe not in recipes:
            raise unknown_name("recipe", recipe, recipes)
        if minutes is not None and not (steps is None and tokenizer_steps is None):
            raise UserInputError("minutes and steps", "exclude each other", "give one of them")
        for name, number in (("steps", steps), ("tokenizer steps", tokenizer_steps)):
            if number is not None and number < 1:
                raise UserInputError(f"{name} {number}", "must be at least 1", "leave it out for the default")
        for name, amount in (("minutes", minutes), ("parts of megabytes", parts_mb)):
            if amount is not None and not 0.0 < amount < math.inf:
                raise UserInputError(f"{name} {amount}", "must be a number above 0", "choose 15 or so")
        if resume_parts is not None and not join(resume_parts, directory):
            _report(f"the parts in {resume_parts} were unpacked before: going on from {directory}")
        chosen = recipes[recipe]
        placement = _placement(devices, state_parts)
        options: dict[str, Any] = {"placement": placement, "report": _report}

        def finish() -> None:
            if parts_mb is not None:
                if _checkpoints(directory / "transformer"):
                    export(directory, chosen)
                if carry == "weights" and not (directory / IMAGE_TOKENIZER).is_file():
                    _report("the image tokenizer is not finished: its weights are only packed with --carry everything")
                for path in pack(directory, parts_mb, carry):
                    _report(f"wrote {path}")

        try:
            _train(stage, directory, chosen, (tokenizer_steps, steps), minutes, options)
        except Stopped:
            finish()
            raise
        finish()

    try:
        tyro.cli(command, args=arguments, prog="python -m toprovar_jax.training.scenes")
    except UserInputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _placement(devices: int | None, state_parts: int) -> Placement:
    there = jax.devices()
    if devices is not None and not 1 <= devices <= len(there):
        raise UserInputError(f"{devices} devices", f"must be 1 to {len(there)}", "leave it out for all")
    return Placement.over(there[:devices], state_parts=state_parts)


def _train(
    stage: str,
    directory: Path,
    recipe: Recipe,
    steps: tuple[int | None, int | None],
    minutes: float | None,
    options: dict[str, Any],
) -> None:
    """The stages that ``stage`` names."""
    lengths: list[dict[str, Any]] = [
        {"num_steps": default if given is None else given}
        if minutes is None
        else {"num_steps": None, "minutes": minutes * share}
        for given, default, share in zip(steps, _STEPS, (TOKENIZER_SHARE, TRANSFORMER_SHARE), strict=True)
    ]
    # The file is written when the stage is done; parts may bring it without checkpoints.
    done = stage == "all" and (directory / IMAGE_TOKENIZER).is_file() and not _checkpoints(directory / "tokenizer")
    if stage in ("tokenizer", "all") and not done:
        train_image_tokenizer(directory, recipe, **lengths[0], **options)
    if stage in ("transformer", "all"):
        brought = directory / "model"
        if (brought / CARD).is_file() and not _checkpoints(directory / "transformer"):
            _report(f"the transformer starts from the weights in {brought}, with a schedule of its own")
            options["start_from"] = brought
        train_transformer(directory, recipe, **lengths[1], **options)
    if stage in ("export", "all"):
        _report(f"wrote {export(directory, recipe)}")


if __name__ == "__main__":
    sys.exit(main())
