"""From the rows of a chunk to batches: a function of the rows, the settings and the batch size, and of nothing else.

So the bytes of a picture are the same whoever makes it and whenever, and a committed batch is known by its name.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from toprovar_jax.distributed.batch.rows import MAX_NUM_IMAGES, BrokenRow, Row
from toprovar_jax.errors import UserInputError
from toprovar_jax.prompts import with_positive_prompt
from toprovar_jax.settings import MAX_SEED

TEXT_BUCKETS = (64, 128, 256)
"""Text lengths in tokens that batches are sorted by, below the longest that the model reads."""

FAILED_ROWS = "failed"
"""The name of the batch that holds a chunk's broken rows."""


@dataclasses.dataclass(frozen=True, eq=False)
class Wanted:
    """One picture to make.

    Attributes:
      row, image: which.
      id: the row's.
      prompt: as the model reads it.
      negative_prompt: the same, or None.
      seed: its own.
      size: height and width in pixels.
      arguments: of the pipeline's call, without prompts and seeds.
      own: whether the row said any of them itself.
    """

    row: int
    image: int
    id: str
    prompt: str
    negative_prompt: str | None
    seed: int
    size: tuple[int, int]
    arguments: Mapping[str, Any]
    own: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Pictures that one copy of the model makes together.

    Attributes:
      name: within its chunk.
      key: equal for batches that run the same programs.
      pictures: what is to be made.
      plan: what will be computed of each.
      size: how many pictures are computed; those beyond ``pictures`` are repetitions of the last, to be thrown away.
    """

    name: str
    key: tuple[Any, ...]
    pictures: tuple[Wanted, ...]
    plan: Any
    size: int

    @property
    def text_length(self) -> int:
        """Tokens that the longest of its texts may have: one of a few lengths."""
        return self.key[-1]

    @property
    def padded(self) -> list[Wanted]:
        """``pictures`` and the repetitions."""
        return [*self.pictures, *[self.pictures[-1]] * (self.size - len(self.pictures))]


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """Batches of one key that are made in one call of the pipeline, each by a copy of the model on its own devices.

    Attributes:
      batches: at most as many as there are copies.
      request: what the pipeline made of them, ahead of the call.
    """

    batches: tuple[Batch, ...]
    request: Any

    def draw(self, pipeline: Any) -> list[Any]:
        """Calls the pipeline; per batch the pixels of its ``pictures``, float in [0, 1], ``[B, h, w, 3]``.

        Raises:
          UserInputError: the pipeline refuses, which after the checks of :class:`Planner` means the device's memory.
        """
        images = pipeline(self.request, output_type="np").images
        starts = itertools.accumulate((batch.size for batch in self.batches), initial=0)
        return [images[start : start + len(batch.pictures)] for start, batch in zip(starts, self.batches, strict=False)]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The work of a chunk: its batches, the rows that cannot be drawn, and what the pipeline warns of."""

    batches: tuple[Batch, ...]
    broken: tuple[BrokenRow, ...]
    warnings: tuple[str, ...]


