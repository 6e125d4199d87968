"""Choosing the device a command runs on, before and while jax is first imported."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import sys
from collections.abc import Iterator
from types import ModuleType

from toprovar_jax.errors import UserInputError, unknown_name

PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}
"""Backends by the names of the command, and what jax calls them."""

_INSTALL = {
    "gpu": "pip install 'toprovar-jax[gpu]' on a machine with an NVIDIA GPU",
    "tpu": "pip install 'toprovar-jax[tpu]' on a TPU machine",
}


def check_backend(name: str) -> None:
    """Refuses a name that is no backend; does not import jax.

    Raises:
      UserInputError: ``name`` is not cpu, gpu or tpu.
    """
    if name not in PLATFORMS:
        raise unknown_name("backend", name, PLATFORMS)


def start_backend(name: str | None) -> None:
    """Imports jax on the wanted backend and turns on the compilation cache.

    Call it before anything else imports jax: jax reads the environment once.

    Args:
      name: cpu, gpu or tpu; None: what JAX_PLATFORMS says, or else whatever jax prefers.

    Raises:
      UserInputError: that backend does not work here; the message lists those that do.
    """
    if name is None:
        jax = _import_jax()
    else:
        check_backend(name)
        jax = _import_jax_on(name)
    _enable_compilation_cache(jax)


def _import_jax() -> ModuleType:
    """jax on its own choice of device, which is made here: later its failure would appear inside some computation."""
    chosen = os.environ.get("JAX_PLATFORMS")
    # Without a wish in the environment jax's warnings are worth reading, such as that of a GPU it cannot use.
    with _quiet_discovery() if chosen else contextlib.nullcontext():
        import jax

        try:
            jax.devices()
            return jax
        except Exception:
            if not chosen:
                raise
        available = _available(jax)
    raise UserInputError(
        f"JAX_PLATFORMS {chosen!r}",
        f"no such device here; available: {', '.join(available)}",
        "unset that variable, or choose with --backend",
    )


def _import_jax_on(name: str) -> ModuleType:
    if "jax" not in sys.modules:
        os.environ["JAX_PLATFORMS"] = PLATFORMS[name]
    with _quiet_discovery():
        import jax

        try:
            found = jax.default_backend()
        except Exception:  # a missing plugin raises RuntimeError or AssertionError, depending on which
            found = None
        if found == name:
            return jax
        available = _available(jax)
    if name in available:
        raise UserInputError(
            f"backend {name}", f"this process already runs jax on {found}", "set JAX_PLATFORMS before it starts"
        )
    raise UserInputError(
        f"backend {name}",
        f"no such device here; available: {', '.join(available)}",
        f"use --backend cpu, or {_INSTALL.get(name, 'install jax again')}",
    )


def _available(jax: ModuleType) -> list[str]:
    names = []
    previous = jax.config.jax_platforms
    jax.config.update("jax_platforms", None)
    try:
        for name in PLATFORMS:
            with contextlib.suppress(Exception):
                jax.devices(name)
                names.append(name)
    finally:
        jax.config.update("jax_platforms", previous)
    return names


@contextlib.contextmanager
def _quiet_discovery() -> Iterator[None]:
    """jax and its plugins log at length about devices they do not find; the one-line error says it better."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(previous)


def _enable_compilation_cache(jax: ModuleType) -> None:
    """Keeps compiled programs between runs, unless the user has said where, or the place cannot be written."""
    if jax.config.jax_compilation_cache_dir is not None:
        return
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: a user without a home directory
        folder = pathlib.Path(os.environ.get("TOPROVAR_CACHE") or "~/.cache/toprovar_jax").expanduser() / "xla"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
