"""What pruning by entropy buys: score and SSIM over FLOPs, and entropy against other choices of as many tokens.

    python benchmarks/pruning_curve.py [--model DIR] [--images 200] [--seed 0] [--timed 20] [--out DIR] [--work DIR]
        [--strengths 0.3 0.5 0.7 0.85 0.95] [--depths ...] [--skips 1 2] [--compared 0.5 0.75 0.95]

(a) The curve: the calibrated policy (the default one without a calibration) at several strengths, which are values of
alpha_max with alpha_min in proportion; with the depth fixed at several scales; and with the last scales left out.
Says the largest speed-up that loses at most one point of the judge's score.
(b) At the depth of the calibration for every picture, so that the plans are the same but for the choice: entropy
against the distance to the mean token (FastVAR's) and against chance, and cached increments against none for the
tokens that are not computed. SSIM differences are paired by picture.

Writes ``pruning_curve_<model>.json`` and ``.png`` into ``--out`` and prints the tables. An interrupted run goes on
where it was, from what ``--work`` holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from judged import Compared, Job, argument_parser, compare
from judged_report import (
    bootstrap,
    draw_over_flops,
    draw_points,
    finish,
    header,
    new_figure,
    row_of,
    table,
    with_seconds,
)

from toprovar_jax.acceleration import AccelerationPolicy, Dense, ToProVAR

ALLOWED_LOSS = 1.0
"""Points of the judge's score."""


def with_strength(policy: ToProVAR, alpha_max: float) -> ToProVAR:
    """The policy with another alpha_max, and alpha_min in proportion."""
    proportion = policy.alpha_min / policy.alpha_max if policy.alpha_max else 0.0
    return dataclasses.replace(policy, alpha_max=alpha_max, alpha_min=round(alpha_max * proportion, 6))


def curve_policies(base: ToProVAR, options: argparse.Namespace, num_scales: int) -> dict[str, dict[str, ToProVAR]]:
    """The curve's policies, by series and name."""
    series = {"calibrated depth": {f"alpha {alpha:g}": with_strength(base, alpha) for alpha in options.strengths}}
    for depth in options.depths or range(max(2, num_scales - 2), num_scales + 1):
        fixed = dataclasses.replace(base, depth_rule="fixed", depth=depth, online=False)
        series[f"depth {depth}"] = {
            f"depth {depth}, alpha {alpha:g}": with_strength(fixed, alpha) for alpha in options.compared
        }
    for skipped in (skipped for skipped in options.skips if skipped < num_scales):
        shorter = dataclasses.replace(base, skip_last=skipped)
        series[f"last {skipped} left out"] = {
            f"last {skipped} left out, alpha {alpha:g}": with_strength(shorter, alpha)
            for alpha in (0.0, max(options.strengths))
        }
    return series


def choices(base: ToProVAR, alpha_max: float) -> dict[str, ToProVAR]:
    """The same plan with other choices of tokens, and with another restoration."""
    entropy = dataclasses.replace(with_strength(base, alpha_max), depth_rule="fixed", online=False)
    return {
        "entropy": dataclasses.replace(entropy, importance="entropy", restoration="cached"),
        "distance": dataclasses.replace(entropy, importance="distance", restoration="cached"),
        "random": dataclasses.replace(entropy, importance="random", restoration="cached"),
        "entropy, identity": dataclasses.replace(entropy, importance="entropy", restoration="identity"),
    }


