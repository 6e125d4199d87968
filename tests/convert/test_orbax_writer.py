"""Arrays written piece by piece, and the copying of pieces."""

import functools
import weakref

import numpy as np
import pytest

from convert import orbax_writer
from convert.copying import copy_into, is_finite
from convert.dtypes import BFLOAT16
from convert.orbax_writer import StreamedArray, chunk_shape, open_array, write_checkpoint


def test_pieces_of_a_chunk_are_all_that_is_held(tmp_path):
    """The numbers that wait for the disk at any time, of an array many times larger."""
    shape, dtype = (40, 256, 1024), np.dtype(np.float32)
    made, alive = [], []

    def make(layer):
        part = np.full((1, *shape[1:]), layer, dtype)
        made.append(weakref.ref(part))
        alive.append(sum(reference() is not None for reference in made))
        return part

    def pieces():
        for layer in range(shape[0]):
            index = (slice(layer, layer + 1), slice(0, shape[1]), slice(0, shape[2]))
            yield index, functools.partial(make, layer)

    array = StreamedArray(shape, dtype, True, pieces)
    limit, orbax_writer._PENDING_BYTES = orbax_writer._PENDING_BYTES, 4 << 20
    try:
        write_checkpoint(tmp_path / "checkpoint", {"a.b": array})
    finally:
        orbax_writer._PENDING_BYTES = limit
    stored = open_array(tmp_path / "checkpoint", "a.b")
    np.testing.assert_array_equal(stored[:, 3, 5].read().result(), np.arange(40, dtype=np.float32))
    assert stored.chunk_layout.read_chunk.shape == (1, 256, 1024)
    assert max(alive) <= 9 < array.nbytes / (1 << 20)


def test_stored_pieces_are_one_layer_or_less():
    bfloat16, float32 = BFLOAT16, np.dtype(np.float32)
    assert chunk_shape((32, 2048, 8192), bfloat16, stacked=True) == (1, 512, 8192)
    assert chunk_shape((40, 3584, 14336), bfloat16, stacked=True) == (1, 276, 14336)
    assert chunk_shape((32128, 2048), float32, stacked=False) == (1004, 2048)
    assert chunk_shape((512,), float32, stacked=False) == (512,)
    assert chunk_shape((3, 1 << 26), float32, stacked=False) == (1, 1 << 26)


@pytest.mark.parametrize("shape", [(3, 5), (129, 300), (256, 128), (130, 129, 2), (400,), (0, 4)], ids=str)
@pytest.mark.parametrize("dtype", [np.float16, np.float32], ids=["float16", "float32"])
def test_transposed_copies_are_copies(shape, dtype):
    array = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    for part in (array, array.T, array[1:].T, array[..., 1:].T):
        out = np.full(part.shape, 7, BFLOAT16)
        copy_into(out, part)
        np.testing.assert_array_equal(out, part.astype(BFLOAT16))


def test_a_piece_that_cannot_be_made_stops_the_writing(tmp_path):
    def make(layer):
        if layer == 3:
            raise ValueError("layer 3 is not there")
        return np.zeros((1, 4), np.float32)

    def pieces():
        for layer in range(20):
            yield (slice(layer, layer + 1), slice(0, 4)), functools.partial(make, layer)

    with pytest.raises(ValueError, match="layer 3 is not there"):
        write_checkpoint(tmp_path / "checkpoint", {"a": StreamedArray((20, 4), np.dtype(np.float32), True, pieces)})


@pytest.mark.parametrize("dtype", [BFLOAT16, np.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("place", [0, 65_535, 65_536, 99_999])
def test_a_number_that_is_none_is_found_wherever_it_is(dtype, place):
    array = np.full(100_000, -3e38, dtype)
    array[:4] = 0.0, -0.0, 1e-40, 3e38
    assert is_finite(array)
    for wrong in (np.inf, -np.inf, np.nan):
        array[place] = wrong
        assert not is_finite(array)
