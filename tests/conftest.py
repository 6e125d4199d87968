"""Test configuration: strict types, strict promotion, eight fake devices, one shared compilation cache."""

import gc
import os
import pathlib
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the time goes into compiling programs that run for milliseconds, so machine code is left unoptimised, and made
# by the older of two ways where XLA still has it, which takes a third of the time.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "",
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
    ]
)

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
_CACHE = os.environ.get("TOPROVAR_TEST_CACHE", str(pathlib.Path(__file__).parent.parent / ".cache" / "xla"))
jax.config.update("jax_compilation_cache_dir", _CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


_MANY_MAPS = 20_000
"""Compiled programs hold memory maps, of which Linux allows a process 65,530 by default; at the limit XLA crashes."""


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Drop what was compiled once it is a lot; the cache on disk gives back what is still needed."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > _MANY_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def golden() -> pathlib.Path:
    """The folder of reference outputs (see tests/golden/README.md)."""
    return pathlib.Path(__file__).parent / "golden"


@pytest.fixture
def compiled():
    """Names of what jax has compiled since the test began, small operations included."""
    names = []

    def listen(event: str, duration_secs: float, **_) -> None:
        if event.endswith("backend_compile_duration"):
            names.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)
