"""The parts that explanations are drawn from, each into its own axes; :mod:`toprovar_jax.figures` makes pages of them.

One code of colours throughout: what is warm and bright was looked at closely or computed, what is dark was spared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from toprovar_jax.explanation import Explanation, Making
from toprovar_jax.schedule import Grid
from toprovar_jax.shapes import Bool, Float

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DENSE, PRUNED, SIGNAL, LIMIT = "#8a8f98", "#d1495b", "#2e6f95", "#c98a00"
SPARED = (0.13, 0.17, 0.27)
"""Colour of what was not computed, RGB."""

FOCUS = "magma_r"
"""Colours of entropies: the lowest, most focused ones are brightest."""

_FEW = 16
"""Grids up to this side get lines between tokens; heat maps up to this many cells across get numbers."""

Item = TypeVar("Item")


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def picture(axes: Axes, image: Float[np.ndarray, "h w 3"], title: str = "", below: str = "") -> None:
    """A picture, pixel by pixel."""
    axes.imshow(np.clip(image, 0.0, 1.0), interpolation="nearest")
    _bare(axes, title, below)


def entropy_map(axes: Axes, entropy: Float[np.ndarray, " T"], grid: Grid, *, label: bool = True) -> None:
    """One map; colours span its own range, the number is its mean in nats."""
    low, high = np.percentile(entropy, (2, 98))
    axes.imshow(entropy.reshape(grid), cmap=FOCUS, vmin=low, vmax=max(high, low + 1e-6), interpolation="nearest")
    _bare(axes, below=f"{entropy.mean():.2f}" if label else "")


def kept_over(
    axes: Axes, image: Float[np.ndarray, "h w 3"], share: Float[np.ndarray, " T"], grid: Grid, below: str = ""
) -> None:
    """The picture, darkened where tokens were not computed; ``share`` is how often each was, in [0, 1]."""
    height, width = image.shape[:2]
    down, across = (np.arange(size) * tokens // size for size, tokens in zip((height, width), grid, strict=True))
    weight = share.reshape(grid)[down][:, across, None]
    faded = 0.15 * image + 0.85 * np.asarray(SPARED)
    axes.imshow(weight * image + (1.0 - weight) * faded, interpolation="nearest")
    if max(grid) <= _FEW:
        lines = {"colors": "white", "linewidths": 0.4, "alpha": 0.5}
        axes.hlines(np.arange(1, grid[0]) * height / grid[0] - 0.5, -0.5, width - 0.5, **lines)
        axes.vlines(np.arange(1, grid[1]) * width / grid[1] - 0.5, -0.5, height - 0.5, **lines)
    _bare(axes, below=below)


def salient_curve(axes: Axes, made: Explanation) -> None:
    """rho over the scales, the threshold, and what is pruned from where."""
    shares = [float(scale.salient_share) for scale in made.dense.statistics]
    numbers = np.arange(1, len(shares) + 1)
    axes.plot(numbers, shares, "o-", color=SIGNAL, label="share of focused patches, ρ")
    alike = [value for value in made.settling if value is not None]
    if alike:
        axes.plot(numbers, alike, "s--", color=DENSE, ms=3, lw=1, label="likeness to the finished picture (SSIM)")
    rule, last = made.rule, len(made.dense.plan.scales)
    if rule is not None and rule.depth_rule != "fixed":
        axes.axhline(rule.tau, color=LIMIT, lw=1.2, label=f"threshold τ = {rule.tau:.2f}")
        if rule.depth_rule == "band":
            axes.axhspan(rule.tau - rule.band, rule.tau + rule.band, color=LIMIT, alpha=0.15, lw=0)
    depth = made.pruned.plan.depth
    if depth is not None:
        axes.axvspan(depth - 0.5, last + 0.5, color=PRUNED, alpha=0.12, lw=0, label=f"spared, from step D = {depth}")
    axes.set_xlim(0.5, last + 0.5)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xticks(range(1, last + 1))
    axes.set_xlabel("step, from coarse to fine")
    axes.set_ylabel("share")


def layer_ratios(axes: Axes, made: Explanation) -> None:
    """varrho per layer, downwards."""
    ratios = np.where(np.isfinite(made.spectrum_ratio), made.spectrum_ratio, np.nan)
    axes.barh(np.arange(len(ratios)), ratios - 1.0, left=1.0, color=SIGNAL, height=0.7)
    axes.set_xlim(left=1.0)
    axes.set_xlabel("one pattern rules →\n" + "ϱ = σ₁ / σ₂")
    _layer_axis(axes, len(ratios))


def layer_scores(axes: Axes, made: Explanation) -> None:
    """R per layer, downwards: what the policy went by, and what this picture alone would say."""
    places = np.arange(made.config.num_layers)
    if made.used_score is not None:
        axes.barh(places, made.used_score, color=PRUNED, alpha=0.75, height=0.7, label="used by the policy")
    axes.plot(made.measured_score, places, "o", mfc="white", mec=SIGNAL, ms=5, label="from this picture alone")
    axes.set_xlim(0.0, 1.04)
    axes.set_xlabel("may be spared →\nscore R")
    _layer_axis(axes, len(places))


def computed_table(axes: Axes, made: Explanation) -> Any:
    """Layers by scales: the share of tokens that was computed; a scale that was not run is nothing."""
    run, last = made.computed_share.T, len(made.pruned.plan.scales)
    share = np.concatenate([run, np.zeros((len(run), last - run.shape[1]))], axis=1)
    drawn = axes.imshow(share, cmap=_computed_colours(), vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
    if last <= 8 and len(share) <= _FEW:
        for (layer, scale), value in np.ndenumerate(run):
            colour = "black" if value > 0.5 else "white"
            axes.text(scale, layer, f"{value:.0%}", ha="center", va="center", fontsize=8, color=colour)
    for scale in range(run.shape[1], last):
        middle = (len(share) - 1) / 2
        axes.text(scale, middle, "not run", rotation=90, ha="center", va="center", fontsize=9, color="white")
    axes.set_xticks(range(last), [str(number) for number in range(1, last + 1)])
    axes.set_xlabel("step, from coarse to fine")
    _layer_axis(axes, len(share))
    return drawn


def time_bars(axes: Axes, made: Explanation) -> None:
    """Text, scales and decoder of both ways, end to end."""
    ways = (made.pruned, made.dense)
    count = max(len(way.seconds.scales) for way in ways)
    for place, way in enumerate(ways):
        start = 0.0
        for part, (name, seconds) in enumerate(_parts(way)):
            colour = _part_colour(name, part, count)
            axes.barh(place, 1e3 * seconds, left=1e3 * start, color=colour, edgecolor="white", lw=0.5)
            if seconds > 0.1 * max(other.seconds.total for other in ways):
                middle = 1e3 * (start + seconds / 2)
                dark = sum(colour[:3]) < 1.25
                axes.text(
                    middle,
                    place,
                    name,
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if dark else "black",
                    in_layout=False,
                )
            start += seconds
        axes.text(1e3 * start, place, f"  {1e3 * start:.0f} ms", va="center", fontsize=9, in_layout=False)
    axes.set_yticks(range(2), ["with the policy", "in full"])
    axes.set_xlim(0, 1.15e3 * max(way.seconds.total for way in ways))
    axes.set_xlabel("milliseconds")


def part_bars(axes: Axes, made: Explanation) -> None:
    """Seconds of each part, both ways side by side."""
    names = [name for name, _ in _parts(made.dense)]
    for offset, way, colour, label in _both(made):
        spent = dict(_parts(way))
        axes.barh(
            [place + offset for place in range(len(names))],
            [1e3 * spent.get(name, 0.0) for name in names],
            height=0.38,
            color=colour,
            label=label,
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")


def work_bars(axes: Axes, made: Explanation) -> None:
    """Transformer operations of each scale, both ways side by side."""
    unit, name = next((pair for pair in _UNITS if sum(made.dense.flops) >= pair[0]), _UNITS[-1])
    for offset, way, colour, label in _both(made):
        places = [place + offset for place in range(len(way.flops))]
        axes.barh(places, [flops / unit for flops in way.flops], height=0.38, color=colour, label=label)
    count = len(made.dense.flops)
    axes.set_yticks(range(count), [f"step {number}" for number in range(1, count + 1)])
    axes.invert_yaxis()
    axes.set_xlabel(f"{name} in the transformer")


def side_by_side(places: Sequence[Axes], made: Explanation) -> None:
    """The picture in full, by the policy, and where they differ, into three axes."""
    image, how = difference(made)
    picture(places[0], made.dense.image, "in full")
    picture(places[1], made.pruned.image, f"with policy {made.policy.name}")
    picture(places[2], image, f"where they differ, {how}")


def difference(made: Explanation) -> tuple[Float[np.ndarray, "h w 3"], str]:
    """How far pixels lie apart, made visible, and how that was done."""
    apart = np.abs(made.dense.image - made.pruned.image)
    if not apart.any():
        return apart, "which is nowhere"
    factor = next(factor for factor in (1, 2, 4, 8, 16) if factor * apart.max() > 0.5 or factor == 16)
    return np.clip(factor * apart, 0.0, 1.0), f"{factor}× amplified" if factor > 1 else "as it is"


def numbers(made: Explanation) -> list[tuple[str, str]]:
    """The outcome in words and figures."""
    unit, name = next((pair for pair in _UNITS if sum(made.dense.flops) >= pair[0]), _UNITS[-1])
    works = [math.fsum(way.flops) / unit for way in (made.dense, made.pruned)]
    times = [1e3 * way.seconds.total for way in (made.dense, made.pruned)]
    same = math.isinf(made.psnr)
    run, all_scales = made.pruned.plan.num_run, len(made.pruned.plan.scales)
    lines = [
        ("transformer work", f"{works[0]:.3g} → {works[1]:.3g} {name}, {_times(works, 'less', 'more')}"),
        ("time", f"{times[0]:.0f} → {times[1]:.0f} ms, {_times(times, 'faster', 'slower')}"),
        ("steps run", f"{run} of {all_scales}"),
        ("difference (PSNR)", "none, bit for bit" if same else f"{made.psnr:.1f} dB"),
    ]
    if made.ssim is not None:
        lines.append(("likeness (SSIM)", f"{made.ssim:.3f} of 1"))
    return lines


def _times(ways: Sequence[float], better: str, worse: str) -> str:
    ratio = ways[0] / ways[1]
    if abs(ratio - 1.0) < 0.005:
        return "the same"
    return f"{ratio:.2f}× {better}" if ratio > 1.0 else f"{1.0 / ratio:.2f}× {worse}"


_UNITS: tuple[tuple[float, str], ...] = ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP"))


def _both(made: Explanation) -> tuple[tuple[float, Making, str, str], ...]:
    return ((-0.2, made.dense, DENSE, "in full"), (0.2, made.pruned, PRUNED, f"policy {made.policy.name}"))


def _parts(way: Making) -> list[tuple[str, float]]:
    scales = [(f"step {number}", seconds) for number, seconds in enumerate(way.seconds.scales, start=1)]
    return [("text", way.seconds.text), *scales, ("decoder", way.seconds.decoder)]


def _part_colour(name: str, part: int, scales: int) -> Any:
    import matplotlib

    if not name.startswith("step"):
        return (0.75, 0.77, 0.8, 1.0)
    return matplotlib.colormaps["viridis"]((part - 1) / max(1, scales - 1) * 0.9)


def _computed_colours() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("computed", [SPARED, "#d1495b", "#ffd9a0", "#fff6e5"])


def _layer_axis(axes: Axes, count: int) -> None:
    axes.set_yticks(range(0, count, 1 if count <= _FEW else 4))
    axes.set_ylim(count - 0.5, -0.5)


def _bare(axes: Axes, title: str = "", below: str = "") -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(below, fontsize=8, labelpad=2)


def kept_share(kept: Bool[np.ndarray, "L T"]) -> Float[np.ndarray, " T"]:
    """How often each token was computed, as a share of the layers."""
    return kept.mean(axis=0, dtype=np.float64)
