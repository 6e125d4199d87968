"""What an implementation needs to know to say whether it can run a call."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from pallas_kernels.attention.block_mask import BlockMask


@dataclass(frozen=True)
class Problem:
    """The static description of one call of :func:`pallas_kernels.attention`.

    Attributes:
      batch: batch rows, B.
      num_queries: query tokens, T.
      num_keys: key tokens, S.
      heads: N.
      head_dim: H.
      dtype: of queries, keys and values.
      ragged: whether every batch row has its own number of visible keys.
      block_mask: the block-sparse pattern, if any.
      with_entropy: whether the entropy is asked for.
    """

    batch: int
    num_queries: int
    num_keys: int
    heads: int
    head_dim: int
    dtype: np.dtype
    ragged: bool = False
    block_mask: BlockMask | None = None
    with_entropy: bool = False

    @classmethod
    def of(
        cls,
        q: jax.Array,
        k: jax.Array,
        *,
        key_length: jax.Array | None = None,
        block_mask: BlockMask | None = None,
        with_entropy: bool = False,
    ) -> Problem:
        """The problem posed by arrays ``q [B, T, N, H]`` and ``k [B, S, N, H]``."""
        batch, num_queries, heads, head_dim = q.shape
        return cls(
            *(batch, num_queries, k.shape[1], heads, head_dim),
            dtype=np.dtype(q.dtype),
            ragged=key_length is not None,
            block_mask=block_mask,
            with_entropy=with_entropy,
        )

    @property
    def flops(self) -> float:
        """Floating-point operations of the two products over the visible blocks, two per multiply-add."""
        density = 1.0 if self.block_mask is None else self.block_mask.density
        return 4.0 * self.batch * self.heads * self.num_queries * self.num_keys * self.head_dim * density
