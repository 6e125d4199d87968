"""What the export-eval command does once it has started.

Every file appears whole or not at all, and those that are whole are not made again. Nothing imported at the top
imports jax: the backend is chosen first, and ``--help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import pathlib
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from toprovar_jax.cli.backend import start_backend
from toprovar_jax.cli.export_eval_options import ExportEvalOptions, ExportEvalRequest, request_of
from toprovar_jax.cli.interrupts import Interrupts
from toprovar_jax.cli.memory_flags import memory_options_of
from toprovar_jax.cli.model_options import files_of, loader
from toprovar_jax.cli.result_files import Bar
from toprovar_jax.errors import UserInputError
from toprovar_jax.evaluation_suites.manifest import (
    PICTURES,
    alone,
    check_same,
    fingerprint,
    read_manifest,
    write_companions,
    write_manifest,
)
from toprovar_jax.evaluation_suites.reading import digest
from toprovar_jax.evaluation_suites.rewriting import read_rewritten
from toprovar_jax.evaluation_suites.suite import PictureFile, SuitePrompt
from toprovar_jax.files import check_output_dir, ensure_output_dir

SHOWN_WARNINGS = 5
"""Suites have thousands of prompts; after this many warnings the rest is counted."""


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """An export that has been checked.

    Attributes:
      request: what is asked for.
      prompts: what is to be drawn of the suite, in its order.
      texts: what to draw for each prompt, by its number.
      files: every picture file of these prompts.
      made: what the pictures depend on, for the manifest.
      versions: versions and device, for the manifest.
      resolved: what the pipeline makes of one request: plan and size.
    """

    request: ExportEvalRequest
    prompts: list[SuitePrompt]
    texts: Sequence[str]
    files: list[PictureFile]
    made: dict[str, Any]
    versions: dict[str, Any]
    resolved: Any

    @property
    def folder(self) -> pathlib.Path:
        """What the scorer is given."""
        return self.request.out / PICTURES


def run(
    options: ExportEvalOptions,
    load: Callable[[str | None], Any] | None,
    progress: dict[str, Any],
    interrupts: Interrupts,
) -> None:
    """Carries out parsed options.

    Args:
      options: the command line.
      load: makes the pipeline from ``--model``; None: ``InfinityPipeline.from_pretrained``.
      progress: receives how many ``files`` are finished, and in which ``folder``.
      interrupts: tells a Ctrl-C from a failure, and lets it end the process at once as long as nothing is written.

    Raises:
      UserInputError: something that was asked for cannot be done; raised before any picture is begun.
      OSError: a file could not be written.
    """
    request, memory = request_of(options), memory_options_of(options)
    everything = request.suite.read(request.prompts)
    texts = [prompt.text for prompt in everything]
    if request.rewritten is not None:
        texts = read_rewritten(request.rewritten, everything)
    prompts = everything[: request.limit]
    check_output_dir(request.out)
    found = read_manifest(request.out)
    voice = _Voice(shown=not options.quiet)
    with interrupts.nothing_to_lose():
        start_backend(options.backend)
        weights = _weights(options)
        pipeline = load(options.model) if load else loader(options)(options.model, memory=memory)
        task = _task(request, prompts, texts, pipeline, weights, memory.quantization)
    check_same(request.out, found, task.made, len(prompts))
    if options.dry_run:
        _show(task, options)
        return
    ensure_output_dir(request.out)
    with alone(request.out):
        found = read_manifest(request.out)  # another export may have been at work since
        check_same(request.out, found, task.made, len(prompts))
        _make(task, pipeline, found, voice, progress, interrupts, options)


def _task(
    request: ExportEvalRequest,
    prompts: list[SuitePrompt],
    texts: Sequence[str],
    pipeline: Any,
    weights: pathlib.Path,
    quantization: str | None,
) -> Task:
    import jax

    resolved = pipeline.resolve(texts[0], seed=request.seed, **request.settings)
    height, width = resolved.size
    if request.suite.square and height != width:
        rule = f"must be square for {request.suite.name}, whose scorer crops squares"
        raise UserInputError(f"pictures of {height} x {width} pixels", rule, "leave --aspect-ratio out")
    settings = {("guidance" if name == "guidance_scale" else name): value for name, value in request.settings.items()}
    for name, value in settings.items():
        if value is None:
            settings[name] = getattr(pipeline, f"default_{name}")
    rewritten = request.rewritten
    made = {
        "suite": request.suite.name,
        "model": pipeline.model_name,
        "weights": fingerprint(weights),
        **({"quantization": quantization} if quantization else {}),
        **settings,
        "height": height,
        "width": width,
        "images_per_prompt": request.images,
        "seed": request.seed,
        "seed_of_a_picture": "seed + 1000 * prompt number + picture number, both from 0, modulo 2**32",
        "prompts_sha256": digest(request.suite.files_of(request.prompts)),
        "rewritten_sha256": None if rewritten is None else digest([rewritten]),
    }
    versions = {name: importlib.metadata.version(name) for name in ("toprovar-jax", "jax", "pillow")}
    return Task(
        request,
        prompts,
        texts,
        request.suite.files(prompts, request.images),
        made,
        {**versions, "backend": jax.default_backend()},
        resolved,
    )


def _make(
    task: Task,
    pipeline: Any,
    found: Mapping[str, Any] | None,
    voice: _Voice,
    progress: dict[str, Any],
    interrupts: Interrupts,
    options: ExportEvalOptions,
) -> None:
    from toprovar_jax.evaluation_suites.pictures import make_pictures, missing_files

    request, total = task.request, len(task.files)
    missing, broken = missing_files(task.files, task.folder, task.resolved.size)
    if broken:
        voice.warn([f"{len(broken)} files were not whole pictures and are made again, the first being {broken[0]}"])
    if found is not None and task.versions not in found["runs"]:
        voice.warn([f"earlier pictures in {request.out} were made with other versions or on another device"])
    write_manifest(request.out, found, task.made, task.versions, prompts=len(task.prompts), finished=False)
    write_companions(request.out, request.suite.companions(task.prompts, request.images))
    progress["folder"] = task.folder
    done = progress["files"] = total - len(missing)
    bar = Bar(shown=not options.quiet and sys.stderr.isatty())

    def draw(prompts: list[SuitePrompt], seeds: list[int]) -> list[Any]:
        import numpy as np

        with interrupts.nothing_to_lose(not progress["files"]):
            output = pipeline(
                [task.texts[prompt.number] for prompt in prompts], seed=seeds, output_type="pil", **request.settings
            )
        voice.warn(output.warnings)
        interrupts.check()
        return [np.asarray(image) for image in output.images]

    making = make_pictures(task.files, missing, task.folder, draw, seed=request.seed, batch_size=request.batch_size)
    try:
        for file in making:
            done = progress["files"] = done + 1
            bar(file.path, done, total)
    finally:
        bar.close()
    found = read_manifest(request.out)
    write_manifest(request.out, found, task.made, task.versions, prompts=len(task.prompts), finished=True)
    progress.clear()
    _conclude(task, len(missing), voice, options)


def _conclude(task: Task, made: int, voice: _Voice, options: ExportEvalOptions) -> None:
    height, images = task.resolved.size[0], task.request.images
    out = shlex.quote(str(task.request.out.absolute()))
    scorer = task.request.suite.scorer.format(out=out, side=height, images=images)
    voice.left_out()
    if options.json:
        told = {"folder": str(task.folder), "files": len(task.files), "made": made, "scorer": scorer}
        print(json.dumps({**told, "export": task.made, "warnings": voice.said}), flush=True)
        return
    voice.tell(f"{len(task.files)} files of {len(task.prompts)} prompts, {made} of them made now; to score them:")
    voice.tell(f"  {scorer}")
    print(task.folder, flush=True)


def _show(task: Task, options: ExportEvalOptions) -> None:
    """A dry run: what is to be made, and how much of it is there."""
    from toprovar_jax.evaluation_suites.pictures import missing_files

    missing, _ = missing_files(task.files, task.folder, task.resolved.size)
    if options.json:
        told = {"folder": str(task.folder), "files": len(task.files), "missing": len(missing)}
        print(json.dumps({**told, "export": task.made, "plan": task.resolved.plan.as_dict()}), flush=True)
        return
    height, width = task.resolved.size
    print(
        f"{len(task.files)} files of {len(task.prompts)} prompts in {task.folder}, {len(missing)} of them to be made; "
        f"{task.request.images} pictures per prompt, {height} x {width} pixels (height x width)\n{task.resolved.plan}"
    )


def _weights(options: ExportEvalOptions) -> pathlib.Path:
    from toprovar_jax.hub import find_model

    return find_model(options.model, **files_of(options))


class _Voice:
    """What a run says on stderr: each warning once, and of many only the first."""

    def __init__(self, *, shown: bool):
        self._shown = shown
        self.said: list[str] = []

    def warn(self, warnings: Sequence[str]) -> None:
        """Says warnings that were not said before."""
        for warning in warnings:
            line = " ".join(warning.split())
            if line not in self.said:
                self.said.append(line)
                if len(self.said) <= SHOWN_WARNINGS:
                    self.tell(f"warning: {line}")

    def left_out(self) -> None:
        """Counts the warnings that were not said."""
        if len(self.said) > SHOWN_WARNINGS:
            self.tell(f"warning: {len(self.said) - SHOWN_WARNINGS} more like these")

    def tell(self, line: str) -> None:
        """Says one line."""
        if self._shown:
            print(line, file=sys.stderr, flush=True)
