"""What the eval command does once it has started.

Finished batches are kept in a folder beside the results until these are written, so that the same command goes on
where it was stopped. Nothing imported at the top imports jax: the backend is chosen first, and ``--help`` answers at
once.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from toprovar_jax.cli.backend import start_backend
from toprovar_jax.cli.evaluate_options import EvaluateOptions, EvaluateRequest, request_of
from toprovar_jax.cli.interrupts import Interrupts
from toprovar_jax.cli.model_options import files_of, loader
from toprovar_jax.cli.result_files import Bar, ResultFiles
from toprovar_jax.files import check_output_dir, ensure_output_dir
from toprovar_jax.hub import find_model

NUMBERS, SHEET = "results.json", "contact_sheet.png"
KEPT = "unfinished"
"""Folder of the batches of an evaluation that is not finished."""


def run(
    options: EvaluateOptions,
    load: Callable[..., Any] | None,
    judge: Any,
    progress: dict[str, Any],
    interrupts: Interrupts,
) -> None:
    """Carries out parsed options.

    Args:
      options: the command line.
      load: makes the pipeline from ``--model`` and ``precision=``; None: ``InfinityPipeline.from_pretrained``.
      judge: what finds objects in pictures; None: the package's judge.
      progress: receives how many ``pictures`` are kept, and in which ``folder``, until the results are written.
      interrupts: tells a Ctrl-C from a failure, and lets it end the process at once as long as nothing is written.

    Raises:
      UserInputError: something that was asked for cannot be done; raised before any picture is begun.
      OSError: a file could not be written.
    """
    request = request_of(options)
    check_output_dir(request.out)
    files = ResultFiles(request.out, (NUMBERS, SHEET), replace=options.force)
    bar = Bar(shown=not options.quiet and sys.stderr.isatty())
    with interrupts.nothing_to_lose():
        start_backend(options.backend)
        wanted: dict[str, Any] = files_of(options) | {"precision": request.precision}
        folder = find_model(options.model, **wanted)
        evaluation = _evaluation(options, request, folder, load, judge, bar)
    if not options.quiet:
        for warning in evaluation.warnings:
            print(f"warning: {' '.join(warning.split())}", file=sys.stderr)
    ensure_output_dir(request.out)
    progress["folder"] = request.out / KEPT
    try:
        for pictures in evaluation.run():
            progress["pictures"] = pictures
            interrupts.check()
    finally:
        bar.close()
    _conclude(evaluation, options, files)
    evaluation.forget()
    progress.clear()


def _evaluation(
    options: EvaluateOptions,
    request: EvaluateRequest,
    folder: pathlib.Path,
    load: Callable[..., Any] | None,
    judge: Any,
    bar: Bar,
) -> Any:
    from toprovar_jax.evaluation import Evaluation, Setup, load_coder, prompts_of
    from toprovar_jax.scenes.tasks import read_task_prompts

    given = None if request.prompts is None else tuple(read_task_prompts(request.prompts))
    pipeline = (load or loader(options))(options.model, precision=request.precision)
    prompts = given or prompts_of(pipeline.card, request.per_task, request.tasks, request.seed)
    setup = Setup(
        pipeline,
        prompts,
        images=request.images,
        seed=request.seed,
        policy=request.policy,
        against=request.against,
        options=request.settings,
        batch_size=request.batch_size,
        coder=load_coder(folder, pipeline.card.transformer.precision) if options.ceiling else None,
        judge=judge,
        kept=request.out / KEPT,
        weights=_fingerprint(folder),
        on_picture=bar,
    )
    return Evaluation(setup)


def _conclude(evaluation: Any, options: EvaluateOptions, files: ResultFiles) -> None:
    from toprovar_jax.evaluation_report import as_dict, sheet, table

    found = as_dict(evaluation)
    numbers = files.write(NUMBERS, (json.dumps(found, indent=1, allow_nan=False) + "\n").encode("utf-8"))
    picture = files.write(SHEET, sheet(evaluation))
    if options.json:
        told = {name: value for name, value in found.items() if name != "pictures"}
        print(json.dumps({**told, "files": [str(numbers), str(picture)]}), flush=True)
        return
    if not options.quiet:
        print(table(evaluation), end="\n\n")
    print(numbers, picture, sep="\n", flush=True)


def _fingerprint(folder: pathlib.Path) -> str:
    """Changes whenever a file of the model does; sizes and times stand for what is in them."""
    told = [
        (str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    return hashlib.sha256(repr(told).encode("utf-8")).hexdigest()[:32]
