"""A dry run of the batch command: every row read and judged, and what would be made of them."""

from __future__ import annotations

import collections
import json
from typing import Any

SHOWN_FAILURES = 10
"""After these, rows that cannot be drawn are counted."""


def show(work: Any, *, as_json: bool) -> None:
    """Prints rows, pictures, failures, and per program its batches, padding and plan.

    Args:
      work: a :class:`toprovar_jax.distributed.batch.work.Work`.
      as_json: one JSON object in place of lines.
    """
    pictures: collections.Counter[Any] = collections.Counter()
    batches: collections.Counter[Any] = collections.Counter()
    thrown: collections.Counter[Any] = collections.Counter()
    first: dict[Any, Any] = {}
    failed, reasons = 0, []
    for number in range(work.chunks):
        chunk = work.of(number)
        failed += len(chunk.broken)
        reasons += [row.reason for row in chunk.broken[: SHOWN_FAILURES - len(reasons)]]
        for batch in chunk.batches:
            key = batch.key
            first.setdefault(key, batch)
            pictures[key] += len(batch.pictures)
            batches[key] += 1
            thrown[key] += batch.size - len(batch.pictures)
    work.rows.close()
    programs = [
        {
            "pictures": pictures[key],
            "batches": batches[key],
            "batch_size": batch.size,
            "padding": thrown[key],
            "height": batch.pictures[0].size[0],
            "width": batch.pictures[0].size[1],
            "text_length": batch.text_length,
            "negative_prompt": batch.pictures[0].negative_prompt is not None,
            "plan": batch.request.plan.as_dict() if as_json else str(batch.request.plan),
        }
        for key, batch in first.items()
    ]
    total, padding = pictures.total(), thrown.total()
    told = {"rows": work.rows.count, "chunks": work.chunks, "images": total, "failures": failed, "padding": padding}
    if as_json:
        print(json.dumps({**told, "reasons": reasons, "programs": programs}), flush=True)
        return
    print(f"{work.rows.count} prompts in {work.chunks} chunks: {total} pictures, {failed} rows that cannot be drawn")
    print("".join(f"  {reason}\n" for reason in reasons), end="")
    if failed > len(reasons):
        print(f"  and {failed - len(reasons)} more")
    share = f", {100 * padding / (total + padding):.0f} % of what is computed is padding" if padding else ""
    print(f"{len(programs)} kinds of batches, each compiled once{share}")
    for program in programs:
        print(
            f"{program['pictures']} pictures in {program['batches']} batches of {program['batch_size']}, "
            f"{program['height']} x {program['width']} pixels (height x width), texts of up to "
            f"{program['text_length']} tokens{', negative prompts' if program['negative_prompt'] else ''}\n"
            f"{program['plan']}",
            flush=True,
        )
