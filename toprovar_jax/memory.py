"""How much device memory making pictures takes, told before anything is allocated.

    print(toprovar_jax.memory_report("infinity-8b", pixels="1M", batch_size=4, policy="toprovar"))

A report goes through a generation program by program, as :mod:`toprovar_jax.drivers` runs them. Sizes are bytes; in
text, GB is 1e9 bytes.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.dtypes import BFLOAT16
from pallas_kernels.attention.api import choose
from pallas_kernels.attention.problem import Problem
from pallas_kernels.attention.target import current_target
from toprovar_jax.acceleration import POLICIES, AccelerationPolicy, GenerationPlan, policy_named
from toprovar_jax.config import Precision
from toprovar_jax.errors import UserInputError
from toprovar_jax.generation import make_plan
from toprovar_jax.hub import CARD, EMBEDDED_MODELS, find_model
from toprovar_jax.memory_options import ON_DEVICE, MemoryOptions
from toprovar_jax.memory_parts import weight_bytes
from toprovar_jax.memory_phases import AttentionKind, Driver, Phase, decoder_phase, scale_phases, text_phases
from toprovar_jax.model_card import ModelCard
from toprovar_jax.presets import PRESETS
from toprovar_jax.sampling import Sampling
from toprovar_jax.settings import check_setting


@dataclasses.dataclass(frozen=True)
class MemoryReport:
    """What a generation needs of its device.

    Attributes:
      model, pixels, policy, precision: of what.
      batch_size: pictures asked for at once.
      together: pictures computed at once; in exact precision one.
      driver: how its scales are run.
      memory: what is spared.
      weights: bytes of each network's parameters that stay on the device.
      phases: every program, in order.
      again: ``(memory, batch_size) -> MemoryReport``, the same otherwise.
    """

    model: str
    pixels: str
    policy: str
    precision: Precision
    batch_size: int
    together: int
    driver: Driver
    memory: MemoryOptions
    weights: dict[str, int]
    phases: tuple[Phase, ...]
    again: Callable[[MemoryOptions, int], MemoryReport] = dataclasses.field(repr=False, compare=False)

    @property
    def largest(self) -> Phase:
        """The phase with the peak."""
        return max(self.phases, key=lambda phase: phase.peak)

    @property
    def peak(self) -> int:
        """The most there is on the device at any time."""
        return self.largest.peak

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        names = (field.name for field in dataclasses.fields(self) if field.name not in ("again", "memory", "phases"))
        return {
            **{name: getattr(self, name) for name in names},
            "memory": dataclasses.asdict(self.memory),
            "phases": [{**dataclasses.asdict(phase), "peak": phase.peak} for phase in self.phases],
            "peak": self.peak,
            "peak_phase": self.largest.name,
        }

    def to_json(self) -> str:
        """:meth:`as_dict` as text."""
        return json.dumps(self.as_dict(), indent=1)

    def __str__(self) -> str:
        head = f"{self.model}, {self.pixels}, batch {self.batch_size}, {self.policy}, {self.precision}, {self.driver}"
        weights = ", ".join(f"{name} {gigabytes(size)}" for name, size in self.weights.items())
        names = ("beside", "arguments", "outputs", "reused", "temporaries", "peak")
        width = max(len(phase.name) for phase in self.phases)
        lines = [head, f"weights on the device: {weights}", ""]
        lines.append(f"{'GB':<{width}}" + "".join(f"{name:>12}" for name in names))
        for phase in self.phases:
            numbers = "".join(f"{getattr(phase, name) / 1e9:>12.2f}" for name in names)
            lines.append(f"{phase.name:<{width}}{numbers}")
        return "\n".join([*lines, "", f"peak {gigabytes(self.peak)}, at {self.largest.name}"])


def gigabytes(size: int) -> str:
    """For people; 1 GB is 1e9 bytes."""
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def memory_report(
    model: str | os.PathLike[str] | None = None,
    *,
    pixels: str | None = None,
    aspect_ratio: str = "1:1",
    batch_size: int = 1,
    policy: str | AccelerationPolicy = "dense",
    guided: bool = True,
    precision: Precision = "fast",
    memory: MemoryOptions = ON_DEVICE,
    driver: Driver | None = None,
    attention: AttentionKind = "kernel",
) -> MemoryReport:
    """Predict the device memory of a generation from the model's description alone; nothing is loaded or allocated.

    Args:
      model: a name of ``toprovar_jax.list_models()``, with or without weights here, or a model folder; None for the
        embedded model.
      pixels: a pixel budget of the model; default: its own.
      aspect_ratio: ``"height:width"``.
      batch_size: pictures made at once.
      policy: a name or a policy. By name it is not calibrated.
      guided: whether unconditional rows are computed, as for any guidance but 1.
      precision: of the computation.
      memory: what is spared.
      driver: how the scales are run; default: as without a callback.
      attention: what attention is computed by.

    Raises:
      UserInputError: an unknown name, or a value that is not legal.
    """
    card = PRESETS[str(model)] if model is not None and str(model) in PRESETS else None
    card = card or _card_of(model)
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise UserInputError(f"batch_size {batch_size!r}", "must be an integer >= 1", "leave it out for 1")
    chosen = policy
    if not isinstance(chosen, AccelerationPolicy) or isinstance(chosen, str):
        chosen = policy_named(check_setting("policy", policy), lambda name: POLICIES[name]())
    schedule = card.schedule(
        check_setting("aspect_ratio", aspect_ratio), None if pixels is None else check_setting("pixels", pixels)
    )
    sampling = Sampling(guidance=2.0 if guided else 1.0)
    plan = make_plan(schedule, sampling, chosen, num_layers=card.transformer.num_layers)
    named = card.default_pixels if pixels is None else pixels
    return predict(card.with_precision(precision), plan, batch_size, named, memory, driver=driver, attention=attention)


def _card_of(model: str | os.PathLike[str] | None) -> ModelCard:
    """The description in a model folder, or of an embedded model; original files are not looked into."""
    if model is not None and model not in EMBEDDED_MODELS and not (Path(model).expanduser() / CARD).is_file():
        named = f"a name ({', '.join((*EMBEDDED_MODELS, *PRESETS))}) or a folder with a {CARD}"
        rule = f"must be {named}; what memory takes does not depend on the weights"
        raise UserInputError(f"model {str(model)!r}", rule, "name the preset, such as infinity-2b")
    return ModelCard.read(find_model(model) / CARD, PRESETS)


def attention_of(card: ModelCard, plan: GenerationPlan) -> AttentionKind:
    """What this process's device computes attention by at a plan's last scale, the largest.

    Raises:
      ValueError, NotImplementedError: attention that does not exist or cannot run here.
    """
    step, config = plan.step(plan.num_run - 1), card.transformer
    dtype = np.dtype(BFLOAT16 if config.precision == "fast" else np.float32)
    visible = max(max(group.visible) for group in step.groups)
    problem = Problem(1, step.tokens, visible, config.num_heads, config.head_dim, dtype)
    name = choose(problem, current_target(), config.attention)
    return name if name in ("xla", "reference") else "kernel"


def device_limit() -> int | None:
    """Bytes that the first device lets a process have; None where it does not tell, as a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def predict(
    card: ModelCard,
    plan: GenerationPlan,
    batch_size: int,
    pixels: str,
    memory: MemoryOptions,
    *,
    driver: Driver | None = None,
    attention: AttentionKind = "kernel",
    negative: bool = False,
) -> MemoryReport:
    """The report of a plan.

    Args:
      card: with the precision it is computed in.
      plan: what is run, with its alternatives.
      batch_size: pictures.
      pixels: name of their size.
      memory: what is spared.
      driver, attention: see :func:`memory_report`.
      negative: whether there are negative prompts to encode, too.
    """
    exact = card.transformer.precision == "exact"
    together = 1 if exact else batch_size
    steps_apart = exact or bool(plan.alternatives)
    asked, driver = driver, driver or ("stepwise" if steps_apart else "fused")
    weights = weight_bytes(card, memory)
    staying = {"transformer": weights.transformer + weights.moving, "image tokenizer": weights.image_tokenizer}
    if memory.text_encoder == "device":
        staying["text encoder"] = weights.text_encoder
    phases = [
        *text_phases(card, plan, together, memory, sum(staying.values()), negative),
        *scale_phases(card, plan, together, memory, sum(staying.values()), driver, attention),
        decoder_phase(card, plan, together, memory, sum(staying.values())),
    ]

    def again(memory: MemoryOptions, batch_size: int) -> MemoryReport:
        options: dict[str, Any] = {"driver": asked, "attention": attention, "negative": negative}
        return predict(card, plan, batch_size, pixels, memory, **options)

    return MemoryReport(
        *(card.name, pixels, plan.policy, card.transformer.precision, batch_size, together, driver, memory),
        *(staying, tuple(phases), again),
    )


