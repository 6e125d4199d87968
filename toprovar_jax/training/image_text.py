"""Pictures with captions: folders and webdatasets, in buckets of one size each, in an order that a number fixes.

Everything is found in one pass at the start, which reads captions and the headers of pictures but no pixels; after
that batch ``i`` is a function of the seed and ``i``, so a run that is resumed at a step reads what it would have read.
Tar shards are streamed once and then read in place: nothing is unpacked. Imports no jax.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from toprovar_jax.errors import UserInputError
from toprovar_jax.schedule import ASPECT_RATIOS, Grid
from toprovar_jax.shapes import UInt8

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
LISTINGS = ("metadata.jsonl", "captions.jsonl")
"""Files that hold a folder's captions, one object a line: ``{"file_name": ..., "text": ...}``."""

_CAPTION_FIELDS = ("caption", "text")
_TURNED = (5, 6, 7, 8)  # EXIF orientations in which height and width change places


@dataclasses.dataclass(frozen=True)
class Sample:
    """A picture and its caption, the picture still where it was found.

    Attributes:
      name: for messages: its path inside the data.
      caption: what it shows.
      bucket: the nearest aspect ratio, a key of ``ASPECT_RATIOS``.
      file: the picture's file, or the shard it lies in.
      start, size: its bytes in that file.
    """

    name: str
    caption: str
    bucket: str
    file: Path
    start: int
    size: int

    def read(self) -> bytes:
        """The encoded picture.

        Raises:
          OSError: the file is gone.
        """
        with self.file.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


