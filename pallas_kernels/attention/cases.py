"""The shapes and score distributions that tests, tuning and benchmarks share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.block_mask import BlockMask
from pallas_kernels.attention.problem import Problem

Scores = Literal["normal", "cosine", "uniform", "far"]
"""``normal``: standard normal queries and keys. ``cosine``: unit vectors, logits up to 100, half of the queries next to
one key. ``uniform``: all scores alike. ``far``: dot products around -2^20, where only small differences matter."""

INFINITY_SIDES = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)
"""Side of every scale of a square megapixel image, in tokens; keys accumulate over the scales."""


@dataclass(frozen=True)
class Case:
    """One call of attention.

    Attributes:
      name: unique in its group.
      batch: batch rows.
      num_queries: query tokens.
      num_keys: key tokens.
      heads: attention heads.
      head_dim: width of a head.
      scale: factor on the dot products.
      scores: how queries and keys are distributed.
      key_length: visible keys per batch row, or None for all.
      block_mask: block-sparse pattern, or None.
      poisoned: whether NaN lies past the visible keys.
    """

    name: str
    batch: int
    num_queries: int
    num_keys: int
    heads: int
    head_dim: int
    scale: float
    scores: Scores = "normal"
    key_length: tuple[int, ...] | None = None
    block_mask: BlockMask | None = None
    poisoned: bool = False

    @property
    def shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """Of ``q [B, T, N, H]`` and of ``k`` and ``v [B, S, N, H]``."""
        lengths = (self.num_queries, self.num_keys, self.num_keys)
        return tuple((self.batch, length, self.heads, self.head_dim) for length in lengths)

    def problem(self, dtype: Any, *, with_entropy: bool = False) -> Problem:
        """What an implementation is told about the call."""
        sizes = (self.batch, self.num_queries, self.num_keys, self.heads, self.head_dim, np.dtype(dtype))
        return Problem(*sizes, self.key_length is not None, self.block_mask, with_entropy)

    @property
    def flops(self) -> float:
        """Floating-point operations over visible keys: those of the problem, less what lies past the key lengths."""
        lengths = self.key_length or (self.num_keys,)
        return self.problem(np.float32).flops * sum(lengths) / (len(lengths) * self.num_keys)

    def draw(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Float32 ``q, k, v``, the same on every machine."""
        random = np.random.default_rng(seed)
        q, k, v = (random.standard_normal(shape, np.float32) for shape in self.shapes)
        return self._distributed(np, q, k, v, random.integers(0, self.num_keys, self.num_queries))

    def draw_on_device(self, dtype: Any, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """``q, k, v`` and key lengths, made on the device: full cases take the host seconds."""

        @jax.jit
        def make(key):
            *keys, last = jax.random.split(key, 4)
            q, k, v = (jax.random.normal(key, shape, jnp.float32) for key, shape in zip(keys, self.shapes, strict=True))
            partner = jax.random.randint(last, (self.num_queries,), 0, self.num_keys)
            return tuple(x.astype(dtype) for x in self._distributed(jnp, q, k, v, partner))

        lengths = None if self.key_length is None else jnp.asarray(self.key_length, jnp.int32)
        return *jax.block_until_ready(make(jax.random.key(seed))), lengths

    def _distributed(self, xp: Any, q: Any, k: Any, v: Any, partner: Any) -> tuple[Any, Any, Any]:
        """Standard normal arrays of ``xp`` (NumPy or JAX's) with the case's scores; ``partner`` is a key per query."""
        if self.scores == "uniform":
            q = xp.zeros_like(q)
        elif self.scores == "cosine":
            q, k = (x / xp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
            sharp = np.arange(self.num_queries) % 2 == 0
            q = xp.where(sharp[None, :, None, None], k[:, partner], q)
        elif self.scores == "far":
            # One common component moves all scores alike; the others are small integers, so that every product and
            # every sum below 2^24 is exact in every dtype and order.
            first = (np.arange(self.head_dim) == 0)[None, None, None]
            q = xp.where(first, np.float32(1024.0), xp.clip(xp.round(q), -2, 2))
            k = xp.where(first, np.float32(-1024.0), xp.clip(xp.round(k), -2, 2))
        if self.poisoned and self.key_length is not None:
            hidden = (np.arange(self.num_keys)[None] >= np.array(self.key_length)[:, None])[:, :, None, None]
            k, v = (xp.where(hidden, np.float32(np.nan), x) for x in (k, v))
        return q, k, v

    def shrunk(self, *, heads: int = 1, batch: int | None = None) -> Case:
        """The same lengths with fewer heads and rows, for slow machines."""
        batch = self.batch if batch is None else batch
        lengths = None if self.key_length is None else self.key_length[:batch]
        return dataclasses.replace(self, heads=min(heads, self.heads), batch=batch, key_length=lengths)


def _infinity() -> tuple[Case, ...]:
    """All scales of Infinity-2B at one megapixel, one guided image; keys are those of all scales so far."""
    cumulative = np.cumsum(np.square(INFINITY_SIDES))
    return tuple(
        Case(f"{side}x{side}", 2, side * side, int(num_keys), 16, 128, 10.0, "cosine")
        for side, num_keys in zip(INFINITY_SIDES, cumulative, strict=True)
    )


def _fa3() -> tuple[Case, ...]:
    """The shapes in which the FlashAttention papers report speed: 16k tokens in all, width 2048."""
    return tuple(
        Case(f"{length}-h{head_dim}", 16384 // length, length, length, 2048 // head_dim, head_dim, head_dim**-0.5)
        for head_dim in (64, 128, 256)
        for length in (512, 1024, 2048, 4096, 8192, 16384)
    )


def _pruned() -> tuple[Case, ...]:
    """Kept tokens of the last scales against caches that were pruned before."""
    lengths = (
        *((512, 2304), (640, 4229), (1024, 3584), (1024, 10521), (1152, 4355), (1664, 5888), (2048, 7168)),
        *((2304, 6425), (3072, 8704)),
    )
    return tuple(Case(f"{queries}of{keys}", 2, queries, keys, 16, 128, 10.0, "cosine") for queries, keys in lengths)


def _tails() -> tuple[Case, ...]:
    """Lengths that no tile divides, ragged rows, patterns, and head dims that are not powers of two."""
    plain: dict[str, Any] = {"batch": 2, "heads": 16, "head_dim": 128, "scale": 10.0, "scores": "cosine"}
    lengths = ((1, 1), (1, 16384), (17, 33), (127, 129), (255, 1025), (1023, 4097), (1600, 3121), (4095, 10519))
    return (
        *(Case(f"{queries}of{keys}", num_queries=queries, num_keys=keys, **plain) for queries, keys in lengths),
        Case("ragged", num_queries=1000, num_keys=3000, key_length=(2999, 257), **plain),
        Case("windows", num_queries=4096, num_keys=10521, block_mask=windows(4096, 10521), **plain),
        *(
            Case(f"h{width}", 2, 1600, 3121, 16, width, width**-0.5)
            for width in (64, 80, 96, 104, 112, 120, 160, 192, 256)
        ),
    )


def _edges() -> tuple[Case, ...]:
    """What breaks kernels: sharp, uniform and far scores, rows that see nothing, patterns with empty rows."""
    plain: dict[str, Any] = {"batch": 2, "num_queries": 193, "num_keys": 777, "heads": 2, "head_dim": 128}
    pattern = np.random.default_rng(7).random((4, 9)) < 0.4
    pattern[1] = False
    return (
        Case("sharp", scale=100.0, scores="cosine", **plain),
        Case("uniform", scale=1.0, scores="uniform", **plain),
        Case("far", scale=128**-0.5, scores="far", **plain),
        Case("nothing", scale=0.1, key_length=(0, 777), **plain),
        Case("one key", scale=0.1, key_length=(1, 128), **plain),
        Case("tile edges", scale=0.1, key_length=(127, 129), **plain),
        Case("poisoned", scale=0.1, key_length=(300, 640), poisoned=True, **plain),
        Case("pattern", 2, 450, 1100, 2, 128, 0.1, block_mask=BlockMask.from_array(pattern)),
        Case("ragged pattern", 2, 450, 1100, 2, 64, 0.1, "normal", (1100, 200), BlockMask.from_array(pattern)),
        Case("wide blocks", 2, 600, 800, 2, 128, 0.1, block_mask=_wide_blocks()),
    )


def _wide_blocks() -> BlockMask:
    return BlockMask.from_array(np.array([[1, 0, 1], [0, 1, 1], [0, 1, 0]], bool), query_block=256, key_block=384)


def windows(num_queries: int, num_keys: int, *, sinks: int = 121, radius: int = 320) -> BlockMask:
    """A pattern of local windows at the proportional position, and the first ``sinks`` keys for everyone."""

    def sees(query: np.ndarray, key: np.ndarray) -> np.ndarray:
        return (key < sinks) | (np.abs(key - query * num_keys / num_queries) <= radius)

    return BlockMask.from_predicate(sees, num_queries, num_keys)


CASES: dict[str, tuple[Case, ...]] = {
    "infinity": _infinity(),
    "fa3": _fa3(),
    "pruned": _pruned(),
    "tails": _tails(),
    "edges": _edges(),
}
"""Groups of cases. ``edges`` is for conformance; the others are also timed."""
