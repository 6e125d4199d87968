"""How much of what prompts ask for a model draws: what ``toprovar eval`` does.

Pictures of the six tasks' prompts are judged by GenEval's protocol (:mod:`toprovar_jax.scenes.score`), beside those of
another policy with the same seeds, beside renders of scenes that show what the prompts ask for, and beside these
renders once the model's image tokenizer has coded them, which is the most that the transformer behind it can reach.
:mod:`toprovar_jax.evaluation_report` says what was found and draws the contact sheet.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

import toprovar_jax
from toprovar_jax.acceleration import AccelerationPolicy
from toprovar_jax.comparison import OnPicture
from toprovar_jax.errors import UserInputError, unknown_name
from toprovar_jax.files import replace_file
from toprovar_jax.image_tokenizer import ImageTokenizer, encode_scales
from toprovar_jax.images import to_uint8
from toprovar_jax.intervals import Interval, bootstrap_shares
from toprovar_jax.loading import load_model
from toprovar_jax.model_card import ModelCard
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.scenes.judge import Detections, Judge
from toprovar_jax.scenes.quality import frechet_distance
from toprovar_jax.scenes.reading import read_prompt
from toprovar_jax.scenes.renderer import render
from toprovar_jax.scenes.score import LEAST_SIDE, Score, Seen, objects_seen, score, task_shown
from toprovar_jax.scenes.staging import scenes_showing
from toprovar_jax.scenes.tasks import TASKS, TaskPrompt, task_prompts
from toprovar_jax.scenes.world import Scenes
from toprovar_jax.schedule import Grid
from toprovar_jax.settings import MAX_SEED
from toprovar_jax.shapes import Array, Float, UInt8
from toprovar_jax.similarity import SSIM_WINDOW, psnr, ssim

SHOWN = 8
"""The first so many prompts of a task are kept to be shown."""

WORLD_TASKS: Mapping[str, tuple[str, ...]] = {"scenes": TASKS, "scenes-single": ("single object", "colours")}
"""What a model can be asked, by its world."""

RENDERS, CEILING = "renders", "renders through the tokenizer"
"""Names of what is judged beside the pictures of policies."""

Coder = Callable[[Array, tuple[Grid, ...]], Array]
"""Pictures in [0, 1], as arrays ``[B, h, w, 3]``, and the latent grids of all scales; gives pictures again."""


@runtime_checkable
class Judging(Protocol):
    """What finds objects: :class:`toprovar_jax.scenes.judge.Judge`, or something in its place."""

    def __call__(self, images: UInt8[np.ndarray, "B h w 3"], /) -> Detections:
        """The objects of each picture."""
        ...

    def features(self, images: UInt8[np.ndarray, "B h w 3"], /) -> Float[Array, "B F"] | Float[np.ndarray, "B F"]:
        """Numbers that describe whole pictures."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """A model, and what it is asked.

    Attributes:
      pipeline: the model.
      prompts: of the tasks; see :func:`prompts_of`.
      images: pictures per prompt.
      seed: of the first picture; picture i has ``seed + i``.
      policy: by name.
      against: the policy that it is compared with, on the same prompts and seeds; None or the same one: none.
      options: whatever else the pipeline takes, such as ``guidance_scale``.
      batch_size: pictures per call.
      coder: what makes of pictures what the model's image tokenizer leaves of them (:func:`coder_of`), for the
        ceiling; None: no ceiling.
      judge: None: the one that comes with the package.
      kept: a folder where finished batches are kept until all is done, and found again by a later run of the same.
      weights: what tells this model's weights from others', for batches that are kept.
      on_picture: told after every batch.
    """

    pipeline: InfinityPipeline
    prompts: tuple[TaskPrompt, ...]
    images: int = 1
    seed: int = 0
    policy: str = "dense"
    against: str | None = "dense"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batch_size: int = 16
    coder: Coder | None = None
    judge: Judging | None = None
    kept: pathlib.Path | None = None
    weights: str = ""
    on_picture: OnPicture = lambda what, done, total: None


def prompts_of(
    card: ModelCard, per_task: int, tasks: Sequence[str] | None = None, seed: int = 0
) -> tuple[TaskPrompt, ...]:
    """Prompts of the tasks that a model's world allows, in the tasks' order.

    Args:
      card: the model's.
      per_task: how many of each.
      tasks: which; None: every one that the world allows.
      seed: where the choice comes from.

    Raises:
      UserInputError: a model of no known world, or a task that does not exist or that this world does not allow.
    """
    allowed = _tasks_of(card)
    for task in tasks or ():
        if task not in TASKS:
            raise unknown_name("task", task, TASKS)
        if task not in allowed:
            raise _beyond(f"task {task!r}", card)
    chosen = allowed if tasks is None else tasks
    # Twice as many, since a world of one object lacks some of them.
    prompts = [p for p in task_prompts(2 * per_task, seed) if p.task in chosen and _within(p, card)]
    of_task = (itertools.islice((p for p in prompts if p.task == task), per_task) for task in TASKS)
    return tuple(itertools.chain.from_iterable(of_task))


def coder_of(image_tokenizer: ImageTokenizer) -> Coder:
    """Coding pictures scale by scale and decoding them, by an image tokenizer that has its encoder."""

    @functools.partial(jax.jit, static_argnums=2)
    def coded(tokenizer: ImageTokenizer, pictures: Array, grids: tuple[Grid, ...]) -> Array:
        return tokenizer.decode(encode_scales(tokenizer.encode(pictures), grids).latents)

    return functools.partial(coded, image_tokenizer)


def load_coder(folder: pathlib.Path, precision: Any) -> Coder:
    """:func:`coder_of` the image tokenizer of the model in ``folder``, which is loaded with its encoder."""
    return coder_of(load_model(folder, precision=precision, with_encoder=True).networks.image_tokenizer)


class _Made(NamedTuple):
    """One policy's pictures of one batch, and the seconds that they cost once everything was compiled."""

    images: UInt8[np.ndarray, "B h w 3"]
    seconds: float


