"""A worker of a batch run with a model that only pretends: a few milliseconds and a tiny picture per prompt.

    python benchmarks/batch_kills_worker.py PROMPTS.jsonl OUT LAYOUT WORKER CHUNK LEASE

Uses storage and ledger as a real run does, without jax, so that a process is there in a moment.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
import sys
import time
import zlib
from pathlib import Path
from typing import Any, cast

from toprovar_jax.distributed.batch.ledger import Claim, Failure, Ledger, Picture
from toprovar_jax.distributed.batch.results import Layout
from toprovar_jax.distributed.batch.storage import open_storage

BATCH = 8
SECONDS_PER_PICTURE = 0.005
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def tiny_png(seed: int, prompt: str) -> bytes:
    """A grey picture of 16x16 that seed and prompt decide."""
    pixels = hashlib.sha256(f"{seed} {prompt}".encode()).digest() * 8
    lines = b"".join(b"\0" + pixels[16 * line : 16 * line + 16] for line in range(16))
    blocks = {b"IHDR": struct.pack(">IIBBBBB", 16, 16, 8, 0, 0, 0, 0), b"IDAT": zlib.compress(lines), b"IEND": b""}
    return SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in blocks.items()
    )


def make(row: int, prompt: str) -> Picture | Failure:
    if not prompt:
        return Failure(row, 0, str(row), prompt, "prompt '': is empty; write one")
    time.sleep(SECONDS_PER_PICTURE)
    recipe = {"prompt": prompt, "seed": row}
    return Picture(row, 0, str(row), prompt, row, recipe, tiny_png(row, prompt))


class Run:
    """One worker's run; it says that it makes progress four times per lease."""

    def __init__(self, prompts: Path, ledger: Ledger, chunk_rows: int, lease: float) -> None:
        content = prompts.read_bytes()
        self._prompts: list[str] = [json.loads(line)["prompt"] for line in content.splitlines()]
        self._ledger, self._chunk_rows, self._lease = ledger, chunk_rows, lease
        self._chunks = -(-len(self._prompts) // chunk_rows)
        self._beaten = -lease
        ledger.open({"prompts": hashlib.sha256(content).hexdigest(), "chunk": chunk_rows})

    def to_the_end(self) -> None:
        start = random.randrange(self._chunks)
        self._beat()
        while not self._ledger.finish(self._chunks):
            missing = set(range(self._chunks)) - self._ledger.complete_chunks()
            for chunk in sorted(missing, key=lambda chunk: (chunk - start) % self._chunks):
                claim = self._ledger.claim(chunk)
                if claim is not None and self._made(claim):
                    claim.complete()
            self._beat()
            time.sleep(0.1)

    def _made(self, claim: Claim) -> bool:
        """Makes what is missing of a chunk; False if somebody else goes on with it."""
        done = claim.committed()
        end = min((claim.chunk + 1) * self._chunk_rows, len(self._prompts))
        for first in range(claim.chunk * self._chunk_rows, end, BATCH):
            if f"{first:08d}" in done:
                continue
            made = [make(row, self._prompts[row]) for row in range(first, min(first + BATCH, end))]
            self._beat()
            if claim.lost():
                return False
            claim.commit(f"{first:08d}", made)
        return True

    def _beat(self) -> None:
        if time.monotonic() - self._beaten > self._lease / 4:
            self._ledger.heartbeat({})
            self._beaten = time.monotonic()


def main(words: list[str]) -> Any:
    prompts, out, layout, worker, chunk_rows, lease = words
    ledger = Ledger(open_storage(out), layout=cast(Layout, layout), worker=worker, lease_seconds=float(lease))
    Run(Path(prompts), ledger, int(chunk_rows), float(lease)).to_the_end()


if __name__ == "__main__":
    main(sys.argv[1:])
