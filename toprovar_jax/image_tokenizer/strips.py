"""The decoder in horizontal strips: the same picture, in less memory.

Normalisation needs the whole map, so it is the convolutions that are cut, not the picture: each one runs over the rows
of a strip and one row more on either side, out of a whole map in memory. Normalising, activating and doubling are done
to those rows only. What lies in memory whole is thereby the map that a block adds to, and the first convolution's
result, which stays in the dtype of its products until it is read. Pictures are decoded one after the other.

At full size those maps set the peak, however many strips there are (benchmarks/decoder_memory.py). The compiler for
TPUs needs little more for one whole picture as it is, and less than in strips: there, strips pay for several pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from toprovar_jax.image_tokenizer.blocks import Conv, GroupNorm, Moments, ResBlock, upsample_nearest
from toprovar_jax.shapes import Array, Float, Int

if TYPE_CHECKING:
    from toprovar_jax.image_tokenizer.autoencoder import Decoder

Start = Int[Array, ""]
"""The first row of a strip."""

Whole = TypeVar("Whole")


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How maps of one size are cut: ``count`` strips of ``rows`` rows; the last may reach beyond ``height``."""

    count: int
    rows: int
    height: int
    width: int

    @classmethod
    def of(cls, height: int, width: int, strips: int) -> _Cut:
        rows = -(-height // min(strips, height))
        return cls(-(-height // rows), rows, height, width)

    def doubled(self) -> _Cut:
        return _Cut(self.count, 2 * self.rows, 2 * self.height, 2 * self.width)

    def fill(self, whole: Whole, function: Callable[[Start, Whole], Whole]) -> Whole:
        """Arrays ``[cells, C]`` with every strip replaced, in place, by the rows ``[h, w, C]`` of ``function``."""

        def replace(index: Int[Array, ""], whole: Whole) -> Whole:
            start = self.rows * index

            def put(array: Array, rows: Array) -> Array:
                cells = rows.reshape(-1, rows.shape[-1])
                return jax.lax.dynamic_update_slice_in_dim(array, cells, start * self.width, 0)

            return jax.tree.map(put, whole, function(start, whole))

        return jax.lax.fori_loop(0, self.count, replace, whole)

    def each(self, function: Callable[[Start], Whole], source: _Map) -> Whole:
        """Arrays ``[cells, C]`` of all strips, whose rows are computed by ``function`` from ``source``."""
        # What they are filled with before does not matter. A number of the source is not there before the source is:
        # zeros would be, for all maps of the decoder from the beginning on.
        number = source.values[0, 0]
        cells = self.count * self.rows * self.width
        blank = jax.tree.map(
            lambda rows: jnp.broadcast_to(number.astype(rows.dtype), (cells, rows.shape[-1])),
            jax.eval_shape(function, jax.ShapeDtypeStruct((), jnp.int32)),
        )
        return self.fill(blank, lambda start, _: function(start))


class _Map(NamedTuple):
    """A map in memory; cells beyond the cut's height mean nothing.

    Cells are one axis: of three axes a TPU's compiler would choose another order for those that write than for those
    that read, and copy whole maps.

    Attributes:
      values: ``[cells, C]``, row-major, float32 or a convolution's products.
      cut: the map's size.
      bias: the convolution's, not yet added; None where there is nothing to add.
    """

    values: Float[Array, "cells C"]
    cut: _Cut
    bias: Float[Array, " C"] | None = None

    def moments(self, norm: GroupNorm) -> Moments:
        return norm.moments(self._read(0, self.cut.height)[None])

    def strip(self, start: Start) -> Float[Array, "rows w C"]:
        return self._read(start, self.cut.rows)

    def with_neighbours(self, start: Start) -> Float[Array, "_ w C"]:
        """A strip and the row on either side; what lies there beyond the map is arbitrary."""
        rows, end = self.cut.rows, self.cut.count * self.cut.rows
        above, below = jnp.maximum(start - 1, 0), jnp.minimum(start + rows, end - 1)
        return jnp.concatenate([self._read(above, 1), self._read(start, rows), self._read(below, 1)])

    def _read(self, start: Start | int, rows: int) -> Float[Array, "rows w C"]:
        width = self.cut.width
        cells = jax.lax.dynamic_slice_in_dim(self.values, start * width, rows * width).astype(jnp.float32)
        if self.bias is not None:
            cells = cells + self.bias.astype(jnp.float32)[None]
        return cells.reshape(rows, width, -1)


def decode_in_strips(
    decoder: Decoder, latents: Float[Array, "B lat_h lat_w C"], strips: int
) -> Float[Array, "B h w 3"]:
    """What ``decoder(latents)`` gives, but for rounding.

    Args:
      decoder: any.
      latents: summed codes.
      strips: into how many strips maps are cut, at most one for every row of ``latents``. They are equally high, so
        where the number does not divide the height there may be fewer.
    """
    return jax.lax.map(lambda latents: _picture(decoder, latents, strips), latents)


def _picture(decoder: Decoder, latents: Float[Array, "lat_h lat_w C"], strips: int) -> Float[Array, "h w 3"]:
    cut = _Cut.of(latents.shape[0], latents.shape[1], strips)
    first = decoder.conv_in(latents[None])[0].reshape(cut.height * cut.width, -1)
    x = _Map(jnp.pad(first, ((0, (cut.count * cut.rows - cut.height) * cut.width), (0, 0))), cut)
    for block in decoder.middle:
        x = _block(block, x)
    for level in reversed(list(decoder.levels)):
        for block in level.blocks:
            x = _block(block, x)
        if level.resample is not None:
            x = _double(level.resample, x)
    activated = _activation(decoder.norm_out, x)
    picture = x.cut.each(lambda start: _convolved(decoder.conv_out, activated(start)), x)
    return _Map(picture, x.cut, decoder.conv_out.bias[...])._read(0, x.cut.height)


def _block(block: ResBlock, x: _Map) -> _Map:
    """The residual block; where it can, it adds to ``x`` in place."""
    shortcut, activated = block.shortcut, _activation(block.norm1, x)

    def first(start: Start) -> tuple[Array, Array | None]:
        y = _convolved(block.conv1, activated(start))
        return y, None if shortcut is None else shortcut.without_bias(x.strip(start)[None], pad_rows=(0, 0))[0]

    # Both in one go: the wider map that they are computed from is then no longer needed.
    y, aside = x.cut.each(first, x)
    if shortcut is not None and aside is not None:
        x = _Map(aside, x.cut, shortcut.bias[...])
    activated_again = _activation(block.norm2, _Map(y, x.cut, block.conv1.bias[...]))
    bias = block.conv2.bias[...].astype(jnp.float32)[None, None]

    def second(start: Start, values: Float[Array, "cells C"]) -> Float[Array, "rows w C"]:
        added = _convolved(block.conv2, activated_again(start)).astype(jnp.float32) + bias
        return x._replace(values=values).strip(start) + added

    if x.bias is None:
        return _Map(x.cut.fill(x.values, second), x.cut)
    return _Map(x.cut.each(lambda start: second(start, x.values), x), x.cut)


def _double(conv: Conv, x: _Map) -> _Map:
    cut = x.cut.doubled()

    def doubled(start: Start) -> Float[Array, "_ w C"]:
        before = start // 2
        rows = _inside(x.with_neighbours(before), before, x.cut.height)
        # A row of these becomes two, and of the neighbours' the convolution needs the nearer one only.
        return _convolved(conv, upsample_nearest(rows[None])[0, 1:-1])

    return _Map(cut.each(doubled, x), cut, conv.bias[...])


def _activation(norm: GroupNorm, x: _Map) -> Callable[[Start], Float[Array, "_ w C"]]:
    """Normalised and activated rows of ``x`` for a convolution: from a strip's start, with its neighbours."""
    moments = x.moments(norm)

    def rows(start: Start) -> Float[Array, "_ w C"]:
        normed = norm.normalised(x.with_neighbours(start)[None], moments)[0]
        return _inside(jax.nn.silu(normed), start, x.cut.height)

    return rows


def _inside(rows: Float[Array, "h w C"], start: Start, height: int) -> Float[Array, "h w C"]:
    """A strip with its neighbours, zero beyond the map, as convolutions pad."""
    positions = start - 1 + jnp.arange(rows.shape[0])
    return jnp.where(((positions >= 0) & (positions < height))[:, None, None], rows, jnp.float32(0))


def _convolved(conv: Conv, rows: Float[Array, "h w c_in"]) -> Float[Array, "_ w c_out"]:
    """A 3x3 convolution of all rows but the first and last, without its bias."""
    return conv.without_bias(rows[None], pad_rows=(0, 0))[0]
