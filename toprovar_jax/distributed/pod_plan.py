"""What a slice of chips makes of a model: which mesh, what it holds and sends, and how long pictures would take.

    print(describe_plan(plan_pod(request_of("infinity-8b", "v5e-16")), images=1_000_000))

An estimate from operations, bytes and the chips' documented peaks; nothing here is measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from toprovar_jax.acceleration import POLICIES, policy_named
from toprovar_jax.acceleration.cost import plan_flops
from toprovar_jax.acceleration.plan import GenerationPlan
from toprovar_jax.distributed.chips import CHIPS, SHAPES, Chip, Topology, parse_topology
from toprovar_jax.distributed.choosing import check_heads, program_bytes
from toprovar_jax.distributed.mesh import AUTO, MEMORY_SHARE, MeshSpec, check_mesh, parse_mesh
from toprovar_jax.distributed.pod_costs import ProgramCost, Seconds, program_costs
from toprovar_jax.errors import UserInputError
from toprovar_jax.generation import make_plan
from toprovar_jax.memory_options import ON_DEVICE, MemoryOptions
from toprovar_jax.memory_phases import AttentionKind
from toprovar_jax.model_card import ModelCard
from toprovar_jax.presets import PRESETS
from toprovar_jax.sampling import Sampling
from toprovar_jax.settings import check_setting

BATCHES = (8, 4, 2, 1)
"""Pictures of a copy of the model at once, as they are tried where none are asked for."""

UTILISATION = 0.4
"""Share of a chip's peak that products are taken to reach."""

SHORT_NAMES = {"2b": "infinity-2b", "8b": "infinity-8b"}


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be made on what.

    Attributes:
      card: the model with its precision.
      plan: with its alternatives.
      topology: the chips.
      pixels: name of the pictures' size.
      memory: what stays off the chips.
      attention: what attention is computed by.
    """

    card: ModelCard
    plan: GenerationPlan
    topology: Topology
    pixels: str
    memory: MemoryOptions = ON_DEVICE
    attention: AttentionKind = "kernel"

    def programs(self, spec: MeshSpec, batch: int) -> dict[str, int]:
        """Bytes on each chip at every program's peak, predicted."""
        options: dict[str, Any] = {"pictures": batch, "attention": self.attention}
        return program_bytes(self.card, self.plan, self.memory, spec, **options)

    def fits(self, spec: MeshSpec, batch: int) -> bool:
        """Whether the prediction leaves the chip some memory to spare."""
        return max(self.programs(spec, batch).values()) <= MEMORY_SHARE * self.topology.chip.memory


@dataclasses.dataclass(frozen=True)
class Way:
    """One way that pictures may go, where the policy decides for each of them.

    Attributes:
      plan: that way, alone.
      costs: of its programs, for one batch.
      seconds: the same programs' times.
    """

    plan: GenerationPlan
    costs: tuple[ProgramCost, ...]
    seconds: tuple[Seconds, ...]

    @property
    def total(self) -> float:
        """Seconds of a batch."""
        return sum(each.total for each in self.seconds)


