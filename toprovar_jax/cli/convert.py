"""The convert command: weights under the official names in, a model folder of orbax checkpoints out.

Little is imported at the top: a Ctrl-C can only be answered once :func:`main` runs, and most of a start is imports.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

from tyro.conf import Positional

from toprovar_jax.cli.backend import start_backend
from toprovar_jax.cli.command_line import option, read_command_line
from toprovar_jax.cli.interrupts import Interrupts
from toprovar_jax.cli.outcome import carry_out
from toprovar_jax.errors import UserInputError, unknown_name

if TYPE_CHECKING:
    from convert.conversion import Plan


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """The command line as typed: values stay text, so that a wrong one gets a one-line message when it is read."""

    sources: Annotated[
        Positional[tuple[str, ...]],
        option(
            "SOURCE...",
            "Files (.pth, .bin, .safetensors), folders or indices of shards; of the transformer, the VAE or the T5 "
            "encoder, or of several of them.",
        ),
    ] = ()
    out: Annotated[str | None, option("DIR", "The model folder; several conversions may fill it.")] = None
    dtype: Annotated[
        str,
        option(
            "bfloat16|float32",
            "bfloat16 is for matrices only, as they are computed with; norms, biases and the like stay as exact as "
            "they are (default: bfloat16).",
        ),
    ] = "bfloat16"
    model: Annotated[
        str | None,
        option("PRESET", "Which model this must be, by name or as a model.json; default: whichever fits."),
    ] = None
    ema: Annotated[bool, option("", "Take the averaged weights of a training checkpoint.")] = False
    dry_run: Annotated[bool, option("", "Only say what was recognised and what would be written.")] = False
    verify: Annotated[bool, option("", "Read both sides again and compare every tensor bit for bit.")] = False
    force: Annotated[bool, option("", "Replace networks that are in the folder already.")] = False
    quiet: Annotated[bool, option("", "No progress and no report; only errors.")] = False
    debug: Annotated[bool, option("", "On failure, show the whole traceback.")] = False


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m convert") -> int:
    """Runs the command and returns its exit status; every mistake and failure is one line on stderr.

    Args:
      argv: the words after the command's name; default: those of this process.
      prog: the command's name, as ``--help`` shows it.

    Returns:
      0 on success, 2 on bad input, 1 on any other failure, 130 on Ctrl-C. The folder appears whole or not at all.
    """
    argv = sys.argv[1:] if argv is None else argv

    def work(interrupts: Interrupts) -> None:
        description = "Convert released weights into a model folder."
        options = read_command_line(ConvertOptions, argv, prog=prog, description=description)
        check_options(options)
        with interrupts.nothing_to_lose():
            start_backend("cpu")  # nothing is computed, and an accelerator may be at work elsewhere
        run(options, interrupts)

    return carry_out(work, lost="nothing was written", debug="--debug" in argv)


def check_options(options: ConvertOptions) -> None:
    """Refuses options that need no look at any file.

    Raises:
      UserInputError: no source, no folder, or a dtype that does not exist.
    """
    if not options.sources:
        raise UserInputError("no source", "files to convert are needed", "name one or more")
    if not all(source.strip() for source in options.sources):
        raise UserInputError("source ''", "must be a path", "name a file or folder")
    if options.out is None or not options.out.strip():
        raise UserInputError("no folder", "the result needs one", "name it with --out DIR")
    if options.dtype not in ("bfloat16", "float32"):
        raise unknown_name("--dtype", options.dtype, ("bfloat16", "float32"))


def run(options: ConvertOptions, interrupts: Interrupts) -> None:
    """Does what the options ask for; a Ctrl-C is answered between two pieces, until the folder is there.

    Raises:
      UserInputError: see :func:`convert.conversion.make_plan` and :func:`convert.conversion.convert`.
    """
    from tqdm import tqdm

    from convert.conversion import check_plan, convert, make_plan
    from convert.streaming import Dtype
    from toprovar_jax.presets import PRESETS

    out = Path(str(options.out)).expanduser()
    sources = [Path(source).expanduser() for source in options.sources]
    dtype = next(name for name in get_args(Dtype) if name == options.dtype)
    plan = make_plan(sources, PRESETS, model=options.model, dtype=dtype, ema=options.ema)
    models = check_plan(plan, out, force=options.force)
    if not options.quiet:
        _describe(plan, out, models)
    if options.dry_run:
        return
    ended = {"start": time.perf_counter()}
    total = plan.nbytes
    bars = {
        stage: tqdm(total=total, unit="B", unit_scale=True, desc=stage, disable=True if options.quiet else None)
        for stage in ("write", "verify")[: 1 + options.verify]
    }

    def progress(stage: str, nbytes: int) -> None:
        interrupts.check()
        bars[stage].update(nbytes)
        ended[stage] = time.perf_counter()

    try:
        with interrupts.later():
            compared = convert(plan, out, force=options.force, verified=options.verify, progress=progress)
    finally:
        for bar in bars.values():
            bar.close()
    if not options.quiet:
        now = time.perf_counter()
        # What is not comparing is the writing: its last piece is on the disk after it was told of.
        comparing = ended["verify"] - ended["write"] if options.verify else 0.0
        writing = now - ended["start"] - comparing
        print(f"wrote {size(total)} in {writing:.1f} s ({total / writing / 1e6:.0f} MB/s): {out}")
        if options.verify:
            speed = f"{comparing:.1f} s ({total / comparing / 1e6:.0f} MB/s)"
            print(f"verified {compared} tensors in {speed}, all equal bit for bit")


def _describe(plan: Plan, out: Path, models: Sequence[str]) -> None:
    for network in plan.networks:
        source = network.source
        read = sum(path.stat().st_size for path in source.files)
        written = sum(array.nbytes for array in plan.arrays()[network.kind.name].values())
        files = f"{len(source.files)} files, " * (len(source.files) > 1)
        inside = f" under {source.wrapped_in}" * bool(source.wrapped_in)
        print(f"{network.kind.title}: {source.label}{inside} ({files}{size(read)}, {len(network.reading)} tensors)")
        print(f"  -> {out / network.kind.name} ({plan.dtype}, {size(written)})")
        if network.left_out:
            print(f"  left out, as no model has a place for it: {', '.join(network.left_out)}")
    others = f" (these weights fit {', '.join(models[1:])} too; choose with --model)" * (len(models) > 1)
    print(f"model: {models[0]}{others}")


def size(nbytes: int) -> str:
    """Bytes in words, in decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes} B"
