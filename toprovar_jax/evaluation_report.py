"""What an evaluation found: a table, everything as JSON, and a contact sheet with the wrong pictures framed."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from toprovar_jax.comparison import markdown_table, where_and_when
from toprovar_jax.evaluation import Evaluation
from toprovar_jax.lettering import LINE, sized, wrapped, write
from toprovar_jax.scenes.quality import JUDGE_FID

_GAP, _LABEL_WIDTH, _FRAME = 8, 150, 4
_WRONG = (214, 30, 30)


def as_dict(evaluation: Evaluation) -> dict[str, Any]:
    """Everything that was found, ready for JSON. ``psnr`` is of the pictures that differ, null if none does."""
    setup, pipeline = evaluation.setup, evaluation.setup.pipeline
    return {
        "model": pipeline.model_name,
        "world": pipeline.card.world,
        "precision": pipeline.card.transformer.precision,
        "weights": setup.weights,
        "size": list(evaluation.size),
        "policy": {"name": setup.policy, "fields": repr(evaluation.policy)},
        "guidance": setup.options.get("guidance_scale", pipeline.default_guidance),
        "options": dict(setup.options),
        "prompts": len(setup.prompts),
        "images_per_prompt": setup.images,
        "seed": setup.seed,
        **where_and_when(),
        "scores": {name: _scores(evaluation, name) for name in evaluation.names},
        "comparison": _comparison(evaluation),
        "judge_fid": {"what": JUDGE_FID, "pictures": len(evaluation.prompts), **evaluation.distances()},
        "seconds_per_image": {name: evaluation.seconds(name) for name in evaluation.policies},
        "left_out": evaluation.left_out,
        "warnings": list(evaluation.warnings),
        "pictures": [_picture(evaluation, index) for index in range(len(evaluation.prompts))],
    }


def table(evaluation: Evaluation) -> str:
    """Scores by task as an aligned Markdown table, and below it everything else in a line each."""
    setup, names = evaluation.setup, evaluation.names
    scores = {name: evaluation.score(name) for name in names}
    lines = [["task", "prompts", "images", *names]]
    for place, task in enumerate(scores[setup.policy].tasks):
        shares = [percent(scores[name].tasks[place].share) for name in names]
        lines.append([task.task, str(task.prompts), str(task.images), *shares])
    totals = [percent(scores[name].total) for name in names]
    lines.append(["mean of the tasks", str(len(setup.prompts)), str(len(evaluation.prompts)), *totals])
    return "\n".join([markdown_table(lines), "", *_notes(evaluation)])


def sheet(evaluation: Evaluation) -> bytes:
    """A row per task as a PNG, its first prompts below their pictures; what the judge found wrong is framed in red."""
    setup = evaluation.setup
    tasks = list(dict.fromkeys(prompt.task for prompt in setup.prompts))
    rows = [[index for index in evaluation.shown if evaluation.prompts[index].task == task] for task in tasks]
    pictures = {index: sized(image) for index, image in evaluation.shown.items()}
    width, height = next(iter(pictures.values())).size
    words = {index: wrapped(evaluation.prompts[index].prompt, width, 4) for index in pictures}
    heights = [height + LINE * max(len(words[index]) for index in row) + 2 * _GAP for row in rows]
    columns = max(map(len, rows))
    page = Image.new("RGB", (_LABEL_WIDTH + columns * (width + 2 * _GAP), sum(heights) + _GAP), "white")
    draw = ImageDraw.Draw(page)
    right = evaluation.judged[setup.policy].right
    for number, (row, task) in enumerate(zip(rows, evaluation.score(setup.policy).tasks, strict=True)):
        y = _GAP + sum(heights[:number])
        name, *more = wrapped(task.task, _LABEL_WIDTH - 2 * _GAP, 2)
        value, low, high = (100 * number for number in task.share)
        write(draw, (_GAP, y), [*more, f"right {value:.0f} %", f"[{low:.0f}, {high:.0f}]"], first=name)
        for column, index in enumerate(row):
            x = _LABEL_WIDTH + column * (width + 2 * _GAP)
            if not right[index]:
                box = (x - _FRAME, y - _FRAME, x + width + _FRAME - 1, y + height + _FRAME - 1)
                draw.rectangle(box, outline=_WRONG, width=_FRAME)
            page.paste(pictures[index], (x, y))
            write(draw, (x, y + height + _FRAME), words[index])
    encoded = io.BytesIO()
    page.save(encoded, format="PNG")
    return encoded.getvalue()


def percent(interval: Sequence[float]) -> str:
    """A share and its interval, in percent."""
    value, low, high = (100.0 * number for number in interval)
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


def _notes(evaluation: Evaluation) -> list[str]:
    policy, against = evaluation.setup.policy, evaluation.against
    notes = ["shares of right pictures, by the judge; in brackets 95 % intervals, by bootstrap over prompts"]
    shares = {name: evaluation.held_out_share(name) for name in evaluation.names}
    told = [f"{name} {percent(share)}" for name, share in shares.items() if share is not None]
    if told:
        notes.append(f"of what training never showed, pooled over tasks: {', '.join(told)}")
    seconds = evaluation.seconds(policy)
    notes.append(f"{policy}: {1e3 * seconds:.1f} ms per picture, {1 / seconds:.3g} pictures/s")
    if against is not None:
        decibels = "equal" if evaluation.mean_psnr is None else f"PSNR {evaluation.mean_psnr:.1f} dB"
        likeness = f", SSIM {np.mean(evaluation.ssim):.3f}" if evaluation.ssim else ""
        speedup = evaluation.seconds(against) / seconds
        notes.append(f"{policy} to {against}: speed-up {speedup:.2f}x, {decibels}{likeness}")
    distances = evaluation.distances()
    notes += [f"judge-FID, {pair}: {value:.3g}" for pair, value in distances.items()]
    notes += [f"({JUDGE_FID})"] if distances else []
    return [*notes, *(f"{what}: left out; {reason}" for what, reason in evaluation.left_out.items())]


def _comparison(evaluation: Evaluation) -> dict[str, Any] | None:
    against = evaluation.against
    if against is None:
        return None
    return {
        "against": against,
        "psnr": evaluation.mean_psnr,
        "ssim": float(np.mean(evaluation.ssim)) if evaluation.ssim else None,
        "identical": sum(map(math.isinf, evaluation.psnr)),
        "speedup": evaluation.seconds(against) / evaluation.seconds(evaluation.setup.policy),
    }


def _scores(evaluation: Evaluation, name: str) -> dict[str, Any]:
    found = evaluation.score(name)
    tasks = {
        task.task: {**task.share._asdict(), "prompts": task.prompts, "images": task.images} for task in found.tasks
    }
    held_out = evaluation.held_out_share(name)
    return {
        "tasks": tasks,
        "total": found.total._asdict(),
        "held_out_pooled_over_tasks": None if held_out is None else held_out._asdict(),
    }


def _picture(evaluation: Evaluation, index: int) -> dict[str, Any]:
    prompt = evaluation.prompts[index]
    return {
        "task": prompt.task,
        "prompt": prompt.prompt,
        "held_out": prompt.held_out,
        "seed": evaluation.seeds[index],
        "right": {name: judged.right[index] for name, judged in evaluation.judged.items()},
        "seen": [f"{it.colour} {it.shape}" for it in evaluation.judged[evaluation.setup.policy].seen[index]],
    }
