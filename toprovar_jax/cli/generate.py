"""The generate command from its start to its exit status: one line on stderr for whatever goes wrong, Ctrl-C included.

Little is imported at the top: a Ctrl-C can only be answered once :func:`main` runs, and most of a start is imports.
"""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from toprovar_jax.cli.interrupts import Interrupts
from toprovar_jax.errors import UserInputError


def main(argv: Sequence[str] | None = None, *, load: Callable[[str | None], Any] | None = None) -> int:
    """Runs the command and returns its exit status; every mistake and failure is one line on stderr.

    Args:
      argv: the words after the command's name; default: those of this process.
      load: makes the pipeline from ``--model``; default: ``InfinityPipeline.from_pretrained``.

    Returns:
      0 on success, 2 on bad input, 1 on any other failure, 130 on Ctrl-C. Pictures finished before that stay.
    """
    argv = sys.argv[1:] if argv is None else argv
    saved: list[pathlib.Path] = []
    with Interrupts() as interrupts:
        try:
            with interrupts.nothing_to_lose():
                from toprovar_jax.cli.options import parse_options
                from toprovar_jax.cli.run import run

            run(parse_options(argv, prog=os.path.basename(sys.argv[0])), load, saved, interrupts)
            sys.stdout.flush()
            return 0
        except SystemExit as stop:  # --help
            return int(stop.code or 0)
        except BaseException as error:
            if interrupts.explain(error):
                _flush()
                return _fail(130, "interrupted" if saved else "interrupted; no picture was saved", saved)
            if isinstance(error, UserInputError):
                return _fail(2, str(error), saved)
            if isinstance(error, BrokenPipeError):
                _flush()
                return 1
            if "--debug" in argv or not isinstance(error, Exception):
                raise
            return _fail(1, _explain(error), saved)


def _flush() -> None:
    """Flushes stdout; if its reader is gone, once and for all: Python would try again on exit and report that."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