@dataclasses.dataclass(frozen=True)
class PodPlan:
    """What was chosen and what follows.

    Attributes:
      request: of what.
      spec: the mesh.
      batch: pictures of each copy of the model at once.
      memory: bytes on each chip at every program's peak.
      utilisation: share of the chips' peak that products are taken to reach.
      ways: the slowest way that a picture may go and, where the policy decides for each of them, the quickest.
    """

    request: Request
    spec: MeshSpec
    batch: int
    memory: dict[str, int]
    utilisation: float
    ways: tuple[Way, ...]

    @property
    def together(self) -> int:
        """Pictures that all chips make at once."""
        return self.batch * self.spec.data * self.spec.fsdp

    def rate(self, way: Way) -> float:
        """Pictures per second of all chips."""
        return self.together / way.total

    def hours(self, way: Way, images: int) -> float:
        """For so many pictures; the last batch may have room to spare."""
        return -(-images // self.together) * way.total / 3600


def request_of(
    model: str,
    topology: str,
    *,
    pixels: str | None = None,
    policy: str = "dense",
    memory: MemoryOptions = ON_DEVICE,
    attention: AttentionKind = "kernel",
) -> Request:
    """A request by names.

    Raises:
      UserInputError: an unknown name.
    """
    chips = parse_topology(topology)
    name = SHORT_NAMES.get(model.lower(), model)
    if name not in PRESETS:
        raise UserInputError(f"model {model!r}", f"must be one of {', '.join((*SHORT_NAMES, *PRESETS))}", "choose one")
    card = PRESETS[name].with_precision("fast")
    chosen = policy_named(check_setting("policy", policy), lambda found: POLICIES[found]())
    schedule = card.schedule("1:1", None if pixels is None else check_setting("pixels", pixels))
    plan = make_plan(schedule, Sampling(guidance=2.0), chosen, num_layers=card.transformer.num_layers)
    return Request(card, plan, chips, pixels or card.default_pixels, memory, attention)


def plan_pod(
    request: Request, *, mesh: str = AUTO, batch: int | None = None, utilisation: float = UTILISATION
) -> PodPlan:
    """Choose what is not given, and estimate.

    Args:
      request: what is to be made on what.
      mesh: text for :func:`toprovar_jax.distributed.mesh.parse_mesh`, or ``"auto"`` for the most copies of the model.
      batch: pictures of each copy at once; default: the most of :data:`BATCHES` that fit.
      utilisation: share of the chips' peak that products reach, above 0 and at most 1.

    Raises:
      UserInputError: no such mesh, or it does not fit; the message says what would.
    """
    if not 0.0 < utilisation <= 1.0:
        raise UserInputError(f"utilisation {utilisation:g}", "must be above 0 and at most 1", "leave it out for 0.4")
    transformer = request.card.transformer
    if mesh == AUTO:
        spec = next(filter(lambda spec: request.fits(spec, batch or 1), _meshes(request)), None)
        if spec is None:
            raise _too_small(request, _meshes(request)[-1], batch or 1)
    else:
        spec = parse_mesh(mesh, request.topology.count)
        check_mesh(spec, transformer)
        if not request.fits(spec, batch or 1):
            raise _too_small(request, spec, batch or 1)
    check_heads(request.plan, spec.tensor)
    batch = batch or next(size for size in BATCHES if request.fits(spec, size))
    found = request.programs(spec, batch)
    return PodPlan(request, spec, batch, found, utilisation, tuple(_ways(request, spec, batch, utilisation)))


def slowest_way(plan: GenerationPlan, card: ModelCard) -> GenerationPlan:
    """Of a plan and its alternatives the one with the most operations, on its own."""
    return _alone(max((plan, *plan.alternatives), key=_flops(card)))


def _ways(request: Request, spec: MeshSpec, batch: int, utilisation: float) -> Iterator[Way]:
    quickest = _alone(min((request.plan, *request.plan.alternatives), key=_flops(request.card)))
    for plan in dict.fromkeys((slowest_way(request.plan, request.card), quickest)):
        costs = program_costs(request.card, plan, request.memory, spec, batch)
        seconds = tuple(cost.seconds(request.topology.chip, spec, utilisation) for cost in costs)
        yield Way(plan, costs, seconds)


def _flops(card: ModelCard) -> Callable[[GenerationPlan], float]:
    return lambda plan: sum(plan_flops(plan, card.transformer))


def _alone(plan: GenerationPlan) -> GenerationPlan:
    return dataclasses.replace(plan, alternatives=(), decisions=())


def _meshes(request: Request) -> list[MeshSpec]:
    """Meshes of all chips with whole copies of the model, the most copies first."""
    config, count = request.card.transformer, request.topology.count
    sizes = [
        size
        for size in range(1, count + 1)
        if count % size == 0 and config.num_heads % size == 0 and config.feed_forward_width % size == 0
    ]
    return [MeshSpec(count // size, 1, size) for size in sizes]


def _too_small(request: Request, spec: MeshSpec, batch: int) -> UserInputError:
    """The error, with what would fit."""
    chip = request.topology.chip
    found = request.programs(spec, batch)
    worst = max(found, key=lambda name: found[name])
    remedy = next(_what_fits(request, spec, batch), "take larger chips or a smaller model")
    share = f"{MEMORY_SHARE * chip.memory / 1e9:.1f} of {chip.memory / 1e9:.1f}"
    return UserInputError(
        f"{request.card.name} at {request.pixels} on {request.topology.name}, mesh {spec}, {batch} to a copy",
        f"takes {found[worst] / 1e9:.1f} GB of each chip at the {worst}, of which {share} may be planned for",
        remedy,
    )


def _what_fits(request: Request, spec: MeshSpec, batch: int) -> Iterator[str]:
    """Ways out, the least painful first."""
    for other in _meshes(request):
        if request.fits(other, batch):
            yield f"--mesh {other} fits"
    for size in BATCHES:
        if size < batch and request.fits(spec, size):
            yield f"--batch-size {size} fits"
    spared = dataclasses.replace(request, memory=dataclasses.replace(request.memory, text_encoder="on_demand"))
    if spared.fits(spec, batch):
        yield "--text-encoder-on on-demand fits"
    for topology in _slices(request.topology.chip):
        other = dataclasses.replace(request, topology=topology)
        found = next((mesh for mesh in _meshes(other) if other.fits(mesh, batch)), None)
        if found is not None:
            yield f"{topology.name} with mesh {found} fits"


def _slices(chip: Chip) -> Iterator[Topology]:
    """All slices, of this chip first."""
    for each in (chip, *(other for other in CHIPS.values() if other is not chip and other.is_tpu == chip.is_tpu)):
        shapes: dict[int, str | None] = {**SHAPES.get(each.name, dict.fromkeys((1, 2, 4, 8)))}
        for count, shape in shapes.items():
            yield Topology(each, count, shape)
