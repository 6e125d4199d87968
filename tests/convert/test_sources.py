"""Whatever weights come in are found; what is missing, double or out of place is one line."""

import json
import os
import pathlib
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from convert.safetensors_io import save_safetensors
from convert.sources import group_sources, open_source
from toprovar_jax.errors import UserInputError

A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(4, np.float16)


def write(path, **tensors):
    save_safetensors(path, {name.replace("__", "."): tensor for name, tensor in tensors.items()}, {})
    return path


@pytest.fixture
def sharded(tmp_path):
    """Two shards and their index."""
    write(tmp_path / "model-00001-of-00002.safetensors", a=A)
    write(tmp_path / "model-00002-of-00002.safetensors", b=B)
    index(tmp_path, a="model-00001-of-00002.safetensors", b="model-00002-of-00002.safetensors")
    return tmp_path


def index(folder, **placed):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def refusal(*paths, **options) -> str:
    with pytest.raises(UserInputError) as caught:
        open_source(paths, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_whole(source):
    assert source.tensors.keys() == {"a", "b"}
    assert (source.tensors["a"].shape, source.tensors["a"].dtype) == (A.shape, A.dtype)
    np.testing.assert_array_equal(source.tensors["a"](), A)
    np.testing.assert_array_equal(source.tensors["b"](), B)


def test_a_file_and_a_folder_with_one_file_are_the_same(tmp_path):
    path = write(tmp_path / "model.safetensors", a=A, b=B)
    (tmp_path / "config.json").write_text("{}")
    for given in (path, tmp_path):
        assert_whole(open_source([given]))
        assert open_source([given]).files == (path,)


def test_shards_are_found_by_folder_by_index_and_by_name(sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    for given in ([sharded], [sharded / "model.safetensors.index.json"], shards):
        source = open_source(given)
        assert_whole(source)
        assert sorted(source.files) == shards
    (sharded / "model.safetensors.index.json").unlink()
    assert_whole(open_source([sharded]))


def test_shards_of_one_set_are_grouped_and_other_files_stay_alone(tmp_path):
    names = ["x-00001-of-00002.bin", "y-00001-of-00001.bin", "x-00002-of-00002.bin", "vae.pth"]
    groups = group_sources(tmp_path / name for name in names)
    assert [[path.name for path in group] for group in groups] == [[names[0], names[2]], [names[1]], [names[3]]]


def test_safetensors_are_preferred_to_another_copy(sharded):
    (sharded / "pytorch_model.bin").write_bytes(b"not read")
    (sharded / "pytorch_model.bin.index.json").write_text("not read")
    assert_whole(open_source([sharded]))


def test_prefixes_of_training_wrappers_are_taken_off(tmp_path):
    path = write(tmp_path / "m.safetensors", module__a=A, module__b=B)
    assert_whole(open_source([path]))
    path = write(tmp_path / "n.safetensors", module__a=A, b=B)
    assert open_source([path]).tensors.keys() == {"module.a", "b"}


@pytest.mark.parametrize(
    "names",
    [
        ("_orig_mod.module.a", "_orig_mod.module.b"),
        ("module.module.a", "module.module.b"),
        ("module._orig_mod.module._fsdp_wrapped_module.a", "module._orig_mod.module.b"),
        ("a", "_checkpoint_wrapped_module.b"),
    ],
)
def test_wrappers_within_wrappers_are_taken_off(tmp_path, names):
    tensors = dict(zip(names, (A, B), strict=True))
    assert_whole(open_source([write(tmp_path / "m.safetensors", **tensors)]))
    index(tmp_path, **dict.fromkeys(names, "m.safetensors"))
    assert_whole(open_source([tmp_path / "model.safetensors.index.json"]))


def test_wrappers_are_taken_out_of_the_middle_of_names_and_modules_of_the_network_stay(tmp_path):
    name = "blocks.0._fsdp_wrapped_module.module._checkpoint_wrapped_module.1._orig_mod.weight"
    path = write(tmp_path / "m.safetensors", **{name: A, "b": B})
    assert open_source([path]).tensors.keys() == {"blocks.0.module.1.weight", "b"}


def test_a_tensor_with_and_without_its_wrapper_is_refused(tmp_path):
    path = write(tmp_path / "m.safetensors", **{"x._orig_mod.a": A, "x.a": A})
    assert "has 'x.a' twice, once with and once without" in refusal(path)


def test_a_source_that_is_given_twice_is_said_to_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for again in (pathlib.Path("m.pth"), tmp_path / "m.pth"):
        with pytest.raises(UserInputError, match=r"m\.pth: is given twice"):
            group_sources([pathlib.Path("m.pth"), again])


@pytest.mark.parametrize("name", ["pipe", "pipe.pth", "pipe.safetensors"])
def test_a_pipe_is_no_regular_file(tmp_path, name):
    os.mkfifo(tmp_path / name)
    assert "is no regular file" in refusal(tmp_path / name)


def test_an_index_may_start_with_a_byte_order_mark(sharded):
    path = sharded / "model.safetensors.index.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert_whole(open_source([path]))


def test_several_files_in_a_folder_have_to_be_told_apart(tmp_path):
    write(tmp_path / "one.safetensors", a=A)
    write(tmp_path / "two.safetensors", a=A)
    assert "holds several files of weights (one.safetensors, two.safetensors); name one of them" in refusal(tmp_path)


def test_what_is_not_there_is_said(tmp_path):
    assert "holds no file that ends with .safetensors, .bin" in refusal(tmp_path)
    assert "does not exist" in refusal(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("")
    assert "is no file of weights" in refusal(tmp_path / "notes.txt")
    safetensors.numpy.save_file({}, tmp_path / "empty.safetensors")
    assert "has no tensors" in refusal(tmp_path / "empty.safetensors")


def test_a_missing_shard_is_named(sharded):
    missing = sharded / "model-00002-of-00002.safetensors"
    missing.unlink()
    assert f"file {missing}: is missing" in refusal(sharded)
    message = refusal(sharded / "model-00001-of-00002.safetensors")
    assert "must be given together, without model-00002-of-00002.safetensors" in message


def test_index_and_shards_must_agree(sharded):
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    index(sharded, a=first, b=second, c=second)
    assert "names tensors that its shards lack ('c')" in refusal(sharded)
    index(sharded, a=first, c=second)
    assert "has tensor 'b', not so the index" in refusal(sharded)
    index(sharded, a=second, b=second)
    assert "has tensor" not in refusal(sharded)
    assert "names tensors that its shards lack ('a')" in refusal(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded):
    write(sharded / "model-00002-of-00002.safetensors", a=A, b=B)
    (sharded / "model.safetensors.index.json").unlink()
    assert "has tensor 'a', and so has model-00001-of-00002.safetensors" in refusal(sharded)


@pytest.mark.parametrize(
    "name",
    ["../m.safetensors", "/etc/m.safetensors", "a/m.safetensors", "..", "", "a\\m.safetensors", ".m.safetensors"],
)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, name):
    folder = tmp_path / "inside"
    folder.mkdir()
    for place in (tmp_path, folder):
        write(place / "m.safetensors", a=A)
    index(folder, a=name)
    assert "must name files of weights that lie beside it" in refusal(folder / "model.safetensors.index.json")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "cannot be read (not JSON)"),
        ("[" * 100_000, "cannot be read (not JSON)"),
        ("[]", "must have a weight_map"),
        ('{"weight_map": {}}', "must have a weight_map"),
        ('{"weight_map": ["a"]}', "must have a weight_map"),
        ('{"weight_map": {"a": 3}}', "must name files of weights"),
        ('{"weight_map": {"a": "x.bin", "a": "y.bin"}}', "gives 'a' twice"),
    ],
)
def test_a_spoilt_index_is_refused(tmp_path, text, reason):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    assert reason in refusal(path)


