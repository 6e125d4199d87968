"""Which parameters need not be float32: those of matrix products whose operands are bfloat16 in fast precision."""

from __future__ import annotations

import ml_dtypes
import numpy as np

BFLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)

_MATRICES = (
    *("kernel", "embedding"),
    *(f"layers.attention.{name}" for name in ("query", "key", "value", "output")),
    *(f"layers.feed_forward.{name}" for name in ("gate", "up", "down")),
)


def fast_dtype(network: str, target: str) -> np.dtype:
    """The dtype of one parameter in fast precision.

    What enters matrix products of the transformer's blocks, the text encoder and the image tokenizer is bfloat16; the
    rest stays float32.

    Args:
      network: ``transformer``, ``image_tokenizer`` or ``text_encoder``.
      target: the parameter's dotted path.
    """
    outside_blocks = network == "transformer" and not target.startswith("layers.")
    return FLOAT32 if outside_blocks or not target.endswith(_MATRICES) else BFLOAT16
