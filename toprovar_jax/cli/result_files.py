"""What commands with one result share: its files, which replace others only on demand, and a progress bar."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from toprovar_jax.errors import UserInputError
from toprovar_jax.files import replace_file, write_new


class ResultFiles:
    """A command's files in a folder; each may be written again and again, over someone else's only on demand.

    Attributes:
      written: paths by name.

    Args:
      folder: where.
      names: of the files.
      replace: whether files that are there already may be replaced.

    Raises:
      UserInputError: a file is there already and is not to be replaced, or cannot be.
    """

    def __init__(self, folder: pathlib.Path, names: Sequence[str], *, replace: bool):
        self._folder, self._replace = folder, replace
        self.written: dict[str, pathlib.Path] = {}
        for path in (folder / name for name in names):
            if path.is_dir():
                raise UserInputError(f"{path}", "must be a file, but is a directory", "choose another --out")
            if path.exists() and not replace:
                raise UserInputError(
                    f"file {path}", "is there already", "choose another folder with --out, or replace it with --force"
                )

    def write(self, name: str, content: bytes) -> pathlib.Path:
        """Puts ``content`` in place of what this run wrote before; returns the path."""
        path = self.written.get(name)
        if path is None and not self._replace:
            # Had someone else written the file meanwhile, this one gets a number: neither run loses its work.
            stem, suffix = pathlib.PurePath(name).stem, pathlib.PurePath(name).suffix
            path = write_new(self._folder, stem, suffix, content)
        else:
            path = path or self._folder / name
            replace_file(path, content)
        self.written[name] = path
        return path


class Bar:
    """A progress bar over all pictures on a terminal, from the first one on; elsewhere nothing."""

    def __init__(self, *, shown: bool):
        self._shown = shown
        self._bar: Any = None

    def __call__(self, what: str, done: int, total: int) -> None:
        """So many pictures are done, the last of them for this."""
        if not self._shown:
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=" pictures", leave=False, file=sys.stderr)
        self._bar.set_description(what)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()