class Problems:
    """What could not be used and why; one line per reason, however many there are."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, None]] = {}

    def add(self, reason: str, name: str) -> None:
        """Count ``name``, once per reason."""
        self._found.setdefault(reason, {})[name] = None

    def lines(self) -> list[str]:
        """``3 skipped, no caption: a.png and others``."""
        return [
            f"{len(names)} skipped, {reason}: {next(iter(names))}{' and others' * (len(names) > 1)}"
            for reason, names in self._found.items()
        ]


def find_samples(path: str | Path, *, aspect_ratio: str | None = None) -> tuple[list[Sample], Problems]:
    """Every usable picture with a caption, sorted by name.

    Args:
      path: a folder of pictures beside ``.txt`` files of the same name, or with one of :data:`LISTINGS`; a folder of
        ``.tar`` shards, or one shard, in which ``key.jpg`` (or ``.png``, ``.webp``) goes with ``key.txt`` or with
        ``key.json`` that has a field ``caption`` or ``text``. As in every webdataset, a key ends at the first dot of
        the file's name, so ``photo.v2.png`` is no picture but another field of ``photo``.
      aspect_ratio: put all into this bucket instead of the nearest one.

    Returns:
      The samples, and what was passed over: pictures that cannot be read or have no caption, pictures that lie outside
      the folder by their names or by links (links to whole folders are not entered at all; shards may be links),
      members of shards that are no plain files or belong to no picture, and what lies beside shards.

    Raises:
      UserInputError: no such folder, a compressed shard, or nothing in it that can be used.
    """
    path, problems = Path(path), Problems()
    try:
        exists, is_folder = path.exists(), path.is_dir()
    except (OSError, ValueError) as error:  # too long a name, a zero byte
        raise UserInputError(f"data {str(path)[:60]!r}", f"cannot be looked up ({error})", "check the path") from None
    if not exists:
        raise UserInputError(f"data {path}", "does not exist", "name a folder of pictures with captions")
    if is_folder:
        packed = sorted(file for file in path.iterdir() if file.name.endswith((".tar.gz", ".tgz", ".tar.zst")))
        shards = sorted(path.glob("*.tar"))
    else:
        shards, packed = ([path], []) if path.suffix == ".tar" else ([], [path])
    if packed and not shards:
        raise UserInputError(
            f"data {packed[0]}",
            "must be a folder or plain .tar shards (a compressed one cannot be read from the middle)",
            "unpack it once with gunzip; pictures are compressed already",
        )
    if is_folder and shards:
        _count_beside(path, packed, problems)
    found = _from_shards(shards, problems) if shards else _from_folder(path, problems)
    samples = []
    for raw, head in found:
        size = _picture_size(raw, head, problems)
        if size is not None:
            samples.append(dataclasses.replace(raw, bucket=aspect_ratio or nearest_aspect_ratio(*size)))
    if not samples:
        why = f" ({'; '.join(problems.lines())})" if problems.lines() else ""
        raise UserInputError(
            f"data {path}",
            f"holds no picture with a caption{why}",
            f"put NAME.png beside NAME.txt, add a {LISTINGS[0]}, or give .tar shards",
        )
    return sorted(samples, key=lambda sample: sample.name), problems


def _from_folder(folder: Path, problems: Problems) -> Iterator[tuple[Sample, bytes | None]]:
    listing = next((folder / name for name in LISTINGS if (folder / name).is_file()), None)
    root = os.path.realpath(folder)
    if listing is not None:
        pairs = _listed(folder, listing, problems)
    else:
        pairs = ((file, _text_beside(file, root)) for file in _pictures_in(folder, problems))
    for file, caption in pairs:
        name = file.relative_to(folder).as_posix()
        if not os.path.isfile(file):  # which, unlike Path.is_file, is also False for names too long to exist
            problems.add("no such file", name)
        elif not _leads_into(root, file):
            problems.add("leaves the folder", name)
        elif not caption:
            problems.add("no caption", name)
        else:
            yield Sample(name, caption, "", file, 0, file.stat().st_size), None


def _pictures_in(folder: Path, problems: Problems) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in IMAGE_ENDINGS:
            yield file
        elif file.is_symlink() and file.is_dir():
            problems.add("a link to a folder", file.relative_to(folder).as_posix())


def _leads_into(root: str, file: Path) -> bool:
    """Whether an existing file lies in the folder whose real path is ``root``, all links followed."""
    return Path(os.path.realpath(file)).is_relative_to(root)


def _text_beside(file: Path, root: str) -> str:
    beside = file.with_suffix(".txt")
    try:
        # Editors of some systems begin UTF-8 with a mark, which would else be the caption's first character.
        text = beside.read_text(encoding="utf-8-sig") if beside.is_file() and _leads_into(root, beside) else ""
    except (OSError, ValueError):
        return ""
    return " ".join(text.split())


def _listed(folder: Path, listing: Path, problems: Problems) -> Iterator[tuple[Path, str]]:
    try:
        lines = listing.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError):
        raise UserInputError(f"file {listing}", "must be readable UTF-8 text", "save it as UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{listing.name} line {number}"
        try:
            record = json.loads(line)
            name, caption = record["file_name"], _caption_of(record)
            if not isinstance(name, str) or "\0" in name:
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            problems.add("not an object with file_name and text", where)
            continue
        if not _stays_inside(name):
            problems.add("leaves the folder", where)
            continue
        yield folder / name, caption


def _caption_of(record: Mapping[str, Any]) -> str:
    value = next((record[field] for field in _CAPTION_FIELDS if isinstance(record.get(field), str)), "")
    return " ".join(value.split())


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name.replace("\\", "/"))
    return not path.is_absolute() and ".." not in path.parts and ":" not in path.parts[0] if path.parts else False


def _count_beside(folder: Path, packed: Sequence[Path], problems: Problems) -> None:
    """What a folder holds beside the shards that are read."""
    for file in packed:
        problems.add("compressed shard beside plain ones", file.name)
    for file in _pictures_in(folder, problems):
        problems.add("picture beside .tar shards, which alone are read", file.relative_to(folder).as_posix())


def _from_shards(shards: Sequence[Path], problems: Problems) -> Iterator[tuple[Sample, bytes | None]]:
    for shard in shards:
        pictures: dict[str, tuple[str, int, int, bytes]] = {}
        captions: dict[str, str] = {}
        texts: dict[str, str] = {}
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    if member.isdir():
                        continue
                    # Nothing is unpacked, so such names could do no harm; but who writes them means some.
                    if not member.isfile() or not _stays_inside(member.name):
                        problems.add("no plain file of the shard", f"{shard.name}/{member.name}")
                        continue
                    key, ending = _key(member.name)
                    if ending in (".txt", ".json"):
                        texts.setdefault(key, member.name)
                    if ending in IMAGE_ENDINGS and key in pictures:
                        problems.add("second picture of its key", f"{shard.name}/{member.name}")
                    elif ending in IMAGE_ENDINGS:
                        head = _member(archive, member, _HEAD)
                        pictures[key] = member.name, member.offset_data, member.size, head
                    elif ending == ".txt":
                        captions[key] = " ".join(_member(archive, member).decode("utf-8-sig", "replace").split())
                    elif ending == ".json":
                        if key not in captions:
                            captions[key] = _caption_in(_member(archive, member))
                    else:
                        problems.add(_why_no_part(ending), f"{shard.name}/{member.name}")
        except (tarfile.TarError, OSError, EOFError) as error:
            problems.add(f"shard cut short or damaged ({error})", shard.name)
        for key, (name, start, size, head) in pictures.items():
            if captions.get(key):
                yield Sample(f"{shard.name}/{name}", captions[key], "", shard, start, size), head
            else:
                problems.add("no caption", f"{shard.name}/{name}")
        for key, name in texts.items():
            if key not in pictures:
                problems.add("no picture of its key", f"{shard.name}/{name}")


def _why_no_part(ending: str) -> str:
    """Why a member of a shard is neither picture nor caption, by what follows the first dot of its name."""
    if PurePosixPath(ending).suffix in (*IMAGE_ENDINGS, ".txt", ".json"):
        return "more than one dot in its name (webdataset keys end at the first)"
    return "neither picture nor caption by its ending"


_HEAD = 1 << 16
"""Bytes in which a picture tells its size, nearly always; if not, the whole picture is read."""


def _key(name: str) -> tuple[str, str]:
    """A webdataset's key and ending: parted at the first dot of the last component."""
    folder, _, last = name.rpartition("/")
    stem, dot, ending = last.partition(".")
    return f"{folder}/{stem}", (dot + ending).lower()


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo, size: int = -1) -> bytes:
    file = archive.extractfile(member)
    return b"" if file is None else file.read(size)


