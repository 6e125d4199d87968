"""Processes beside each other that are killed, with all that they started, when they hang or this one ends."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

from gpu_verdicts import NO_TIME

ROOT = pathlib.Path(__file__).parent.parent
STILL = 60.0
"""Seconds without a new result after which tuning is taken to hang in the configuration it is trying."""


def end_by(
    commands: dict[str, list[str]],
    logs: dict[str, pathlib.Path],
    environment: dict[str, str],
    limit: float,
    watched: pathlib.Path | None = None,
) -> dict[str, str]:
    """Run commands side by side: ``done``, ``exit N``, ``timed out`` or ``stood still`` for each.

    Args:
      commands: by name.
      logs: where the output of each goes.
      environment: of the processes.
      limit: seconds; none lives longer.
      watched: a file whose last change may not be longer ago than :data:`STILL` seconds.
    """
    started = time.monotonic()
    if limit <= 0:
        for log in logs.values():
            log.write_text("")
        return dict.fromkeys(commands, NO_TIME)
    running: dict[str, subprocess.Popen] = {}
    ended: dict[str, str] = {}
    try:
        for name, command in commands.items():
            with logs[name].open("w") as log:
                # In a session of its own, so that what it started can be killed with it.
                running[name] = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
                )
        while len(ended) < len(commands):
            time.sleep(0.2)
            now = time.monotonic()
            changed = watched.stat().st_mtime if watched is not None and watched.is_file() else 0.0
            still = watched is not None and now - started > STILL and time.time() - changed > STILL
            for name, process in running.items():
                if name in ended:
                    continue
                code = process.poll()
                if code is not None:
                    ended[name] = "done" if code == 0 else f"exit {code}"
                elif still or now - started > limit:
                    kill(process)
                    ended[name] = f"stood still for {STILL:.0f} s" if still else f"timed out after {limit:.0f} s"
    finally:  # Being in other sessions, they do not hear of what ends this one.
        for name in set(running) - set(ended):
            kill(running[name])
    return ended


def kill(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def stop_on_signals() -> None:
    """Let whoever ends this process unwind it, so that its children end with it."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