# Files of torch.save, in the shape that it gives them: a pickle, and the numbers of each tensor in an entry of its own.


def save_pth(path, tree):
    """``tree`` of dictionaries and float32 arrays as torch writes it."""
    numbers = []

    def text(value: str) -> bytes:
        return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()

    def integer(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    def pickled(value) -> bytes:
        if isinstance(value, dict):
            return b"}(" + b"".join(text(key) + pickled(item) for key, item in value.items()) + b"u"
        if not isinstance(value, np.ndarray):
            return integer(value)
        numbers.append(value.astype(np.float32))
        storage = text("storage") + b"ctorch\nFloatStorage\n" + text(str(len(numbers) - 1)) + text("cpu")
        shape = b"(" + b"".join(map(integer, value.shape)) + b"t"
        strides = b"(" + b"".join(integer(step // value.itemsize) for step in value.strides) + b"t"
        arguments = b"((" + storage + integer(value.size) + b"tQ" + integer(0) + shape + strides + b"\x89"
        return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"ccollections\nOrderedDict\n)Rt" + b"R"

    content = b"\x80\x02" + pickled(tree) + b"."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        for i, array in enumerate(numbers):
            archive.writestr(f"archive/data/{i}", array.tobytes())
    return path


@pytest.fixture
def pth(tmp_path):
    return lambda tree: save_pth(tmp_path / "m.pth", tree)


BARE = {"a": A, "b": B.astype(np.float32)}


@pytest.mark.parametrize(
    ("wrap", "keys"),
    [
        (lambda bare: bare, ""),
        (lambda bare: {"trainer": {"gpt_fsdp": bare, "step": 3}, "epoch": 1}, "trainer.gpt_fsdp"),
        (lambda bare: {"trainer": {"gpt_ema_fsdp": bare, "gpt_fsdp": {}}}, "trainer.gpt_ema_fsdp"),
        (lambda bare: {"trainer": {"gpt_ema": bare}}, "trainer.gpt_ema"),
        (lambda bare: {"vae": bare, "ema": {"c": A}}, "vae"),
        (lambda bare: {"state_dict": bare}, "state_dict"),
        (lambda bare: {"model": bare, "lr": A}, "model"),
        (lambda bare: {"module": {f"module.{name}": tensor for name, tensor in bare.items()}}, "module"),
    ],
)
def test_state_dicts_are_found_in_what_wraps_them(pth, wrap, keys):
    source = open_source([pth(wrap(BARE))])
    assert source.wrapped_in == keys
    assert source.averaged == ("ema" in keys)
    assert source.tensors.keys() == {"a", "b"}
    np.testing.assert_array_equal(source.tensors["a"](), A)


def test_averaged_weights_are_taken_where_asked_for(pth):
    path = pth({"trainer": {"gpt_fsdp": {"a": A}, "gpt_ema_fsdp": {"a": A + 1}}})
    np.testing.assert_array_equal(open_source([path]).tensors["a"](), A)
    averaged = open_source([path], ema=True)
    assert averaged.averaged
    np.testing.assert_array_equal(averaged.tensors["a"](), A + 1)
    assert "has no averaged weights; leave out --ema" in refusal(pth(BARE), ema=True)


def test_files_that_hold_no_tensors_say_what_they_hold(pth):
    assert "holds no tensors but 'epoch', 'optimizer'" in refusal(pth({"epoch": 3, "optimizer": {"lr": 1}}))
    assert "m.pth: holds no tensors; name another file" in refusal(pth({}))
    assert "holds a int, not tensors by name" in refusal(pth(3))


def test_an_index_that_is_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    os.mkfifo(index)
    with pytest.raises(UserInputError, match="must be a file"):
        open_source([index])


def test_names_out_of_a_damaged_file_cannot_command_a_terminal(tmp_path):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}  # half of what the shape needs
    header = json.dumps({"\x1b[2Jweight": entry}, ensure_ascii=False).encode()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserInputError) as raised:
        open_source([path])
    assert str(raised.value).isprintable()
