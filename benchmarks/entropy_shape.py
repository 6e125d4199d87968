"""Whether attention entropy behaves in a model as the ToProVAR paper says it does in Infinity.

    python benchmarks/entropy_shape.py [--model NAME] [--images 40] [--prompts FILE ...] [--out DIR]

Dense pictures are made and observed. For every statement of the paper (section 3, figure 3, appendix A.5) that can be
measured on any model, the curve is drawn and a verdict is printed: the same shape, or not, with the numbers behind it.
Each file of prompts is one group, for the statement that groups do not differ; a single file is cut into halves.
Writes ``entropy_shape_<model>.json`` and ``.png``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import pathlib
import platform
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import toprovar_jax
from toprovar_jax import InfinityPipeline
from toprovar_jax.prompts import read_prompts
from toprovar_jax.similarity import ssim

HERE = pathlib.Path(__file__).parent

TAU = 0.4
"""The paper's threshold of rho for all backbones."""

STABLE_SSIM = 0.8
"""From this similarity to the finished picture on, the paper calls a scale stable."""

REPRESENTATIVE_SCALE = 6


class Observed(NamedTuple):
    """Dense pictures; S scales, L layers.

    Attributes:
      rho: share of tokens below the mean entropy, ``[B, S]``.
      similarity: SSIM of the decoded sum after each scale to the finished picture, ``[B, S]``.
      entropy: mean over tokens, as a share of the entropy of attention that looks everywhere alike, ``[B, S, L]``.
      varrho: ratio of the first two singular values of each layer's map, ``[B, S, L]``.
      group: of prompts, ``[B]``.
    """

    rho: np.ndarray
    similarity: np.ndarray
    entropy: np.ndarray
    varrho: np.ndarray
    group: np.ndarray


def observe(pipeline: InfinityPipeline, prompts: Sequence[str], groups: Sequence[int]) -> Observed:
    """Makes one picture per prompt, its number being its seed."""
    decode = jax.jit(lambda tokenizer, latents: tokenizer.decode(latents))
    tokenizer = pipeline.networks.image_tokenizer
    rows = []
    for seed, prompt in enumerate(prompts):
        sums: list[Any] = []
        made = pipeline(
            prompt,
            seed=seed,
            policy="dense",
            observe=True,
            output_type="np",
            callback_on_scale_end=lambda index, count, info, sums=sums: sums.append(info["latents"]),
        )
        image = np.asarray(made.images)
        visible = np.cumsum([scale.tokens for scale in made.plan.scales])
        scales = made.statistics
        rows.append(
            (
                [float(scale.salient_share[0]) for scale in scales],
                [*(float(ssim(np.asarray(decode(tokenizer, total)), image)[0]) for total in sums[:-1]), 1.0],
                [
                    np.asarray(scale.entropy[0], np.float64).mean(axis=1) / max(math.log(keys), 1e-9)
                    for scale, keys in zip(scales, visible, strict=True)
                ],
                [np.asarray(scale.spectrum_ratio[0], np.float64) for scale in scales],
            )
        )
    columns = (np.asarray(column) for column in zip(*rows, strict=True))
    return Observed(*columns, np.asarray(groups))


class Verdict(NamedTuple):
    """One statement of the paper, whether it holds here, and the numbers."""

    statement: str
    holds: bool
    numbers: str


def verdicts(seen: Observed) -> list[Verdict]:
    """All statements that can be measured without pruning."""
    return [
        _rho_falls(seen),
        _rho_crosses(seen),
        _stable_near_threshold(seen),
        _groups_alike(seen),
        _types_by_depth(seen),
        _types_stable(seen),
    ]


