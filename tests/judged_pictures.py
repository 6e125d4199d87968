"""Pictures that list their objects in their first pixels, a pipeline that makes them, and a judge who reads them."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Sequence
from typing import Any

import numpy as np

from toprovar_jax.acceleration import Dense
from toprovar_jax.errors import UserInputError, unknown_name
from toprovar_jax.outputs import PipelineOutput
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.scenes.judge import Detections
from toprovar_jax.scenes.score import Seen
from toprovar_jax.scenes.tasks import TaskPrompt, task_prompts
from toprovar_jax.scenes.world import COLOURS, MAX_OBJECTS, SHAPES, Scenes
from toprovar_jax.timings import Timings

from .tiny_model import CARD

SIDE, SLOTS = 32, 8
GRIDS = ((1, 1), (2, 2))
NAMES = list(COLOURS)


def detections(pictures: Sequence[Sequence[Seen]]) -> Detections:
    """What a judge who sees these objects says."""
    found = np.zeros((len(pictures), SLOTS), bool)
    shape, colour, size = (np.zeros((len(pictures), SLOTS), np.int32) for _ in range(3))
    position, centre = (np.zeros((len(pictures), SLOTS, 2), np.float32) for _ in range(2))
    for row, things in enumerate(pictures):
        for slot, thing in enumerate(things):
            found[row, slot] = True
            shape[row, slot], colour[row, slot] = SHAPES.index(thing.shape), NAMES.index(thing.colour)
            position[row, slot] = thing.position
    return Detections(found, shape, colour, size, position, centre, np.where(found, 0.9, 0.1).astype(np.float32))


def painted(things: Sequence[Seen]) -> np.ndarray:
    """A picture, floats ``[SIDE, SIDE, 3]``, that lists the objects: shape, colour and place, a row each."""
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    for row, thing in enumerate(things):
        x, z = (round(10 * value) + 100 for value in thing.position)
        image[row, 0] = 1 + SHAPES.index(thing.shape), NAMES.index(thing.colour), x
        image[row, 1] = z, 0, 0
    return (image + 0.25) / 255.0


def perfect(prompt: TaskPrompt) -> list[Seen]:
    """Objects that do what a prompt says; those of a relation stand two units apart along both axes."""
    sign = 1.0 if prompt.relation in ("right of", "behind") else -1.0
    asked = [wanted for wanted in prompt.wanted for _ in range(wanted.count)]
    places = [(sign * (1.0 - 2.0 * index), sign * (1.0 - 2.0 * index)) for index in range(len(asked))]
    return [
        Seen(wanted.shape or "cube", wanted.colour or "red", place) for wanted, place in zip(asked, places, strict=True)
    ]


def scenes_of(prompts: Sequence[TaskPrompt]) -> Scenes:
    """As many scenes, with nothing in them."""
    empty = np.zeros((len(prompts), MAX_OBJECTS), np.float32)
    whole = empty.astype(np.int32)
    return Scenes(empty > 0, whole, whole, whole, np.zeros((*empty.shape, 2), np.float32), empty, empty)


class PixelJudge:
    """Reads what :func:`painted` has written; its features are pixel values."""

    def __call__(self, images: np.ndarray) -> Detections:
        read = images[:, :SLOTS, :2].astype(int)
        return detections(
            [
                [
                    Seen(SHAPES[first[0] - 1], NAMES[first[1]], ((first[2] - 100) / 10, (second[0] - 100) / 10))
                    for first, second in picture
                    if first[0]
                ]
                for picture in read
            ]
        )

    def features(self, images: np.ndarray) -> np.ndarray:
        return images[:, :2, :2].reshape(len(images), -1).astype(np.float32)


class Half(Dense):
    """Does half of what it should."""

    name = "half"


class PaintingPipeline(InfinityPipeline):
    """Stands for InfinityPipeline: policy "dense" does what prompts say; "half" only for pictures of even seeds.

    Attributes:
      calls: what each call was asked for.
    """

    def __init__(self, world: str | None = "scenes", stop_after: int = 10**6, side: int = SIDE):
        self.card = dataclasses.replace(CARD, name="fake", world=world)
        self.calls: list[dict[str, Any]] = []
        self._stop_after, self._side = stop_after, side
        self._asked = {prompt.prompt: prompt for seed in (0, 4) for prompt in task_prompts(60, seed)}

    def resolve(self, prompts: list[str], *, seed: list[int], policy: str, **options: Any) -> Any:
        if policy not in ("dense", "half"):
            raise unknown_name("policy", policy, ("dense", "half"))
        if options.get("guidance_scale") == [1.0, 2.0]:
            raise UserInputError("guidance list of 2 numbers", "must have 3", "give one per scale")
        plan = types.SimpleNamespace(schedule=types.SimpleNamespace(latent_grids=GRIDS))
        chosen = Half() if policy == "half" else Dense()
        warnings = ("one warning",) if len(prompts) > 100 else ()
        return types.SimpleNamespace(policy=chosen, plan=plan, size=(self._side, self._side), warnings=warnings)

    def __call__(self, prompts: list[str], *, seed: list[int], policy: Any, **options: Any) -> PipelineOutput:
        if sum(len(call["prompts"]) for call in self.calls) + len(prompts) > self._stop_after:
            raise KeyboardInterrupt
        self.calls.append({"prompts": prompts, "seeds": seed, "policy": policy.name, **options})
        things = [
            perfect(self._asked[prompt])[: 0 if policy.name == "half" and number % 2 else 8]
            for prompt, number in zip(prompts, seed, strict=True)
        ]
        cost = 0.5 if policy.name == "half" else 1.0
        return PipelineOutput(
            images=np.stack([painted(picture) for picture in things]),
            seeds=tuple(seed),
            prompts=tuple(prompts),
            timings=Timings(compile=5.0, transformer=cost * len(prompts), total=9.0),
            plan=None,
        )
