"""Files that should be refused: each with one line that names what is wrong, and none with any effect."""

import pathlib
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from convert.pth import file, open_pth, unpickler
from toprovar_jax.errors import UserInputError

HERE = pathlib.Path(__file__).parent
DATA = HERE / "data"
ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def refusal(tmp_path):
    def refuse(content) -> str:
        path = tmp_path / "model.pth"
        path.write_bytes(content)
        with pytest.raises(UserInputError) as caught:
            open_pth(path)
        assert str(caught.value).startswith(f"file {path}: ")
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == [path]
        return str(caught.value)

    return refuse


@pytest.mark.parametrize(
    ("name", "reason", "remedy"),
    [
        ("legacy", "format of torch before 1.6", "torch.save(torch.load(old), new)"),
        ("script", "is a TorchScript program", "torch.save(torch.jit.load(old).state_dict(), new)"),
        ("module", "refers to torch.nn.modules.linear.Linear", "torch.save(model.state_dict(), new)"),
        ("sparse", "refers to torch._utils._rebuild_sparse_tensor", "as plain tensors"),
        ("quantised", "refers to torch._utils._rebuild_qtensor", "as plain tensors"),
        ("complex", "refers to torch.ComplexFloatStorage", "as plain tensors"),
        ("float8", "refers to torch.float8_e4m3fn", "as plain tensors"),
        ("negated", "is to be negated", "torch.save(torch.load(old), new)"),
        ("storage", "neither a tensor nor a plain value at 'w'", "as plain tensors"),
    ],
)
def test_what_torch_writes_besides_plain_tensors_is_refused_with_a_remedy(refusal, name, reason, remedy):
    message = refusal((DATA / f"{name}.pth").read_bytes())
    assert reason in message
    assert remedy in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"hello\n" * 99, "is not a zip archive"),
        (bytes(257) + b"ustar" + bytes(250), "format of torch before 1.6"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 440\n", "git lfs pull"),
        (b"PK\3\4" + bytes(500), "has no directory at its end"),
    ],
    ids=["empty", "text", "tar", "pointer", "half a zip"],
)
def test_foreign_files_are_refused(refusal, content, reason):
    assert reason in refusal(content)


def test_a_folder_and_a_missing_file_are_told_apart(tmp_path):
    with pytest.raises(UserInputError, match="name the file inside it"):
        open_pth(tmp_path)
    with pytest.raises(UserInputError, match="does not exist"):
        open_pth(tmp_path / "model.pth")


def test_every_truncation_is_refused(refusal):
    content = (DATA / "bare.pth").read_bytes()
    for length in range(0, len(content), 7):
        assert "fetch it again" in refusal(content[:length])


def test_compressed_and_encrypted_entries_are_refused(files, refusal):
    assert "has the compressed zip entry" in refusal(files.pth_of({"w": ARRAY}, method=zipfile.ZIP_DEFLATED))
    content = bytearray(files.pth_of({"w": ARRAY}))
    content[content.index(b"PK\1\2") + 8] |= 1
    assert "has the encrypted zip entry 'archive/data.pkl'" in refusal(content)


def directory_of(content) -> int:
    return struct.unpack_from("<I", content, len(content) - 6)[0]


def test_lies_of_the_zip_directory_are_refused(files, refusal):
    plain = files.pth_of({"a": ARRAY, "b": ARRAY})
    start = directory_of(plain)
    at = plain.index(b"archive/data/1", start) - 46
    first = struct.unpack_from("<I", plain, plain.index(b"archive/data/0", start) - 4)[0]

    def changed(where, layout, *values):
        content = bytearray(plain)
        struct.pack_into(layout, content, where, *values)
        return refusal(content)

    assert "gives the zip entry 'archive/data/1' two lengths" in changed(at + 24, "<I", 23)
    assert "gives the storage '1' 6 numbers of 4 bytes where it has 23 bytes" in changed(at + 20, "<II", 23, 23)
    assert "ends before its zip entry 'archive/data/1'" in changed(at + 20, "<II", 2**31, 2**31)
    assert "zip entries that overlap" in changed(at + 20, "<II", 200, 200)
    assert "damaged zip directory" in changed(at + 20, "<II", 2**32 - 1, 2**32 - 1)
    assert "has no zip entry 'archive/data/1' where its directory says" in changed(at + 42, "<I", first)
    assert "ends before its zip entry" in changed(at + 42, "<I", 2**32 - 2)
    assert "gives the zip entry 'archive/data/0' twice" in changed(at + 46 + 13, "<c", b"0")
    assert "damaged zip directory" in changed(len(plain) - 6, "<I", start + 1)
    assert "damaged zip directory" in changed(len(plain) - 12, "<H", 2**16 - 1)
    assert "does not end where the file does" in refusal(plain + b"more")


