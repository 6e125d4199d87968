"""What the plan-pod command does once it has started; imports jax only after the backend is chosen."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from toprovar_jax.cli.backend import start_backend
from toprovar_jax.cli.memory_flags import memory_options_of
from toprovar_jax.cli.plan_pod_options import PlanPodCommand, checked


def run(options: PlanPodCommand) -> None:
    """Carries out parsed options.

    Raises:
      UserInputError: a value is not legal, or the model does not fit.
    """
    topology, images, batch, utilisation = checked(options)
    memory = memory_options_of(options)
    start_backend("cpu")
    from toprovar_jax.distributed.pod_plan import plan_pod, request_of
    from toprovar_jax.distributed.pod_text import plan_dict, plan_text

    names: dict[str, Any] = {"pixels": options.pixels, "policy": options.policy, "attention": options.attention}
    request = request_of(options.model, topology, memory=memory, **names)
    plan = plan_pod(request, mesh=options.mesh, batch=batch, utilisation=utilisation)
    reason = _why_not_compiled(options, plan)
    compiled = {} if reason is not None else _compiled(plan)
    if options.json:
        print(json.dumps(plan_dict(plan, images, compiled), indent=1))
    else:
        print(plan_text(plan, images, compiled, reason))


def _why_not_compiled(options: PlanPodCommand, plan: Any) -> str | None:
    """The reason for predictions alone, or None."""
    if options.predict_only:
        return "was asked for"
    if plan.request.topology.compiled_for is None:
        return "GPUs have no compiler that knows several of them without one"
    if plan.request.memory.text_encoder == "host":
        return "programs of two kinds of chip are not compiled"
    from pallas_kernels.ahead_of_time import why_no_tpu_compiler

    missing = why_no_tpu_compiler()
    return missing and "no TPU compiler is installed (pip install 'toprovar-jax[aot-tpu]')"


def _compiled(plan: Any) -> dict[str, Any]:
    import jax

    from pallas_kernels.ahead_of_time import TPU_ENVIRONMENT
    from toprovar_jax.distributed.pod_compile import compile_plan

    os.environ.update(TPU_ENVIRONMENT)
    # A program for chips that are not there can be written to the cache but not read back.
    jax.config.update("jax_enable_compilation_cache", False)
    return compile_plan(plan, lambda message: print(message, file=sys.stderr, flush=True))
