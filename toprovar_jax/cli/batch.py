"""The batch command: pictures for a file of prompts, on any number of hosts, and none of them lost.

Little is imported at the top: a Ctrl-C can only be answered once :func:`main` runs, and most of a start is imports.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from toprovar_jax.cli.interrupts import Interrupts
from toprovar_jax.cli.outcome import carry_out


def main(argv: Sequence[str] | None = None, *, load: Callable[..., Any] | None = None, prog: str | None = None) -> int:
    """Runs the command and returns its exit status; every mistake and failure is one line on stderr.

    Args:
      argv: the words after the command's name.
      load: makes the pipeline from ``--model``; default: ``InfinityPipeline.from_pretrained``.
      prog: the command's name, as ``--help`` shows it; default: that of this process.

    Returns:
      0 when everything is made, or all that is left is with other workers; 2 on bad input; 1 on any other failure; 130
      on Ctrl-C and 143 on SIGTERM, after the batch in flight. What is committed is kept, and the same command goes on.
    """
    argv = sys.argv[1:] if argv is None else argv
    told: dict[str, Any] = {}

    def work(interrupts: Interrupts) -> None:
        with interrupts.nothing_to_lose():
            from toprovar_jax.cli.batch_options import parse_options
            from toprovar_jax.cli.batch_run import run

        run(parse_options(argv, prog=prog or os.path.basename(sys.argv[0])), load, told, interrupts)

    def kept() -> str:
        made = told.get("images", 0)
        what = "1 picture" if made == 1 else f"{made} pictures"
        return f"{what} committed now in {told['out']}; the same command goes on from there" if told else ""

    return carry_out(work, lost="no picture was saved", kept=kept, debug="--debug" in argv)


if __name__ == "__main__":
    sys.exit(main())