def test_an_archive_needs_exactly_one_pickle(files, refusal):
    assert "has 0 entries of the name data.pkl" in refusal(files.archive({"a/version": b"3\n"}))
    pickled = files.pth_pickle({})
    assert "has 2 entries of the name data.pkl" in refusal(
        files.archive({"a/data.pkl": pickled, "b/data.pkl": pickled})
    )


def test_storages_must_be_there_and_be_used_as_one_type(files, refusal):
    described = files.tensor("0", ARRAY)
    assert "has no zip entry 'archive/data/0'" in refusal(files.pth({"w": described}, {}))
    both = {"w": described, "v": files.tensor("0", ARRAY.view(np.int32))}
    assert "gives the storage '0' two types" in refusal(files.pth(both, {"0": ARRAY.tobytes()}))
    assert "unknown order of bytes" in refusal(files.pth_of({"w": ARRAY}, order="middle"))


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "reason"),
    [
        (-1, (2,), (1,), "negative"),
        (0, (-2,), (1,), "negative"),
        (5, (2,), (-1,), "negative"),
        (2**62, (2,), (1,), "or over"),
        (0, (2**62,), (0,), "or over"),
        (0, (2,), (2**62,), "or over"),
        (2**200, (), (), "or over"),
        (1, (6,), (1,), "reaches beyond"),
        (0, (2, 3), (4, 1), "reaches beyond"),
        (7, (0,), (1,), "reaches beyond"),
        (6, (), (), "reaches beyond"),
        (0, (2**40,), (0,), "repeats its storage"),
        (0, (0, 2**40, 2**40), (1, 1, 1), "repeats its storage"),
        (0, (2,), (1, 1), "1 sizes and 2 strides"),
        (0, (1,) * 40, (1,) * 40, "too many axes"),
        (True, (2,), (1,), "damaged pickle"),
        (0, (2.0,), (1,), "damaged pickle"),
    ],
)
def test_a_tensor_must_lie_inside_its_storage(files, refusal, offset, shape, strides, reason):
    tensor = files.Tensor("0", np.float32, 6, offset, shape, strides)
    assert reason in refusal(files.pth({"w": tensor}, {"0": ARRAY.tobytes()}))


@pytest.mark.parametrize("count", [5, 7, -6, 2**70])
def test_a_storage_must_have_the_length_that_its_tensors_say(files, refusal, count):
    tensor = files.Tensor("0", np.float32, count, 0, (1,), (1,))
    assert "gives the storage '0'" in refusal(files.pth({"w": tensor}, {"0": ARRAY.tobytes()}))


NAMES = ["os.system", "posix.system", "nt.system", "builtins.eval", "__builtin__.exec", "subprocess.Popen"]
NAMES += [
    "builtins.getattr",
    "torch.load",
    "numpy.load",
    "shutil.rmtree",
    "runpy._run_code",
    "torch.storage._load_from_bytes",
]


@pytest.mark.parametrize("name", NAMES)
def test_calls_are_refused_by_name_and_not_made(files, refusal, tmp_path, name):
    argument = f"open({str(tmp_path / 'canary')!r}, 'w')"
    module, _, last = name.rpartition(".")
    named = files.Raw(files.code(module) + files.code(last) + pickle.STACK_GLOBAL)
    for value in (
        files.Call(name, (argument,)),
        files.Raw(files.code(named) + files.code((argument,)) + pickle.REDUCE),
    ):
        message = refusal(files.pth({"w": value}, {}))
        assert f"refers to {name.replace('__builtin__', 'builtins')}, which is not a plain tensor" in message


@pytest.mark.parametrize(
    ("operations", "name"),
    [
        (b"(ios\nsystem\n", "INST"),
        (b"(ccollections\nOrderedDict\no", "OBJ"),
        (b"\x82\x01", "EXT1"),
        (b"Pos.system\n", "PERSID"),
        (b"\x92", "NEWOBJ_EX"),
        (b"\x8b" + struct.pack("<I", 2**31 - 1), "LONG4"),
        (b"\x8f", "EMPTY_SET"),
        (b"I1\n", "INT"),
        (b"\xff", "0xff"),
    ],
)
def test_other_operations_are_refused_by_name(files, refusal, operations, name):
    assert f"uses the pickle operation {name}, " in refusal(files.pth(files.Raw(operations), {}))


