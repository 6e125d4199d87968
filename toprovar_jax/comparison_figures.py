"""One picture of a comparison: a row per policy, dense first, and a column per prompt. Drawn by Pillow alone."""

from __future__ import annotations

import io

from PIL import Image, ImageDraw

from toprovar_jax.comparison import SHOWN, Comparison, Result
from toprovar_jax.lettering import LINE, NAME_SIZE, sized, wrapped, write

_GAP, _LABEL_WIDTH = 6, 212


def sheet(comparison: Comparison) -> bytes:
    """The finished policies as a PNG: each row is labelled with what the policy saved and what that did.

    Small pictures are enlarged by whole factors, so that their pixels stay what they are; very large ones are reduced.
    """
    results, setup = comparison.results, comparison.setup
    pictures = [[sized(image) for image in result.images] for result in results]
    columns, (width, height) = len(pictures[0]), pictures[0][0].size
    heads = [
        [*wrapped(prompt, width, 3), f"seed {seed}"]
        for prompt, seed in zip(setup.prompts[:columns], setup.seeds, strict=False)
    ]
    top = _GAP + LINE * max(map(len, heads))
    labels = [_label(comparison, result) for result in results]
    heights = [max(height, LINE * len(lines) + 2) + _GAP for lines in labels]
    total = (_LABEL_WIDTH + columns * (width + _GAP), top + sum(heights))
    page = Image.new("RGB", total, "white")
    draw = ImageDraw.Draw(page)
    write(draw, (_GAP, 0), _corner(len(setup.prompts)))
    for column, lines in enumerate(heads):
        write(draw, (_LABEL_WIDTH + column * (width + _GAP), 0), lines)
    for row, (images, lines) in enumerate(zip(pictures, labels, strict=True)):
        y = top + sum(heights[:row])
        write(draw, (_GAP, y), lines[1:], first=lines[0])
        for column, image in enumerate(images):
            page.paste(image, (_LABEL_WIDTH + column * (width + _GAP), y))
    encoded = io.BytesIO()
    page.save(encoded, format="PNG")
    return encoded.getvalue()


def _label(comparison: Comparison, result: Result) -> list[str]:
    """The name, then what the policy saved, then how far its pictures lie from the dense ones."""
    name, *more = wrapped(result.name, _LABEL_WIDTH - 2 * _GAP, 3, NAME_SIZE)
    share = 100 * result.flops.mean() / comparison.results[0].flops.mean()
    lines = [name, *more]
    if result.times is not None:
        lines.append(f"{1e3 * result.times.seconds.all:.3g} ms, speed-up {result.times.speedup:.2f}x")
    lines.append(f"{share:.0f} % of dense FLOPs")
    if result.identical == len(result.psnr):
        likeness = "equal to dense"
    elif result.ssim is not None:
        likeness = f"SSIM to dense {result.ssim.mean():.3f}"
    else:
        likeness = f"PSNR to dense {result.mean_psnr:.1f} dB"
    lines.append(likeness)
    if result.right is not None:
        lines.append(f"judged right {100 * result.right.mean():.0f} %")
    return lines


def _corner(count: int) -> list[str]:
    return [] if count <= SHOWN else [f"numbers are of {count} pictures,", f"of which the first {SHOWN} are shown"]
