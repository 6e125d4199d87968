"""One of several processes over jax.distributed: draws on a mesh of all their devices, and writes what it got.

    python one_process.py PORT PROCESSES PROCESS DEVICES JOB OUT

DEVICES is how many this process has; JOB is a JSON list of objects with "model", "mesh", "policy", "precision",
"prompts"; OUT receives the pictures and bits of job j under ``j-images`` and ``j-bits-0`` and so on.
"""

import json
import os
import sys


def policy_of(name):
    from toprovar_jax.acceleration import Dense, ToProVAR

    if name == "fixed":
        return ToProVAR(depth_rule="fixed", depth=2, guard_first=0.0, guard_last=0.5)
    return ToProVAR(tau=0.4, guard_first=0.0, guard_last=0.5) if name == "adaptive" else Dense()


def draw(job, mesh):
    from toprovar_jax import InfinityPipeline

    pipeline = InfinityPipeline.from_pretrained(job["model"], mesh=mesh, precision=job["precision"])
    prompts = job["prompts"]
    return pipeline(prompts, seed=list(range(len(prompts))), policy=policy_of(job["policy"]), output_type="np")


def main(port, processes, process, devices, jobs, out):
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    import jax
    import numpy as np

    jax.distributed.initialize(f"localhost:{port}", num_processes=int(processes), process_id=int(process))
    assert jax.device_count() == int(processes) * int(devices)
    arrays = {}
    for number, job in enumerate(json.loads(jobs)):
        output = draw(job, job["mesh"])
        arrays |= {f"{number}-images": np.asarray(output.images)}
        arrays |= {f"{number}-bits-{scale}": bits for scale, bits in enumerate(output.bits)}
    np.savez(out, **arrays)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