def check_fits(report: MemoryReport, limit: int) -> None:
    """Refuse what the device cannot hold.

    Args:
      report: what is needed.
      limit: bytes that the device has.

    Raises:
      UserInputError: the peak is above the limit.
    """
    if report.peak <= limit:
        return
    remedy = "use a smaller model or a smaller picture"
    for memory, batch in _smaller(report):
        other = report.again(memory, batch)
        if other.peak <= limit:
            remedy = f"{_described(memory, report, batch)} needs {gigabytes(other.peak)}"
            break
    raise UserInputError(
        f"{report.model} at {report.pixels}, batch {report.batch_size}, needing {gigabytes(report.peak)} at "
        f"{report.largest.name}",
        f"must fit the device's {gigabytes(limit)}",
        remedy,
    )


def _smaller(report: MemoryReport) -> Iterator[tuple[MemoryOptions, int]]:
    """What to try, the least painful first: what costs no time, then batches, bits, and time."""
    given = report.memory
    spared = dataclasses.replace(given, decoder_strips=max(given.decoder_strips, 4))
    if given.text_encoder == "device":
        yield dataclasses.replace(given, text_encoder="on_demand"), report.batch_size
        spared = dataclasses.replace(spared, text_encoder="on_demand")
    yield spared, report.batch_size
    batches = [size for size in (report.batch_size // 2**power for power in range(1, 32)) if size]
    for batch in batches:
        yield spared, batch
    for batch in (report.batch_size, *batches):
        yield dataclasses.replace(spared, quantization="int8"), batch
    spared = dataclasses.replace(spared, stream_blocks=True, decoder_strips=max(given.decoder_strips, 8))
    for quantization in dict.fromkeys((given.quantization, "int8")):
        for batch in (report.batch_size, *batches):
            yield dataclasses.replace(spared, quantization=quantization), batch


def _described(memory: MemoryOptions, report: MemoryReport, batch: int) -> str:
    changed = [
        f"{field.name}={getattr(memory, field.name)!r}"
        for field in dataclasses.fields(MemoryOptions)
        if getattr(memory, field.name) != getattr(report.memory, field.name)
    ]
    words = [f"batch {batch}"] if batch != report.batch_size else []
    if changed:
        words.append(f"MemoryOptions({', '.join(changed)}), as a command {_flags(memory)},")
    return " with ".join(words)


def _flags(memory: MemoryOptions) -> str:
    """The same on the command line."""
    flags = ["--low-memory"] if memory.stream_blocks else []
    if memory.text_encoder != ("on_demand" if memory.stream_blocks else "device"):
        flags.append(f"--text-encoder-on {memory.text_encoder.replace('_', '-')}")
    if memory.quantization is not None:
        flags.append("--int8")
    if memory.decoder_strips != (8 if memory.stream_blocks else 1):
        flags.append(f"--decoder-strips {memory.decoder_strips}")
    return " ".join(flags)
