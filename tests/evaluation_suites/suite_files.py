"""Small prompt files in the formats of the public suites, and readers of pictures that walk as their scorers do."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable

from PIL import Image

TEXTS = ("a red cone", "two blue cubes", "a green ring left of a sphere", "a metal cylinder", "three small spheres")

Seen = dict[str, list[Image.Image]]
"""The pictures that a scorer compares with each prompt."""


def write_geneval(folder: pathlib.Path) -> pathlib.Path:
    path = folder / "evaluation_metadata.jsonl"
    records = [{"tag": "counting", "include": [{"class": "cone", "count": 1}], "prompt": text} for text in TEXTS]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_dpg(folder: pathlib.Path) -> pathlib.Path:
    path = folder / "prompts"
    path.mkdir()
    for name, text in zip(("10", "2", "COCOval7", "vrd3", "whoops0"), TEXTS, strict=True):
        (path / f"{name}.txt").write_text(text)
    return path


def write_hpsv2(folder: pathlib.Path) -> pathlib.Path:
    path = folder / "benchmark"
    path.mkdir()
    for style, texts in zip(("anime", "concept-art", "paintings", "photo"), _parts(), strict=True):
        (path / f"{style}.json").write_text(json.dumps(texts))
    return path


def write_imagereward(folder: pathlib.Path) -> pathlib.Path:
    path = folder / "benchmark-prompts.json"
    path.write_text(json.dumps([{"id": f"00{n}-0{n}", "prompt": text} for n, text in enumerate(TEXTS)]))
    return path


def write_mjhq(folder: pathlib.Path) -> pathlib.Path:
    path = folder / "meta_data.json"
    entries = {f"{n}f0a": {"category": "food" if n % 2 else "people", "prompt": t} for n, t in enumerate(TEXTS)}
    path.write_text(json.dumps(entries))
    return path


def scan_geneval(out: pathlib.Path, _prompts: pathlib.Path, _side: int) -> Seen:
    seen: Seen = {}
    for folder in (out / "images").iterdir():
        if not folder.is_dir() or not folder.name.isdigit():
            continue
        record = json.loads((folder / "metadata.jsonl").read_text())
        assert record.keys() >= {"tag", "include", "prompt"}
        for picture in (folder / "samples").iterdir():
            if picture.is_file() and re.match(r"\d+\.png", picture.name):
                seen.setdefault(record["prompt"], []).append(_opened(picture))
    return seen


def scan_dpg(out: pathlib.Path, prompts: pathlib.Path, side: int) -> Seen:
    seen: Seen = {}
    for picture in (out / "images").iterdir():
        text = (prompts / f"{picture.name.split('.')[0]}.txt").read_text()
        for left, top in ((0, 0), (side, 0), (0, side), (side, side)):
            box = (left, top, left + side, top + side)
            seen.setdefault(text, []).append(_opened(picture).crop(box))
    return seen


def scan_hpsv2(out: pathlib.Path, prompts: pathlib.Path, _side: int) -> Seen:
    seen: Seen = {}
    for style in (out / "images").iterdir():
        for index, text in enumerate(json.loads((prompts / f"{style.name}.json").read_text())):
            seen.setdefault(text, []).append(_opened(style / f"{index:05d}.jpg"))
    return seen


def scan_imagereward(out: pathlib.Path, prompts: pathlib.Path, _side: int) -> Seen:
    entries = json.loads(prompts.read_text())
    each = len(list((out / "images").iterdir())) // len(entries)
    paths = [[out / "images" / f"{entry['id']}_{n}.png" for n in range(each)] for entry in entries]
    # Infinity's own script reads the paths from a list beside the folder.
    listed = json.loads((out / "metadata.jsonl").read_text())
    assert [[out / path for path in entry["gen_image_paths"]] for entry in listed] == paths
    assert [{"id": entry["id"], "prompt": entry["prompt"]} for entry in listed] == entries
    return {entry["prompt"]: [_opened(path) for path in row] for entry, row in zip(entries, paths, strict=True)}


def scan_mjhq(out: pathlib.Path, prompts: pathlib.Path, _side: int) -> Seen:
    entries = json.loads(prompts.read_text())
    seen: Seen = {}
    for picture in (out / "images").rglob("*"):
        if picture.is_file():
            assert entries[picture.stem]["category"] == picture.parent.name
            seen.setdefault(entries[picture.stem]["prompt"], []).append(_opened(picture))
    return seen


WRITE: dict[str, Callable[[pathlib.Path], pathlib.Path]] = {
    "geneval": write_geneval,
    "dpg": write_dpg,
    "hpsv2": write_hpsv2,
    "imagereward": write_imagereward,
    "mjhq": write_mjhq,
}
SCAN: dict[str, Callable[[pathlib.Path, pathlib.Path, int], Seen]] = {
    "geneval": scan_geneval,
    "dpg": scan_dpg,
    "hpsv2": scan_hpsv2,
    "imagereward": scan_imagereward,
    "mjhq": scan_mjhq,
}
IMAGES = {"geneval": 4, "dpg": 4, "hpsv2": 1, "imagereward": 10, "mjhq": 1}


def _parts() -> list[list[str]]:
    return [list(TEXTS[:2]), [TEXTS[2]], [TEXTS[3]], [TEXTS[4]]]


def _opened(path: pathlib.Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image.convert("RGB")
