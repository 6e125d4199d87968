"""What the batch command does once it has started.

Nothing imported at the top imports jax: the backend is chosen first, and ``--help`` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from toprovar_jax.cli.backend import PLATFORMS, start_backend
from toprovar_jax.cli.batch_options import BatchOptions, BatchRequest, request_of
from toprovar_jax.cli.batch_voice import Voice
from toprovar_jax.cli.interrupts import Interrupts
from toprovar_jax.cli.memory_flags import memory_options_of
from toprovar_jax.cli.model_options import files_of, loader
from toprovar_jax.cli.outcome import fail
from toprovar_jax.cli.stopping import Stopping
from toprovar_jax.distributed.batch.rows import PromptRows

JOB_VERSION = 1
"""Of the format of ``job.json`` and of what lies beside it."""

GOLDEN = 0.6180339887498949
"""Multiples of it, modulo 1, are spread evenly however many there are."""


def run(options: BatchOptions, load: Callable[..., Any] | None, told: dict[str, Any], interrupts: Interrupts) -> None:
    """Carries out parsed options.

    Args:
      options: the command line.
      load: makes the pipeline from ``--model``; None: ``InfinityPipeline.from_pretrained``.
      told: receives ``out`` and how many ``images`` were committed, once there is something to keep.
      interrupts: lets a Ctrl-C wait for the end of a batch.

    Raises:
      UserInputError: something that was asked for cannot be done.
      SystemExit: after a SIGTERM, or when too many rows have failed; one line has been said.
      OSError: the output could not be written.
    """
    request, memory = request_of(options), memory_options_of(options)
    voice = Voice(shown=not options.quiet)
    with interrupts.nothing_to_lose():
        rows = PromptRows(request.prompts)
        storage = None
        if not options.dry_run:
            from toprovar_jax.distributed.batch.storage import open_storage

            storage = open_storage(request.out)
        _start(options, request)
        from toprovar_jax.distributed.batch.work import Work

        weights = _weights(options)
        devices = None if load else _devices(options, weights, memory)
        placed = {} if devices is None else {"mesh": devices.made()}
        if options.attention is not None:
            placed["attention"] = tuple(name.strip() for name in options.attention.split(","))
        pipeline = (load or loader(options))(options.model, memory=memory, **placed)
        copies = 1 if devices is None else devices.mesh.data * devices.mesh.fsdp
        work = Work(rows, _planner(request, options, pipeline, copies), pipeline, request.chunk)
        if storage is None:
            from toprovar_jax.cli.batch_show import show

            show(work, as_json=options.json)
            return
        _check_settings(request, pipeline)
        job = _job(request, options, rows, pipeline, weights, devices)
    if devices is not None and not devices.leader:
        _follow(work, interrupts)
        return
    _make(work, storage, job, request, options, voice, told, interrupts, devices)


def _make(
    work: Any,
    storage: Any,
    job: dict[str, Any],
    request: BatchRequest,
    options: BatchOptions,
    voice: Voice,
    told: dict[str, Any],
    interrupts: Interrupts,
    devices: Any,
) -> None:
    from toprovar_jax.distributed.batch.health import Health
    from toprovar_jax.distributed.batch.ledger import Ledger
    from toprovar_jax.distributed.batch.progress import Progress
    from toprovar_jax.distributed.batch.run import BatchRun, TooManyFailures

    start = time.perf_counter()
    chips = 1 if devices is None else devices.mesh.size
    progress = Progress(index=request.index, chips=chips, warned=voice.warn)
    ledger = Ledger(storage, layout=request.layout, worker=request.worker, lease_seconds=request.lease_seconds)
    with Stopping(interrupts) as stopping:
        ledger.open(job)
        if len(ledger.complete_chunks()) == work.chunks and ledger.finish(work.chunks):
            voice.tell(f"nothing to do: all {work.rows.count} prompts are done in {request.out}")
            _conclude(work, ledger, progress, "finished", request, options, voice, start)
            return
        told |= {"out": request.out, "images": 0}
        health = Health(
            storage,
            ledger,
            progress,
            index=request.index,
            rows=work.rows.count,
            chunk=request.chunk,
            chunks=work.chunks,
            lease_seconds=request.lease_seconds,
            stall_seconds=request.stall_seconds,
            tell=voice.progress,
        )
        run = BatchRun(
            work,
            ledger,
            progress,
            group=_group(devices),
            first_chunk=int(request.index * GOLDEN % 1 * work.chunks),
            wait=not options.no_wait,
            max_failures=request.max_failures,
            stopping=stopping,
            poll_seconds=min(2.0, request.lease_seconds / 2),
        )
        with health:
            outcome = "failed"
            try:
                outcome = run.run()
            except TooManyFailures as error:
                remedy = "mend the rows and start anew elsewhere, or raise it"
                raise SystemExit(fail(1, f"{error}; {remedy}; what is committed is kept in {request.out}")) from None
            finally:
                told["images"] = progress.made
                progress.ended("failed" if outcome == "failed" else "stopped" if outcome == "stopped" else "finished")
    if outcome == "stopped":
        interrupts.check()
        told_so = f"terminated; {progress.made} pictures committed now in {request.out}"
        raise SystemExit(fail(143, f"{told_so}; the same command goes on from there"))
    _conclude(work, ledger, progress, outcome, request, options, voice, start)


def _conclude(
    work: Any,
    ledger: Any,
    progress: Any,
    outcome: str,
    request: BatchRequest,
    options: BatchOptions,
    voice: Voice,
    start: float,
) -> None:
    seconds = time.perf_counter() - start
    voice.end()
    voice.left_out()
    failed_rows = ledger.failures() if outcome == "finished" else None
    if failed_rows is None:
        voice.tell("what is left to make is with other workers")
    elif failed_rows:
        voice.tell(f"{failed_rows} of all {work.rows.count} rows have failed; the manifest says why")
    if options.json:
        record = {
            "out": request.out,
            "finished": outcome == "finished",
            "rows": work.rows.count,
            "images": progress.made,
            "failures": progress.failures,
            "failed_rows": failed_rows,
            "programs": progress.programs,
            "seconds": seconds,
            "warnings": progress.warnings,
        }
        print(json.dumps(record), flush=True)
        return
    failed = f", {progress.failures} failed" if progress.failures else ""
    voice.tell(f"{progress.made} pictures made now{failed}, {seconds:.1f} s")
    print(request.out, flush=True)


def _start(options: BatchOptions, request: BatchRequest) -> None:
    """Chooses the backend; before that, which must be the first thing jax does, joins the processes of other hosts."""
    if request.processes is not None:
        if options.backend is not None and "jax" not in sys.modules:
            os.environ["JAX_PLATFORMS"] = PLATFORMS[options.backend]
        import jax

        jax.distributed.initialize(**request.processes)
    start_backend(options.backend)


def _weights(options: BatchOptions) -> Any:
    from toprovar_jax.hub import find_model

    return find_model(options.model, **files_of(options))


def _devices(options: BatchOptions, weights: Any, memory: Any) -> Any:
    """The devices that this process makes pictures with; None where there is one, and nothing was said of others."""
    import jax

    from toprovar_jax.distributed.groups import devices_for
    from toprovar_jax.distributed.mesh import AUTO
    from toprovar_jax.hub import CARD
    from toprovar_jax.model_card import ModelCard
    from toprovar_jax.presets import PRESETS

    if options.mesh is None and jax.device_count() == 1:
        return None
    precision = "exact" if jax.default_backend() == "cpu" else "fast"
    card = ModelCard.read(weights / CARD, PRESETS).with_precision(precision)
    return devices_for(options.mesh or AUTO, card, memory)


def _group(devices: Any) -> Any:
    if devices is None or not devices.shared:
        return None
    from toprovar_jax.distributed.groups import AllProcesses

    return AllProcesses()


def _follow(work: Any, interrupts: Interrupts) -> None:
    """What a process does that shares its model with others, and does not lead them."""
    from toprovar_jax.distributed.batch.run import follow
    from toprovar_jax.distributed.groups import AllProcesses

    with Stopping(interrupts):  # they are stopped together, and the leader says when
        follow(work, AllProcesses())


def _precision(pipeline: Any) -> str:
    return pipeline.card.transformer.precision


def _planner(request: BatchRequest, options: BatchOptions, pipeline: Any, copies: int) -> Any:
    from toprovar_jax.distributed.batch.batches import Planner

    return Planner(
        pipeline,
        request.settings,
        batch_size=request.batch_size,
        # In exact precision pictures are computed one by one: a batch has no size that would be compiled.
        padded=_precision(pipeline) != "exact",
        cut_long_prompts=options.cut_long_prompts,
        copies=copies,
    )


def _check_settings(request: BatchRequest, pipeline: Any) -> None:
    """Refuses settings of the whole job that the model cannot take, before a million rows fail by them."""
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in request.settings.items()}
    for name in ("seed", "num_images", "positive_prompt"):
        del settings[name]
    pipeline.resolve("a prompt", guidance_scale=settings.pop("guidance"), **settings)


def _job(
    request: BatchRequest, options: BatchOptions, rows: PromptRows, pipeline: Any, weights: Any, devices: Any
) -> dict[str, Any]:
    """What the bytes of the pictures depend on; neither hosts nor workers, nor how devices share the work."""
    from toprovar_jax.evaluation_suites.manifest import fingerprint

    return {
        "version": JOB_VERSION,
        "model": pipeline.model_name,
        "weights": fingerprint(weights),
        "precision": _precision(pipeline),
        "quantization": pipeline.memory.quantization,
        "attention": options.attention,
        # Sums over devices round differently than sums on one.
        "tensor_parts": 1 if devices is None else devices.mesh.tensor,
        "rows": rows.count,
        "bytes": rows.bytes,
        "sha256": rows.sha256,
        "settings": dict(request.settings),
        "chunk": request.chunk,
        "batch_size": request.batch_size,
        "cut_long_prompts": options.cut_long_prompts,
    }
