"""Policies side by side: the same pictures by each of them, what they cost, and how far they lie from dense ones.

:mod:`toprovar_jax.comparison_figures` draws the result.
"""

from __future__ import annotations

import dataclasses
import datetime
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import toprovar_jax
from toprovar_jax.acceleration import AccelerationPolicy, Dense
from toprovar_jax.errors import UserInputError
from toprovar_jax.images import to_uint8
from toprovar_jax.loading import LoadedModel
from toprovar_jax.outputs import PipelineOutput
from toprovar_jax.perceptual import LPIPS_SIDE, Distance, load_lpips
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.scenes.score import check_judgeable, judged_right
from toprovar_jax.shapes import Bool, Float, Int, UInt8
from toprovar_jax.similarity import SSIM_WINDOW, psnr, ssim

SHOWN = 12
"""The first so many pictures are kept to be shown; all of them are measured."""

OnPicture = Callable[[str, int, int], None]
"""``(policy, done, total)`` after every picture, made or timed, of all policies."""


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """A model, and the pictures that every policy makes with it, one at a time.

    Attributes:
      pipeline: the model.
      prompts, seeds: of each picture; one or more.
      options: whatever else the pipeline takes, such as ``guidance_scale``.
      repeats: how often each picture is timed, once it was made; 0: no times.
      on_picture: told after every picture.
    """

    pipeline: InfinityPipeline
    prompts: Sequence[str]
    seeds: Sequence[int]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    repeats: int = 3
    on_picture: OnPicture = lambda policy, done, total: None


class Seconds(NamedTuple):
    """Per picture, warm: text encoder and conditioning, all scales of the transformer, decoder."""

    text: float
    transformer: float
    decoder: float

    @property
    def all(self) -> float:
        """Text, transformer and decoder."""
        return sum(self)


class Times(NamedTuple):
    """What was measured of a policy: its seconds, and dense ones over them, from runs of both by turns."""

    seconds: Seconds
    speedup: float
    speedup_transformer: float


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """One policy's pictures and what became of them; all other arrays hold one entry per picture.

    Attributes:
      name: as it was asked for.
      policy: what the name stood for.
      images: the first :data:`SHOWN`, as they would be saved.
      flops: of the transformer, predicted from the plan that the picture went by.
      cache_bytes: largest size of the KV cache while the picture was made.
      scales_run: how many.
      psnr: to the dense pictures, decibels; infinite for equal ones.
      ssim: likewise; None for pictures that are too small for one.
      lpips: likewise; None where it cannot be had.
      right: the judge's verdicts; None where there is nothing to judge by.
      times: None if none were measured.
    """

    name: str
    policy: AccelerationPolicy
    images: UInt8[np.ndarray, "_ h w 3"]
    flops: Float[np.ndarray, " B"]
    cache_bytes: Int[np.ndarray, " B"]
    scales_run: Int[np.ndarray, " B"]
    psnr: Float[np.ndarray, " B"]
    ssim: Float[np.ndarray, " B"] | None
    lpips: Float[np.ndarray, " B"] | None
    right: Bool[np.ndarray, " B"] | None
    times: Times | None

    @property
    def identical(self) -> int:
        """How many pictures are those of the dense policy, bit for bit."""
        return int(np.isinf(self.psnr).sum())

    @property
    def mean_psnr(self) -> float | None:
        """Of the pictures that differ from the dense ones, if any does."""
        differs = np.isfinite(self.psnr)
        return float(self.psnr[differs].mean()) if differs.any() else None


class _Picture(NamedTuple):
    """What :class:`Result` holds, of one picture or in lists of all."""

    image: Any
    flops: Any
    cache_bytes: Any
    scales_run: Any
    psnr: Any
    ssim: Any
    lpips: Any
    right: Any


