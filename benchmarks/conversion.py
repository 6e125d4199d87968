"""Converts random weights in files as large as the released ones; memory, speed against the disk's, and proof.

    python benchmarks/conversion.py [NAME ...] [--folder DIR]

For each file of ``synthetic_checkpoints.py`` (or those named): writes it, copies it, converts it by
``python -m convert --verify`` in a process of its own, copies it again, and removes everything. The 8B model needs
38 GB of disk below ``--folder``. What was read before is dropped from the system's memory where that is allowed (as
root), and the copies end when they are on the disk. Memory is sampled every 5 ms: ``anonymous`` is what the process
had for itself, ``mapped`` the pages of files it looked at, which the system takes back whenever it needs them.

Prints a line per file and writes benchmarks/results/conversion.json, where files that were not named stay.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from synthetic_checkpoints import FILES, write_files

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "conversion.json"
MOST = {"infinity_8b_weights": 2.0e9}
"""Anonymous memory that a conversion may take, in bytes; 1.5e9 for what is not named."""


def drop_caches() -> bool:
    """Whether the system forgot the files it had in memory."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def copy_speed(source: Path, copy: Path) -> float:
    """Bytes per second of copying ``source`` to the disk; the copy is removed."""
    drop_caches()
    start = time.perf_counter()
    with source.open("rb") as origin, copy.open("wb") as target:
        while os.sendfile(target.fileno(), origin.fileno(), None, 1 << 26):
            pass
        os.fsync(target.fileno())
    seconds = time.perf_counter() - start
    copy.unlink()
    return source.stat().st_size / seconds


def watched(command: list[str]) -> tuple[str, dict[str, int]]:
    """What ``command`` printed, and the peaks of its memory in bytes.

    Raises:
      SystemExit: it failed.
    """
    peaks = {"anonymous": 0, "mapped": 0, "resident": 0}
    fields = {"RssAnon": "anonymous", "RssFile": "mapped", "VmRSS": "resident"}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            for name, kilobytes in re.findall(r"(RssAnon|RssFile|VmRSS):\s+(\d+) kB", status.read_text()):
                peaks[fields[name]] = max(peaks[fields[name]], int(kilobytes) << 10)
            time.sleep(0.005)
        printed = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return printed, peaks


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Writes, copies, converts and verifies one file or folder of shards."""
    (source,) = write_files(folder, "full", [name])
    largest = max([source] if source.is_file() else source.glob("*.*"), key=lambda path: path.stat().st_size)
    copies = [copy_speed(largest, folder / "copy")]
    cold = drop_caches()
    printed, peaks = watched([sys.executable, "-m", "convert", str(source), "--out", str(folder / "out"), "--verify"])
    shutil.rmtree(folder / "out")
    copies.append(copy_speed(largest, folder / "copy"))
    wrote = re.search(r"wrote .* in (\S+) s \((\d+) MB/s\)", printed)
    compared = re.search(r"verified (\d+) tensors in (\S+) s", printed)
    if wrote is None or compared is None:
        raise SystemExit(f"the conversion printed something else: {printed}")
    copied = sum(copies) / len(copies)
    return {
        "bytes_read": sum(path.stat().st_size for path in ([source] if source.is_file() else source.iterdir())),
        "copy_mb_per_second": [round(speed / 1e6) for speed in copies],
        "convert_mb_per_second": int(wrote[2]),
        "convert_seconds": float(wrote[1]),
        "share_of_copy_speed": round(int(wrote[2]) * 1e6 / copied, 2),
        "verified_tensors": int(compared[1]),
        "verify_seconds": float(compared[2]),
        "peak_bytes": peaks,
        "most_bytes": int(MOST.get(name, 1.5e9)),
        "caches_dropped": cold,
    }


def main() -> int:
    """Measures what was asked for; status 1 if something took more memory than it may."""
    parser = argparse.ArgumentParser(description="Convert files as large as the released ones.")
    parser.add_argument("names", nargs="*", metavar="NAME", default=[file.name for file in FILES])
    parser.add_argument("--folder", type=Path, help="where files go for the time being; default: the temporary folder")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in options.names:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found = results[name] = measure(name, Path(folder))
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        peaks = {kind: f"{peak / 1e9:.2f}" for kind, peak in found["peak_bytes"].items()}
        print(
            f"{name}: {found['bytes_read'] / 1e9:.1f} GB at {found['convert_mb_per_second']} MB/s "
            f"({found['share_of_copy_speed']:.2f} of copying at {found['copy_mb_per_second']}), "
            f"{found['verified_tensors']} tensors verified; GB at most: {peaks}"
        )
    return int(any(results[name]["peak_bytes"]["anonymous"] > results[name]["most_bytes"] for name in options.names))


if __name__ == "__main__":
    sys.exit(main())
