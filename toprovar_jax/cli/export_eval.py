"""The export-eval command: the pictures that a public benchmark's scorer reads, in that scorer's own folder layout.

Little is imported at the top: a Ctrl-C can only be answered once :func:`main` runs, and most of a start is imports.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from toprovar_jax.cli.interrupts import Interrupts
from toprovar_jax.cli.outcome import carry_out


def main(
    argv: Sequence[str] | None = None, *, load: Callable[[str | None], Any] | None = None, prog: str | None = None
) -> int:
    """Runs the command and returns its exit status; every mistake and failure is one line on stderr.

    Args:
      argv: the words after the command's name; default: those of this process.
      load: makes the pipeline from ``--model``; default: ``InfinityPipeline.from_pretrained``.
      prog: the command's name, as ``--help`` shows it; default: that of this process.

    Returns:
      0 on success, 2 on bad input, 1 on any other failure, 130 on Ctrl-C. Pictures that were finished before that are
      kept, and the same command goes on from there.
    """
    argv = sys.argv[1:] if argv is None else argv
    progress: dict[str, Any] = {}

    def work(interrupts: Interrupts) -> None:
        with interrupts.nothing_to_lose():
            from toprovar_jax.cli.export_eval_options import parse_options
            from toprovar_jax.cli.export_eval_run import run

        run(parse_options(argv, prog=prog or os.path.basename(sys.argv[0])), load, progress, interrupts)

    def kept() -> str:
        count = progress.get("files", 0)
        what = "finished file" if count == 1 else "finished files"
        return f"{count} {what} kept in {progress['folder']}; the same command goes on from there" if count else ""

    return carry_out(work, lost="no picture was saved", kept=kept, debug="--debug" in argv)


if __name__ == "__main__":
    sys.exit(main())
