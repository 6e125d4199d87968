"""Saving and restoring pytrees with orbax: atomic, numbered by step, the newest few kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from toprovar_jax.errors import UserInputError


class Checkpoints:
    """A folder of numbered checkpoints.

    Writing is atomic: a checkpoint exists once it is complete, and the previous one stays until then.

    Args:
      directory: where they are; created if need be.
      keep: how many of the newest to keep.
    """

    def __init__(self, directory: Path | str, *, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(Path(directory).resolve(), options=options)

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint, None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, tree: Any) -> None:
        """Write ``tree`` as the checkpoint of ``step``; returns when it is on disk."""
        self._manager.save(step, args=ocp.args.StandardSave(tree), force=True)
        self._manager.wait_until_finished()

    def restore(self, tree: Any, step: int | None = None) -> Any:
        """The checkpoint of ``step`` (default: the newest) with the structure, dtypes and shardings of ``tree``.

        Raises:
          UserInputError: there is no such checkpoint.
        """
        kept = self._manager.all_steps()
        step = self.latest_step if step is None else step
        if step is None or step not in kept:
            raise UserInputError(
                f"checkpoint {'(the newest)' if step is None else step} in {self._manager.directory}",
                f"must be one that is there ({', '.join(map(str, sorted(kept))) or 'there is none'})",
                "choose another step or folder",
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
        return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))

    def close(self) -> None:
        """Release the folder."""
        self._manager.close()
