"""The options of the batch command and how they are read; imports neither jax nor numpy."""

from __future__ import annotations

import dataclasses
import os
import socket
import zlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from toprovar_jax.cli.command_line import flag_of, option, read_command_line
from toprovar_jax.cli.memory_flags import DecoderStrips, Int8, LowMemory, TextEncoderOn, positive
from toprovar_jax.cli.model_options import Model, TextEncoder, Vae, Variant
from toprovar_jax.cli.options import settings_of
from toprovar_jax.errors import UserInputError, unknown_name

LAYOUTS = ("files", "tar")

INDEX_VARIABLES = ("SLURM_PROCID", "JOB_COMPLETION_INDEX", "OMPI_COMM_WORLD_RANK")
"""Where launchers tell a process its number."""


@dataclasses.dataclass(frozen=True)
class BatchOptions:
    """The command line as typed: values stay text, so that a wrong one gets a one-line message when it is read."""

    prompts: Annotated[
        str | None,
        option(
            "FILE",
            "The prompts: .txt, one a line; .jsonl, objects with prompt and, as needed, id and any setting; .csv or "
            ".parquet with these columns. A path, or a URL such as gs://bucket/prompts.jsonl.",
        ),
    ] = None
    out: Annotated[
        str | None,
        option("URL", "Where everything goes, the same for all workers: a folder, or a URL such as gs://bucket/run."),
    ] = None
    layout: Annotated[
        str, option("files|tar", "One PNG per picture, or one webdataset shard (tar) per chunk (default: files).")
    ] = "files"
    model: Model = None
    variant: Variant = None
    vae: Vae = None
    text_encoder: TextEncoder = None
    low_memory: LowMemory = False
    int8: Int8 = False
    text_encoder_on: TextEncoderOn = None
    decoder_strips: DecoderStrips = None
    backend: Annotated[str | None, option("cpu|gpu|tpu", "Where to run; default: the best device found.")] = None
    mesh: Annotated[
        str | None, option("SPEC", "How the devices share the work, such as data=8,tensor=4; default: automatic.")
    ] = None
    attention: Annotated[
        str | None,
        option(
            "NAME|NAME,NAME,...",
            "What computes attention, such as mosaic_tpu; of several the first that can run. Default: the fastest that "
            "is proven on the device.",
        ),
    ] = None
    policy: Annotated[str, option("NAME", "Which computations to spare; dense spares none (default: dense).")] = "dense"
    seed: Annotated[
        str,
        option(
            "N", "Picture k of row r has the seed N + 1000 r + k; of a row with its own seed, that + k (default: 0)."
        ),
    ] = "0"
    num_images: Annotated[str, option("K", "Pictures per prompt (default: 1).")] = "1"
    negative_prompt: Annotated[str | None, option("TEXT", "What to avoid; acts through guidance.")] = None
    positive_prompt: Annotated[bool, option("", "Append standard words for good faces to prompts about people.")] = (
        False
    )
    aspect_ratio: Annotated[str, option("H:W", "Height to width, such as 4:3 (default: 1:1).")] = "1:1"
    pixels: Annotated[str | None, option("BUDGET", "Picture size in pixels; default: the model's.")] = None
    guidance: Annotated[
        str | None, option("X|X,X,...", "How closely to follow the prompt, one number or one per scale.")
    ] = None
    tau: Annotated[str | None, option("X|X,X,...", "Sampling temperature, one number or one per scale.")] = None
    top_k: Annotated[str | None, option("K", "Sample among the K likeliest values of each bit; 0: all.")] = None
    top_p: Annotated[str | None, option("P", "Sample within this probability mass of each bit, in (0, 1].")] = None
    stop_after_scale: Annotated[str | None, option("K", "Stop after K scales and decode what is there.")] = None
    cut_long_prompts: Annotated[
        bool, option("", "Cut prompts that are longer than the model reads; without it they are failures.")
    ] = False
    batch_size: Annotated[str, option("B", "Pictures that each copy of the model makes together (default: 8).")] = "8"
    chunk: Annotated[
        str, option("N", "Rows that a worker claims at a time; a shard of the tar layout (default: 64).")
    ] = "64"
    max_failures: Annotated[
        str | None, option("N", "Stop when more rows than this have failed, in the whole job; default: never.")
    ] = None
    worker: Annotated[
        str | None, option("NAME", "This worker's name, unlike all others'; default: host and process.")
    ] = None
    worker_index: Annotated[
        str | None,
        option("I", "This worker's number; the lowest reports for all. Default: what Slurm, Kubernetes or MPI say."),
    ] = None
    lease_seconds: Annotated[
        str, option("S", "Silence after which a worker counts as dead, and others take over (default: 60).")
    ] = "60"
    stall_minutes: Annotated[
        str, option("M", "Minutes without a batch after which a worker lets others take over (default: 15).")
    ] = "15"
    no_wait: Annotated[
        bool, option("", "End when nothing is left to claim, without waiting for other workers' chunks.")
    ] = False
    distributed: Annotated[
        bool, option("", "Join JAX's processes of all hosts first; nothing else is needed on Slurm and GKE.")
    ] = False
    coordinator: Annotated[str | None, option("HOST:PORT", "With --distributed elsewhere: the first process.")] = None
    num_processes: Annotated[str | None, option("N", "With --distributed elsewhere: of how many.")] = None
    process_id: Annotated[str | None, option("I", "With --distributed elsewhere: which of them, from 0.")] = None
    json: Annotated[bool, option("", "Print one JSON object instead of the output's place.")] = False
    quiet: Annotated[bool, option("", "No progress, no summary, no warnings; only errors.")] = False
    dry_run: Annotated[bool, option("", "Read and check everything, say what is to be made, but make nothing.")] = False
    debug: Annotated[bool, option("", "On failure, show the whole traceback.")] = False


