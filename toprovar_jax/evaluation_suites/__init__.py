"""Pictures for public text-to-image benchmarks, in the folder layouts that their scorers read."""

from __future__ import annotations

from toprovar_jax.evaluation_suites.dpg import DPG
from toprovar_jax.evaluation_suites.geneval import GENEVAL
from toprovar_jax.evaluation_suites.hpsv2 import HPSV2
from toprovar_jax.evaluation_suites.imagereward import IMAGEREWARD
from toprovar_jax.evaluation_suites.mjhq import MJHQ
from toprovar_jax.evaluation_suites.suite import Suite

SUITES: dict[str, Suite] = {suite.name: suite for suite in (GENEVAL, DPG, HPSV2, IMAGEREWARD, MJHQ)}
"""Every suite by its name."""

__all__ = ["SUITES", "Suite"]
