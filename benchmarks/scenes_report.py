"""A model's score on the six tasks, beside what its image tokenizer allows, with a contact sheet to look at.

    python benchmarks/scenes_report.py [--model NAME_OR_DIR] [--policy dense] [--per-task 50] [--images 2]

Does what ``toprovar eval --ceiling`` does. Writes ``scenes_MODEL.json`` and ``scenes_MODEL.png`` into
``benchmarks/results``, in place of older ones; with another policy than dense ``scenes_MODEL_POLICY``.
"""

import argparse
import json
import pathlib
import sys

from judged import weights_sha256

from toprovar_jax import InfinityPipeline
from toprovar_jax.errors import UserInputError
from toprovar_jax.evaluation import Evaluation, Setup, load_coder, prompts_of
from toprovar_jax.evaluation_report import as_dict, sheet, table
from toprovar_jax.files import replace_file
from toprovar_jax.hub import find_model

RESULTS = pathlib.Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="model folder or name; default: the embedded model")
    parser.add_argument("--policy", default="dense")
    parser.add_argument("--per-task", type=int, default=50, help="prompts of each task")
    parser.add_argument("--images", type=int, default=2, help="pictures per prompt")
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args(arguments)
    try:
        evaluation = _evaluation(options)
    except UserInputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for done in evaluation.run():
        print(f"{done} of {len(evaluation.prompts)} pictures", end="\r", flush=True)
    suffix = "" if options.policy == "dense" else f"_{options.policy}"
    path = options.out / f"scenes_{evaluation.setup.pipeline.model_name}{suffix}.json"
    replace_file(path, (json.dumps(as_dict(evaluation), indent=1, allow_nan=False) + "\n").encode("utf-8"))
    replace_file(path.with_suffix(".png"), sheet(evaluation))
    print(table(evaluation), path, sep="\n\n")
    return 0


def _evaluation(options: argparse.Namespace) -> Evaluation:
    pipeline = InfinityPipeline.from_pretrained(options.model)
    folder, coder = find_model(options.model), None
    if pipeline.card.world == "scenes":
        coder = load_coder(folder, pipeline.card.transformer.precision)
    setup = Setup(
        pipeline,
        prompts_of(pipeline.card, options.per_task),
        images=options.images,
        policy=options.policy,
        options={} if options.guidance is None else {"guidance_scale": options.guidance},
        coder=coder,
        weights=weights_sha256(folder),
    )
    return Evaluation(setup)


if __name__ == "__main__":
    sys.exit(main())