def _caption_in(content: bytes) -> str:
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return ""
    return _caption_of(record) if isinstance(record, dict) else ""


def _picture_size(sample: Sample, head: bytes | None, problems: Problems) -> Grid | None:
    """Height and width of a picture as it is looked at, from its header; None if it has none."""
    sources = ([head] if head is not None and len(head) < sample.size else []) + [None]
    for source in sources:
        try:
            with _open(sample.read() if source is None else source) as image:
                width, height = image.size
                # Where a PNG has no EXIF ahead of its pixels, asking for it would decode them all.
                has_exif = image.format != "PNG" or "exif" in image.info
                turned = has_exif and image.getexif().get(ExifTags.Base.Orientation) in _TURNED
                return (width, height) if turned else (height, width)
        except Exception:  # decoders fail in many ways; whatever they raise, the picture cannot be used
            continue
    problems.add("picture cannot be read", sample.name)
    return None


def _open(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP"))


def nearest_aspect_ratio(height: int, width: int) -> str:
    """The template whose ratio is nearest to a picture's, in octaves, so that tall and wide are alike."""

    def distance(name: str) -> float:
        tall, wide = map(int, name.split(":"))
        return abs(math.log2(height / width) - math.log2(tall / wide))

    return min(ASPECT_RATIOS, key=distance)


def decode_picture(content: bytes, size: Grid) -> UInt8[np.ndarray, "h w 3"]:
    """Encoded bytes as pixels of one size.

    Turned as its EXIF says, transparent parts on white, cropped to the middle and resized with antialiasing (Lanczos,
    as the released models' data).

    Args:
      content: JPEG, PNG or WebP.
      size: height and width.

    Raises:
      Exception: whatever the decoder raises if the picture is broken.
    """
    height, width = size
    with _open(content) as opened:
        opened.load()
        image = _as_rgb(ImageOps.exif_transpose(opened))
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
    box = (left, top, left + scale * width, top + scale * height)
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box))


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, which a plain conversion would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


@dataclasses.dataclass(frozen=True, eq=False)
class ImageTextBatch:
    """One batch, all of one size.

    Attributes:
      bucket: its aspect ratio.
      images: pixels.
      samples: where they come from, with their captions.
    """

    bucket: str
    images: UInt8[np.ndarray, "B h w 3"]
    samples: tuple[Sample, ...]