class Comparison:
    """Policies on the same prompts and seeds; dense always comes first.

    Programs are what a process can run out of: on a CPU each holds hundreds of the memory maps that an operating
    system allows. So a policy's are compiled apart from the others' and dropped when it is finished, and jax's own
    caches with them, which makes other jitted functions of the process compile again. Only the dense ones stay, since
    a policy is timed by turns with dense, picture by picture: what else the machine does then falls on both, and
    speed-ups may be compared between policies although their seconds were taken at different times.

    Attributes:
      setup: the model and the pictures.
      results: of the policies that are finished.
      left_out: measures that cannot be taken, by name, with the reason.
      warnings: one line each, of the pipeline.

    Args:
      setup: the model and the pictures.
      policies: names, compositions such as ``"fastvar+guidance-off-late"`` included.

    Raises:
      UserInputError: no picture at all, or anything that cannot be done as asked; nothing was run then.
    """

    def __init__(self, setup: Setup, policies: Sequence[str]):
        if not setup.prompts:
            raise UserInputError("comparison of 0 pictures", "needs at least one prompt", "give it one")
        self.setup = setup
        self.results: list[Result] = []
        self.left_out: dict[str, str] = {}
        names = dict.fromkeys((Dense().name, *policies))
        prompts, seeds = list(setup.prompts), list(setup.seeds)
        requests = [setup.pipeline.resolve(prompts, seed=seeds, policy=name, **setup.options) for name in names]
        self.warnings = tuple(dict.fromkeys(warning for request in requests for warning in request.warnings))
        self._policies = {name: request.policy for name, request in zip(names, requests, strict=True)}
        self._num_scales = len(requests[0].plan.scales)
        side = min(requests[0].size)
        self._has_ssim = side >= SSIM_WINDOW
        if not self._has_ssim:
            self.left_out["SSIM"] = f"needs pictures of at least {SSIM_WINDOW} pixels along each side"
        self._lpips = self._lpips_for(side)
        self._has_judge = self._can_judge(side)
        self._dense: list[np.ndarray] = []
        self._done, self._total = 0, len(prompts) * (len(names) + setup.repeats * (2 * len(names) - 1))

    @property
    def names(self) -> tuple[str, ...]:
        """Of all policies, dense first."""
        return tuple(self._policies)

    def run(self) -> Iterator[Result]:
        """Each policy's result as soon as it is there; it is in :attr:`results` by then."""
        for name in self.names[len(self.results) :]:
            pipeline = self.setup.pipeline if not self.results else _apart(self.setup.pipeline)
            self.results.append(self._result(pipeline, name))
            del pipeline
            jax.clear_caches()
            yield self.results[-1]

    def as_dict(self) -> dict[str, Any]:
        """Everything that was found so far, ready for JSON; means over the pictures unless it says otherwise.

        Seconds are per picture. ``psnr`` is that of the pictures that differ from the dense ones, null if none does.
        """
        pipeline = self.setup.pipeline
        return {
            "model": pipeline.model_name,
            "precision": pipeline.card.transformer.precision,
            "prompts": list(self.setup.prompts),
            "seeds": list(self.setup.seeds),
            "options": dict(self.setup.options),
            "repeats": self.setup.repeats,
            "scales": self._num_scales,
            **where_and_when(),
            "left_out": self.left_out,
            "warnings": list(self.warnings),
            "unfinished": list(self.names[len(self.results) :]),
            "policies": [self._row(result) for result in self.results],
        }

    def table(self) -> str:
        """The finished policies as an aligned Markdown table, and below it what was left out of it and why."""
        rows = [self._cells(result) for result in self.results]
        shown = [name for name in rows[0] if any(row[name] for row in rows)]
        text = markdown_table([shown, *([row[name] for name in shown] for row in rows)])
        notes = [f"{measure}: left out; it {reason}" for measure, reason in self.left_out.items()]
        return "\n".join([text, *(["", *notes] if notes else [])])

    def _draw(self, pipeline: InfinityPipeline, name: str, index: int) -> PipelineOutput:
        setup = self.setup
        output = pipeline(
            setup.prompts[index],
            seed=setup.seeds[index],
            policy=self._policies[name],
            output_type="np",
            **setup.options,
        )
        self._done += 1
        setup.on_picture(name, self._done, self._total)
        return output

    def _result(self, pipeline: InfinityPipeline, name: str) -> Result:
        made = [self._picture(pipeline, name, index) for index in range(len(self.setup.prompts))]
        first, columns = made[0], _Picture(*map(list, zip(*made, strict=True)))
        return Result(
            name,
            self._policies[name],
            np.stack(columns.image[:SHOWN]),
            np.array(columns.flops),
            np.array(columns.cache_bytes),
            np.array(columns.scales_run),
            np.array(columns.psnr),
            None if first.ssim is None else np.array(columns.ssim),
            None if first.lpips is None else np.array(columns.lpips),
            None if first.right is None else np.array(columns.right),
            self._times(pipeline, name),
        )

    def _picture(self, pipeline: InfinityPipeline, name: str, index: int) -> _Picture:
        """One at a time: many large ones in float64 would fill the memory."""
        config = self.setup.pipeline.card.transformer
        output = self._draw(pipeline, name, index)
        [plan], [image] = output.plans, to_uint8(np.asarray(output.images))
        if not self.results:
            self._dense.append(image)
        pixels, dense = (picture[None].astype(np.float32) / 255.0 for picture in (image, self._dense[index]))
        return _Picture(
            image if index < SHOWN else np.empty(0, np.uint8),
            plan.flops(config),
            plan.bytes(config)["cache"],
            plan.num_run,
            psnr(pixels, dense)[0],
            ssim(pixels, dense)[0] if self._has_ssim else None,
            None if self._lpips is None else self._lpips(pixels, dense)[0],
            judged_right(image[None], self.setup.prompts[index : index + 1])[0] if self._has_judge else None,
        )

    def _times(self, pipeline: InfinityPipeline, name: str) -> Times | None:
        """Everything was run once before, so nothing is compiled here."""
        setup, first = self.setup, not self.results
        if not setup.repeats:
            return None
        ways = {Dense().name: setup.pipeline} if first else {Dense().name: setup.pipeline, name: pipeline}
        shape = (setup.repeats, len(setup.prompts), len(Seconds._fields))
        taken = {way: np.empty(shape) for way in ways}
        for turn, index in np.ndindex(*shape[:2]):
            for way in list(ways)[:: 1 if (turn + index) % 2 else -1]:
                spent = self._draw(ways[way], way, index).timings
                taken[way][turn, index] = spent.text, spent.transformer, spent.decoder
        whole, ours = (Seconds(*np.median(taken[way], axis=0).mean(axis=0).tolist()) for way in (Dense().name, name))
        return Times(ours, whole.all / ours.all, whole.transformer / ours.transformer)

    def _row(self, result: Result) -> dict[str, Any]:
        def mean(values: np.ndarray | None) -> float | None:
            return None if values is None else float(values.mean())

        dense, times = self.results[0], result.times
        return {
            "name": result.name,
            "policy": repr(result.policy),
            "flops": mean(result.flops),
            "flops_share": float(result.flops.mean() / dense.flops.mean()),
            "cache_bytes": mean(result.cache_bytes),
            "scales_run": [int(result.scales_run.min()), int(result.scales_run.max())],
            "seconds": None if times is None else {**times.seconds._asdict(), "all": times.seconds.all},
            "speedup": None if times is None else times.speedup,
            "speedup_transformer": None if times is None else times.speedup_transformer,
            "psnr": result.mean_psnr,
            "identical": result.identical,
            "ssim": mean(result.ssim),
            "lpips": mean(result.lpips),
            "judge": mean(result.right),
        }

    def _cells(self, result: Result) -> dict[str, str]:
        """Columns of the table; an empty one is left out if it is empty for every policy."""
        row = self._row(result)
        unit, prefix = next((pair for pair in _UNITS if self.results[0].flops.mean() >= pair[0]), _UNITS[-1])
        low, high = row["scales_run"]
        seconds, same = row["seconds"] or {}, row["identical"] == len(self.setup.prompts)
        cells = {
            "policy": row["name"],
            "scales": f"{high}" if low == high else f"{low}-{high}",
            f"{prefix}FLOP": f"{row['flops'] / unit:.3g}",
            "of dense": f"{100 * row['flops_share']:.1f} %",
            "cache MB": f"{row['cache_bytes'] / 1e6:.3g}",
        }
        for part in ("text", "transformer", "decoder"):
            cells[f"{part} ms"] = f"{1e3 * seconds[part]:.1f}" if seconds else ""
        cells["speed-up"] = f"{row['speedup']:.2f}x" if seconds else ""
        cells["PSNR dB"] = "equal" if same else f"{row['psnr']:.1f}"
        for measure in ("ssim", "lpips"):
            cells[measure.upper()] = "" if row[measure] is None else f"{row[measure]:.3f}"
        cells["judge"] = "" if row["judge"] is None else f"{100 * row['judge']:.0f} %"
        return cells

    def _lpips_for(self, side: int) -> Distance | None:
        if side < LPIPS_SIDE:
            self.left_out["LPIPS"] = f"needs pictures of at least {LPIPS_SIDE} pixels along each side"
            return None
        try:
            return load_lpips()
        except UserInputError as error:
            self.left_out["LPIPS"] = f"{error.rule}; {error.remedy}"
            return None

    def _can_judge(self, side: int) -> bool:
        if self.setup.pipeline.card.world is None:
            self.left_out["judge"] = "knows the embedded models' world only"
            return False
        try:
            check_judgeable(self.setup.prompts, side)
        except UserInputError as error:
            self.left_out["judge"] = f"cannot answer ({error.value} {error.rule})"
            return False
        return True


_UNITS: tuple[tuple[float, str], ...] = ((1e12, "T"), (1e9, "G"), (1e6, "M"))


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells, the first of them the heads, in columns of one width."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def where_and_when() -> dict[str, Any]:
    """Date, device and versions, ready for JSON: what measurements are worth little without."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"{jax.devices()[0].device_kind} x{jax.device_count()}, {platform.machine()}",
        "versions": {"toprovar_jax": toprovar_jax.__version__, "jax": jax.__version__},
    }


def _apart(pipeline: InfinityPipeline) -> InfinityPipeline:
    """The same model with programs of its own."""
    loaded = LoadedModel(pipeline.card, pipeline.networks, pipeline.tokenizer, pipeline.calibration)
    return InfinityPipeline(loaded, memory=pipeline.memory)
