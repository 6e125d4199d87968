"""What the explain command does once it has started: make one picture in full and spared, and draw how.

Nothing imported at the top imports jax: the backend is chosen first, and ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from toprovar_jax.cli.backend import start_backend
from toprovar_jax.cli.explain_options import ExplainOptions, request_of
from toprovar_jax.cli.interrupts import Interrupts
from toprovar_jax.cli.model_options import loader
from toprovar_jax.errors import UserInputError
from toprovar_jax.files import check_output_dir, ensure_output_dir, write_new


def run(
    options: ExplainOptions,
    load: Callable[[str | None], Any] | None,
    saved: list[pathlib.Path],
    interrupts: Interrupts,
) -> None:
    """Carries out parsed options.

    Args:
      options: the command line.
      load: makes the pipeline from ``--model``; None: ``InfinityPipeline.from_pretrained``.
      saved: receives the path of each file as soon as it is complete.
      interrupts: lets a Ctrl-C end the process at once as long as nothing is written.

    Raises:
      UserInputError: something that was asked for cannot be done; raised before any picture is begun.
      OSError: a file could not be written.
    """
    request = request_of(options)
    _check_matplotlib()
    check_output_dir(request.out)
    with interrupts.nothing_to_lose():
        start_backend(options.backend)
        from toprovar_jax.explanation import explain
        from toprovar_jax.figures import pages

        pipeline = (load or loader(options))(options.model)
        with _progress() as on_picture:
            made = explain(
                pipeline,
                request.prompt,
                policy=request.policy,
                seed=request.seed,
                guidance_scale=request.guidance,
                on_picture=on_picture,
            )
    for warning in made.warnings:
        print(f"warning: {' '.join(warning.split())}", file=sys.stderr)
    ensure_output_dir(request.out)
    numbers = json.dumps(made.as_dict(), allow_nan=False).encode("utf-8")
    _save(request.out, "explain", ".json", numbers, saved)
    for stem, page in pages(made):
        _save(request.out, stem, ".png", page, saved)
        interrupts.check()


def _save(folder: pathlib.Path, stem: str, suffix: str, content: bytes, saved: list[pathlib.Path]) -> None:
    saved.append(write_new(folder, stem, suffix, content))
    print(saved[-1], flush=True)


def _check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserInputError("matplotlib", "is needed to draw and is missing", "install toprovar-jax[demo]") from None


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar over the generations on a terminal; elsewhere nothing."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from tqdm import tqdm

    with tqdm(desc="pictures", unit=" pictures", leave=False, file=sys.stderr) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance
