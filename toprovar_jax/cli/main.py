"""The toprovar command: ``toprovar generate ...``, ``toprovar explain ...`` and so on."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from toprovar_jax.cli.outcome import fail

COMMANDS = {
    "generate": "make pictures from text",
    "explain": "show how one picture is made, and what a policy spared",
    "compare": "make the same pictures by several policies, and show what each saves and spoils",
    "calibrate": "measure a model, and write the constants of the toprovar policies for it",
    "eval": "judge task by task how much of what prompts ask for a model draws",
    "export-eval": "make the pictures that a public benchmark's scorer reads, in its own folder layout",
    "batch": "make pictures for a file of prompts, of any size, on any number of hosts, and lose none",
    "convert": "turn released weights into a model folder",
    "finetune": "train a model further on pictures with captions",
    "memory": "tell how much device memory a model needs, without running it",
    "plan-pod": "estimate what a TPU slice or a GPU cluster makes of a model, without one",
}
"""Each is a module of this package with a ``main``; see :data:`MODULES`."""

MODULES = {"eval": "evaluate", "export-eval": "export_eval", "plan-pod": "plan_pod"}
"""Modules by the commands that have another name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Hands the words after a command's name to that command and returns its exit status; 2 for an unknown command."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("--help", "-h"):
        print(_help())
        return 0
    if argv and argv[0] in COMMANDS:
        command = importlib.import_module(f"toprovar_jax.cli.{MODULES.get(argv[0], argv[0])}")
        return command.main(argv[1:], prog=f"{os.path.basename(sys.argv[0])} {argv[0]}")
    named = f"command {argv[0]!r}" if argv else "no command"
    return fail(2, f"{named}: must be one of {', '.join(COMMANDS)}; see toprovar --help")


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: toprovar COMMAND ...", "", *lines, "", "toprovar COMMAND --help lists its options."])


if __name__ == "__main__":
    sys.exit(main())
