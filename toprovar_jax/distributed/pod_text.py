"""A pod's plan for people and for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from toprovar_jax.distributed.collectives import count
from toprovar_jax.distributed.pod_costs import block_exchanges
from toprovar_jax.distributed.pod_plan import PodPlan, Way
from toprovar_jax.distributed.pod_programs import ProgramFacts

Compiled = Mapping[str, ProgramFacts]
"""What was compiled ahead of time, by program."""


def plan_dict(plan: PodPlan, images: int, compiled: Compiled) -> dict[str, Any]:
    """JSON-ready. Sizes are bytes and times seconds; those of programs are of one chip and one batch."""
    request, chip = plan.request, plan.request.topology.chip
    return {
        "model": request.card.name,
        "pixels": request.pixels,
        "policy": request.plan.policy,
        "attention": request.attention,
        "memory_options": dataclasses.asdict(request.memory),
        "topology": {"name": request.topology.name, "chips": request.topology.count, "shape": request.topology.shape},
        "chip": dataclasses.asdict(chip),
        "mesh": dataclasses.asdict(plan.spec),
        "batch_per_copy": plan.batch,
        "batch": plan.together,
        "estimate": True,
        "utilisation": plan.utilisation,
        "memory": {name: _memory(name, size, compiled) for name, size in plan.memory.items()},
        "ways": [_way_dict(plan, way, images) for way in plan.ways],
        "images": images,
    }


def _memory(name: str, predicted: int, compiled: Compiled) -> dict[str, Any]:
    if name not in compiled:
        return {"predicted": predicted}
    counts = count(compiled[name].collectives)
    exchanged = {"in_loops": list(counts.loops), "outside": counts.outside}
    return {"predicted": predicted, "compiled": compiled[name].peak, "collectives": exchanged}


def _way_dict(plan: PodPlan, way: Way, images: int) -> dict[str, Any]:
    programs = {
        cost.name: {
            "flops": cost.flops,
            "traffic": cost.traffic,
            "sent": sum(cost.sent.values()),
            **dataclasses.asdict(seconds),
            "total": seconds.total,
        }
        for cost, seconds in zip(way.costs, way.seconds, strict=True)
    }
    return {
        "pruned_from": way.plan.depth,
        "programs": programs,
        "seconds_per_batch": way.total,
        "images_per_second": plan.rate(way),
        "hours": plan.hours(way, images),
    }


def plan_text(plan: PodPlan, images: int, compiled: Compiled, why_predicted: str | None) -> str:
    """The same as a page of text; ``why_predicted`` says why nothing was compiled."""
    request, spec, chip = plan.request, plan.spec, plan.request.topology.chip
    copies = spec.data * spec.fsdp
    lines = [
        f"{request.card.name}, {request.pixels}, {request.plan.policy} on {request.topology}",
        f"mesh {spec}: {copies} {'copy' if copies == 1 else 'copies'} of the model, {spec.tensor} "
        f"{'chip' if spec.tensor == 1 else 'chips'} to each; {plan.batch} to a copy, {plan.together} pictures at once",
        "",
        *_table(plan, plan.ways[0], compiled),
        "",
        _source(plan, compiled, why_predicted),
        *_exchanges(plan, compiled),
        "",
    ]
    for way in plan.ways:
        lines.append(
            f"{_name(plan, way)}{way.total:.2f} s for {plan.together} pictures, {plan.rate(way):.2f} pictures per "
            f"second of all {request.topology.count} chips, {plan.hours(way, images):.1f} hours for {images:,}"
        )
    decides = " The policy decides picture by picture, between the two." if len(plan.ways) > 1 else ""
    lines += [
        "",
        f"This is an estimate; nothing was measured.{decides} Operations and bytes are counted from the model and the "
        f"plan; products are taken to run at {plan.utilisation:.0%} of {chip.flops / 1e12:.0f} TFLOP/s, memory at "
        f"{chip.bandwidth / 1e9:.0f} GB/s and links at {chip.link / 1e9:.0f} GB/s, as documented for {chip.name}. "
        f"Exchanges are taken not to overlap with anything. Attention is the "
        f"{'kernel' if request.attention == 'kernel' else request.attention}'s. Left out: compiling, loading, the "
        f"hosts' work{_left_out(plan)}.",
    ]
    return "\n".join(lines)


def _left_out(plan: PodPlan) -> str:
    moved = plan.request.memory.stream_blocks or plan.request.memory.text_encoder != "device"
    return ", and what comes from their memory or is computed there" if moved else ""


def _table(plan: PodPlan, way: Way, compiled: Compiled) -> list[str]:
    names = [cost.name for cost in way.costs]
    width = max(map(len, plan.memory))
    heads = ("memory GB", "TFLOP", "moves GB", "sends GB", "computes s", "memory s", "sends s", "seconds")
    lines = [f"{'each chip, one batch':<{width}}" + "".join(f"{head:>12}" for head in heads)]
    for name, predicted in plan.memory.items():
        held = f"{compiled[name].peak / 1e9:.2f}*" if name in compiled else f"{predicted / 1e9:.2f} "
        numbers = ""
        if name in names:
            cost, seconds = way.costs[names.index(name)], way.seconds[names.index(name)]
            sizes = (cost.flops / 1e12, cost.traffic / 1e9, sum(cost.sent.values()) / 1e9)
            times = (seconds.computing, seconds.memory, seconds.exchanging, seconds.total)
            numbers = "".join(f"{value:>12.2f}" for value in sizes) + "".join(f"{value:>12.4f}" for value in times)
        lines.append(f"{name:<{width}}{held:>12}{numbers}".rstrip())
    return lines


def _source(plan: PodPlan, compiled: Compiled, why_predicted: str | None) -> str:
    limit = f"A chip has {plan.request.topology.chip.memory / 1e9:.2f} GB for programs."
    if compiled:
        kind = plan.request.topology.compiled_for
        return f"* compiled ahead of time for {kind}, with what else lies on the chip; the rest is predicted. {limit}"
    return f"Memory is predicted by this package's model{f', as {why_predicted}' if why_predicted else ''}. {limit}"


def _exchanges(plan: PodPlan, compiled: Compiled) -> list[str]:
    """What the chips of a copy send each other, per block and per picture."""
    way, spec = plan.ways[0], plan.spec
    seen = {
        tuple(sorted(loop.items()))
        for name, facts in compiled.items()
        if name.startswith("scale")
        for loop in count(facts.collectives).loops
    }
    found = "; ".join(", ".join(f"{number} {kind}" for kind, number in loop) for loop in sorted(seen)) or "none"
    told = f" Compiled, a block's turn of the loop has: {found}." if compiled else ""
    if spec.model_size == 1:
        return [f"Collectives: none at any scale; every chip makes its own pictures.{told}"]
    sent = sum(sum(cost.sent.values()) for cost in way.costs) / plan.batch
    spent = sum(each.exchanging for each in way.seconds) / plan.batch
    step = way.plan.step(way.plan.num_run - 1)
    block = block_exchanges(plan.request.card, step, spec.tensor, plan.batch) / way.plan.num_layers
    kinds = []
    if spec.tensor > 1:
        kinds.append(
            f"2 reduce-scatter and 2 all-gather per block, for which each chip sends {block / 1e6:.0f} MB at the last "
            "scale"
        )
    if spec.fsdp > 1:
        kinds.append("an all-gather per matrix")
    return [
        f"Collectives: {', '.join(kinds)}; {sent / 1e9:.2f} GB and {spent:.3f} s of each chip for a picture.{told}",
    ]


def _name(plan: PodPlan, way: Way) -> str:
    if len(plan.ways) == 1:
        return ""
    return f"pruned from scale {way.plan.depth}: " if way.plan.depth else "nothing pruned: "
