"""The shape of a T5 encoder, and the one preset that the released Infinity models use."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from toprovar_jax.errors import UserInputError, unknown_name

COMPUTE_DTYPES = ("float32", "bfloat16")

# Our field -> the key of the public T5 configuration files. Keys of the second group may be absent there.
_REQUIRED_KEYS = {
    "vocab_size": "vocab_size",
    "width": "d_model",
    "head_dim": "d_kv",
    "feed_forward_width": "d_ff",
    "num_layers": "num_layers",
    "num_heads": "num_heads",
}
_OPTIONAL_KEYS = {
    "relative_buckets": "relative_attention_num_buckets",
    "relative_max_distance": "relative_attention_max_distance",
    "norm_epsilon": "layer_norm_epsilon",
    "compute_dtype": "compute_dtype",
}
_SIZES = (*_REQUIRED_KEYS, "relative_buckets", "relative_max_distance")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """A T5 v1.1 encoder: bias-free, pre-norm, gated tanh-GELU, relative position buckets shared by all layers.

    Args:
      vocab_size: rows of the embedding table (may exceed the tokenizer's vocabulary).
      width: E, the width of the residual stream and of the result.
      head_dim: H; heads need not add up to ``width``.
      feed_forward_width: inner width of the gated feed-forward layer.
      num_layers: L.
      num_heads: N.
      relative_buckets: rows of the position bias table; half of them for keys after the query. A multiple of 4.
      relative_max_distance: distance in tokens from which all positions share the last bucket.
      norm_epsilon: added to the mean square in every RMS norm.
      compute_dtype: operand type of the matmuls, ``"float32"`` or ``"bfloat16"``; norms, softmax and the residual
        stream are float32 either way.

    Raises:
      UserInputError: a size that is not a positive integer, or values that contradict each other.
    """

    vocab_size: int
    width: int
    head_dim: int
    feed_forward_width: int
    num_layers: int
    num_heads: int
    relative_buckets: int = 32
    relative_max_distance: int = 128
    norm_epsilon: float = 1e-6
    compute_dtype: str = "float32"

    def __post_init__(self):
        for name in _SIZES:
            _check_size(name, getattr(self, name))
        if self.relative_buckets % 4:
            raise UserInputError(
                f"T5 relative_buckets {self.relative_buckets}", "must be a multiple of 4", "released models use 32"
            )
        if self.relative_max_distance <= self.relative_buckets // 4:
            raise UserInputError(
                f"T5 relative_max_distance {self.relative_max_distance}",
                f"must exceed a quarter of relative_buckets ({self.relative_buckets // 4})",
                "released models use 128",
            )
        if not 0.0 < self.norm_epsilon < 1.0:
            raise UserInputError(
                f"T5 norm_epsilon {self.norm_epsilon!r}", "must be a number between 0 and 1", "released models use 1e-6"
            )
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise unknown_name("T5 compute_dtype", self.compute_dtype, COMPUTE_DTYPES)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> T5Config:
        """The configuration in a public T5 ``config.json`` (or in ``to_dict``'s result); other keys are ignored.

        Args:
          values: has ``vocab_size, d_model, d_kv, d_ff, num_layers, num_heads`` and may have
            ``relative_attention_num_buckets, relative_attention_max_distance, layer_norm_epsilon, compute_dtype``.

        Raises:
          UserInputError: keys are missing, or the file describes a T5 whose feed-forward layer is not gated tanh-GELU.
        """
        missing = [key for key in _REQUIRED_KEYS.values() if key not in values]
        if missing:
            raise UserInputError(
                f"T5 configuration without {', '.join(missing)}",
                f"must have {', '.join(_REQUIRED_KEYS.values())}",
                "use the config.json that lies next to the encoder's weights",
            )
        projection = values.get("feed_forward_proj", "gated-gelu")
        if projection != "gated-gelu":
            raise UserInputError(
                f"T5 feed_forward_proj {projection!r}",
                "must be 'gated-gelu', the feed-forward layer of T5 v1.1 and Flan-T5",
                "use a T5 v1.1 or Flan-T5 encoder",
            )
        keys = _REQUIRED_KEYS | _OPTIONAL_KEYS
        fields = {field: values[key] for field, key in keys.items() if key in values}
        for field in fields.keys() & set(_SIZES):
            _check_size(keys[field], fields[field])
        epsilon = fields.get("norm_epsilon", cls.norm_epsilon)
        if not isinstance(epsilon, float):
            raise UserInputError(
                f"T5 layer_norm_epsilon {epsilon!r}", "must be a decimal number", "released models use 1e-6"
            )
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """The same configuration under the keys of the public T5 files; ``from_dict`` gives an equal one back."""
        keys = _REQUIRED_KEYS | _OPTIONAL_KEYS
        return {key: getattr(self, field) for field, key in keys.items()} | {"feed_forward_proj": "gated-gelu"}


def _check_size(name: str, size: object) -> None:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise UserInputError(f"T5 {name} {size!r}", "must be a positive integer", "correct the configuration")


FLAN_T5_XL = T5Config(vocab_size=32128, width=2048, head_dim=64, feed_forward_width=5120, num_layers=24, num_heads=32)