class Planner:
    """Makes batches of rows.

    Attributes:
      batch_size: pictures that a copy of the model makes together.

    Args:
      pipeline: whose ``resolve`` judges settings and tokenises prompts.
      settings: of rows that say nothing else, by the names of :data:`toprovar_jax.settings.SETTINGS`; None where the
        model's default holds.
      batch_size: as above.
      padded: whether every batch computes that many, so that no other size is compiled.
      cut_long_prompts: whether prompts of more tokens than the model reads are cut; else their rows are broken.
      copies: of the model, among which a call is divided.
    """

    def __init__(
        self,
        pipeline: Any,
        settings: Mapping[str, Any],
        *,
        batch_size: int,
        padded: bool = True,
        cut_long_prompts: bool = False,
        copies: int = 1,
    ):
        self._pipeline, self._settings = pipeline, dict(settings)
        self.batch_size, self._padded, self._strict = batch_size, padded, not cut_long_prompts
        self._copies = copies

    def chunk(self, rows: Iterable[Row | BrokenRow]) -> Chunk:
        """The batches of some rows, which are a whole chunk."""
        broken: list[BrokenRow] = []
        alike: dict[Any, list[Row]] = collections.defaultdict(list)
        for row in rows:
            if isinstance(row, BrokenRow):
                broken.append(row)
            else:
                alike[self._kind(row)].append(row)
        resolved: list[tuple[Row, Any, int]] = []
        warnings: list[str] = []
        for group in alike.values():
            for part, request in self._resolve(group, broken):
                warnings += request.warnings
                resolved += [(row, request, place) for place, row in enumerate(part)]
        resolved.sort(key=lambda found: found[0].number)
        broken.sort(key=lambda row: row.number)
        return Chunk(self._batches(resolved), tuple(broken), tuple(dict.fromkeys(warnings)))

    def _batches(self, resolved: Sequence[tuple[Row, Any, int]]) -> tuple[Batch, ...]:
        groups: dict[tuple[Any, ...], list[Wanted]] = collections.defaultdict(list)
        for row, request, place in resolved:
            arguments = self._arguments(row)
            key = (
                request.plan,
                request.sampling,
                request.size,
                arguments["policy"],
                request.negative_prompts is not None,
                _text_bucket(request.tokens, place),
            )
            groups[key] += self._pictures(row, request, arguments)
        batches = []
        for key, members in groups.items():
            for start in range(0, len(members), self.batch_size):
                part = tuple(members[start : start + self.batch_size])
                size = self.batch_size if self._padded else len(part)
                batches.append(Batch(f"{len(batches):04d}", key, part, key[0], size))
        return tuple(batches)

    def calls(self, batches: Iterable[Batch]) -> Iterator[Call]:
        """Batches in their order, those of one key together, as many at a time as there are copies of the model."""
        alike: dict[Any, list[Batch]] = collections.defaultdict(list)
        for batch in batches:
            alike[batch.key].append(batch)
        for found in alike.values():
            for start in range(0, len(found), self._copies):
                yield self.call(found[start : start + self._copies])

    def call(self, batches: Sequence[Batch]) -> Call:
        """The call that makes some batches of one key."""
        wanted = [picture for batch in batches for picture in batch.padded]
        if self._padded:
            # Copies without a batch of their own repeat a picture, so that the others' parts are as large as ever.
            wanted += [wanted[-1]] * ((self._copies - len(batches)) * self.batch_size)
        first = wanted[0]
        arguments = {
            name: list(value) if isinstance(value, tuple) else value for name, value in first.arguments.items()
        }
        if first.negative_prompt is not None:
            arguments["negative_prompt"] = [picture.negative_prompt for picture in wanted]
        request = self._pipeline.resolve(
            [picture.prompt for picture in wanted],
            seed=[picture.seed for picture in wanted],
            text_length=batches[0].text_length,
            **arguments,
        )
        return Call(tuple(batches), request)

    def _pictures(self, row: Row, request: Any, arguments: Mapping[str, Any]) -> list[Wanted]:
        settings = {**self._settings, **row.settings}
        # As far apart as a row may have pictures: no two of the job share a seed, up to four million rows.
        first = settings["seed"] + MAX_NUM_IMAGES * row.number if row.seed is None else row.seed
        prompt, negative = self._texts(row)
        own = any(row.settings.get(name, value) != value for name, value in self._settings.items())
        return [
            Wanted(
                row.number,
                image,
                row.id,
                prompt,
                negative,
                (first + image) % (MAX_SEED + 1),
                request.size,
                {**arguments, "negative_prompt": negative},
                own,
            )
            for image in range(settings["num_images"])
        ]

    def _resolve(self, rows: list[Row], broken: list[BrokenRow]) -> list[tuple[list[Row], Any]]:
        """What the pipeline makes of rows of one kind: of all at once, or one by one where it refuses some."""
        texts = [self._texts(row) for row in rows]
        negatives = [negative for _, negative in texts if negative is not None]
        arguments = {**self._arguments(rows[0]), "negative_prompt": negatives or None, "strict": self._strict}
        try:
            request = self._pipeline.resolve([prompt for prompt, _ in texts], seed=[0] * len(rows), **arguments)
        except UserInputError as error:
            if len(rows) > 1:
                return [found for row in rows for found in self._resolve([row], broken)]
            row = rows[0]
            broken.append(BrokenRow(row.number, row.id, row.prompt, f"row {row.number}: {error}"))
            return []
        return [(rows, request)]

    def _texts(self, row: Row) -> tuple[str, str | None]:
        settings = {**self._settings, **row.settings}
        prompt = with_positive_prompt(row.prompt) if settings["positive_prompt"] else row.prompt
        negative = settings["negative_prompt"]
        return prompt, negative if negative and negative.strip() else None

    def _arguments(self, row: Row) -> dict[str, Any]:
        """What the call takes beside texts and seeds."""
        settings = {**self._settings, **row.settings}
        for name in ("seed", "num_images", "positive_prompt", "negative_prompt"):
            del settings[name]
        guidance = settings.pop("guidance")
        return {**settings, "guidance_scale": guidance}

    def _kind(self, row: Row) -> tuple[Any, ...]:
        """Equal for rows that the pipeline can be asked about together."""
        return (*sorted(self._arguments(row).items()), self._texts(row)[1] is None)


def padding_of(batches: Iterable[Batch]) -> tuple[int, int]:
    """How many pictures batches make, and how many more they compute and throw away."""
    made = thrown = 0
    for batch in batches:
        made += len(batch.pictures)
        thrown += batch.size - len(batch.pictures)
    return made, thrown


def _text_bucket(tokens: Any, place: int) -> int:
    """The smallest of the text lengths that holds the prompt, and its negative prompt too."""
    longest = tokens.ids.shape[1]
    length = int(tokens.lengths[place])
    if tokens.negative_lengths is not None:
        length = max(length, int(tokens.negative_lengths[place]))
    return next((bucket for bucket in TEXT_BUCKETS if length <= bucket < longest), longest)
