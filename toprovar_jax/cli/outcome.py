"""From a command's work to its exit status: one line on stderr for whatever goes wrong, Ctrl-C included.

Little is imported at the top: a Ctrl-C can only be answered once :func:`carry_out` runs, and most of a start is
imports.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from toprovar_jax.cli.interrupts import Interrupts
from toprovar_jax.errors import UserInputError


def carry_out(
    work: Callable[[Interrupts], None], *, lost: str, kept: Callable[[], str] = str, debug: bool = False
) -> int:
    """Does a command's work and returns its exit status; every mistake and failure is one line on stderr.

    Args:
      work: the command.
      lost: what a Ctrl-C has cost if nothing was kept, in words.
      kept: what is there already when something goes wrong, in words; empty for nothing.
      debug: let failures that are nobody's mistake through with their traceback.

    Returns:
      0 on success, 2 on bad input, 1 on any other failure, 130 on Ctrl-C.
    """
    with Interrupts(lost) as interrupts:
        try:
            work(interrupts)
            sys.stdout.flush()
            return 0
        except SystemExit as stop:  # --help
            return int(stop.code or 0)
        except BaseException as error:
            if interrupts.explain(error):
                _flush()
                return fail(130, f"interrupted; {kept() or lost}")
            after = f"; {kept()}" if kept() else ""
            if isinstance(error, UserInputError):
                return fail(2, f"{error}{after}")
            if isinstance(error, BrokenPipeError):
                _flush()
                return 1
            if debug or not isinstance(error, Exception):
                raise
            return fail(1, f"{_explain(error)}{after}")


def fail(status: int, message: str) -> int:
    """Says what went wrong, on one line, and returns ``status``."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status


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
