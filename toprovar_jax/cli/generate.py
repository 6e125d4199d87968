"""The generate command: prompts in, PNG files out, batch by batch so that nothing finished is ever lost.

Nothing imported at the top imports jax: the backend is chosen first, and ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import itertools
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from toprovar_jax.cli.backend import start_backend
from toprovar_jax.cli.options import GenerateOptions, batch_size_of, parse_options, requests_of, settings_of
from toprovar_jax.cli.report import Report
from toprovar_jax.errors import UserInputError
from toprovar_jax.files import check_output_dir, ensure_output_dir
from toprovar_jax.prompts import with_positive_prompt
from toprovar_jax.settings import MAX_SEED
from toprovar_jax.timings import Timings

Load = Callable[[str | None], Any]
"""Turns ``--model`` into a pipeline: an ``InfinityPipeline`` or anything that is called like one."""


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """One prompt with its settings, and the seeds of the pictures wanted of it."""

    prompt: str
    seeds: tuple[int, ...]
    arguments: dict[str, Any]
    origin: str


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """One picture to make: its number in the run, its job and seed, and what the pipeline made of the request."""

    index: int
    job: Job
    seed: int
    size: tuple[int, int]
    plan: Any


def main(argv: Sequence[str] | None = None, *, load: Load | None = None) -> int:
    """Runs the command and returns its exit status; every mistake and failure is one line on stderr.

    Args:
      argv: the words after the command's name; default: those of this process.
      load: makes the pipeline from ``--model``; default: ``InfinityPipeline.from_pretrained``.

    Returns:
      0 on success, 2 on bad input, 1 on any other failure, 130 on Ctrl-C. Pictures finished before that stay.
    """
    argv = sys.argv[1:] if argv is None else argv
    saved: list[pathlib.Path] = []
    try:
        run(parse_options(argv), load or _from_pretrained, saved)
        sys.stdout.flush()
        return 0
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except UserInputError as error:
        return _fail(2, str(error), saved)
    except KeyboardInterrupt:
        return _fail(130, "interrupted" if saved else "interrupted; no picture was saved", saved)
    except BrokenPipeError:
        # Python flushes stdout again on exit and would report the closed pipe a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if "--debug" in argv:
            raise
        return _fail(1, _explain(error), saved)


def run(options: GenerateOptions, load: Load, saved: list[pathlib.Path]) -> None:
    """Carries out parsed options.

    Args:
      options: the command line.
      load: makes the pipeline.
      saved: receives the path of each picture as soon as its file is complete.

    Raises:
      UserInputError: something that was asked for cannot be done; raised before any picture is begun.
      OSError: a file could not be written.
    """
    start = time.perf_counter()
    batch_size = batch_size_of(options)
    jobs = list(_jobs(options))
    check_output_dir(options.out)
    start_backend(options.backend)
    report = Report(as_json=options.json, quiet=options.quiet)
    pipeline = load(options.model)
    pictures = _resolve(pipeline, jobs, report)
    if options.dry_run:
        _show(pictures, report)
        return
    ensure_output_dir(options.out)
    _generate(options, pipeline, _batches(pictures, batch_size), report, saved, start)


def _from_pretrained(model: str | None) -> Any:
    from toprovar_jax.pipeline import InfinityPipeline

    return InfinityPipeline.from_pretrained(model)


def _jobs(options: GenerateOptions) -> Iterator[Job]:
    defaults = settings_of(options)
    for request in requests_of(options):
        settings = {**defaults, **request.overrides}
        if request.seed is not None:
            settings["seed"] = request.seed
        first, count = settings.pop("seed"), settings.pop("num_images")
        prompt = with_positive_prompt(request.prompt) if settings.pop("positive_prompt") else request.prompt
        arguments = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
        arguments["guidance_scale"] = arguments.pop("guidance")
        seeds = tuple((first + offset) % (MAX_SEED + 1) for offset in range(count))
        yield Job(prompt, seeds, {**arguments, "strict": options.strict}, request.origin)


def _resolve(pipeline: Any, jobs: Sequence[Job], report: Report) -> list[Picture]:
    """Every picture of every job, once the pipeline has agreed to all of them."""
    pictures: list[Picture] = []
    for job in jobs:
        try:
            resolved = pipeline.resolve(job.prompt, seed=job.seeds[0], **job.arguments)
        except UserInputError as error:
            if not job.origin:
                raise
            raise UserInputError(f"{job.origin}: {error.value}", error.rule, error.remedy) from None
        report.warn(resolved.warnings)
        pictures += [
            Picture(len(pictures) + place, job, seed, resolved.size, resolved.plan)
            for place, seed in enumerate(job.seeds)
        ]
    return pictures


def _batches(pictures: Sequence[Picture], batch_size: int) -> list[list[Picture]]:
    """Neighbours with equal settings, at most ``batch_size`` at a time."""
    batches = []
    for _, group in itertools.groupby(pictures, key=lambda picture: picture.job.arguments):
        alike = list(group)
        batches += [alike[start : start + batch_size] for start in range(0, len(alike), batch_size)]
    return batches


def _generate(
    options: GenerateOptions,
    pipeline: Any,
    batches: Sequence[Sequence[Picture]],
    report: Report,
    saved: list[pathlib.Path],
    start: float,
) -> None:
    import numpy as np

    from toprovar_jax.images import file_stem, make_grid, save_png

    total = sum(map(len, batches))
    records, timings, pixels = [], [], []
    for batch in batches:
        label = f"picture {batch[-1].index + 1} of {total}"
        with report.scale_bar(label) as on_scale_end:
            output = pipeline(
                [picture.job.prompt for picture in batch],
                seed=[picture.seed for picture in batch],
                output_type="pil",
                callback_on_scale_end=on_scale_end,
                **batch[0].job.arguments,
            )
        report.warn(output.warnings)
        timings.append(output.timings)
        for picture, image in zip(batch, output.images, strict=True):
            array = np.asarray(image)
            recipe = None if options.no_metadata else _recipe(pipeline, picture)
            stem = file_stem(picture.index, picture.job.prompt, picture.seed)
            path = save_png(array, options.out, stem, recipe)
            saved.append(path)
            report.path(path)
            records.append({"path": str(path), "prompt": picture.job.prompt, "seed": picture.seed})
            if options.grid:
                pixels.append(array)
    grid = {}
    if options.grid:
        path = save_png(make_grid(pixels), options.out, "grid")
        report.path(path)
        grid = {"grid": str(path)}
    combined = Timings.combined(timings, total=time.perf_counter() - start)
    report.result(records, combined, _distinct_plans(itertools.chain(*batches)), **grid)
    report.summary(total, pathlib.Path(options.out), combined)


def _show(pictures: Sequence[Picture], report: Report) -> None:
    """A dry run: the plans and sizes of what would be made."""
    variants: list[tuple[Any, tuple[int, int]]] = []
    counts: list[int] = []
    for picture in pictures:
        variant = (picture.plan, picture.size)
        if variant not in variants:
            variants.append(variant)
            counts.append(0)
        counts[variants.index(variant)] += 1
    for (plan, size), count in zip(variants, counts, strict=True):
        report.plan(plan, size, count)
    records = [{"path": None, "prompt": picture.job.prompt, "seed": picture.seed} for picture in pictures]
    report.result(records, Timings(), _distinct_plans(pictures))


def _distinct_plans(pictures: Iterator[Picture] | Sequence[Picture]) -> list[Any]:
    plans: list[Any] = []
    for picture in pictures:
        if picture.plan not in plans:
            plans.append(picture.plan)
    return plans


def _recipe(pipeline: Any, picture: Picture) -> dict[str, Any]:
    """Everything needed to make the picture again; what was left to the model is filled in with its defaults."""
    arguments = picture.job.arguments
    recipe = {
        "prompt": picture.job.prompt,
        "negative_prompt": arguments["negative_prompt"],
        "seed": picture.seed,
        "model": pipeline.model_name,
        "height": picture.size[0],
        "width": picture.size[1],
        "aspect_ratio": arguments["aspect_ratio"],
        "pixels": arguments["pixels"],
        "guidance": arguments["guidance_scale"],
        **{name: arguments[name] for name in ("tau", "top_k", "top_p", "policy", "stop_after_scale")},
    }
    for name, value in recipe.items():
        if value is None:
            recipe[name] = getattr(pipeline, f"default_{name}", None)
    return {**recipe, "toprovar_jax_version": _version("toprovar-jax"), "jax_version": _version("jax")}


def _version(package: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return "not installed"


def _explain(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}; run again with --debug to see where"


def _fail(status: int, message: str, saved: Sequence[pathlib.Path]) -> int:
    kept = f"; {len(saved)} finished picture{'s' * (len(saved) > 1)} kept in {saved[0].parent}" if saved else ""
    print(f"error: {' '.join(message.split())}{kept}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
