"""What the devices of a compiled program exchange, read off its text (HLO after optimisation)."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_ITEM_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%([^ ]+) \(.*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%[^ ]+ = (?P<type>.*?) (?P<opcode>[a-z][a-z0-9-]*)\((?P<rest>.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=\{?([^,}\s]+(?:, %[^,}]+)*)")
_SHAPE = re.compile(r"\b(pred|[sufc][0-9]+\w*|bf16)\[([0-9,]*)\]")


class Collective(NamedTuple):
    """One operation by which devices exchange arrays.

    Attributes:
      kind: of :data:`KINDS`.
      size: bytes of the whole array: what is gathered, summed up, or sent.
      group: how many devices take part.
      loop: name of the loop's body that it is in, the innermost; None outside of loops.
    """

    kind: str
    size: int
    group: int
    loop: str | None

    @property
    def sent(self) -> float:
        """Bytes that each device sends, if they go around a ring."""
        if self.kind == "collective-permute":
            return float(self.size)
        return (2.0 if self.kind == "all-reduce" else 1.0) * self.size * (self.group - 1) / self.group


class Counts(NamedTuple):
    """How many collectives there are, by kind.

    Attributes:
      loops: in each loop's body that has any.
      outside: in no loop.
    """

    loops: tuple[dict[str, int], ...]
    outside: dict[str, int]

    @property
    def total(self) -> int:
        """All of the program's text."""
        return sum(map(sum, (found.values() for found in (*self.loops, self.outside))))


def count(found: Sequence[Collective]) -> Counts:
    """Collectives by loop and kind."""
    bodies = dict.fromkeys(each.loop for each in found)
    by_body = {body: dict(collections.Counter(each.kind for each in found if each.loop == body)) for body in bodies}
    outside = by_body.pop(None, {})
    return Counts(tuple(by_body.values()), outside)


def collectives_of(text: str) -> tuple[Collective, ...]:
    """The collectives of a compiled program, each once, however it is split into a start and an end.

    Those of a single device, which move nothing, do not count.

    Args:
      text: of the optimised program, as ``jax.stages.Compiled.as_text`` gives it.
    """
    computations = _computations(text)
    loops = _loops(computations)
    found: dict[tuple, Collective] = {}
    for name, lines in computations.items():
        for line in lines:
            read = _OPERATION.match(line)
            kind = read and _kind(read["opcode"], name)
            if read and kind:
                group, loop = _group(read["rest"], text), loops.get(name)
                # TPU's compiler writes one that goes on beside other work as several steps of a chain.
                chain = re.search(r'chain_id="([0-9]+)"', read["rest"])
                key = (loop, kind, chain[1]) if chain else (len(found),)
                if group != 1:
                    found.setdefault(key, Collective(kind, _size(kind, read, group), group, loop))
    return tuple(found.values())


def _computations(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        opened = _COMPUTATION.match(line)
        if opened:
            lines = found.setdefault(opened[1], [])
        else:
            lines.append(line)
    return found


def _loops(computations: dict[str, list[str]]) -> dict[str, str]:
    """By computation, the body of the innermost loop that it is in."""
    callers: dict[str, tuple[str, bool]] = {}
    for name, lines in computations.items():
        for line in lines:
            for attribute, called in _calls(line):
                callers[called] = (name, attribute == "body")
    found = {}
    for name in computations:
        at, is_body = name, False
        while not is_body and at in callers:
            inner, (at, is_body) = at, callers[at]
            if is_body:
                found[name] = inner
    return found


def _calls(line: str) -> Iterator[tuple[str, str]]:
    for match in _CALLED.finditer(line):
        attribute = match[0].partition("=")[0]
        for called in match[1].split(", "):
            yield attribute, called.lstrip("%")


def _kind(opcode: str, computation: str) -> str | None:
    """The kind of a collective, or of the start of one; None for others and for ends."""
    kind = opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    # TPU's compiler writes some reduce-scatters as a computation of that name with a sum and a slice of it.
    return "reduce-scatter" if computation.startswith("all-reduce-scatter") else kind


def _group(rest: str, text: str) -> int:
    """How many devices take part in one."""
    if "source_target_pairs" in rest:
        return 2
    listed = re.search(r"replica_groups=\{\{([0-9,]+)\}", rest)
    if listed:
        return listed[1].count(",") + 1
    tiled = re.search(r"replica_groups=\[[0-9]+,([0-9]+)\]", rest)
    if tiled:
        return int(tiled[1])
    named = dict(re.findall(r"(num_partitions|replica_count)=([0-9]+)", text.partition("\n")[0]))
    return math.prod(map(int, named.values()))


def _size(kind: str, operation: re.Match, group: int) -> int:
    """Bytes of the whole array."""
    total = 0.0
    for dtype, dims in _SHAPE.findall(operation["type"]):
        item = _ITEM_BYTES.get(dtype)
        if item is None:
            item = int(re.sub(r"[^0-9].*", "", dtype[1:])) / 8
        total += item * math.prod(int(size) for size in dims.split(",") if size)
    begun = operation["opcode"].endswith("-start")
    if kind in ("all-gather", "reduce-scatter") and begun:
        # The type of a start is that of the operand and the result, one of which is a part of the other.
        return round(total * group / (group + 1))
    if kind == "reduce-scatter":
        return round(total * group)
    return round(total / 2) if kind == "collective-permute" and begun else round(total)
