"""What batch generation costs on the host: wall time against the time that a device would take for the same batches.

    python benchmarks/batch_overhead.py [--pictures 2000] [--batch-size 8] [--milliseconds 50] [--side 256] [--out DIR]

The pipeline is the embedded model's but for the device's work, in whose place it sleeps: everything else (rows read
from a file, requests checked and tokenised, PNG encoding, files, claims and manifest on a local disk) is what
``toprovar batch`` does. Pictures are smooth with a little noise, which compresses about as photographs do.

``overhead`` is the share of the wall time in which the device would have had nothing to do. Other work on the machine
counts towards it; what does not depend on that is written beside it: the processor's seconds in all, and those of the
thread that drives the device, during which it waits (``cpu_seconds_between_batches``). Both layouts are measured, and,
with one thread and nothing overlapped, what each part of the host's work takes by itself.

Writes ``batch_overhead.json`` into ``--out``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import tempfile
import time
from typing import Any

import jax
import numpy as np

import toprovar_jax
from toprovar_jax import InfinityPipeline
from toprovar_jax.distributed.batch.batches import Planner
from toprovar_jax.distributed.batch.encoding import encode_picture
from toprovar_jax.distributed.batch.ledger import Ledger, Picture
from toprovar_jax.distributed.batch.progress import Progress
from toprovar_jax.distributed.batch.rows import PromptRows
from toprovar_jax.distributed.batch.run import BatchRun
from toprovar_jax.distributed.batch.storage import open_storage
from toprovar_jax.distributed.batch.work import Work
from toprovar_jax.outputs import PipelineOutput
from toprovar_jax.recipes import recipe_of
from toprovar_jax.timings import Timings

RESULTS = pathlib.Path(__file__).parent / "results"
PROMPTS = pathlib.Path(__file__).parent / "prompts" / "scenes_200.txt"
CHUNK = 64
SETTINGS = {
    **dict.fromkeys(("negative_prompt", "pixels", "guidance", "tau", "top_k", "top_p", "stop_after_scale")),
    **{"seed": 0, "num_images": 1, "aspect_ratio": "1:1", "policy": "dense", "positive_prompt": False},
}


class SleepingPipeline(InfinityPipeline):
    """Checks and tokenises as the real one, then sleeps as long as a device would compute."""

    def device(self, seconds: float, side: int) -> None:
        """How long a call takes, and how large its pictures are."""
        rng = np.random.default_rng(0)
        waves = np.sin(rng.uniform(0, 9, (16, side, 1, 3)) + np.linspace(0, 5, side)[:, None]).astype(np.float32)
        noise = rng.standard_normal((16, side, side, 3), np.float32)
        self.pictures = np.clip(0.5 + 0.4 * waves + 0.01 * noise, 0, 1)
        self.seconds_per_call, self.calls = seconds, 0

    def __call__(self, prompt: Any, *, output_type: Any = "np", **options: Any) -> PipelineOutput:
        request = self._request(prompt, options)
        time.sleep(self.seconds_per_call)
        self.calls += 1
        return PipelineOutput(
            self.pictures[: request.batch_size], request.seeds, request.prompts, Timings(), request.plan
        )


def run(pipeline: SleepingPipeline, work: Work, layout: Any, folder: pathlib.Path) -> dict[str, Any]:
    """One job from its first claim to its manifest."""
    progress = Progress()
    ledger = Ledger(open_storage(str(folder)), layout=layout, worker="bench", lease_seconds=60.0)
    ledger.open({"rows": work.rows.count})
    pipeline.calls = 0
    start, computed, own = time.perf_counter(), time.process_time(), time.thread_time()
    outcome = BatchRun(work, ledger, progress).run()
    wall, computed = time.perf_counter() - start, time.process_time() - computed
    own = time.thread_time() - own
    device = pipeline.calls * pipeline.seconds_per_call
    if (outcome, progress.made) != ("finished", work.rows.count):
        raise RuntimeError(f"{outcome} with {progress.made} pictures")
    share, bare = (wall - device) / wall, own / (own + device)
    print(f"{layout}: {wall:.2f} s for {device:.2f} s of device, overhead {100 * share:.2f} %", end="; ")
    print(f"CPU {computed:.2f} s, {own:.2f} s of it between batches ({100 * bare:.2f} %)")
    return {
        "wall_seconds": wall,
        "device_seconds": device,
        "cpu_seconds": computed,
        "cpu_seconds_between_batches": own,
        "overhead": share,
    }


def parts(pipeline: SleepingPipeline, work: Work, folder: pathlib.Path) -> dict[str, float]:
    """Milliseconds per batch of each part by itself, over one chunk."""
    ledger = Ledger(open_storage(str(folder)), layout="files", worker="bench", lease_seconds=60.0)
    ledger.open({"rows": work.rows.count})
    took = {}

    def timed(name: str, do: Any) -> Any:
        start = time.perf_counter()
        result = do()
        took[name] = 1000 * (time.perf_counter() - start) / len(batches)
        return result

    batches = [None]
    rows = work.rows.read(0, CHUNK)
    batches = work.planner.chunk(rows).batches
    timed("rows", lambda: work.rows.read(CHUNK, CHUNK))
    timed("plan_and_tokenise", lambda: work.planner.chunk(rows))
    wanted = [picture for batch in batches for picture in batch.pictures]
    recipes = timed(
        "recipe",
        lambda: [recipe_of(pipeline, one.prompt, one.seed, one.size, one.arguments) for one in wanted],
    )
    content = timed(
        "png",
        lambda: [encode_picture(pipeline.pictures[place % 16], recipe) for place, recipe in enumerate(recipes)],
    )
    made = [
        Picture(one.row, one.image, one.id, one.prompt, one.seed, recipe, png)
        for one, recipe, png in zip(wanted, recipes, content, strict=True)
    ]
    claim = timed("claim", lambda: ledger.claim(0))
    size = work.planner.batch_size
    timed(
        "commit",
        lambda: [claim.commit(batch.name, made[k * size : (k + 1) * size]) for k, batch in enumerate(batches)],
    )
    timed("complete", claim.complete)
    print("ms per batch, one thread: " + ", ".join(f"{name} {value:.2f}" for name, value in took.items()))
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--milliseconds", type=float, default=50.0, help="of device per batch")
    parser.add_argument("--side", type=int, default=256, help="of a picture, in pixels")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()

    pipeline: Any = SleepingPipeline.from_pretrained()
    pipeline.device(options.milliseconds / 1000, options.side)
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        lines = [prompts[number % len(prompts)] for number in range(options.pictures)]
        (folder / "prompts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        rows = PromptRows(str(folder / "prompts.txt"))
        work = Work(rows, Planner(pipeline, SETTINGS, batch_size=options.batch_size), pipeline, CHUNK)
        report = {
            "pictures": rows.count,
            "batch_size": options.batch_size,
            "milliseconds_per_batch": options.milliseconds,
            "side": options.side,
            "chunk": CHUNK,
            "milliseconds_of_host_per_batch": parts(pipeline, work, folder / "parts"),
            **{layout: run(pipeline, work, layout, folder / layout) for layout in ("files", "tar")},
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "host": f"{os.cpu_count()} cores, {platform.machine()}",
            "versions": {"toprovar_jax": toprovar_jax.__version__, "jax": jax.__version__},
        }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "batch_overhead.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
