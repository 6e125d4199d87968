"""How long a device works on a call: the profiler's kernel times, or the wall clock where there is no profile."""

from __future__ import annotations

import datetime
import importlib.metadata
import pathlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
from jax.profiler import ProfileData, ProfileOptions, TraceAnnotation

PEAK_TFLOPS = {
    "A100": 312.0,
    "H100": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "L40": 181.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5p": 459.0,
    "TPU v5": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
}
"""Published dense bfloat16 (and float16) peaks by a part of the device's name, TFLOP/s."""

_PREFIX = "timed call "
"""Host annotations of the calls in a trace."""

_PAUSE = 5e-4
"""Seconds between calls: the clocks of host and device may differ by half of it before calls are mixed up."""


class Span(NamedTuple):
    """An interval of a trace, nanoseconds."""

    start: float
    duration: float


@dataclass(frozen=True)
class Timing:
    """Milliseconds of every call.

    Attributes:
      timer: ``profiler`` for the sum of the device's kernel times, ``wall`` for the host's clock around a call.
      milliseconds: by name of the function, in the order of the rounds.
    """

    timer: Literal["profiler", "wall"]
    milliseconds: dict[str, list[float]]


def measure(
    functions: Mapping[str, Callable[[], Any]], rounds: int, announce: Callable[[str], None] = lambda name: None
) -> Timing:
    """Time functions in turns, so that a drift of the device's clock meets all of them alike.

    Kernel times leave out launches and gaps between kernels, which is what is wanted of single kernels and flatters
    programs of many small ones.

    Args:
      functions: calls without arguments that return arrays; compiled before, because each is only called twice
        before it is timed.
      rounds: calls of each function.
      announce: told a function's name before each of its calls, outside the time that is taken.
    """
    for name, run in functions.items():
        for _ in range(2):
            announce(name)
            jax.block_until_ready(run())
    if jax.default_backend() != "cpu":
        names = [name for _ in range(rounds) for name in functions]
        kernels, windows = _trace(functions, names, announce)
        if kernels:
            times = attribute(kernels, windows, names)
            if times is None:  # The clocks of host and device disagree: one trace per function needs neither.
                alone = {name: _trace(functions, [name] * rounds, announce)[0] for name in functions}
                times = {name: [sum(span.duration for span in spans) / 1e6 / rounds] for name, spans in alone.items()}
            return Timing("profiler", times)
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, run in functions.items():
            announce(name)
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(1e3 * (time.perf_counter() - start))
    return Timing("wall", times)


def attribute(kernels: Sequence[Span], windows: Sequence[Span], names: Sequence[str]) -> dict[str, list[float]] | None:
    """Milliseconds of device work in every call.

    Args:
      kernels: what the device did.
      windows: when the host was in each call, in order.
      names: the function of each call.

    Returns:
      By function, one number per call; None if that cannot be: a call without kernels, or two calls of one function
      with different numbers of kernels.
    """
    if len(windows) != len(names):
        return None
    counts = [0] * len(windows)
    sums = [0.0] * len(windows)
    at = 0
    for kernel in sorted(kernels):
        middle = kernel.start + kernel.duration / 2
        while at + 1 < len(windows) and middle >= _between(windows[at], windows[at + 1]):
            at += 1
        counts[at] += 1
        sums[at] += kernel.duration / 1e6
    if len(set(zip(names, counts, strict=True))) != len(set(names)) or 0 in counts:
        return None
    times: dict[str, list[float]] = {name: [] for name in names}
    for name, total in zip(names, sums, strict=True):
        times[name].append(total)
    return times


def _between(window: Span, following: Span) -> float:
    return (window.start + window.duration + following.start) / 2


def _trace(
    functions: Mapping[str, Callable[[], Any]], names: Sequence[str], announce: Callable[[str], None]
) -> tuple[list[Span], list[Span]]:
    """Device spans, and host spans of the calls, of running the named functions one after the other."""
    options = ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 1
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for number, name in enumerate(names):
                announce(name)
                with TraceAnnotation(f"{_PREFIX}{number}"):
                    jax.block_until_ready(functions[name]())
                time.sleep(_PAUSE)
        planes = [
            plane
            for path in pathlib.Path(folder).rglob("*.xplane.pb")
            for plane in ProfileData.from_file(str(path)).planes
        ]
        return device_spans(planes), call_spans(planes)


def device_spans(planes: Sequence[Any]) -> list[Span]:
    """What a GPU's streams or a TPU's program line did; copies within the device count as work."""
    spans = []
    for plane in planes:
        if not plane.name.startswith("/device:"):
            continue
        lines = list(plane.lines)
        # Where there are streams, a line of whole programs repeats what is in them.
        streams = [line for line in lines if line.name.startswith("Stream")]
        for line in streams or [line for line in lines if line.name == "XLA Modules"]:
            spans += [Span(event.start_ns, event.duration_ns) for event in line.events]
    return spans


def call_spans(planes: Sequence[Any]) -> list[Span]:
    """When the host was in each of the annotated calls, in their order."""
    found = {
        int(event.name.removeprefix(_PREFIX)): Span(event.start_ns, event.duration_ns)
        for plane in planes
        if plane.name.startswith("/host:")
        for line in plane.lines
        for event in line.events
        if event.name.startswith(_PREFIX)
    }
    return [found[number] for number in sorted(found)]


def peak_tflops(kind: str, dtype: str) -> float | None:
    """Published dense peak of a device by its name, TFLOP/s; None if unknown or for other dtypes."""
    known = [name for name in PEAK_TFLOPS if name.lower() in kind.lower()]
    return PEAK_TFLOPS[max(known, key=len)] if known and dtype in ("bfloat16", "float16") else None


def environment() -> dict[str, Any]:
    """Device, versions and date (UTC), for the head of a report."""
    device = jax.devices()[0]
    versions = {}
    for package in ("jax", "jaxlib", "libtpu", "triton", "jax-triton", "jax-cuda13-plugin", "nvidia-cudnn-cu13"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "driver": _driver(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