def _rho_falls(seen: Observed) -> Verdict:
    rho = seen.rho.mean(axis=0)
    late = rho[len(rho) // 2 :]
    return Verdict(
        "rho does not rise over the later scales",
        bool((np.diff(late) <= 0.01).all()),
        "rho by scale: " + " ".join(f"{value:.2f}" for value in rho),
    )


def _rho_crosses(seen: Observed) -> Verdict:
    rho = seen.rho[:, 2:]
    share = float((rho.min(axis=1) <= TAU).mean()) if rho.size else 0.0
    return Verdict(
        f"rho falls to {TAU} at some scale after the second, of nearly every picture",
        bool(share > 0.9),
        f"{share:.0%} of the pictures",
    )


def _stable_near_threshold(seen: Observed) -> Verdict:
    stable = (seen.similarity >= STABLE_SSIM).argmax(axis=1)
    rho = seen.rho[np.arange(len(stable)), stable]
    return Verdict(
        f"rho is near {TAU} where pictures become stable (SSIM {STABLE_SSIM})",
        bool(abs(np.median(rho) - TAU) < 0.05),
        f"median {np.median(rho):.2f}, 5 to 95 %: {np.quantile(rho, 0.05):.2f} to {np.quantile(rho, 0.95):.2f}, "
        f"at scale {np.median(stable) + 1:.0f}",
    )


def _groups_alike(seen: Observed) -> Verdict:
    means = np.stack([seen.entropy[seen.group == g].mean(axis=(0, 2)) for g in np.unique(seen.group)])
    # The first scale sees one key: its entropy is 0 in every group.
    spread = float((np.ptp(means, axis=0)[1:] / means.mean(axis=0)[1:]).max())
    return Verdict(
        "the mean entropy of each scale is nearly the same for different sets of prompts",
        bool(spread < 0.05),
        f"{len(means)} sets, largest relative difference {spread:.1%}",
    )


def _types_by_depth(seen: Observed) -> Verdict:
    varrho = np.median(seen.varrho[:, _representative(seen)], axis=0)
    third = max(1, len(varrho) // 3)
    ends = np.concatenate([varrho[:third], varrho[-third:]])
    middle = varrho[third:-third] if len(varrho) > 2 * third else varrho[third:]
    return Verdict(
        "early and final layers are Global (one dominant pattern, large varrho), middle ones Detail",
        bool(min(ends.mean(), varrho[0], varrho[-1]) > middle.mean()) if middle.size else False,
        "median varrho by layer: " + " ".join(f"{value:.2f}" for value in varrho),
    )


def _types_stable(seen: Observed) -> Verdict:
    at = _representative(seen)
    own = seen.varrho[:, at] > np.median(seen.varrho[:, at], axis=1, keepdims=True)
    agreement = np.maximum(own.mean(axis=0), 1.0 - own.mean(axis=0))
    order = [_ranks(np.median(seen.varrho[:, scale], axis=0)) for scale in range(2, seen.varrho.shape[1])]
    across = [float(np.corrcoef(order[a], order[a + 1])[0, 1]) for a in range(len(order) - 1)]
    numbers = f"a layer has its usual type in {agreement.mean():.0%} of the pictures"
    if across:
        numbers += f"; rank correlation of varrho between neighbouring scales {min(across):.2f} to {max(across):.2f}"
    steady = bool(agreement.mean() > 0.9 and across and min(across) > 0.5)
    return Verdict("a layer's type is stable over prompts and scales", steady, numbers)


def _representative(seen: Observed) -> int:
    return min(REPRESENTATIVE_SCALE, seen.rho.shape[1]) - 1


def _ranks(values: np.ndarray) -> np.ndarray:
    return values.argsort().argsort().astype(np.float64)


def draw(seen: Observed, title: str, path: pathlib.Path) -> None:
    """Four panels: rho and SSIM over scales, entropy over layers and scales, varrho over layers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scales, layers = np.arange(1, seen.rho.shape[1] + 1), np.arange(seen.varrho.shape[2])
    figure, grid = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    figure.suptitle(title)
    curves = {"rho": seen.rho, "SSIM to the finished picture": seen.similarity}
    for axes, (name, values) in zip(grid[0], curves.items(), strict=True):
        low, high = np.quantile(values, (0.05, 0.95), axis=0)
        axes.fill_between(scales, low, high, alpha=0.25, label="5 to 95 % of the pictures")
        axes.plot(scales, values.mean(axis=0), "o-", label="mean")
        axes.set(xlabel="scale", title=name, xticks=scales, ylim=(0, 1.02))
    grid[0, 0].axhline(TAU, color="tab:red", linestyle="--", label=f"the paper's tau {TAU}")
    grid[0, 1].axhline(STABLE_SSIM, color="tab:red", linestyle="--", label="stable, in the paper")
    for axes in grid[0]:
        axes.legend(fontsize=8)
    image = grid[1, 0].imshow(seen.entropy.mean(axis=0).T, aspect="auto", origin="lower", vmin=0, vmax=1)
    grid[1, 0].set(xlabel="scale", ylabel="layer", title="mean entropy / log of visible tokens", yticks=layers)
    grid[1, 0].set_xticks(scales - 1, scales)
    figure.colorbar(image, ax=grid[1, 0])
    at = _representative(seen)
    grid[1, 1].boxplot(seen.varrho[:, at], positions=layers, widths=0.6, showfliers=False)
    grid[1, 1].set(xlabel="layer", title=f"varrho at scale {at + 1} (large: Global; small: Detail)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes-medium")
    parser.add_argument("--images", type=int, default=40, help="pictures per file of prompts")
    parser.add_argument("--prompts", type=pathlib.Path, nargs="+", default=[HERE / "prompts/scenes_200.txt"])
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    options = parser.parse_args()
    pipeline = InfinityPipeline.from_pretrained(options.model)
    prompts, groups = [], []
    for group, path in enumerate(options.prompts):
        chosen = [request.prompt for request in read_prompts(path)][: options.images]
        prompts += chosen
        halves = [index >= len(chosen) // 2 for index in range(len(chosen))]
        groups += [int(half) for half in halves] if len(options.prompts) == 1 else [group] * len(chosen)
    seen = observe(pipeline, prompts, groups)
    found = verdicts(seen)
    name = pipeline.model_name
    for verdict in found:
        print(f"{'same shape' if verdict.holds else 'NOT the same'}: {verdict.statement} ({verdict.numbers})")
    options.out.mkdir(parents=True, exist_ok=True)
    record = {
        "model": name,
        "images": len(prompts),
        "prompts": [path.name for path in options.prompts],
        "date": datetime.date.today().isoformat(),
        "device": f"{jax.devices()[0].device_kind} x{jax.device_count()}",
        "machine": platform.machine(),
        "versions": {"jax": jax.__version__, "toprovar_jax": toprovar_jax.__version__},
        "verdicts": [verdict._asdict() for verdict in found],
        "rho": np.round(seen.rho.mean(axis=0), 4).tolist(),
        "similarity": np.round(seen.similarity.mean(axis=0), 4).tolist(),
        "entropy": np.round(seen.entropy.mean(axis=0), 4).tolist(),
        "varrho": np.round(np.median(seen.varrho, axis=0), 4).tolist(),
    }
    (options.out / f"entropy_shape_{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(seen, f"Attention entropy of {name}, {len(prompts)} pictures", options.out / f"entropy_shape_{name}.png")


if __name__ == "__main__":
    main()
