"""A pipeline without a model: flat pictures whose colour is the seed, and a record of what it was asked."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import pytest
from PIL import Image

from toprovar_jax.acceleration import POLICIES, Dense
from toprovar_jax.cli.generate import main
from toprovar_jax.errors import UserInputError
from toprovar_jax.memory_options import ON_DEVICE, MemoryOptions
from toprovar_jax.outputs import PipelineOutput, Timings

SIDE = 8


@dataclasses.dataclass(frozen=True)
class FakePlan:
    policy: str
    num_scales: int = 3

    def __str__(self) -> str:
        return f"plan {self.policy}: {self.num_scales} scales"

    def as_dict(self) -> dict[str, Any]:
        return {"policy": self.policy, "scales": self.num_scales}


@dataclasses.dataclass(frozen=True)
class FakeResolved:
    plan: FakePlan
    warnings: tuple[str, ...]
    size: tuple[int, int] = (SIDE, SIDE)


class FakePipeline:
    """Stands for InfinityPipeline; ``fail_at`` raises ``failure`` in place of that picture."""

    model_name = "fake"
    default_guidance = 3.0
    default_tau = 1.0

    def __init__(
        self,
        fail_at: int | None = None,
        failure: type[BaseException] = KeyboardInterrupt,
        memory: MemoryOptions = ON_DEVICE,
    ):
        self.fail_at, self.failure, self.memory = fail_at, failure, memory
        self.calls: list[dict[str, Any]] = []

    def resolve(self, prompt: str, *, seed: int, policy: str, guidance_scale: Any, **_: Any) -> FakeResolved:
        if isinstance(guidance_scale, list) and len(guidance_scale) != 3:
            raise UserInputError(f"guidance of {len(guidance_scale)} values", "must have 3", "give one per scale")
        warnings = ("the fake model knows no cats",) if "cat" in prompt else ()
        return FakeResolved(FakePlan(policy), warnings)

    def __call__(self, prompts: list[str], *, seed: list[int], **arguments: Any) -> PipelineOutput:
        made = sum(len(call["prompts"]) for call in self.calls)
        if self.fail_at is not None and made + len(prompts) > self.fail_at:
            raise self.failure("the device went away")
        self.calls.append({"prompts": prompts, "seeds": seed, **arguments})
        if arguments["callback_on_scale_end"] is not None:
            for index in range(3):
                arguments["callback_on_scale_end"](index, 3, {})
        first = len(self.calls) == 1
        return PipelineOutput(
            images=[Image.new("RGB", (SIDE, SIDE), (value % 256, 0, 0)) for value in seed],
            seeds=tuple(seed),
            prompts=tuple(prompts),
            timings=Timings(
                load=2.0, compile=10.0 if first else 0.0, text=0.1, transformer=0.7, decoder=0.2, total=1.0
            ),
            plan=FakePlan(arguments["policy"]),
        )


@dataclasses.dataclass(frozen=True)
class Ran:
    """What one run of the command left behind."""

    status: int
    stdout: str
    stderr: str
    pipeline: FakePipeline
    folder: pathlib.Path

    @property
    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())


@pytest.fixture
def command(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command in an empty folder with the fake pipeline: ``command("--prompt", "a", fail_at=2)``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(POLICIES, "thin", Dense)

    def run(*argv: str, **fake: Any) -> Ran:
        pipeline = FakePipeline(**fake)

        def load(_model: str | None) -> FakePipeline:
            return pipeline

        status = main(argv, load=load)
        captured = capsys.readouterr()
        return Ran(status, captured.out, captured.err, pipeline, tmp_path)

    return run
