"""What a run's pictures depend on: written down once, and the same for everybody who joins in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from toprovar_jax.distributed.batch import names
from toprovar_jax.distributed.batch.storage import Storage
from toprovar_jax.errors import UserInputError

_MOST = 3
"""How many differences a message names."""


def open_job(storage: Storage, job: Mapping[str, Any]) -> None:
    """Writes ``job.json``, or compares ``job`` with the one that is there.

    Raises:
      UserInputError: the storage holds another job, a damaged one, or something else.
    """
    # As it will be read, so that it compares equal.
    wanted = json.loads(json.dumps(dict(job)))
    # The listing first: where there is a job afterwards, what is listed may be the job's.
    held = storage.top() - {names.WORK}
    if held and names.JOB not in held:
        raise UserInputError(
            f"output {storage.url}",
            f"must be empty or hold a job of this command (there is {min(held)!r} and no {names.JOB})",
            "choose another with --out",
        )
    content = f"{json.dumps(wanted, indent=1, sort_keys=True, ensure_ascii=False)}\n".encode()
    if names.JOB not in held and storage.create(names.JOB, content):
        return
    there = _read(storage)
    differences = list(_differences(there, wanted, ""))
    if differences:
        shown = ", ".join(differences[:_MOST])
        more = f" and {len(differences) - _MOST} more" if len(differences) > _MOST else ""
        raise UserInputError(
            f"output {storage.url}",
            f"holds another job: {shown}{more}",
            "start it as it was started, or choose another place with --out",
        )


def _read(storage: Storage) -> dict[str, Any]:
    try:
        there = json.loads(storage.read(names.JOB))
        if not isinstance(there, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise UserInputError(
            f"{storage.url}/{names.JOB}", f"is damaged ({error})", "choose another place with --out"
        ) from None
    return there


def _differences(there: Any, wanted: Any, name: str) -> Iterator[str]:
    """What differs, by its name and with both values."""
    if isinstance(there, dict) and isinstance(wanted, dict):
        for key in sorted({*there, *wanted}):
            yield from _differences(there.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif there != wanted:
        yield f"{name} is {_short(there)} there, {_short(wanted)} here"


def _short(value: Any) -> str:
    text = "not set" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}..."
