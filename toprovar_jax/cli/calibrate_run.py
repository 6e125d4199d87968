"""What the calibrate command does once it has started: measure, choose, write one file, and say what was found.

Nothing imported at the top imports jax: the backend is chosen first, and ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from toprovar_jax.acceleration.calibration import Calibration
from toprovar_jax.cli.backend import start_backend
from toprovar_jax.cli.calibrate_options import CalibrateOptions, request_of
from toprovar_jax.cli.interrupts import Interrupts
from toprovar_jax.cli.model_options import files_of, loader
from toprovar_jax.errors import UserInputError
from toprovar_jax.files import check_output_dir, replace_file, write_new

FILE_NAME = "calibration.json"
"""What the file is called in a model's folder, where the model's pipeline finds it."""

_HARDLY_VARIES = 0.5


def run(options: CalibrateOptions, load: Callable[[str | None], Any] | None, interrupts: Interrupts) -> None:
    """Carries out parsed options.

    Args:
      options: the command line.
      load: makes the pipeline from ``--model``; None: ``InfinityPipeline.from_pretrained``.
      interrupts: lets a Ctrl-C end the process at once as long as nothing is written.

    Raises:
      UserInputError: something that was asked for cannot be done; nearly always raised before any picture is begun.
      OSError: the file could not be written.
    """
    request = request_of(options)
    if request.out is not None:
        _check_out(request.out, options.force)
    with interrupts.nothing_to_lose():
        start_backend(options.backend)
        from toprovar_jax.hub import find_model
        from toprovar_jax.measurement import Setup, Target, calibrate

        path = request.out or find_model(options.model, **files_of(options)) / FILE_NAME
        _check_out(path, options.force)
        pipeline = (load or loader(options))(options.model)
        with _progress(options.quiet) as on_picture:
            setup = Setup(pipeline, request.prompts, request.seeds, on_picture)
            calibration = calibrate(setup, Target(request.target_speedup, request.target_drop))
    content = calibration.to_json().encode("utf-8")
    if options.force:
        replace_file(path, content)
    else:
        # Had someone else written the file meanwhile, this one gets a number: the work of hours is not thrown away.
        path = write_new(path.parent, path.stem, path.suffix, content)
    if not options.quiet:
        print(table(calibration))
        for warning in warnings_of(calibration):
            print(f"warning: {warning}", file=sys.stderr)
    print(path)


def _check_out(path: pathlib.Path, force: bool) -> None:
    if path.is_dir():
        raise UserInputError(f"--out {path}", "must name a file, but is a directory", f"for example {path / FILE_NAME}")
    if path.exists() and not force:
        raise UserInputError(
            f"file {path}", "is there already", "choose another with --out, or replace it with --force"
        )
    check_output_dir(path.parent)


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar per round of pictures on a terminal; elsewhere nothing."""
    if quiet or not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from tqdm import tqdm

    with tqdm(unit=" pictures", leave=False, file=sys.stderr) as bar:

        def advance(what: str, done: int, total: int) -> None:
            if done == 1:
                bar.reset(total)
                bar.set_description(what)
            bar.update(done - bar.n)

        yield advance


def table(calibration: Calibration) -> str:
    """What was measured and chosen, for people."""
    curves, chosen = calibration.curves, calibration.profiles["toprovar"]
    lines = [f"{calibration.model}: {calibration.images} pictures of {calibration.num_scales} scales"]
    lines += ["", f"{'scale':>5}  {'rho':>5}  {'ssim':>5}  stable from here"]
    for index, (share, similarity) in enumerate(_columns(curves, "salient_share", "partial_ssim")):
        stable = curves["stable_scale"].count(index + 1)
        lines.append(f"{index + 1:>5}  {_short(share)}  {_short(similarity)}  {stable or ''}".rstrip())
    lines += ["", f"{'layer':>5}  {'varrho':>6}  {'R':>5}"]
    ratios = curves["spectrum_ratio"]["mean"]
    for index, (ratio, score) in enumerate(zip(ratios, chosen["layer_scores"], strict=True)):
        lines.append(f"{index:>5}  {_short(ratio, 6)}  {_short(score)}")
    errors = ", ".join(f"{rule} {error:.2f}" for rule, error in curves["depth_error"].items())
    lines += ["", f"depth rule {chosen['depth_rule']} (mean error in scales: {errors})"]
    if chosen["depth_rule"] == "fixed":
        lines[-1] += f"; pruned from scale {chosen['depth']} on"
        if curves["depth_error"]["fixed"] < _HARDLY_VARIES:
            lines.append("one depth fits all pictures: the scale at which they become stable hardly varies")
    else:
        lines[-1] += f"; pruned from a scale of {chosen['min_depth']} to {chosen['max_depth']} on"
    lines.append(
        f"tau {chosen['tau']:.3f}, beta {chosen['beta']:.3f}, "
        f"alpha_min {chosen['alpha_min']:.3f}, alpha_max {chosen['alpha_max']:.3f}"
    )
    for name, outcome in curves["outcome"].items():
        lines.append(
            f"{name}: {outcome['speedup']:.2f} times fewer transformer operations, SSIM to dense "
            f"{outcome['ssim']:.3f}, scales run: {outcome['scales_run']} of {calibration.num_scales}"
        )
    return "\n".join(lines)


def warnings_of(calibration: Calibration) -> list[str]:
    """What the user should know about the result, one line each."""
    if calibration.curves["target_reached"]:
        return []
    (name, value), *_ = calibration.curves["target"].items()
    outcome = calibration.curves["outcome"]["toprovar"]
    if name == "speedup":
        return [f"target speed-up {value:g} is out of reach: full strength gives {outcome['speedup']:.2f}"]
    return [f"target drop {value:g} allows no pruning: the weakest already loses more"]


def _columns(curves: Any, *names: str) -> Iterator[tuple[Any, ...]]:
    means: list[Sequence[Any]] = [curves[name]["mean"] for name in names]
    return zip(*means, strict=True)


def _short(value: float | None, width: int = 5) -> str:
    return " " * (width - 1) + "-" if value is None else f"{value:>{width}.3f}"
