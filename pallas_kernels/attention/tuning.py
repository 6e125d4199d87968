"""What was measured on a device: which implementations are proven there, and their best configurations.

``tuned/<device>.json`` holds the results of ``benchmarks/gpu_suite.py`` on one kind of device, with their times::

    {
      "device": "NVIDIA H200", "date": "2026-01-31T12:00:00+00:00", "versions": {"jax": "0.11.2"},
      "proven": [{"implementation": "mosaic_gpu", "with_entropy": true, "milliseconds": 1.9}],
      "configs": [{"implementation": "mosaic_gpu", "head_dim": 128, "dtype": "bfloat16", "size": "many queries",
                   "with_entropy": true, "config": {"query_tile": 128}, "milliseconds": 0.7}]
    }

``proven`` lists the implementations that passed conformance on that device; its order is by time, so its first entry
that can run, with or without entropy as asked, is what ``attention(implementation=None)`` takes. A device without a
file has nothing proven and nothing tuned: XLA and the kernels' default configurations are used there.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import re
from dataclasses import dataclass
from typing import Any

from pallas_kernels.attention.problem import Problem
from pallas_kernels.attention.target import Target

DIRECTORY = pathlib.Path(__file__).parent / "tuned"
"""Where the measured tables lie."""

SIZES = ((64, "few queries"), (1024, "some queries"))
"""Size classes by the largest number of queries; anything above is ``many queries``. The number of keys only sets how
long a kernel's inner loop runs, the number of queries how many tiles there are to share between the cores."""


@dataclass(frozen=True)
class Proven:
    """An implementation that passed conformance on the device.

    Attributes:
      implementation: its name.
      with_entropy: whether this is about calls that ask for the entropy.
      milliseconds: sum over the key cases; orders the list.
    """

    implementation: str
    with_entropy: bool
    milliseconds: float


@dataclass(frozen=True)
class Tuned:
    """The best configuration of an implementation for one kind of problem.

    Attributes:
      implementation: its name.
      head_dim: H.
      dtype: of the inputs.
      size: a class as :func:`size_class` names it.
      with_entropy: whether the entropy is computed.
      config: fields of the implementation's configuration.
      milliseconds: measured.
    """

    implementation: str
    head_dim: int
    dtype: str
    size: str
    with_entropy: bool
    config: dict[str, Any]
    milliseconds: float

    def fits(self, implementation: str, problem: Problem) -> bool:
        """Whether this entry was measured for such a problem."""
        return (self.implementation, self.head_dim, self.dtype, self.size, self.with_entropy) == (
            *(implementation, problem.head_dim, str(problem.dtype)),
            *(size_class(problem), problem.with_entropy),
        )


@dataclass(frozen=True)
class Table:
    """All that was measured on one kind of device.

    Attributes:
      device: its name, as the driver gives it.
      date: when, UTC, ISO 8601.
      versions: of the packages involved.
      proven: fastest first.
      configs: at most one for each kind of problem.
    """

    device: str
    date: str
    versions: dict[str, str | None]
    proven: tuple[Proven, ...] = ()
    configs: tuple[Tuned, ...] = ()


def size_class(problem: Problem) -> str:
    """Name of the problem's size class."""
    return next((name for most, name in SIZES if problem.num_queries <= most), "many queries")


