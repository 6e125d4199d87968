"""A pipeline whose pictures spell their prompt and seed in their colours, and the command that runs on it."""

from __future__ import annotations

import dataclasses
import pathlib
import zlib
from typing import Any

import pytest
from PIL import Image

from toprovar_jax.acceleration import POLICIES, Dense
from toprovar_jax.cli.export_eval import main
from toprovar_jax.outputs import PipelineOutput, Timings

from .suite_files import WRITE

SIDE = 16


def colour(prompt: str, seed: int) -> tuple[int, int, int]:
    """What the painting pipeline fills a picture with; JPEG keeps it to a few steps."""
    return zlib.crc32(prompt.encode()) % 256, seed % 256, (seed // 256) % 256


@dataclasses.dataclass(frozen=True)
class Plan:
    policy: str

    def as_dict(self) -> dict[str, str]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Resolved:
    plan: Plan
    size: tuple[int, int]


class ColourPipeline:
    """Called like InfinityPipeline; raises ``failure`` instead of the call of number ``fail_at``.

    With ``company`` a picture also depends on the other ones of its call, as products of a whole batch may.
    """

    default_guidance, default_tau, default_top_k, default_top_p, default_pixels = 3.0, (1.0, 0.5), 900, 0.97, "tiny"

    def __init__(self, *, model_name: str = "colours", fail_at: int | None = None, company: bool = False):
        self.model_name, self.fail_at, self.company = model_name, fail_at, company
        self.calls: list[tuple[list[str], list[int], dict[str, Any]]] = []

    def resolve(self, prompt: str, *, seed: int, policy: str, aspect_ratio: str, **_: Any) -> Resolved:
        return Resolved(Plan(policy), (SIDE, SIDE if aspect_ratio == "1:1" else 2 * SIDE))

    def __call__(self, prompts: list[str], *, seed: list[int], **options: Any) -> PipelineOutput:
        if len(self.calls) == self.fail_at:
            raise RuntimeError("the device went away")
        self.calls.append((prompts, seed, options))
        images = []
        for prompt, one in zip(prompts, seed, strict=True):
            red, green, blue = colour(prompt, one)
            if self.company:
                red = (red + sum(seed)) % 256
            images.append(Image.new("RGB", (SIDE, SIDE), (red, green, blue)))
        warnings = tuple(f"{prompt!r} was cut" for prompt in prompts if "long" in prompt)
        return PipelineOutput(images, tuple(seed), tuple(prompts), Timings(), Plan("dense"), warnings=warnings)

    @property
    def seeds(self) -> list[int]:
        return [seed for _, seeds, _ in self.calls for seed in seeds]


@dataclasses.dataclass(frozen=True)
class Ran:
    status: int
    stdout: str
    stderr: str
    out: pathlib.Path
    prompts: pathlib.Path
    pipeline: ColourPipeline

    @property
    def files(self) -> dict[str, bytes]:
        """What lies in the export's folder."""
        found = sorted(path for path in self.out.rglob("*") if path.is_file())
        return {path.relative_to(self.out).as_posix(): path.read_bytes() for path in found}


@pytest.fixture
def export(tmp_path, monkeypatch, capsys):
    """Runs the command on small prompts of a suite: ``export("dpg", "--batch-size", "3", fail_at=2)``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(POLICIES, "thin", Dense)
    written: dict[str, pathlib.Path] = {}

    def run(suite: str, *argv: str, out: str = "out", **pipeline: Any) -> Ran:
        if suite not in written:
            folder = tmp_path / f"prompts of {suite}"
            folder.mkdir()
            written[suite] = WRITE[suite](folder)
        model = ColourPipeline(**pipeline)
        words = ["--suite", suite, "--prompts", str(written[suite]), "--out", out, *argv]
        status = main(words, load=lambda _model: model)
        captured = capsys.readouterr()
        return Ran(status, captured.out, captured.err, tmp_path / out, written[suite], model)

    return run
