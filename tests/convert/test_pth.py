"""Files of torch.save that should be read: what comes back is what was saved, in place."""

import functools
import pathlib
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.pth import open_pth
from toprovar_jax.errors import UserInputError

HERE = pathlib.Path(__file__).parent
DATA = HERE / "data"
WHOLE = np.arange(24, dtype=np.float32).reshape(4, 6)


@pytest.fixture
def opened(tmp_path):
    def open_content(content):
        path = tmp_path / "model.pth"
        path.write_bytes(content)
        return open_pth(path)

    return open_content


@functools.cache
def torch_types():
    return open_pth(DATA / "types.pth").tensors


@pytest.mark.parametrize("name", sorted(torch_types()))
def test_every_type_that_torch_writes_comes_back(name):
    array = torch_types()[name]()
    assert array.dtype == np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    assert array.astype(np.float32).tolist() == [[1, 0, 1 if name == "bool" else 3]]


@pytest.mark.parametrize("file", ["layouts", "protocol4"])
def test_strided_scalar_empty_repeated_and_tied_tensors_come_back(file):
    tensors = open_pth(DATA / f"{file}.pth").tensors
    expected = {
        "whole": WHOLE,
        "transposed": WHOLE.T,
        "part": WHOLE[1:3, 2::2],
        "scalar": WHOLE[2, 3],
        "none": np.zeros((0, 4), np.float32),
        "repeated": np.full((3, 5), 2.5, np.float32),
        "parameter": np.ones(2, np.float32),
        "tied": WHOLE,
    }
    assert tensors.keys() == expected.keys()
    for name, array in expected.items():
        assert (tensors[name].shape, tensors[name].dtype) == (array.shape, array.dtype)
        assert tensors[name].nbytes == array.nbytes
        np.testing.assert_array_equal(tensors[name](), array, strict=True)


def test_tensors_are_read_only_views_and_share_their_storage():
    tensors = open_pth(DATA / "layouts.pth").tensors
    arrays = {name: tensor() for name, tensor in tensors.items()}
    assert not any(array.flags.owndata or array.flags.writeable for array in arrays.values())
    assert all(array.flags.aligned for array in arrays.values())
    for name in ("transposed", "part", "scalar", "tied"):
        assert np.shares_memory(arrays[name], arrays["whole"])
    assert not np.shares_memory(arrays["parameter"], arrays["whole"])


def test_a_training_checkpoint_keeps_its_plain_values_and_names_tensors_by_path():
    file = open_pth(DATA / "training.pth")
    assert list(file.tensors) == [
        "trainer.gpt_fsdp.weight",
        "trainer.gpt_fsdp.bias",
        "trainer.gpt_opt.state.0.step",
    ]
    assert file.tree["trainer"]["gpt_fsdp"]["weight"] is file.tensors["trainer.gpt_fsdp.weight"]
    assert file.tree["trainer"]["gpt_fsdp"]["weight"]().tolist() == [[0, 1], [2, 3], [4, 5]]
    assert {name: value for name, value in file.tree.items() if name != "trainer"} == {
        "args": {"lr": 1e-3, "bf16": True},
        "arch": "infinity_2b",
        "iter": 70_000,
        "seed": 2**63 + 5,
        "milestones": [1, -5, 2.5, None, (), b"raw", b"", {}],
        "size": (1, 2),
        "dtype": np.dtype(ml_dtypes.bfloat16),
        "device": "cuda:1",
    }


def test_a_bare_tensor_has_an_empty_path():
    file = open_pth(DATA / "bare.pth")
    assert file.tensors == {"": file.tree}
    assert file.tree().tolist() == [0, 1, 2]


@pytest.mark.parametrize("prefix", ["", "archive/", "infinity_2b_reg/", "../../etc/", "/etc/", "C:\\x/", "ü/"])
def test_the_name_of_the_archive_is_a_name_only(files, opened, prefix):
    assert opened(files.pth_of({"w": WHOLE}, prefix=prefix)).tensors["w"]().tolist() == WHOLE.tolist()


def test_headers_with_64_bit_sizes_are_read(files, opened):
    content = bytearray(files.pth_of({"w": WHOLE, "b": WHOLE[0]}, wide=True))
    # The directory too, as archives of more than 4 GiB have it: sizes and offset of every entry in an extra field.
    start = struct.unpack_from("<I", content, len(content) - 6)[0]
    directory, at = b"", start
    while content[at : at + 4] == b"PK\1\2":
        header = bytearray(content[at : at + 46])
        size, name, extra, offset = struct.unpack_from("<IHH10xI", header, 24)
        struct.pack_into("<II", header, 20, 0xFFFFFFFF, 0xFFFFFFFF)
        struct.pack_into("<H", header, 30, extra + 28)
        struct.pack_into("<I", header, 42, 0xFFFFFFFF)
        wide = struct.pack("<HHQQQ", 1, 24, size, size, offset)
        directory += header + content[at + 46 : at + 46 + name + extra] + wide
        at += 46 + name + extra
    count = struct.unpack_from("<H", content, len(content) - 12)[0]
    end = start + len(directory)
    content[start:] = directory + struct.pack("<4sQ12xQQQQ", b"PK\6\6", 44, count, count, len(directory), start)
    content += struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
    content += struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    tensors = opened(bytes(content)).tensors
    assert tensors["w"]().tolist() == WHOLE.tolist()
    assert tensors["b"]().tolist() == WHOLE[0].tolist()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int64", "uint8", "bool"])
def test_numbers_in_the_other_byte_order_are_turned(files, opened, dtype):
    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    array = np.array([[0, 1, 3], [1, 2, 0]]).astype(dtype)
    turned = array.view(f"u{dtype.itemsize}").byteswap().tobytes()
    file = opened(files.pth({"w": files.tensor("0", array)}, {"0": turned}, order="big"))
    np.testing.assert_array_equal(file.tensors["w"](), array, strict=True)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int64])
def test_numbers_at_odd_places_are_copied_to_even_ones(files, opened, dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    copied = set()
    for length in range(array.itemsize):
        tensor = opened(files.pth_of({"w": array}, align=1, prefix="a" * length + "/")).tensors["w"]
        assert tensor().flags.aligned
        copied.add(tensor().flags.owndata or tensor().base.flags.owndata)
        np.testing.assert_array_equal(tensor(), array, strict=True)
    assert copied == {False, True}


@settings(deadline=None, max_examples=50, derandomize=True)
@given(data=st.data())
def test_any_layout_inside_its_storage_is_read_as_numpy_reads_it(files, tmp_path_factory, data):
    shape = tuple(data.draw(st.lists(st.integers(0, 3), max_size=3)))
    strides = tuple(data.draw(st.integers(0, 9)) for _ in shape)
    offset = data.draw(st.integers(0, 30))
    numbers = np.arange(40, dtype=np.int32)
    path = tmp_path_factory.mktemp("layout") / "w.pth"
    tensor = files.Tensor("0", numbers.dtype, 40, offset, shape, strides)
    path.write_bytes(files.pth({"w": tensor}, {"0": numbers.tobytes()}))
    reach = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if np.prod(shape) and reach >= 40:
        with pytest.raises(UserInputError, match="reaches beyond its storage '0' of 40 numbers"):
            open_pth(path)
    else:
        expected = np.lib.stride_tricks.as_strided(numbers[offset:], shape, [4 * stride for stride in strides])
        np.testing.assert_array_equal(open_pth(path).tensors["w"](), expected, strict=True)
