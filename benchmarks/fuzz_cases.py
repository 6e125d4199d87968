"""The files that ``fuzz_checkpoints.py`` gives to the readers: small valid ones, and what was made of them.

A case is known by a seed and a number alone: the same two give the same bytes on every machine.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import pickle
import random
import struct
import zipfile
from collections.abc import Callable

import checkpoint_files as files
import ml_dtypes
import numpy as np

KINDS = ("pth", "safetensors", "safetensors shards", "pth shards")
TYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int64)
SAFE_NAMES = dict(zip(map(np.dtype, TYPES), ("F32", "F16", "BF16", "F64", "I64"), strict=True))
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)
CALLS = ["os.system", "posix.system", "builtins.eval", "builtins.exec", "builtins.open", "builtins.__import__"]
CALLS += ["subprocess.Popen", "shutil.rmtree", "runpy.run_path", "builtins.getattr", "torch.load", "numpy.load"]
PLACES = ["../../etc/passwd", "/etc/passwd", "..", ".", "", "a/../../b.safetensors", "C:\\x.bin", "\0.bin", "ü.bin"]


@dataclasses.dataclass
class Case:
    """A folder to read from.

    Attributes:
      kind: one of :data:`KINDS`.
      mutation: what was done; empty for a valid case.
      target: the file to open, or empty for the folder itself.
      contents: the bytes of every file.
      links: symbolic links and where they point to; an empty one is a named pipe.
      arrays: the tensors that were written, by name.
    """

    kind: str
    mutation: str
    target: str
    contents: dict[str, bytes]
    links: dict[str, str]
    arrays: dict[str, np.ndarray]

    def write(self, folder: pathlib.Path) -> pathlib.Path:
        """Makes the files; returns what to open."""
        folder.mkdir()
        for name, content in self.contents.items():
            (folder / name).write_bytes(content)
        for name, target in self.links.items():
            (folder / name).unlink(missing_ok=True)
            if target:
                (folder / name).symlink_to(target)
            else:
                os.mkfifo(folder / name)
        return folder / self.target


def make_case(seed: int, number: int) -> Case:
    """The case of this number: one in twenty is valid, the others have a mutation, some two."""
    draw = random.Random(f"{seed} {number}")
    kind = KINDS[number % len(KINDS)]
    case = _valid(draw, kind)
    if number // len(KINDS) % 20 == 0:
        return case
    own = {"pth": _PTH, "safetensors": _SAFETENSORS}.get(kind, _FOLDER)
    chosen = draw.choice([_bytes_of_a_file, *own])
    chosen(draw, case)
    case.mutation = chosen.__name__.strip("_").replace("_", " ")
    if draw.random() < 0.2:
        _bytes_of_a_file(draw, case)
        case.mutation += " and bytes"
    return case


def _valid(draw: random.Random, kind: str) -> Case:
    numbers = np.random.default_rng(draw.getrandbits(32))
    arrays = {}
    for i in range(draw.randint(2, 6)):
        shape = tuple(draw.choice((0, 1, 2, 3, 8)) for _ in range(draw.randint(0, 3)))
        arrays[f"blocks.{i}.weight"] = numbers.integers(0, 100, shape).astype(draw.choice(TYPES))
    make, suffix = (files.pth_of, ".bin") if "pth" in kind else (_safetensors, ".safetensors")
    if "shards" not in kind:
        name = "model" + (".pth" if "pth" in kind else suffix)
        return Case(kind, "", name, {name: make(arrays)}, {}, arrays)
    halves = [dict(list(arrays.items())[i::2]) for i in range(2)]
    stem = "pytorch_model" if "pth" in kind else "model"
    shards = [f"{stem}-{i + 1:05d}-of-00002{suffix}" for i in range(2)]
    contents = {shard: make(half) for shard, half in zip(shards, halves, strict=True)}
    placed = {name: shard for shard, half in zip(shards, halves, strict=True) for name in half}
    index = f"{stem}{suffix}.index.json"
    contents[index] = json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}).encode()
    return Case(kind, "", draw.choice(("", index)), contents, {}, arrays)


def _safetensors(arrays: dict[str, np.ndarray]) -> bytes:
    header, at = {}, 0
    for name, array in arrays.items():
        entry = {"dtype": SAFE_NAMES[array.dtype], "shape": array.shape, "data_offsets": [at, at + array.nbytes]}
        header[name], at = entry, at + array.nbytes
    return _with_header(json.dumps(header).encode(), b"".join(array.tobytes() for array in arrays.values()))


def _with_header(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def _damaged(draw: random.Random, content: bytes) -> bytes:
    """Bytes that were cut, flipped, overwritten with extremes, doubled, dropped, exchanged or zeroed."""
    out = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randrange(len(out) + 1)
        stop = min(len(out), at + draw.choice((1, 4, 16, 100)))
        match draw.randrange(8):
            case 0:
                del out[at:]
            case 1:
                for _ in range(draw.randint(1, 8) if out else 0):
                    out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
            case 2:
                wide = draw.choice("BHIQ")
                value = draw.choice(EXTREMES) % 2 ** (8 * struct.calcsize(wide))
                if at + struct.calcsize(wide) <= len(out):
                    struct.pack_into("<" + wide, out, at, value)
            case 3:
                out[at:at] = out[at:stop]
            case 4:
                del out[at:stop]
            case 5:
                out[at:at] = draw.randbytes(stop - at)
            case 6:
                other = draw.randrange(len(out) + 1)
                out[at:stop] = out[other : other + stop - at]
            case 7:
                out[at:stop] = bytes(stop - at)
    return bytes(out)


def _bytes_of_a_file(draw: random.Random, case: Case) -> None:
    name = draw.choice(sorted(case.contents))
    case.contents[name] = _damaged(draw, case.contents[name])


def _rewrite(case: Case, value: object, arrays: dict[str, np.ndarray] | None = None, **how) -> None:
    """The one ``.pth`` file of a case anew, from a pickle or a value that refers to its storages 0, 1 and so on."""
    arrays = case.arrays if arrays is None else arrays
    storages = {str(i): array.tobytes() for i, array in enumerate(arrays.values())}
    case.contents[case.target] = files.pth(value, storages, **how)


def _described(case: Case) -> dict[str, files.Tensor]:
    return {name: files.tensor(str(i), array) for i, (name, array) in enumerate(case.arrays.items())}


def _pickle_bytes(draw: random.Random, case: Case) -> None:
    _rewrite(case, _damaged(draw, files.pth_pickle(_described(case))))


def _pickle_operations(draw: random.Random, case: Case) -> None:
    """Random operations, most of which the reader knows, behind a valid state dict or for themselves."""
    known = [getattr(pickle, name) for name in pickle.__all__ if name.isupper() and len(name) > 1]
    known = [code for code in known if isinstance(code, bytes) and len(code) == 1]
    named = [files.code(files.Name(name)) for name in ("collections.OrderedDict", "torch.Size", "torch.FloatStorage")]
    named += [files.code(value) for value in (1, "a", (), [], {}, None, 2.0, (1, 2))]
    parts = [
        draw.choice((draw.choice(known), draw.choice(named), draw.randbytes(1))) for _ in range(draw.randint(1, 60))
    ]
    value = files.code(_described(case)) if draw.random() < 0.5 else b""
    _rewrite(case, b"\x80\x02" + value + b"".join(parts) + b".")


def _malicious_call(draw: random.Random, case: Case) -> None:
    name, argument = draw.choice(CALLS), draw.choice(("touch canary", "open('canary', 'w')", "canary"))
    module, _, last = name.rpartition(".")
    called = {
        "call": files.Call(name, (argument,)),
        "stack": files.Raw(b"\x8c%c%s\x8c%c%s\x93" % (len(module), module.encode(), len(last), last.encode())
                           + files.code((argument,)) + b"R"),
        "inst": files.Raw(b"(" + files.code(argument) + f"i{module}\n{last}\n".encode()),
        "obj": files.Raw(b"(" + files.code(files.Name(name)) + files.code(argument) + b"o"),
        "new": files.Raw(files.code(files.Name(name)) + files.code((argument,)) + b"\x81"),
        "nested": files.Call("pickle.loads", (pickle.dumps(argument).decode("latin1"),)),
        "build": files.Raw(b"ccollections\nOrderedDict\n)R" + files.code({"__class__": argument}) + b"b"),
        "extension": files.Raw(b"\x82\x01"),
        "persistent": files.Raw(files.code(("storage", files.Name(name), "0", "cpu", 1)) + b"Q"),
        "module id": files.Raw(files.code(("module", files.Name("torch.FloatStorage"), "a", "b")) + b"Q"),
    }  # fmt: skip
    _rewrite(case, _described(case) | {"canary": called[draw.choice(sorted(called))]})


def _lying_tensor(draw: random.Random, case: Case) -> None:
    described = _described(case)
    name = draw.choice(sorted(described))
    number = lambda: draw.choice((-1, 0, 1, 2, 7, 2**20, 2**31, 2**40, 2**63, 2**200, True, 1.5, None, "1"))
    axes = lambda: tuple(number() for _ in range(draw.choice((0, 1, 2, 3, 40))))
    changes = {"count": number, "offset": number, "shape": axes, "strides": axes, "key": lambda: draw.choice(PLACES)}
    for field in draw.sample(sorted(changes), draw.randint(1, 3)):
        described[name] = dataclasses.replace(described[name], **{field: changes[field]()})
    _rewrite(case, described)


def _cycle_or_repetition(draw: random.Random, case: Case) -> None:
    laughs = b"]q\0" + b"".join(b"](h%ch%ceq%c" % (n, n, n + 1) for n in range(draw.randint(5, 100)))
    code = draw.choice((
        b"}q\0X\1\0\0\0ah\0s", b"]q\0h\0a", b"]q\0(h\0ta", laughs, b"]" * 5000 + b"a" * 4999, b")" + b"\x85" * 5000,
        b"}" + 2 * (files.code("w") + b"Ns"), b"(" * 5000, b"r\xff\xff\xff\xff",
        b"\x8b\xff\xff\xff\x7f", b"X\xff\xff\xff\xff", b"B\xff\xff\xff\xff",
    ))  # fmt: skip
    _rewrite(case, _described(case) | {"odd": files.Raw(code)})


def _wrapped(draw: random.Random, case: Case) -> None:
    tree: object = _described(case)
    for _ in range(draw.choice((1, 2, 3, 70))):
        tree = {draw.choice(("trainer", "gpt_fsdp", "vae", "ema", "", "a.b", "é", "k" * 2000, 0, -1, 1.5, None)): tree}
    _rewrite(case, draw.choice((tree, [tree], (tree, tree))))


def _archive_form(draw: random.Random, case: Case) -> None:
    prefix = draw.choice([place + "/" for place in PLACES] + ["archive/", "x" * 2000 + "/"])
    how = {"prefix": prefix, "order": draw.choice(("little", "big", "", "middle")), "align": draw.choice((1, 64))}
    method = draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    _rewrite(case, _described(case), method=method, wide=draw.random() < 0.5, **how)


def _archive_entries(draw: random.Random, case: Case) -> None:
    """Entries dropped, doubled, renamed, added, or made large by compression."""
    names = {f"archive/data/{i}": array.tobytes() for i, array in enumerate(case.arrays.values())}
    entries = {"archive/data.pkl": files.pth_pickle(_described(case)), **names, "archive/version": b"3\n"}
    extra = draw.choice(
        ("archive/constants.pkl", "archive/code/x.py", "b/data.pkl", "data.pkl", "../canary", "/canary", "")
    )
    method = zipfile.ZIP_STORED
    match draw.randrange(4):
        case 0:
            del entries[draw.choice(sorted(entries))]
        case 1:
            entries[extra or "archive/"] = b"x"
        case 2:
            name = draw.choice(sorted(entries))
            entries[draw.choice(PLACES) or "y"] = entries.pop(name)
        case 3:
            entries["archive/data/0"], method = bytes(2**22), zipfile.ZIP_DEFLATED
    case.contents[case.target] = files.archive(entries, method=method)


def _archive_directory(draw: random.Random, case: Case) -> None:
    """Wrong numbers in the zip headers: signatures stay, so that the fields are looked at."""
    out = bytearray(case.contents[case.target])
    starts = [at for at in range(len(out) - 3) if out[at : at + 4] in (b"PK\1\2", b"PK\3\4", b"PK\5\6")]
    for _ in range(draw.randint(1, 3)):
        at, wide = draw.choice(starts) + draw.randrange(4, 46), draw.choice("BHI")
        if at + 4 <= len(out):
            struct.pack_into(
                "<" + wide, out, at, draw.choice((*EXTREMES, draw.randrange(5000))) % 256 ** struct.calcsize(wide)
            )
    case.contents[case.target] = bytes(out)


def _foreign_content(draw: random.Random, case: Case) -> None:
    contents = (
        b"", b"\n", b"<!DOCTYPE html>" * 50, b"version https://git-lfs.github.com/spec/v1\n", bytes(5000),
        pickle.dumps({"w": 1}), bytes(257) + b"ustar" + bytes(999), b"\xff" * 5000,
        b"\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\2M\xe9\3.",
        b"PK\5\6" + bytes(18), b"PK\3\4" + bytes(30) + b"PK\5\6" + bytes(18), _with_header(b"{}", b""),
    )  # fmt: skip
    case.contents[draw.choice(sorted(case.contents))] = draw.choice(contents)


def _header(draw: random.Random, case: Case) -> None:
    """A safetensors header with wrong values, wrong types, deep nesting, keys given twice, or a wrong length."""
    content = case.contents[case.target]
    length = struct.unpack_from("<Q", content)[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    entry = header[draw.choice(sorted(header))]
    number = lambda: draw.choice((-1, 0, 1, 3, 2**31, 2**40, 2**63 - 1, 2**63, 2**64, 1e300, None, "1", [], True))
    match draw.randrange(7):
        case 0:
            entry["shape"] = [number() for _ in range(draw.choice((0, 1, 2, 3, 100)))]
        case 1:
            entry["data_offsets"] = [number() for _ in range(draw.choice((0, 1, 2, 2, 2, 3)))]
        case 2:
            entry["dtype"] = draw.choice(("F32", "F64", "BOOL", "F8_E4M3", "C64", "", "f32", None, 4))
        case 3:
            del entry[draw.choice(sorted(entry))]
        case 4:
            header["__metadata__"] = draw.choice(({"a": 1}, {"a": "b"}, [], None, {"format": "x" * 10_000}))
        case 5:
            header |= {"../canary": dict(entry), "\x1b[31m\n": dict(entry), "": dict(entry)}
        case 6:
            entry["extra"] = "x"
    text = json.dumps(header).encode()
    doubled = text[:-1] + b"," + text[1:]
    text = draw.choice(
        (text, text, text, doubled, b"[" * 20_000, b'{"a":' * 20_000, text + b" " * 1000, text[:-3], b"\xff" + text)
    )
    wrong = draw.choice((None, None, None, 0, 1, len(text) - 1, len(text) + 1, 2**31, 100_000_001, 2**63, 2**64 - 1))
    case.contents[case.target] = _with_header(text, data, wrong)


def _index_of(case: Case) -> str:
    return next(name for name in case.contents if name.endswith(".index.json"))


def _index_places(draw: random.Random, case: Case) -> None:
    index = json.loads(case.contents[_index_of(case)])
    placed = index["weight_map"]
    places = [
        *PLACES,
        *case.contents,
        "missing.bin",
        None,
        3,
        [],
        {},
        "x" * 5000 + ".bin",
        "../canary.safetensors",
        "\ud800.bin",
    ]
    for name in draw.sample(sorted(placed), draw.randint(1, len(placed))):
        placed[name] = draw.choice(places)
    if draw.random() < 0.3:
        placed[draw.choice(("unknown", "", "../canary", "\x1b[31m"))] = draw.choice(places)
    case.contents[_index_of(case)] = json.dumps(index).encode()


def _index_form(draw: random.Random, case: Case) -> None:
    text = case.contents[_index_of(case)]
    forms = (
        b"", b"{}", b"[]", b"null", b"3", b'{"weight_map": []}', b'{"weight_map": {}}', b"[" * 100_000,
        b'{"a":' * 100_000, b"9" * 100_000, text + text, text[:-2] + b"," + text[1:], b"\xff\xfe" + text, b"NaN",
        b'{"weight_map": {"a": "' + b"x" * 10**6 + b'"}}', text.replace(b'"blocks', b'"\\ud800blocks'),
    )  # fmt: skip
    case.contents[_index_of(case)] = draw.choice(forms)


def _files_in_folder(draw: random.Random, case: Case) -> None:
    name = draw.choice(sorted(case.contents))
    match draw.randrange(6):
        case 0:
            del case.contents[name]
        case 1:
            case.links[name] = draw.choice(("/etc/passwd", "..", ".", name, "/dev/zero", "/dev/null", "missing"))
        case 2:
            case.links[name] = ""
        case 3:
            case.contents["another" + pathlib.Path(name).suffix] = case.contents[name]
        case 4:
            first, second = sorted(case.contents)[:2]
            case.contents[first], case.contents[second] = case.contents[second], case.contents[first]
        case 5:
            del case.contents[_index_of(case)]
            case.target = ""


_PTH: list[Callable[[random.Random, Case], None]] = [
    _pickle_bytes, _pickle_operations, _malicious_call, _lying_tensor, _cycle_or_repetition, _wrapped, _archive_form,
    _archive_entries, _archive_directory, _foreign_content,
]  # fmt: skip
_SAFETENSORS = [_header, _header, _foreign_content]
_FOLDER = [_index_places, _index_form, _files_in_folder, _foreign_content]