class ImageTextData:
    """Training and held-out batches of samples.

    Every bucket's samples are shuffled anew each epoch and cut into batches; what is left over waits for another
    epoch's shuffle. A bucket with fewer samples than a batch fills one by repeating them.

    Args:
      samples: from :func:`find_samples`.
      sizes: height and width of every bucket that occurs.
      batch_size: pictures per batch.
      seed: fixes the held-out samples and the order.
      held_out: share of the samples, in [0, 1), that training never sees; rounded down, but one at least if it is
        above zero and there are two.
      problems: receives pictures that turn out broken when they are decoded; the next of their bucket, in the order
        of the samples, takes their place.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        sizes: Mapping[str, Grid],
        *,
        batch_size: int,
        seed: int = 0,
        held_out: float = 0.0,
        problems: Problems | None = None,
    ):
        self.sizes, self.batch_size, self.seed = sizes, batch_size, seed
        self.problems = Problems() if problems is None else problems
        order = np.random.default_rng((seed, 0)).permutation(len(samples))
        kept_back = min(max(int(held_out * len(samples)), 1), len(samples) - 1) if held_out > 0 else 0
        hidden = {int(i) for i in order[:kept_back]}
        self.training = _by_bucket(sample for i, sample in enumerate(samples) if i not in hidden)
        self.held_out = _by_bucket(samples[i] for i in sorted(hidden))
        self._epoch: tuple[int, list[tuple[str, list[int]]]] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """How many batches see (nearly) every picture once."""
        return sum(max(1, len(samples) // self.batch_size) for samples in self.training.values())

    def batch(self, index: int) -> ImageTextBatch:
        """Batch ``index`` of training, of however many epochs.

        Raises:
          UserInputError: not one picture of its bucket can be decoded.
        """
        epoch, place = divmod(index, self.batches_per_epoch)
        bucket, rows = self._plan(epoch)[place]
        return self._load(bucket, self.training[bucket], rows)

    def held_out_batches(self) -> Iterator[tuple[ImageTextBatch, int]]:
        """The held-out pictures, and how many of each batch count: the last of a bucket is filled by repeating."""
        for bucket, samples in self.held_out.items():
            for start in range(0, len(samples), self.batch_size):
                rows = [i % len(samples) for i in range(start, start + self.batch_size)]
                yield self._load(bucket, samples, rows), min(self.batch_size, len(samples) - start)

    def _plan(self, epoch: int) -> list[tuple[str, list[int]]]:
        """Bucket and rows of every batch of an epoch. Threads may race here: they would all write the same."""
        kept = self._epoch
        if kept is not None and kept[0] == epoch:
            return kept[1]
        rng = np.random.default_rng((self.seed, 1, epoch))
        batches: list[tuple[str, list[int]]] = []
        for bucket, samples in self.training.items():
            order = rng.permutation(len(samples))
            repeated = np.resize(order, max(len(order) // self.batch_size, 1) * self.batch_size)
            batches += [(bucket, [int(row) for row in rows]) for rows in repeated.reshape(-1, self.batch_size)]
        plan = [batches[i] for i in rng.permutation(len(batches))]
        self._epoch = (epoch, plan)
        return plan

    def _load(self, bucket: str, samples: Sequence[Sample], rows: Sequence[int]) -> ImageTextBatch:
        images, chosen = [], []
        for row in rows:
            for other in range(len(samples)):
                sample = samples[(row + other) % len(samples)]
                try:
                    images.append(decode_picture(sample.read(), self.sizes[bucket]))
                except Exception:  # decoders fail in many ways; whatever they raise, the picture cannot be used
                    self.problems.add("picture cannot be decoded", sample.name)
                    continue
                chosen.append(sample)
                break
            else:
                raise UserInputError(
                    f"data of aspect ratio {bucket}",
                    f"holds no picture that can be decoded ({samples[0].name} and {len(samples) - 1} more)",
                    "remove or replace them",
                )
        return ImageTextBatch(bucket, np.stack(images), tuple(chosen))


def _by_bucket(samples: Iterator[Sample]) -> dict[str, list[Sample]]:
    buckets: dict[str, list[Sample]] = {}
    for sample in samples:
        buckets.setdefault(sample.bucket, []).append(sample)
    return dict(sorted(buckets.items()))
