"""Storages of every kind."""

from __future__ import annotations

import pathlib

import pytest

from toprovar_jax.distributed.batch.remote_storage import RemoteStorage
from toprovar_jax.distributed.batch.storage import Storage, open_storage

from .toy import memory


@pytest.fixture(params=["local", "objects", "folders"])
def storage(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Storage:
    """A disk, an object store, and a file system with folders behind fsspec."""
    if request.param == "folders":
        return RemoteStorage(f"file://{tmp_path}/a/run")
    return open_storage(str(tmp_path / "a" / "run")) if request.param == "local" else memory()
