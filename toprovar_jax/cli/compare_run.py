"""What the compare command does once it has started: policy by policy, with both files up to date after each.

Nothing imported at the top imports jax: the backend is chosen first, and ``--help`` answers at once.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from toprovar_jax.cli.backend import start_backend
from toprovar_jax.cli.compare_options import CompareOptions, request_of
from toprovar_jax.cli.interrupts import Interrupts
from toprovar_jax.cli.model_options import loader
from toprovar_jax.cli.result_files import Bar, ResultFiles
from toprovar_jax.files import check_output_dir, ensure_output_dir

PICTURE, NUMBERS = "compare.png", "compare.json"


def run(
    options: CompareOptions,
    load: Callable[..., Any] | None,
    saved: dict[str, pathlib.Path],
    interrupts: Interrupts,
) -> None:
    """Carries out parsed options.

    Args:
      options: the command line.
      load: makes the pipeline from ``--model`` and ``precision=``; None: ``InfinityPipeline.from_pretrained``.
      saved: receives the file of numbers under the name of each policy that is in it.
      interrupts: tells a Ctrl-C from a failure, and lets it end the process at once as long as nothing is written.

    Raises:
      UserInputError: something that was asked for cannot be done; raised before any picture is begun.
      OSError: a file could not be written.
    """
    request = request_of(options)
    check_output_dir(request.out)
    files = ResultFiles(request.out, (PICTURE, NUMBERS), replace=options.force)
    bar = Bar(shown=not options.quiet and sys.stderr.isatty())
    with interrupts.nothing_to_lose():
        start_backend(options.backend)
        from toprovar_jax.comparison import Comparison, Setup

        pipeline = (load or loader(options))(options.model, precision=request.precision)
        setup = Setup(pipeline, request.prompts, request.seeds, request.settings, request.repeats, bar)
        comparison = Comparison(setup, request.policies)
    if not options.quiet:
        for warning in comparison.warnings:
            print(f"warning: {' '.join(warning.split())}", file=sys.stderr)
    ensure_output_dir(request.out)
    try:
        _work(comparison, files, saved, interrupts)
    finally:
        bar.close()
        if saved and not options.quiet:
            print(comparison.table(), end="\n\n")
        for path in files.written.values():
            print(path, flush=True)


def _work(comparison: Any, files: ResultFiles, saved: dict[str, pathlib.Path], interrupts: Interrupts) -> None:
    """Both files hold every policy that is finished, whatever happens during the next one."""
    from toprovar_jax.comparison_figures import sheet

    finished = comparison.run()
    while len(saved) < len(comparison.names):
        with interrupts.nothing_to_lose(not saved):
            result = next(finished)
        files.write(PICTURE, sheet(comparison))
        numbers = json.dumps(comparison.as_dict(), indent=1, allow_nan=False) + "\n"
        saved[result.name] = files.write(NUMBERS, numbers.encode("utf-8"))
        interrupts.check()