@pytest.mark.parametrize(
    "operations",
    [
        b"",
        b"a",
        b"t",
        b"}e",
        b"](K\x01u",
        b"}(K\x01u",
        b"K",
        b"X\xff\xff\xff\x7fabc",
        b"X\x01\0\0\0\xff",
        b"h\x07",
        b"\x94",
        b"Q",
        b"K\x01Q",
        b"cos",
        b"ccollections\nOrderedDict\nK\x01R",
        b"ccollections\nOrderedDict\nK\x01\x85R",
        b"K\x01)R",
        b"K\x01}b",
        b"K\x01(\x85",
        b"ctorch\nSize\n]R",
        b"ctorch\nSize\n]\x85R",
        b"ctorch\ndevice\nK\x01\x85R",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R",
        b"ctorch._utils\n_rebuild_parameter\n)R",
        b"c_codecs\nencode\nX\x01\0\0\0aX\x04\0\0\0zlib\x86R",
    ],
    ids=repr,
)
def test_a_pickle_that_makes_no_sense_is_damaged(files, refusal, operations):
    assert "has a damaged pickle (at byte" in refusal(files.pth(files.Raw(operations), {}))


@pytest.mark.parametrize("key", [("a",), 1.5, None, b"x", "k" * 1001, 2**70])
def test_keys_are_short_text_and_integers(files, refusal, key):
    assert "has a dictionary with a key" in refusal(files.pth({key: 1}, {}))


def test_a_key_given_twice_is_refused(files, refusal):
    twice = files.Raw(b"}(" + 2 * (files.code("w") + files.code(1)) + b"u")
    assert "gives 'w' twice" in refusal(files.pth(twice, {}))
    described = files.tensor("0", ARRAY)
    tree = {"a": {"b": described}, "a.b": described}
    assert "two tensors at the path 'a.b'" in refusal(files.pth(tree, {"0": ARRAY.tobytes()}))


@pytest.mark.parametrize("cycle", [b"}q\0X\x01\0\0\0ah\0s", b"]q\0h\0a", b"]q\0(h\0ta"], ids=["dict", "list", "tuple"])
def test_a_container_that_holds_itself_is_refused(files, refusal, cycle):
    assert "a container that holds itself" in refusal(files.pth({"w": files.Raw(cycle)}, {}))


LAUGHS = b"]q\0" + b"".join(b"](h%ch%ceq%c" % (n, n, n + 1) for n in range(60))
LAYERS = b"](" + b"]" * 500 + b"e" + b"\x85" * 100
TEXT = b"X\0\x10\0\0" + b"a" * 4096
MANY = b"K\1" * 1000
COPIES = b"(c_codecs\nencode\nq\0" + TEXT + b"X\6\0\0\0latin1\x86q\1R" + b"h\0h\1R" * 300 + b"t"
SHARED = b"(}q\0(" + b"".join(b"J" + struct.pack("<i", n) + b"N" for n in range(300)) + b"u"
NAMESPACES = SHARED + b"cargparse\nNamespace\nq\1)\x81h\0b" + b"h\1)\x81h\0b" * 200 + b"t"
SIZES = b"(ctorch\nSize\nq\0(" + MANY + b"t\x85q\1R" + b"h\0h\1R" * 300 + b"t"
ARGUMENTS = b"(ctorch._utils\n_rebuild_parameter\nq\0(" + MANY + b"tq\1R" + b"h\0h\1R" * 300 + b"t"
MEMO = b"N" + b"".join(b"r" + struct.pack("<I", n << 20) for n in range(2**12))


BOMBS = {
    "shared lists": (LAUGHS, "holds more than 1,000 values"),
    "deep lists": (LAYERS, "containers more than 64 deep"),
    "deep tuples": (b")" + b"\x85" * 1900, "containers more than 64 deep"),
    "dictionaries": (b"(" + b"}" * 3000 + b"t", "more than 2,000 operations"),
    "marks": (b"(" * 3000, "more than 2,000 operations"),
    "memo": (MEMO, "more than 2,000 operations"),
    "copies of text": (COPIES, "damaged pickle"),
    "copies of attributes": (NAMESPACES, "damaged pickle"),
    "long sizes": (SIZES, "damaged pickle"),
    "long arguments": (ARGUMENTS, "damaged pickle"),
    "long integer": (b"\x8a\xff" + bytes(255), "an integer of 255 bytes"),
    "long pickle": (bytes(2**16), "has a pickle of more than 65,536 bytes"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_pickle_cannot_fill_memory(files, refusal, monkeypatch, name):
    """With a five-hundredth of the limits, and so of the memory and the time that they allow."""
    monkeypatch.setattr(unpickler, "_MOST_OPERATIONS", 2000)
    monkeypatch.setattr(unpickler, "LONGEST", 2**16)
    monkeypatch.setattr(file, "_MOST_PARTS", 1000)
    operations, reason = BOMBS[name]
    content = files.pth(files.Raw(operations), {})
    tracemalloc.start()
    try:
        message = refusal(content)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert reason in message
    assert peak < 2e6


def test_names_from_the_file_are_shown_short_and_without_control_characters(files, refusal):
    message = refusal(files.pth(files.Call("os.\x1b[31m" + "x" * 150, ()), {}))
    assert "\x1b" not in message
    assert len(message) < 400
