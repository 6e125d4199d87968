"""The eval command: how much of what prompts ask for a model draws, in one table, one JSON file and a contact sheet.

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
    argv: Sequence[str] | None = None,
    *,
    load: Callable[[str | None], Any] | None = None,
    judge: Any = None,
    prog: str | None = None,
) -> int:
    """Runs the command and returns its exit status; every mistake and failure is one line on stderr.

    Args:
      argv: the words after the command's name; default: those of this process.
      load: makes the pipeline from ``--model``; default: ``InfinityPipeline.from_pretrained``.
      judge: what finds objects in pictures; default: the judge that comes with the package.
      prog: the command's name, as ``--help`` shows it; default: that of this process.

    Returns:
      0 on success, 2 on bad input, 1 on any other failure, 130 on Ctrl-C. Batches that were finished before that are
      kept, and the same command goes on from there.
    """
    argv = sys.argv[1:] if argv is None else argv
    progress: dict[str, Any] = {}

    def work(interrupts: Interrupts) -> None:
        with interrupts.nothing_to_lose():
            from toprovar_jax.cli.evaluate_options import parse_options
            from toprovar_jax.cli.evaluate_run import run

        run(parse_options(argv, prog=prog or os.path.basename(sys.argv[0])), load, judge, progress, interrupts)

    def kept() -> str:
        count = progress.get("pictures", 0)
        what = "picture" if count == 1 else "pictures"
        return (
            f"{count} finished {what} kept in {progress['folder']}; the same command goes on from there"
            if count
            else ""
        )

    return carry_out(work, lost="nothing was written", kept=kept, debug="--debug" in argv)


if __name__ == "__main__":
    sys.exit(main())
