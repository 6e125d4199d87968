"""Compiles every TPU program for chips that are not there: all variants of the kernel, and scales of Infinity-2B.

    python benchmarks/aot_tpu.py [--targets v5e v5p v6e]

Prints a line per program. Exit code 0 if all compile, 1 if any does not, 2 without a TPU compiler.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.ahead_of_time import (
    TPU_ENVIRONMENT,
    TPU_SINGLE_HOST,
    Program,
    compile_all,
    compile_for,
    placed,
    tpu_mesh,
    why_no_tpu_compiler,
)
from pallas_kernels.attention import AttentionOutput, attention
from pallas_kernels.attention.cases import CASES, Case, windows
from toprovar_jax.acceleration import Dense
from toprovar_jax.generation import Text, condition_on, initial_state, make_plan, scale_step
from toprovar_jax.model import Infinity
from toprovar_jax.presets import PRESETS
from toprovar_jax.sampling import Sampling

SLICES = {"v5e": "v5e:4x4", "v5p": "v5p:4x4x1", "v6e": "v6e:4x4"}
"""Chip -> a slice of sixteen."""

LAST_SCALE = CASES["infinity"][-1]
HEAD_DIMS = (64, 80, 96, 104, 112, 120, 128, 160, 192, 256)
DTYPES = {"bf16": jnp.bfloat16, "fp32": jnp.float32}


def kernel_call(mesh: Mesh, case: Case, dtype, *, with_entropy: bool):
    """Compile one call of the kernel."""

    def call(q, k, v, lengths):
        return attention(
            *(q, k, v),
            scale=case.scale,
            key_length=None if case.key_length is None else lengths,
            block_mask=case.block_mask,
            with_entropy=with_entropy,
            implementation="mosaic_tpu",
        )

    return compile_for(mesh, jax.jit(call), *placed(describe(case, dtype), mesh))


def describe(case: Case, dtype) -> tuple[jax.ShapeDtypeStruct, ...]:
    """``q, k, v`` and the key lengths of a case."""
    shapes = [(case.batch, length, case.heads, case.head_dim) for length in (case.num_queries, *[case.num_keys] * 2)]
    return *(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes), jax.ShapeDtypeStruct((case.batch,), jnp.int32)


def kernel_programs(target: str) -> Iterator[Program]:
    """The kernel alone: all flags at the last scale, all head dims, all scales, awkward lengths."""
    mesh = tpu_mesh(TPU_SINGLE_HOST[target])
    pattern = windows(LAST_SCALE.num_queries, LAST_SCALE.num_keys)

    def program(case: Case, dtype: str, with_entropy: bool) -> Program:
        name = f"{case.name} {dtype}{' entropy' if with_entropy else ''}"
        return Program(target, name, lambda: kernel_call(mesh, case, DTYPES[dtype], with_entropy=with_entropy))

    for dtype, entropy, ragged, masked in itertools.product(DTYPES, (False, True), (False, True), (False, True)):
        case = dataclasses.replace(
            LAST_SCALE,
            name=f"64x64{' ragged' if ragged else ''}{' masked' if masked else ''}",
            key_length=(10521, 6425) if ragged else None,
            block_mask=pattern if masked else None,
        )
        yield program(case, dtype, entropy)
    for dtype, width in itertools.product(DTYPES, HEAD_DIMS):
        yield program(Case(f"head dim {width}", 2, 1600, 3121, 16, width, 0.1, key_length=(3121, 77)), dtype, True)
    for case in (*CASES["infinity"][:-1], *CASES["edges"]):
        yield program(case, "bf16", True)


def sharded_program(target: str) -> Program:
    """Rows and heads over a slice of 4 x 4 chips, with the checks of ``shard_map``."""
    case = dataclasses.replace(LAST_SCALE, batch=8, key_length=(10521,) * 8)
    mesh = tpu_mesh(SLICES[target], (4, 4), ("data", "tensor"))
    rows, sharded, statistics = P("data"), P("data", None, "tensor"), P("data", "tensor")

    def build():
        @jax.shard_map(
            mesh=mesh.abstract_mesh,
            in_specs=(sharded, sharded, sharded, rows),
            out_specs=AttentionOutput(sharded, statistics, statistics),
        )
        def call(q, k, v, lengths):
            options = {"scale": case.scale, "with_entropy": True, "implementation": "mosaic_tpu"}
            return attention(q, k, v, key_length=lengths, **options)

        q, k, v, lengths = describe(case, jnp.bfloat16)
        return compile_for(mesh, jax.jit(call), *placed((q, k, v), mesh, sharded), placed(lengths, mesh, rows))

    return Program(target, "64x64 bf16 entropy, 8 rows over 4x4 chips", build)


def model_programs(target: str, scales: Iterable[int] = (6, 12)) -> Iterator[Program]:
    """Scales of Infinity-2B at one megapixel, guided, one image, with the kernel in every block."""
    mesh = tpu_mesh(TPU_SINGLE_HOST[target])
    card = PRESETS["infinity-2b"].with_precision("fast")
    config = dataclasses.replace(card.transformer, attention=("mosaic_tpu",))
    plan = make_plan(card.schedule("1:1", "1M"), Sampling(), Dense())
    step = jax.jit(scale_step, static_argnames=("plan", "scale"), donate_argnums=2)

    def arguments(scale: int):
        transformer = as_loaded(nnx.eval_shape(lambda: Infinity(config, rngs=nnx.Rngs(0))))
        text = jax.eval_shape(
            lambda: Text(jnp.zeros((1, 512, config.text_width), jnp.float32), jnp.zeros((1,), jnp.int32))
        )
        condition = jax.eval_shape(lambda model, text: condition_on(model, text, guided=True), transformer, text)
        state = jax.eval_shape(lambda model: initial_state(model, plan, 1), transformer)
        sampling = jax.eval_shape(lambda: Sampling().for_scales(len(plan.scales)))
        keys = jax.eval_shape(lambda: jax.random.key(0)[None])
        for before in range(scale):
            state, *_ = jax.eval_shape(
                lambda *given, before=before: scale_step(*given, plan=plan, scale=before),
                *(transformer, condition, state, sampling, keys),
            )
        return placed((transformer, condition, state, sampling, keys), mesh)

    def build(scale: int):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            given = arguments(scale)
        return compile_for(mesh, step, *given, plan=plan, scale=scale)

    for scale in scales:
        side = int(np.sqrt(CASES["infinity"][scale].num_queries))
        # One kernel for the attention over the cache, one for that over the text; layers are a loop.
        yield Program(target, f"Infinity-2B, scale {side}x{side}", lambda scale=scale: build(scale), kernels=2)


def as_loaded(transformer: Infinity) -> Infinity:
    """The parameter dtypes of ``precision="fast"``: bfloat16 matrices in the blocks (see ``loading.load_model``)."""

    def cast(path, leaf):
        name = jax.tree_util.keystr(path)
        matrix = name.startswith(".layers.") and ".kernel" in name
        return jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16 if matrix else leaf.dtype)

    return jax.tree_util.tree_map_with_path(cast, transformer)


def report(programs: Iterable[Program]) -> int:
    """Compile, print the table, return the exit code."""
    print(f"{'target':<8}{'program':<48}{'seconds':>8}{'temporary MiB':>15}{'code KiB':>10}")
    total, failures = 0, []
    for done in compile_all(programs):
        total += 1
        if done.failure is not None:
            failures.append(done)
        numbers = f"{done.seconds:8.1f}{done.temporary_bytes / 2**20:15.1f}{done.code_bytes / 2**10:10.0f}"
        print(f"{done.target:<8}{done.case:<48}{numbers if done.failure is None else '  FAILED'}", flush=True)
    for failed in failures:
        print(f"{failed.target} {failed.case}: {failed.failure}")
    print(f"{total - len(failures)} of {total} programs compiled for TPU; jax {jax.__version__}")
    return 1 if failures else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile every TPU program without a TPU.")
    parser.add_argument("--targets", nargs="+", choices=tuple(TPU_SINGLE_HOST), default=list(TPU_SINGLE_HOST))
    targets = parser.parse_args(arguments).targets
    reason = why_no_tpu_compiler()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    os.environ.update(TPU_ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    # An executable for a chip that is not there can be written to the cache but not read back.
    jax.config.update("jax_enable_compilation_cache", False)
    return report(
        itertools.chain.from_iterable(
            (*kernel_programs(target), sharded_program(target), *model_programs(target)) for target in targets
        )
    )


if __name__ == "__main__":
    sys.exit(main())
