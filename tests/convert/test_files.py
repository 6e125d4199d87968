import dataclasses
import json
import math
import struct
import tracemalloc

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from convert import rules
from convert.safetensors_io import open_safetensors, save_safetensors
from toprovar_jax.errors import UserInputError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_safetensors(path, {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(4, np.int64)}, {})
    return path


def refusal(path) -> str:
    with pytest.raises(UserInputError) as caught:
        open_safetensors(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_written_file_is_read_by_the_public_library_with_its_metadata(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {"x": np.arange(4, dtype=np.float32), "y": np.ones((2, 1), ml_dtypes.bfloat16)}
    save_safetensors(path, tensors, {"format": "pt", "model": "tiny"})
    with safetensors.safe_open(str(path), "np") as opened:
        assert opened.metadata() == {"format": "pt", "model": "tiny"}
        np.testing.assert_array_equal(opened.get_tensor("x"), tensors["x"])
    np.testing.assert_array_equal(open_safetensors(path)["y"](), tensors["y"])


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"]
)
def test_types_shapes_and_scalars_come_back(tmp_path, dtype):
    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    path = tmp_path / "model.safetensors"
    tensors = {"odd": np.ones((3, 1, 5), dtype), "none": np.zeros((0, 4), dtype), "scalar": np.array(1, dtype)}
    safetensors.numpy.save_file(tensors, str(path))
    read = {name: reader() for name, reader in open_safetensors(path).items()}
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (dtype, tensor.shape)
        np.testing.assert_array_equal(read[name], tensor)


def test_tensors_are_views_of_the_file_not_copies(file):
    readers = open_safetensors(file)
    first, second = readers["a"](), readers["a"]()
    assert not first.flags.owndata
    assert not first.flags.writeable
    assert np.shares_memory(first, second)


def test_a_file_without_tensors_opens(tmp_path):
    path = tmp_path / "none.safetensors"
    safetensors.numpy.save_file({}, str(path))
    assert open_safetensors(path) == {}


@pytest.mark.parametrize("left", [4, 30, -1], ids=["in the length", "in the header", "in the data"])
def test_a_truncated_file_says_so(file, left):
    file.write_bytes(file.read_bytes()[:left])
    assert "not a readable safetensors file" in refusal(file)
    assert "cut short: fetch it again" in refusal(file)


@pytest.mark.parametrize("content", [b"", b"hello\n" * 99, b"PK\x03\x04" + bytes(200)], ids=["empty", "text", "zip"])
def test_foreign_contents_are_refused(file, content):
    file.write_bytes(content)
    assert "not a readable safetensors file" in refusal(file)


def test_a_stub_left_by_a_version_control_system_is_refused(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4404019200\n")
    assert "not a readable safetensors file" in refusal(file)


def test_a_folder_and_a_missing_file_are_told_apart(tmp_path):
    assert "name the file inside it" in refusal(tmp_path)
    assert "does not exist" in refusal(tmp_path / "model.safetensors")


def test_element_types_without_a_meaning_here_are_named(tmp_path):
    header = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert "tensors of type F8_E4M3" in refusal(path)


def test_foreign_names_are_refused_by_the_model(kind, tmp_path):
    with pytest.raises(UserInputError, match=r"unknown: transformer\.h\.0\.attn\.weight; missing: "):
        kind.through_file({"transformer.h.0.attn.weight": np.zeros((2, 2), np.float32)}, tmp_path / "m.safetensors")


def test_a_failed_write_leaves_the_old_file_and_no_other(file, monkeypatch):
    before = file.read_bytes()

    def fail(tensors, path, metadata):
        with open(path, "wb") as half:
            half.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save_safetensors(file, {"a": np.zeros(1, np.float32)}, {})
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_filling_holds_one_parameter_at_a_time(infinity, tmp_path):
    """The readers hand out views, so what a fill holds on the host is what it passes to ``place``, one by one."""
    size = {"text_length": 500, "num_layers": 12}
    abstract, table = infinity.abstract(**size), infinity.table.rules(dataclasses.replace(infinity.config, **size))
    targets = {
        ".".join(map(str, path)): leaf.get_value().shape for path, leaf in nnx.to_flat_state(nnx.state(abstract))
    }
    tensors = {}
    for rule in table:
        shape = targets[rule.target]
        tensors[rule.official] = np.zeros(rule.expected_shape(shape if rule.layer is None else shape[1:]), np.float32)
    save_safetensors(tmp_path / "model.safetensors", tensors, {})
    readers = open_safetensors(tmp_path / "model.safetensors")
    total = sum(tensor.nbytes for tensor in tensors.values())
    largest = max(4 * math.prod(shape) for shape in targets.values())
    del tensors
    placed = jnp.zeros(())
    tracemalloc.start()
    try:
        rules.fill_module(abstract, table, readers, source="file", place=lambda array: placed)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * largest < total / 2