def slug(device: str) -> str:
    """File name of a device: ``NVIDIA H200`` is ``nvidia_h200``."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


def proven(target: Target, *, with_entropy: bool, directory: pathlib.Path = DIRECTORY) -> tuple[str, ...]:
    """Implementations that passed conformance on this kind of device, fastest first; none where nothing was measured.

    Args:
      target: the device.
      with_entropy: what the call asks for; the order, and what is good enough, may differ.
      directory: where the tables lie.

    Raises:
      ValueError: a table that cannot be read.
    """
    table = read(target.kind, directory)
    entries = () if table is None else table.proven
    return tuple(entry.implementation for entry in entries if entry.with_entropy == with_entropy)


def tuned_config(
    implementation: str, problem: Problem, target: Target, *, directory: pathlib.Path = DIRECTORY
) -> Any | None:
    """The best measured configuration for such a problem, or None to use the implementation's default.

    A configuration that the implementation does not list among the candidates of this very problem (its tiles do not
    divide the blocks of the mask, or the kernel has changed since) is passed over.

    Raises:
      ValueError: a table that cannot be read.
    """
    table = read(target.kind, directory)
    found = None if table is None else next((x for x in table.configs if x.fits(implementation, problem)), None)
    if found is None:
        return None
    # Here, because that module imports this one.
    from pallas_kernels.attention.api import implementation_module

    candidates = implementation_module(implementation).candidates(problem, target)
    return next((config for config in candidates if as_fields(config) == found.config), None)


def as_fields(config: Any) -> dict[str, Any]:
    """A configuration's fields as JSON returns them (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def read(device: str, directory: pathlib.Path = DIRECTORY) -> Table | None:
    """The table of a device, or None if there is none. Read once per process.

    Raises:
      ValueError: not JSON, another device, missing or unknown fields, unknown implementations, values of the wrong
        type, times that are not positive.
    """
    path = directory / f"{slug(device)}.json"
    return _parse(path, path.stat().st_mtime_ns) if path.is_file() else None


def write(table: Table, directory: pathlib.Path = DIRECTORY) -> pathlib.Path:
    """Write a table, implementations and configurations sorted; returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{slug(table.device)}.json"
    ordered = dataclasses.replace(
        table,
        proven=tuple(sorted(table.proven, key=lambda entry: entry.milliseconds)),
        configs=tuple(
            sorted(table.configs, key=lambda x: (x.implementation, x.head_dim, x.dtype, x.size, x.with_entropy))
        ),
    )
    path.write_text(json.dumps(dataclasses.asdict(ordered), indent=1) + "\n")
    return path


@functools.cache
def _parse(path: pathlib.Path, modified: int) -> Table:
    del modified  # Part of the key only.
    try:
        fields = json.loads(path.read_text())
        table = _build(Table, fields, "table")
        if slug(table.device) != path.stem:
            raise TypeError(f"table.device {table.device!r}: must be the device that the file is named for")
        times = [entry.milliseconds for entry in table.proven]
        if times != sorted(times):
            raise TypeError("proven: must be ordered by milliseconds")
        return table
    except (OSError, TypeError, ValueError, OverflowError, RecursionError) as error:
        told = str(error).splitlines()[0]
        raise ValueError(f"{path}: {told}; delete the file or measure again with benchmarks/gpu_suite.py") from error


_ENTRIES: dict[str, type] = {"proven": Proven, "configs": Tuned}
_TYPES: dict[str, type | tuple[type, ...]] = {
    **{"str": str, "bool": bool, "int": int, "float": (int, float)},
    **{"dict[str, Any]": dict, "dict[str, str | None]": dict},
}


def _build(kind: type, fields: Any, where: str) -> Any:
    """A dataclass from JSON, every field checked."""
    if not isinstance(fields, dict):
        raise TypeError(f"{where}: must be an object")
    declared = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    if set(fields) != set(declared):
        odd = sorted(set(fields) ^ set(declared))
        raise TypeError(f"{where}: fields {', '.join(odd)} are missing or unknown")
    values = {}
    for name, value in fields.items():
        if name in _ENTRIES:
            if not isinstance(value, list):
                raise TypeError(f"{where}.{name}: must be a list")
            values[name] = tuple(_build(_ENTRIES[name], x, f"{name}[{at}]") for at, x in enumerate(value))
            continue
        wanted = _TYPES[declared[name]]
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise TypeError(f"{where}.{name} {value!r}: must be {declared[name]}")
        values[name] = float(value) if declared[name] == "float" else value
    # Here, because that module imports this one.
    from pallas_kernels.attention.api import IMPLEMENTATIONS

    if values.get("implementation", IMPLEMENTATIONS[0]) not in IMPLEMENTATIONS:
        raise TypeError(
            f"{where}.implementation {values['implementation']!r}: must be one of {', '.join(IMPLEMENTATIONS)}"
        )
    if not 0.0 < values.get("milliseconds", 1.0) < math.inf:
        raise TypeError(f"{where}.milliseconds {values['milliseconds']}: must be positive and finite")
    return kind(**values)