@dataclasses.dataclass(frozen=True)
class BatchRequest:
    """What the options ask for, checked.

    Attributes:
      prompts, out, layout: as typed.
      settings: of rows that say nothing else, by the names of :data:`toprovar_jax.settings.SETTINGS`.
      batch_size, chunk: pictures per copy of the model and call, rows per claim.
      max_failures: how many rows may fail, or None.
      worker, index: name and number of this worker.
      lease_seconds, stall_seconds: of silence, and without a batch.
      processes: arguments of ``jax.distributed.initialize``; None: not to be called.
    """

    prompts: str
    out: str
    layout: Literal["files", "tar"]
    settings: Mapping[str, Any]
    batch_size: int
    chunk: int
    max_failures: int | None
    worker: str
    index: int
    lease_seconds: float
    stall_seconds: float
    processes: Mapping[str, Any] | None


def parse_options(argv: Sequence[str], *, prog: str = "toprovar batch") -> BatchOptions:
    """Reads a command line. ``--help`` prints the options and raises ``SystemExit(0)``.

    Args:
      argv: the words after the command's name.
      prog: the command's name, as ``--help`` shows it.

    Raises:
      UserInputError: an unknown option, an option without its value, or a stray word.
    """
    return read_command_line(
        BatchOptions, argv, prog=prog, description="Make pictures for a file of prompts, on any number of hosts."
    )


def request_of(options: BatchOptions) -> BatchRequest:
    """What is asked for.

    Raises:
      UserInputError: a value is missing or not legal.
    """
    if options.prompts is None or not options.prompts.strip():
        raise UserInputError("no prompts", "a file of them is needed", "say which with --prompts FILE")
    if options.out is None or not options.out.strip():
        raise UserInputError("no output", "a place for it is needed", "say where with --out, for example outputs/run")
    if options.layout not in LAYOUTS:
        raise unknown_name("--layout", options.layout, LAYOUTS)
    index = _index(options)
    host = socket.gethostname().partition(".")[0] or "host"
    worker = f"{host}-{os.getpid()}" if options.worker is None else options.worker
    if not worker or len(worker) > 100 or set(worker) - set(_WORKER_CHARACTERS):
        raise UserInputError(
            f"--worker {worker!r}", "must be letters, digits, points, dashes and underscores, at most 100", "name it so"
        )
    return BatchRequest(
        prompts=options.prompts,
        out=options.out,
        layout=options.layout,
        settings=_settings(options),
        batch_size=positive("--batch-size", options.batch_size),
        chunk=positive("--chunk", options.chunk),
        max_failures=None if options.max_failures is None else _whole("--max-failures", options.max_failures),
        worker=worker,
        index=zlib.crc32(worker.encode()) if index is None else index,
        lease_seconds=_seconds("--lease-seconds", options.lease_seconds),
        stall_seconds=60 * _seconds("--stall-minutes", options.stall_minutes),
        processes=_processes(options),
    )


_WORKER_CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_"


def _settings(options: BatchOptions) -> dict[str, Any]:
    from toprovar_jax.distributed.batch.rows import check_num_images

    settings = settings_of(options)
    check_num_images(settings["num_images"], "--num-images")
    return settings


def _index(options: BatchOptions) -> int | None:
    for name in ("worker_index", "process_id"):
        text = getattr(options, name)
        if text is not None:
            return _whole(flag_of(name), text)
    return next((int(os.environ[name]) for name in INDEX_VARIABLES if os.environ.get(name, "").isdigit()), None)


def _processes(options: BatchOptions) -> dict[str, Any] | None:
    given = {name: getattr(options, name) for name in ("coordinator", "num_processes", "process_id")}
    if not options.distributed:
        for name, value in given.items():
            if value is not None:
                raise UserInputError(f"{flag_of(name)} {value}", "needs --distributed", "add it, or leave this out")
        return None
    missing = [flag_of(name) for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return {}
    if missing:
        raise UserInputError("--distributed", f"needs {', '.join(missing)} too", "give all three, or none of them")
    host, _, port = str(given["coordinator"]).rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserInputError(f"--coordinator {given['coordinator']!r}", "must be HOST:PORT", "for example node0:1234")
    processes, number = positive("--num-processes", given["num_processes"]), _whole("--process-id", given["process_id"])
    if number >= processes:
        raise UserInputError(f"--process-id {number}", f"must be below {processes}", "they are counted from 0")
    return {"coordinator_address": given["coordinator"], "num_processes": processes, "process_id": number}


def _whole(flag: str, text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise UserInputError(f"{flag} {text!r}", "must be an integer >= 0", "for example 0")
    return int(text)


def _seconds(flag: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e6:
        raise UserInputError(f"{flag} {text!r}", "must be a number > 0", "for example 60")
    return number
