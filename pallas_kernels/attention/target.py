"""Which device a call will run on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from jax.core import Tracer

_CAPABILITIES = {
    "A100": (8, 0),
    "A30": (8, 0),
    "A10": (8, 6),
    "A40": (8, 6),
    "A6000": (8, 6),
    "RTX 3090": (8, 6),
    "L40": (8, 9),
    "L4": (8, 9),
    "RTX 4090": (8, 9),
    "H100": (9, 0),
    "H200": (9, 0),
    "GH200": (9, 0),
    "B200": (10, 0),
    "GB200": (10, 0),
}
"""Compute capabilities by product name, for devices that are only described (ahead-of-time compilation)."""


@dataclass(frozen=True)
class Target:
    """A device as the implementations judge it.

    Attributes:
      platform: ``cpu``, ``cuda``, ``rocm`` or ``tpu``.
      kind: the name its driver gives it, such as ``NVIDIA H200`` or ``TPU v5 lite``.
      compute_capability: of an NVIDIA device, such as ``(9, 0)``; None where unknown.
    """

    platform: str
    kind: str
    compute_capability: tuple[int, int] | None = None

    def __str__(self) -> str:
        return self.kind if self.kind != self.platform else self.platform


def current_target(*arrays: jax.Array) -> Target:
    """The device that a call on these arrays runs on.

    In order of preference: the device described by the mesh in use (ahead-of-time compilation), the device that holds
    the arrays, JAX's default device.
    """
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if described is not None:
        # A mesh of this process's devices describes them, too; those know more than their names.
        for device in jax.devices():
            if device.device_kind == described.device_kind:
                return describe(device)
        # Only NVIDIA's GPUs can be described; depending on who did, the platform is "gpu" or "cuda".
        platform = "cuda" if described.platform == "gpu" else described.platform or "cpu"
        return Target(platform, described.device_kind, _capability(described.device_kind))
    for array in arrays:
        if isinstance(array, jax.Array) and not isinstance(array, Tracer):
            return describe(min(array.devices(), key=lambda device: device.id))
    default: Any = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    return describe(jax.devices(default)[0] if default is None or isinstance(default, str) else default)


def describe(device: Any) -> Target:
    """A device of this process as a :class:`Target`."""
    platform = device.platform
    if platform == "gpu":
        platform = "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
    if platform != "cuda":
        return Target(platform, device.device_kind)
    text = getattr(device, "compute_capability", None)
    capability = _parse(text) if isinstance(text, str) else _capability(device.device_kind)
    return Target(platform, device.device_kind, capability)


def _parse(text: str) -> tuple[int, int] | None:
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def _capability(kind: str) -> tuple[int, int] | None:
    found = [name for name in _CAPABILITIES if name in kind]
    return _CAPABILITIES[max(found, key=len)] if found else None
