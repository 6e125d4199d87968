"""The names of everything in the output of a run."""

from __future__ import annotations

import re

JOB = "job.json"
"""What the pictures depend on."""
MANIFEST = "manifest.parquet"
"""All pictures and failures, once every chunk is complete."""
PARTS = "manifest"
"""The folder of the manifest's parts: a chunk is complete if and only if its part is there."""
WORK = ".work"
CLAIMS = f"{WORK}/claims"
BATCHES = f"{WORK}/batches"
WORKERS = f"{WORK}/workers"

_NUMBER = r"(\d{6,})"


def key(row: int, image: int) -> str:
    """What a picture is called: its row, and its number among the pictures of that row."""
    return f"{row:08d}-{image:03d}"


def picture(chunk: int, key: str) -> str:
    """The file of a picture in the layout of files."""
    return f"images/{chunk:06d}/{key}.png"


def shard(chunk: int) -> str:
    """The archive of a chunk in the layout of archives."""
    return f"shards/{chunk:06d}.tar"


def part(chunk: int) -> str:
    """The part of the manifest that commits a chunk."""
    return f"{PARTS}/{chunk:06d}.parquet"


def chunk_of_part(name: str) -> int | None:
    """The chunk that a file in the folder of parts commits; None for any other file."""
    match = re.fullmatch(rf"{PARTS}/{_NUMBER}\.parquet", name)
    return int(match[1]) if match else None


def batches(chunk: int) -> str:
    """The folder of a chunk's committed batches."""
    return f"{BATCHES}/{chunk:06d}"


def batch_commit(chunk: int, batch: str) -> str:
    """What was made in a batch; its being there commits the batch."""
    return f"{batches(chunk)}/{batch}.json"


def batch_archive(chunk: int, batch: str) -> str:
    """The archive of a batch in the layout of archives."""
    return f"{batches(chunk)}/{batch}.tar"


def batch_of_commit(name: str) -> tuple[int, str] | None:
    """The chunk and the batch that a file in the folder of batches commits; None for any other file."""
    match = re.fullmatch(rf"{BATCHES}/{_NUMBER}/([^/]+)\.json", name)
    return (int(match[1]), match[2]) if match else None


def claim(chunk: int, generation: int) -> str:
    """A claim on a chunk; the highest generation is the one that counts."""
    return f"{CLAIMS}/{chunk:06d}.{generation}"


def generation_of_claim(name: str) -> tuple[int, int] | None:
    """The chunk and the generation of a file in the folder of claims; None for any other file."""
    match = re.fullmatch(rf"{CLAIMS}/{_NUMBER}\.(\d+)", name)
    return (int(match[1]), int(match[2])) if match else None


def worker(name: str) -> str:
    """A worker's last sign of life."""
    return f"{WORKERS}/{name}.json"
