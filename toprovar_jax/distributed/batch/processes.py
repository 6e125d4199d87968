"""Which process wrote something, in a word; and whether that process, if it was on this host, is gone.

Process numbers alone are used again, within seconds where many processes start, and containers with a host name in
common count theirs apart: the word holds the host, its start, the namespace of process numbers and the process's own
start as well.
"""

from __future__ import annotations

import os
import pathlib
import re
import socket

_PROC = pathlib.Path("/proc")


def identity() -> str:
    """This process in a word without slashes: ``host,boot,namespace,pid,started``."""
    return ",".join([*_place(), str(os.getpid()), _started("self") or "unknown"])


def is_dead(identity: str) -> bool:
    """Whether the process is known to be gone; never True for one of another host, or where that cannot be told."""
    fields = identity.split(",")
    if len(fields) != 5 or fields[:3] != _place() or "unknown" in fields:
        return False
    return _started(fields[3]) != fields[4]


def _place() -> list[str]:
    """Where process numbers mean the same: the host, its start, and the namespace."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        namespace = re.sub(r"\D", "", os.readlink(_PROC / "self/ns/pid"))
    except OSError:
        boot = namespace = "unknown"
    return [re.sub(r"[^A-Za-z0-9.-]", "_", socket.gethostname()), boot, namespace]


def _started(pid: str) -> str | None:
    """When a process started, in clock ticks since the host did; None for one that has ended, awaited or not."""
    try:
        status = (_PROC / pid / "stat").read_text(errors="replace")
    except OSError:
        return None
    # The name, which may hold anything, is in parentheses.
    fields = status.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
