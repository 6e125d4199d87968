"""What every attention implementation returns."""

from typing import NamedTuple

from jaxtyping import Array, Float


class AttentionOutput(NamedTuple):
    """Result of :func:`pallas_kernels.attention`.

    Attributes:
      out: attended values, the dtype of ``v``.
      log_sum_exp: natural-log normaliser of every row, float32; a large negative number where no key is visible.
      entropy: entropy of every row in nats, float32, never negative; None unless asked for.
    """

    out: Float[Array, "B T N H"]
    log_sum_exp: Float[Array, "B N T"]
    entropy: Float[Array, "B N T"] | None
