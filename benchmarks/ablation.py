"""The ablation of the ToProVAR paper on the scenes world: which of its three parts saves what, and costs what.

    python benchmarks/ablation.py [--model DIR] [--images 200] [--seed 0] [--timed 20] [--out DIR] [--work DIR]

All policies draw the same prompts with the same seeds, each at its own settings: those of the model's calibration, or
the defaults without one. "exit" stops every picture before the same scale, "scale" stops each before its own depth D,
"scale + layer" leaves Detail layers out from D on, "scale + token" prunes tokens alike in all layers but the guarded
ones, "all" prunes tokens by layer. Writes ``ablation_<model>.json`` and ``.png`` into ``--out`` and prints the table.
An interrupted run goes on where it was, from what ``--work`` holds.
"""

from __future__ import annotations

import json

from judged import Job, argument_parser, compare
from judged_report import draw_over_flops, header, new_figure, row_of, table, with_seconds

from toprovar_jax.acceleration import AccelerationPolicy, Dense


def ablation(job: Job) -> dict[str, AccelerationPolicy]:
    """The paper's variants, by name."""
    alike = {"layer_scores": (), "online": False, "patterns": ()}
    return {
        "exit": job.base_policy(prune="scales", depth_rule="fixed"),
        "scale": job.base_policy(prune="scales"),
        "scale + layer": job.base_policy(prune="layers"),
        "scale + token": job.base_policy(**alike),
        "all": job.base_policy(),
    }


def main() -> None:
    options = argument_parser(__doc__).parse_args()
    job = Job.of(options)
    policies = ablation(job)
    rows, dense = [], None
    for compared in compare(job, policies):
        dense = dense or compared
        rows.append(row_of(compared, dense))
        print(f"{compared.name}: {rows[-1]['images']} pictures", flush=True)
    with_seconds(rows, job.seconds({"dense": Dense(), **policies}, options.timed))
    report = header(job) | {"rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"ablation_{job.pipeline.model_name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    height, width = report["grid"]
    figure = new_figure(f"{report['model']}, {height}x{width} tokens, {report['images']} pictures, same seeds", 2)
    for axes, quantity, label in zip(figure.axes, ("score", "ssim"), ("judge score", "SSIM with dense"), strict=True):
        draw_over_flops(axes, {row["name"]: [row] for row in rows}, quantity, label)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    print(table(rows))


if __name__ == "__main__":
    main()
