"""What the generate command does once it has started: prompts in, PNG files out, batch by batch.

Nothing imported at the top imports jax: the backend is chosen first, and ``--help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from toprovar_jax.cli.backend import start_backend
from toprovar_jax.cli.interrupts import Interrupts
from toprovar_jax.cli.memory_flags import memory_options_of
from toprovar_jax.cli.model_options import loader
from toprovar_jax.cli.options import (
    GenerateOptions,
    batch_size_of,
    folder_of,
    requests_of,
    settings_of,
)
from toprovar_jax.cli.report import Report
from toprovar_jax.errors import UserInputError
from toprovar_jax.files import check_output_dir, ensure_output_dir
from toprovar_jax.memory_options import MemoryOptions
from toprovar_jax.prompts import with_positive_prompt
from toprovar_jax.recipes import recipe_of
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


@dataclasses.dataclass(frozen=True, eq=False)
class Made:
    """What a run has finished so far; its lists grow.

    Attributes:
      folder: where the files go.
      start: when the run began, in seconds of ``time.perf_counter``.
      calls: the timings of each call of the pipeline.
      pictures: what has been saved.
      records: the same for the JSON object.
      pixels: the same as arrays, if a sheet of all is wanted.
    """

    folder: pathlib.Path
    start: float
    calls: list[Timings] = dataclasses.field(default_factory=list)
    pictures: list[Picture] = dataclasses.field(default_factory=list)
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    pixels: list[Any] = dataclasses.field(default_factory=list)

    @property
    def timings(self) -> Timings:
        """All calls together, and the time since the start."""
        return Timings.combined(self.calls, total=time.perf_counter() - self.start)


def run(options: GenerateOptions, load: Load | None, saved: list[pathlib.Path], interrupts: Interrupts) -> None:
    """Carries out parsed options.

    Args:
      options: the command line.
      load: makes the pipeline from ``--model``; None: ``InfinityPipeline.from_pretrained``.
      saved: receives the path of each picture as soon as its file is complete.
      interrupts: tells a Ctrl-C from a failure; after one, ``--json`` and ``--grid`` still show the pictures kept.

    Raises:
      UserInputError: something that was asked for cannot be done; raised before any picture is begun.
      OSError: a file could not be written.
    """
    start = time.perf_counter()
    batch_size, folder, memory = batch_size_of(options), folder_of(options), memory_options_of(options)
    jobs = list(_jobs(options))
    check_output_dir(folder)
    report = Report(as_json=options.json, quiet=options.quiet)
    with interrupts.nothing_to_lose():
        start_backend(options.backend)
        pipeline = load(options.model) if load else loader(options)(options.model, memory=memory)
        report.warn(_in_vain(memory))
        pictures = _resolve(options, pipeline, jobs, report)
    if options.dry_run:
        _show(pictures, report)
        return
    ensure_output_dir(folder)
    made = Made(folder, start)
    try:
        for batch in _batches(pictures, batch_size):
            with interrupts.nothing_to_lose(not saved):
                output = _draw(pipeline, batch, len(pictures), report)
            _save(options, pipeline, batch, output, made, report, saved)
            interrupts.check()
    except BaseException as error:
        if made.pictures and interrupts.explain(error):
            _conclude(made, report, interrupted=True)
        raise
    _conclude(made, report)
    report.summary(len(pictures), folder, made.timings)


def _in_vain(memory: MemoryOptions) -> tuple[str, ...]:
    import jax

    if memory.stream_blocks and jax.default_backend() == "cpu":
        return ("--low-memory: the memory of a CPU is the host's, so streaming blocks saves nothing here",)
    return ()


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


def _resolve(options: GenerateOptions, pipeline: Any, jobs: Sequence[Job], report: Report) -> list[Picture]:
    """Every picture of every job, once the pipeline has agreed to all of them."""
    pictures: list[Picture] = []
    for job in jobs:
        try:
            resolved = pipeline.resolve(job.prompt, seed=job.seeds[0], **job.arguments)
        except UserInputError as error:
            if not job.origin:
                raise
            raise UserInputError(f"{job.origin}: {error.value}", error.rule, error.remedy) from None
        if options.strict and resolved.warnings:
            where = f"{job.origin}: " if job.origin else ""
            raise UserInputError(
                f"{where}--strict", f"refuses a warning ({resolved.warnings[0]})", "change it, or leave --strict out"
            )
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


def _draw(pipeline: Any, batch: Sequence[Picture], total: int, report: Report) -> Any:
    with report.scale_bar(f"picture {batch[-1].index + 1} of {total}") as on_scale_end:
        return pipeline(
            [picture.job.prompt for picture in batch],
            seed=[picture.seed for picture in batch],
            output_type="pil",
            callback_on_scale_end=on_scale_end,
            **batch[0].job.arguments,
        )


def _save(
    options: GenerateOptions,
    pipeline: Any,
    batch: Sequence[Picture],
    output: Any,
    made: Made,
    report: Report,
    saved: list[pathlib.Path],
) -> None:
    import numpy as np

    from toprovar_jax.images import file_stem, save_png

    report.warn(output.warnings)
    made.calls.append(output.timings)
    for picture, image in zip(batch, output.images, strict=True):
        array = np.asarray(image)
        recipe = None
        if not options.no_metadata:
            recipe = recipe_of(pipeline, picture.job.prompt, picture.seed, picture.size, picture.job.arguments)
        stem = file_stem(picture.index, picture.job.prompt, picture.seed)
        path = save_png(array, made.folder, stem, recipe)
        saved.append(path)
        made.records.append({"path": str(path), "prompt": picture.job.prompt, "seed": picture.seed})
        made.pictures.append(picture)
        if options.grid:
            made.pixels.append(array)
        report.path(path)


def _conclude(made: Made, report: Report, **more: bool) -> None:
    """The sheet and the JSON object of what was made."""
    grid = {}
    if made.pixels:
        from toprovar_jax.images import make_grid, save_png

        path = save_png(make_grid(made.pixels), made.folder, "grid")
        report.path(path)
        grid = {"grid": str(path)}
    report.result(made.records, made.timings, _distinct_plans(made.pictures), **grid, **more)


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


def _distinct_plans(pictures: Sequence[Picture]) -> list[Any]:
    plans: list[Any] = []
    for picture in pictures:
        if picture.plan not in plans:
            plans.append(picture.plan)
    return plans
