"""Kills the workers of a batch run at random moments, and sees that every picture is made, once, and as it should be.

    python benchmarks/batch_kills.py [--pictures 10000] [--kills 50] [--layouts files tar] [--command ...]

Makes the pictures with four workers that are left alone, then again with workers of which one, some or all are killed
(SIGKILL) at random moments, followed by new ones so that one to four are at work. Now and then one is stopped for
longer than its claims hold and goes on afterwards, when another has taken over. At the end there must be every
picture once, with the SHA-256 of the manifest, both as in the run that was left alone, and nothing besides.

``--command`` is a worker's command line, in which ``{out}``, ``{prompts}``, ``{layout}``, ``{worker}``, ``{chunk}`` and
``{lease}`` are replaced; without it, it is batch_kills_worker.py, whose model only pretends. Prints a line per kill and
writes benchmarks/results/batch_kills.json. Status 1 if anything was lost. Linux only. batch_kills_command.json is of
the batch command itself, with ``--pictures 2500 --kills 12 --chunk 25 --layouts tar --lease 20 --command python
examples/batch_pod.py --prompts {prompts} --out {out} --layout {layout} --worker {worker} --chunk {chunk}
--lease-seconds {lease} --quiet``.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "batch_kills.json"
MOST_WORKERS = 4
STOP_EVERY = 10
"""At how many kills all are killed, and one of two new workers is stopped for longer than its claims hold."""
REFUSED_EVERY = 1000
"""After how many pictures comes a prompt of which none can be made."""
WORKER = ROOT / "benchmarks" / "batch_kills_worker.py"
FAKE = [sys.executable, str(WORKER), "{prompts}", "{out}", "{layout}", "{worker}", "{chunk}", "{lease}"]


class Workers:
    """The processes of a run; each has a number, which the next one takes over."""

    def __init__(self, command: Sequence[str], values: dict[str, Any], errors: Path) -> None:
        self._command, self._values, self._errors = command, values, errors
        self.lease: float = values["lease"]
        self.running: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, count: int) -> None:
        """Brings the number of workers up to ``count``, and returns when the new ones have said that they are there."""
        begun = {}
        for number in sorted(set(range(MOST_WORKERS)) - self.running.keys())[: max(count - len(self.running), 0)]:
            words = [word.format(**self._values, worker=f"w{number}") for word in self._command]
            with self._errors.open("ab") as errors:
                begun[number] = subprocess.Popen(words, cwd=ROOT, stdout=errors, stderr=errors)
        self.running |= begun
        while not all(self._there(number, process) for number, process in begun.items()):
            time.sleep(0.01)

    def kill(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.running[number].kill()
        for number in numbers:
            self.running.pop(number).wait()

    def complete_chunks(self) -> int:
        """How many chunks are complete."""
        return len(list(Path(self._values["out"]).glob("manifest/*.parquet")))

    def at_work(self) -> list[int]:
        """The numbers of those at work; ends the benchmark if one has failed."""
        ended = {number: process for number, process in self.running.items() if process.poll() is not None}
        for number in ended:
            del self.running[number]
        if any(process.returncode for process in ended.values()):
            raise SystemExit(f"workers failed: {[process.args for process in ended.values() if process.returncode]}")
        return sorted(self.running)

    def _there(self, number: int, process: subprocess.Popen[bytes]) -> bool:
        if process.poll() is not None:
            return True
        try:
            sign = json.loads(Path(self._values["out"], ".work/workers", f"w{number}.json").read_bytes())
        except FileNotFoundError:
            return False
        return sign["pid"] == process.pid


def left_alone(workers: Workers) -> float:
    """Runs to the end and returns the seconds it took, from when all workers were there."""
    workers.start(MOST_WORKERS)
    start = time.perf_counter()
    finish(workers)
    return time.perf_counter() - start


def finish(workers: Workers) -> None:
    """Waits for the end of the run."""
    while workers.at_work():
        time.sleep(0.02)


def disturbed(workers: Workers, draw: random.Random, kills: int, chunks: int, seconds: float) -> dict[str, int]:
    """A run of ``chunks`` chunks with ``kills`` kills, begun and ended by itself.

    Args:
      workers: none of which has been started.
      draw: decides when whom to kill.
      kills: how many times, spread evenly over the first nine tenths of the chunks; fewer if the run ends before.
      chunks: how many chunks are to be made.
      seconds: what the run takes when it is left alone.

    Returns:
      How many times something was done.
    """
    done = {"moments": 0, "processes": 0, "everybody": 0, "stopped": 0}
    workers.start(MOST_WORKERS)
    for moment in sorted(draw.uniform(0.0, 0.9) for _ in range(kills)):
        while workers.complete_chunks() < moment * chunks and workers.at_work():
            time.sleep(0.005)
        time.sleep(draw.uniform(0.0, 0.5 * seconds / kills))
        here = workers.at_work()
        if not here:
            break
        done["moments"] += 1
        stop = done["moments"] % STOP_EVERY == 0
        everybody = stop or draw.random() < 0.3
        victims = here if everybody else draw.sample(here, draw.randint(1, len(here)))
        workers.kill(victims)
        done["processes"] += len(victims)
        done["everybody"] += not workers.running
        workers.start(2 if stop else draw.randint(1, MOST_WORKERS))
        print(f"{done['moments']:3d} killed {len(victims)} of {len(here)}; {len(workers.running)} at work", flush=True)
        if stop:
            one = workers.running[draw.choice(sorted(workers.running))]
            one.send_signal(signal.SIGSTOP)
            time.sleep(1.5 * workers.lease)
            one.send_signal(signal.SIGCONT)
            done["stopped"] += 1
    finish(workers)
    return done


def content(out: Path) -> dict[str, Any]:
    """SHA-256 of every file but signs of life and status; of manifests all rows without their times."""
    import pyarrow.parquet as pq

    found: dict[str, Any] = {}
    for path in out.rglob("*"):
        name = path.relative_to(out).as_posix()
        if path.is_dir() or name.startswith((".work/workers/", "status.")):
            continue
        if path.suffix == ".parquet":
            found[name] = pq.read_table(io.BytesIO(path.read_bytes())).drop_columns("time").to_pylist()
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def faults(out: Path, alone: dict[str, Any], pictures: int) -> dict[str, int]:
    """What is wrong with a run, by kind; all numbers are 0 if it is as the one that was left ``alone``."""
    there = content(out)
    rows = there.get("manifest.parquet", [])
    keys = [row["key"] for row in rows]
    made = [row for row in rows if row["status"] == "made"]
    shards: dict[str, dict[str, bytes]] = {}
    wrong = 0
    for row in made:
        name, _, member = row["file"].partition(":")
        if member and name not in shards:
            with tarfile.open(out / name) as shard:
                shards[name] = {it.name: shard.extractfile(it).read() for it in shard.getmembers()}  # pyright: ignore
        read = shards[name][member] if member else (out / name).read_bytes()
        wrong += hashlib.sha256(read).hexdigest() != row["sha256"]
    return {
        "missing": pictures - len({row["key"] for row in made}),
        "twice": len(keys) - len(set(keys)),
        "wrong_sha256": wrong,
        "left_in_work": sum(name.startswith(".work") for name in there),
        "files_missing": len(alone.keys() - there.keys()),
        "files_too_many": len(there.keys() - alone.keys()),
        "files_that_differ": sum(there[name] != alone[name] for name in there.keys() & alone.keys()),
    }


def main(words: Sequence[str] | None = None) -> int:
    """Kills and checks; returns the exit status."""
    parser = argparse.ArgumentParser(description="Kill the workers of a batch run at random moments.")
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--chunk", type=int, default=50, help="rows per chunk")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", nargs="+", default=["files", "tar"])
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's place for temporary files")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--lease", type=float, default=2.0, help="seconds for which claims hold")
    parser.add_argument("--command", nargs=argparse.REMAINDER, default=FAKE, help="a worker's command line; comes last")
    options = parser.parse_args(words)
    report = {"pictures": options.pictures, "chunk_rows": options.chunk, "lease_seconds": options.lease, "layouts": {}}
    chunks, good = -(-(options.pictures + len(range(0, options.pictures, REFUSED_EVERY))) // options.chunk), True
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        lines = [json.dumps({"prompt": f"picture {number}"}) for number in range(options.pictures)]
        for number in range(0, options.pictures, REFUSED_EVERY):
            lines.insert(number, json.dumps({"prompt": ""}))
        prompts = folder / "prompts.jsonl"
        prompts.write_text("\n".join(lines))
        for layout in options.layouts:
            values = {"prompts": prompts, "layout": layout, "chunk": options.chunk, "lease": options.lease}
            runs = {
                out: Workers(options.command, values | {"out": folder / layout / out}, folder / "errors.txt")
                for out in ("alone", "killed")
            }
            start = time.perf_counter()
            try:
                seconds = left_alone(runs["alone"])
                alone = content(folder / layout / "alone")
                begun = time.perf_counter()
                done = disturbed(runs["killed"], random.Random(options.seed), options.kills, chunks, seconds)
            finally:
                for workers in runs.values():
                    workers.kill(list(workers.running))
                print((folder / "errors.txt").read_text(), end="")
            killed_seconds = time.perf_counter() - begun
            wrong = faults(folder / layout / "killed", alone, options.pictures)
            good = good and not any(wrong.values())
            report["layouts"][layout] = {
                "seconds_left_alone": round(seconds, 1),
                "seconds_with_kills": round(killed_seconds, 1),
                "kills": done,
                "faults": wrong,
            }
            print(f"{layout}: {time.perf_counter() - start:.0f} s, {done}, {wrong}", flush=True)
    options.results.write_text(json.dumps(report, indent=1) + "\n")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