def largest_speedups(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Of the rows that lose little enough, the one with the fewest FLOPs: of all, and of those that run every scale."""
    last = max(row["scales_run"][1] for row in rows)
    within = [row for row in rows if row["loss"][0] <= ALLOWED_LOSS]
    kinds = {"of all": within, "of those that run every scale": [row for row in within if row["scales_run"][0] == last]}
    return {kind: min(rows, key=lambda row: row["flops_share"]) for kind, rows in kinds.items() if rows}


def differences(compared: Mapping[str, Compared]) -> dict[str, Any]:
    """SSIM of entropy with cached increments less that of the others, paired by picture."""
    entropy = compared["entropy"]
    return {other: bootstrap(entropy.ssim - compared[other].ssim) for other in compared if other != "entropy"}


def verdict(compared: Sequence[tuple[float, Mapping[str, Any]]]) -> str:
    """One line: which choice wins, and by how much."""
    parts = []
    for other in ("random", "distance"):
        gains = [gain[other] for _, gain in compared]
        won, lost = sum(low > 0 for _, low, _ in gains), sum(high < 0 for _, _, high in gains)
        mean = np.mean([value for value, _, _ in gains])
        words = {(len(gains), 0): "beats", (0, len(gains)): "loses to", (0, 0): "is not told apart from"}
        word = words.get((won, lost), f"beats at {won} and loses at {lost} of {len(gains)} strengths:")
        shown = ", ".join(f"{value:+.4f} [{low:+.4f}, {high:+.4f}]" for value, low, high in gains)
        parts.append(f"entropy {word} {other} by {mean:+.4f} SSIM ({shown})")
    return "; ".join(parts)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.85, 0.95])
    parser.add_argument("--depths", type=int, nargs="+", help="default: the last three scales")
    parser.add_argument("--skips", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--compared", type=float, nargs="+", default=[0.5, 0.75, 0.95], help="strengths of part b")
    options = parser.parse_args()
    job = Job.of(options)
    base = job.base_policy()
    series = curve_policies(base, options, len(job.pipeline.plan_for("dense").schedule))

    found: dict[str, Compared] = {}
    for name, policies in series.items():
        for compared in compare(job, policies):
            found[compared.name] = compared
            print(f"{name}: {compared.name}", flush=True)
    dense = found["dense"]
    rows = {name: row_of(compared, dense) for name, compared in found.items()}
    everything = {name: policy for policies in series.values() for name, policy in policies.items()}
    best = largest_speedups(list(rows.values()))
    timed: dict[str, AccelerationPolicy] = {"dense": Dense()}
    timed |= {row["name"]: everything[row["name"]] for row in best.values() if row["name"] in everything}
    with_seconds([rows[name] for name in timed], job.seconds(timed, options.timed))

    tested, gains = [], []
    for alpha in options.compared:
        chosen = {compared.name: compared for compared in compare(job, choices(base, alpha))}
        del chosen["dense"]
        print(f"choices at alpha {alpha:g}", flush=True)
        gains.append((alpha, differences(chosen)))
        tested += [row_of(compared, dense) | {"alpha_max": alpha} for compared in chosen.values()]

    report = header(job) | {
        "curve": {name: [rows[key] for key in ("dense", *policies)] for name, policies in series.items()},
        "largest_speedup": {kind: row["name"] for kind, row in best.items()},
        "allowed_loss": ALLOWED_LOSS,
        "choices": tested,
        "ssim_gain_of_entropy": [{"alpha_max": alpha, **gain} for alpha, gain in gains],
        "verdict": verdict(gains),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"pruning_curve_{job.pipeline.model_name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    height, width = report["grid"]
    figure = new_figure(f"{report['model']}, {height}x{width} tokens, {report['images']} pictures, same seeds", 3)
    drawn = {name: [row for row in group if row["name"] != "dense"] for name, group in report["curve"].items()}
    draw_over_flops(figure.axes[0], drawn, "score", "judge score")
    draw_over_flops(figure.axes[1], drawn, "ssim", "SSIM with dense")
    for other in gains[0][1]:
        draw_points(figure.axes[2], other, [alpha for alpha, _ in gains], [gain[other] for _, gain in gains])
    figure.axes[2].axhline(0.0, color="black", linewidth=0.8)
    finish(figure.axes[2], "alpha_max, fixed depth", "SSIM of entropy less that of ... (95 % intervals)")
    figure.savefig(path.with_suffix(".png"), dpi=120)

    print(table(list(rows.values())))
    for kind, row in best.items():
        print(
            f"largest speed-up at a loss of at most {ALLOWED_LOSS:g} point, {kind}: {row['flops_speedup']:.2f}x in "
            f"FLOPs, {row['name']}, loss {'{:.1f} [{:.1f}, {:.1f}]'.format(*row['loss'])}, scales {row['scales_run']}"
        )
    print("\nat one plan:")
    print(table([row | {"name": f"{row['name']}, alpha {row['alpha_max']:g}"} for row in tested]))
    for alpha, gain in gains:
        shown = ", ".join("{} {:+.4f} [{:+.4f}, {:+.4f}]".format(other, *value) for other, value in gain.items())
        print(f"alpha {alpha:g}: SSIM of entropy less that of {shown}")
    print(report["verdict"])


if __name__ == "__main__":
    main()
