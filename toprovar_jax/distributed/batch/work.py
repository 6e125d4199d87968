"""What there is to do: the rows of a prompt file in chunks, and the batches of each."""

from __future__ import annotations

import dataclasses
from typing import Any

from toprovar_jax.distributed.batch.batches import Chunk, Planner
from toprovar_jax.distributed.batch.rows import PromptRows


@dataclasses.dataclass(frozen=True)
class Work:
    """What there is to do, the same for every worker.

    Attributes:
      rows: the prompt file.
      planner: makes batches of rows.
      pipeline: makes pictures of batches.
      chunk: rows per chunk.
    """

    rows: PromptRows
    planner: Planner
    pipeline: Any
    chunk: int

    @property
    def chunks(self) -> int:
        """How many chunks the job has."""
        return -(-self.rows.count // self.chunk)

    def rows_in(self, chunk: int) -> int:
        """How many rows a chunk has: the last may have fewer."""
        return min(self.chunk, self.rows.count - chunk * self.chunk)

    def of(self, chunk: int) -> Chunk:
        """The batches of a chunk."""
        return self.planner.chunk(self.rows.read(chunk * self.chunk, self.chunk))