@dataclasses.dataclass(eq=False)
class Judged:
    """What the judge made of one kind of pictures; a row or entry per picture, in their order.

    Attributes:
      right: the verdicts.
      seen: the objects.
      features: of each batch.
      seconds: what drawing them cost; nothing for renders.
    """

    right: list[bool] = dataclasses.field(default_factory=list)
    seen: list[list[Seen]] = dataclasses.field(default_factory=list)
    features: list[np.ndarray] = dataclasses.field(default_factory=list)
    seconds: float = 0.0


class Evaluation:
    """Pictures of prompts under one policy or two, judged.

    Attributes:
      setup: the model and what it is asked.
      judged: by the policy's name, :data:`RENDERS` or :data:`CEILING`.
      shown: some of the policy's pictures, by their numbers.
      psnr, ssim: of each picture to that of the other policy.
      policies: what is drawn by, by name.
      size: of the pictures, height and width.
      left_out: what cannot be had, by name, with the reason.
      warnings: one line each, of the pipeline.

    Args:
      setup: the model and what it is asked.

    Raises:
      UserInputError: no prompt, a model or a prompt that cannot be judged, or anything else that cannot be done as
        asked; nothing was run then.
    """

    def __init__(self, setup: Setup):
        card = setup.pipeline.card
        if not setup.prompts:
            raise UserInputError("evaluation of 0 prompts", "needs at least one", "ask for more per task")
        _check_prompts(setup.prompts, card)
        for what, number in (("images per prompt", setup.images), ("pictures per batch", setup.batch_size)):
            if number < 1:
                raise UserInputError(f"{number} {what}", "must be at least 1", "ask for one or more")
        self.setup = setup
        self.prompts = tuple(prompt for prompt in setup.prompts for _ in range(setup.images))
        self.seeds = tuple((setup.seed + index) % (MAX_SEED + 1) for index in range(len(self.prompts)))
        names = dict.fromkeys((setup.policy, setup.against or setup.policy))
        texts = [prompt.prompt for prompt in self.prompts]
        requests = [
            setup.pipeline.resolve(texts, seed=list(self.seeds), policy=name, **setup.options) for name in names
        ]
        self.warnings = tuple(dict.fromkeys(warning for request in requests for warning in request.warnings))
        self.policies = {name: request.policy for name, request in zip(names, requests, strict=True)}
        self.size, self._grids = requests[0].size, requests[0].plan.schedule.latent_grids
        if min(self.size) < LEAST_SIDE:
            rule = f"must be at least {LEAST_SIDE} pixels along each side to be judged"
            raise UserInputError(f"pictures of {min(self.size)} pixels", rule, "use a larger pixel budget")
        self.left_out: dict[str, str] = {}
        if missing := [task for task in TASKS if task not in _tasks_of(card)]:
            self.left_out[", ".join(missing)] = f"model {card.name} knows one object at a time"
        self._has_renders = card.world == "scenes"
        if setup.coder is not None and not self._has_renders:
            raise UserInputError(
                f"a ceiling for model {card.name}", "needs a model whose world the renderer draws", "leave it out"
            )
        if self._has_renders:
            self._scenes: Scenes | None = scenes_showing(self.prompts, setup.seed % 2**31)
        else:
            self._scenes = None
            self.left_out[RENDERS] = f"the renderer draws a world that model {card.name} does not know"
        self._has_ssim = min(self.size) >= SSIM_WINDOW
        self._judge: Judging = Judge.load() if setup.judge is None else setup.judge
        self.judged = {name: Judged() for name in self.names}
        self.psnr: list[float] = []
        self.ssim: list[float] = []
        self.shown: dict[int, np.ndarray] = {}
        self._done = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Of everything that is judged: the policy, the one it is compared with, renders, renders coded."""
        coded = (CEILING,) if self.setup.coder is not None else ()
        return (*self.policies, *((RENDERS,) if self._has_renders else ()), *coded)

    @property
    def policy(self) -> AccelerationPolicy:
        """The policy that is evaluated."""
        return self.policies[self.setup.policy]

    @property
    def against(self) -> str | None:
        """Name of the policy that it is compared with, if there is one."""
        return self.setup.against if len(self.policies) > 1 else None

    def run(self) -> Iterator[int]:
        """Does everything; yields after each batch how many pictures of the policy are judged by now."""
        starts = range(0, len(self.prompts), self.setup.batch_size)
        batches = [range(start, min(start + self.setup.batch_size, len(self.prompts))) for start in starts]
        for batch in batches:
            self._judge_policies(batch)
            yield len(self.judged[self.setup.policy].right)
        if self._scenes is not None:
            for batch in batches:
                self._judge_renders(self._scenes, batch)
                yield len(self.prompts)

    def score(self, name: str) -> Score:
        """The scores of one of :attr:`names`."""
        right = np.array(self.judged[name].right, bool)
        return score(right, self.prompts[: len(right)])

    def held_out_share(self, name: str) -> Interval | None:
        """Share of right pictures among those whose prompts need what training never showed; None without any.

        Pooled over tasks; its interval is by bootstrap over prompts, as those of the scores.
        Models of the world of one object were shown every kind of object.
        """
        if self.setup.pipeline.card.world != "scenes":
            return None
        verdicts: dict[str, list[bool]] = {}
        for ok, prompt in zip(self.judged[name].right, self.prompts, strict=True):
            if prompt.held_out:
                verdicts.setdefault(prompt.prompt, []).append(ok)
        if not verdicts:
            return None
        return bootstrap_shares(
            [([sum(each) for each in verdicts.values()], [len(each) for each in verdicts.values()])]
        )

    @property
    def mean_psnr(self) -> float | None:
        """To the other policy's pictures, of those that differ, if any does; decibels."""
        differs = [value for value in self.psnr if math.isfinite(value)]
        return float(np.mean(differs)) if differs else None

    def distances(self) -> dict[str, float]:
        """Frechet distances of judge features between what was judged, by ``"a to b"``."""
        features = {name: np.concatenate(judged.features) for name, judged in self.judged.items()}
        pairs = [(name, RENDERS) for name in self.names if name != RENDERS and self._has_renders]
        if self.against is not None:
            pairs.append((self.setup.policy, self.against))
        if len(self.prompts) < 2:
            return {}
        return {f"{a} to {b}": frechet_distance(features[a], features[b]) for a, b in pairs}

    def seconds(self, name: str) -> float:
        """What a picture of one of the policies costs, once everything is compiled."""
        return self.judged[name].seconds / len(self.prompts)

    def forget(self) -> None:
        """Takes the kept batches of this evaluation away, and their folder if nothing else is in it."""
        kept = self.setup.kept
        if kept is None or not kept.is_dir():
            return
        for start in range(0, len(self.prompts), self.setup.batch_size):
            batch = range(start, min(start + self.setup.batch_size, len(self.prompts)))
            for name in self.policies:
                path = self._path(name, batch)
                if path is not None:
                    path.unlink(missing_ok=True)
        if not any(kept.iterdir()):
            kept.rmdir()

    def _judge_policies(self, batch: range) -> None:
        made: dict[str, UInt8[np.ndarray, "B h w 3"]] = {}
        for name in reversed(self.policies):  # the one it is compared with first
            drawn = self._drawn(name, batch)
            made[name] = drawn.images
            self.judged[name].seconds += drawn.seconds
            self._look(name, drawn.images, batch)
        ours = made[self.setup.policy]
        if self.against is not None:
            pair = [made[name].astype(np.float32) / 255.0 for name in (self.setup.policy, self.against)]
            self.psnr += psnr(*pair).tolist()
            self.ssim += ssim(*pair).tolist() if self._has_ssim else []
        for row, index in enumerate(batch):
            if self._is_shown(index):
                self.shown[index] = ours[row]

    def _judge_renders(self, scenes: Scenes, batch: range) -> None:
        pictures = self._rendered(scenes, batch)
        self._look(RENDERS, to_uint8(np.asarray(pictures)), batch)
        if self.setup.coder is not None:
            coded = self.setup.coder(pictures, tuple(self._grids))
            self._look(CEILING, to_uint8(np.asarray(coded, np.float32)), batch)

    def _rendered(self, scenes: Scenes, batch: range) -> Float[Array, "B h w 3"]:
        part = Scenes(*(jnp.asarray(np.asarray(field)[batch.start : batch.stop]) for field in scenes))
        return render(part, height=self.size[0], width=self.size[1])

    def _look(self, name: str, images: UInt8[np.ndarray, "B h w 3"], batch: range) -> None:
        judged = self.judged[name]
        seen = objects_seen(self._judge(images))
        judged.right += [task_shown(objects, self.prompts[index]) for objects, index in zip(seen, batch, strict=True)]
        judged.seen += seen
        judged.features.append(np.asarray(self._judge.features(images)))
        self._done += len(batch)
        self.setup.on_picture(name, self._done, len(self.names) * len(self.prompts))

    def _drawn(self, name: str, batch: range) -> _Made:
        path = self._path(name, batch)
        if path is not None and path.exists():
            with np.load(path) as archive:
                return _Made(archive["images"], float(archive["seconds"]))
        output = self.setup.pipeline(
            [self.prompts[index].prompt for index in batch],
            seed=[self.seeds[index] for index in batch],
            policy=self.policies[name],
            output_type="np",
            **self.setup.options,
        )
        made = _Made(to_uint8(np.asarray(output.images)), output.timings.steady)
        if path is not None:
            content = io.BytesIO()
            np.savez_compressed(content, allow_pickle=False, images=made.images, seconds=np.float64(made.seconds))
            replace_file(path, content.getbuffer())
        return made

    def _path(self, name: str, batch: range) -> pathlib.Path | None:
        """Where a batch is kept; the name stands for everything that its pictures depend on."""
        if self.setup.kept is None:
            return None
        told = [
            *(toprovar_jax.__version__, jax.__version__, jax.default_backend(), self.setup.weights),
            *(repr(self.setup.pipeline.card), repr(self.policies[name]), repr(sorted(self.setup.options.items()))),
            *([self.prompts[index].prompt, self.seeds[index]] for index in batch),
        ]
        return self.setup.kept / f"{hashlib.sha256(json.dumps(told).encode('utf-8')).hexdigest()[:32]}.npz"

    def _is_shown(self, index: int) -> bool:
        """Whether a picture is the first of one of its task's first prompts."""
        number, again = divmod(index, self.setup.images)
        task = self.setup.prompts[number].task
        return again == 0 and sum(prompt.task == task for prompt in self.setup.prompts[:number]) < SHOWN


def _tasks_of(card: ModelCard) -> tuple[str, ...]:
    if card.world is None or card.world not in WORLD_TASKS:
        raise UserInputError(
            f"model {card.name}",
            f"must be a model of the world {' or '.join(WORLD_TASKS)} to be judged",
            "compare pictures of other models with the compare command",
        )
    return WORLD_TASKS[card.world]


def _within(prompt: TaskPrompt, card: ModelCard) -> bool:
    """Whether a model's world holds what a prompt asks for."""
    return not read_prompt(prompt.prompt, card.world or "scenes").unknown


def _check_prompts(prompts: Sequence[TaskPrompt], card: ModelCard) -> None:
    allowed = _tasks_of(card)
    for prompt in prompts:
        if prompt.task is None:
            raise UserInputError(f"prompt {prompt.prompt!r}", "must belong to a task", "say which")
        if prompt.task not in allowed or not _within(prompt, card):
            raise _beyond(f"prompt {prompt.prompt!r} of task {prompt.task!r}", card)


def _beyond(what: str, card: ModelCard) -> UserInputError:
    tasks = " and ".join(_tasks_of(card))
    return UserInputError(what, f"is more than model {card.name} knows", f"ask it for {tasks} only")
