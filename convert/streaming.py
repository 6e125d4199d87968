"""A recognised network as arrays that are read from its files piece by piece, and the proof that they arrived."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from convert.copying import copy_into, is_finite
from convert.dtypes import BFLOAT16, FLOAT32, fast_dtype
from convert.orbax_writer import Index, StreamedArray, chunk_shape, open_array
from convert.recognise import Recognised
from convert.rules import Rule, spoilt_checkpoint

Dtype = Literal["bfloat16", "float32", "exact"]


class DifferenceError(RuntimeError):
    """What was written is not what was read."""


def stored_dtype(recognised: Recognised, target: str, dtype: Dtype) -> np.dtype:
    """The dtype in which one parameter is kept.

    ``float32`` is for everything. ``bfloat16`` is for what fast precision would round anyway, see
    :func:`convert.dtypes.fast_dtype`; the rest is float32, unless the file itself has no more than bfloat16. ``exact``
    is float32 except for the latter: no bit is lost, and none is added.
    """
    if dtype == "float32":
        return FLOAT32
    if all(recognised.reading[rule.official]().dtype == BFLOAT16 for rule in recognised.rules[target]):
        return BFLOAT16
    return FLOAT32 if dtype == "exact" else fast_dtype(recognised.kind.name, target)


def streamed_arrays(
    recognised: Recognised, dtype: Dtype, progress: Callable[[int], None] = lambda nbytes: None
) -> dict[str, StreamedArray]:
    """The network's parameters by path, to be produced when they are written.

    Args:
      recognised: the network.
      dtype: see :func:`stored_dtype`.
      progress: told the bytes of each piece when it is about to be written.

    Raises:
      UserInputError: when pieces are made: a tensor has numbers that are not finite in the chosen dtype.
    """

    def array(target: str) -> StreamedArray:
        shape, chosen = recognised.shapes[target], stored_dtype(recognised, target, dtype)

        def made(rule: Rule, part: np.ndarray) -> np.ndarray:
            piece = np.empty(part.shape, chosen)
            with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found below, by its name
                copy_into(piece, part)
            if not is_finite(piece):
                raise spoilt_checkpoint(recognised.source.label, [rule.official])
            return piece if rule.layer is None else piece[None]

        def pieces() -> Iterator[tuple[Index, Callable[[], np.ndarray]]]:
            for rule, index, part in _parts(recognised, target, chosen):
                yield index, functools.partial(made, rule, part)
                progress(part.size * chosen.itemsize)

        return StreamedArray(shape, chosen, recognised.rules[target][0].layer is not None, pieces)

    return {target: array(target) for target in recognised.shapes}


def verify(
    path: Path, recognised: Recognised, dtype: Dtype, progress: Callable[[int], None] = lambda nbytes: None
) -> int:
    """Read both sides again and compare every tensor bit for bit, after the cast and in the file's own layout.

    Args:
      path: the written checkpoint.
      recognised: what it was written from.
      dtype: as it was written.
      progress: told the bytes of each piece when it has been compared.

    Returns:
      How many tensors were compared.

    Raises:
      DifferenceError: a tensor is not the same.
    """
    count = 0
    for target in recognised.shapes:
        chosen = stored_dtype(recognised, target, dtype)
        stored = open_array(path, target)
        if stored.shape != recognised.shapes[target] or stored.dtype.numpy_dtype != chosen:
            raise DifferenceError(f"{path.name} has {target} in another shape or type than it was written")
        for rule, index, part in _parts(recognised, target, chosen):
            ours = stored[index].read().result().reshape(part.shape)
            # The transposition is undone rather than done again, so that a mistake in it cannot hide.
            lying, back = (part.T, ours.T) if rule.layout == "linear" else (part, ours)
            returned = np.empty(lying.shape, chosen)
            copy_into(returned, back)
            if not np.array_equal(_bits(returned), _bits(lying.astype(chosen, order="C"))):
                raise DifferenceError(f"{path.name} does not hold {rule.official} as it was read")
            progress(ours.nbytes)
        count += len(recognised.rules[target])
    return count


def _parts(recognised: Recognised, target: str, dtype: np.dtype) -> Iterator[tuple[Rule, Index, np.ndarray]]:
    """Each tensor of a parameter in our layout, in views no larger than a stored chunk, and where they belong."""
    shape = recognised.shapes[target]
    for rule in recognised.rules[target]:
        stacked = rule.layer is not None
        rows = chunk_shape(shape, dtype, stacked=stacked)[int(stacked)]
        rest = shape[1:] if stacked else shape
        ours = rule.to_ours(recognised.reading[rule.official](), rest)
        layer = () if rule.layer is None else (slice(rule.layer, rule.layer + 1),)
        for start in range(0, rest[0], rows):
            stop = min(start + rows, rest[0])
            index = (*layer, slice(start, stop), *(slice(0, length) for length in rest[1:]))
            yield rule, index, ours[start:stop]


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.itemsize}")
