"""The finetune command: trains a model further on pictures with captions.

Little is imported at the top: a Ctrl-C can only be answered once :func:`main` runs, and most of a start is imports.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from toprovar_jax.cli.interrupts import Interrupts
from toprovar_jax.cli.outcome import carry_out


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Runs the command and returns its exit status; every mistake and failure is one line on stderr.

    Args:
      argv: the words after the command's name; default: those of this process.
      prog: the command's name, as ``--help`` shows it; default: that of this process.

    Returns:
      0 on success, 2 on bad input, 1 on any other failure, 130 on Ctrl-C. An interrupted run has saved its state; the
      same command goes on from there.
    """
    argv = sys.argv[1:] if argv is None else argv

    def work(interrupts: Interrupts) -> None:
        with interrupts.nothing_to_lose():
            from toprovar_jax.cli.finetune_options import parse_options
            from toprovar_jax.cli.finetune_run import run

            options = parse_options(argv, prog=prog or os.path.basename(sys.argv[0]))
        run(options, interrupts)

    return carry_out(work, lost="nothing was trained", debug="--debug" in argv)


if __name__ == "__main__":
    sys.exit(main())
