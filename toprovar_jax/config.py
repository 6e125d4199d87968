"""Frozen configurations of the transformer and the image tokenizer (MODEL_SPEC 1 and 8)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from toprovar_jax.errors import UserInputError

Precision = Literal["exact", "fast"]
"""``exact``: float32 everywhere, highest matmul precision. ``fast``: bfloat16 matmuls; norms, modulation, RoPE,
softmax statistics, head and code sums stay float32."""


@dataclasses.dataclass(frozen=True)
class InfinityConfig:
    """Everything that fixes the transformer's arithmetic. Static and hashable.

    Attributes:
      num_layers, width, num_heads: depth, model width D and attention heads N.
      text_width: width E of the text encoder's features.
      text_length: rows of the learned unconditional text; the longest prompt in tokens (P).
      latent_channels: bits C per image-tokenizer cell.
      spatial_patchify: fold 2x2 cells into one token of ``4C`` bits (the 8B models).
      block_chunks: how the official state dict groups its blocks; matters for names, and for ``level_embedding``.
      feed_forward_ratio: hidden width over ``width`` before rounding to a multiple of 256, half to even.
      norm_epsilon: epsilon of every norm.
      rope_mode: 2 nearest index on the finest grid, 1 interpolated tables, 0 plain coordinates (MODEL_SPEC 5).
      level_embedding: added once before the first block, or before every chunk of blocks.
      precision: see :data:`Precision`.
      attention: implementations of :func:`pallas_kernels.attention` for the blocks, the first that can run is taken;
        None chooses by device.
      tensor_parts: over how many devices of a mesh's axis ``tensor`` self-attention's heads and the feed-forward's
        hidden channels are spread; more than one needs parameters placed so, and runs inside ``shard_map``.
    """

    num_layers: int
    width: int
    num_heads: int
    text_width: int
    text_length: int
    latent_channels: int
    spatial_patchify: bool = False
    block_chunks: int = 4
    feed_forward_ratio: float = 4.0
    norm_epsilon: float = 1e-6
    rope_mode: Literal[0, 1, 2] = 2
    level_embedding: Literal["first_block", "every_chunk"] = "first_block"
    precision: Precision = "exact"
    attention: tuple[str, ...] | None = None
    tensor_parts: int = 1

    def __post_init__(self) -> None:
        _require_positive(self, "num_layers", "width", "num_heads", "text_width", "text_length", "latent_channels")
        _require_positive(self, "block_chunks", "tensor_parts")
        parts = self.tensor_parts
        _require(self.num_heads % parts == 0, "tensor_parts", parts, f"a divisor of num_heads={self.num_heads}")
        _require(self.width % self.num_heads == 0, "width", self.width, f"a multiple of num_heads={self.num_heads}")
        _require(self.head_dim % 4 == 0, "head dimension", self.head_dim, "a multiple of 4 (two rotary axes)")
        _require(
            self.num_layers % self.block_chunks == 0, "num_layers", self.num_layers, f"{self.block_chunks} even chunks"
        )
        _require(self.pool_heads > 0, "text_width", self.text_width, "at least 128")
        _require(self.width % self.pool_heads == 0, "width", self.width, f"a multiple of {self.pool_heads} pool heads")
        ratio = self.feed_forward_ratio
        _require(self.feed_forward_width > 0, "feed_forward_ratio", ratio, f"above {128 / self.width:g} at this width")
        _require(0 < self.norm_epsilon < 1, "norm_epsilon", self.norm_epsilon, "between 0 and 1")
        _require(self.rope_mode in (0, 1, 2), "rope_mode", self.rope_mode, "0, 1 or 2")
        levels = ("first_block", "every_chunk")
        _require(self.level_embedding in levels, "level_embedding", self.level_embedding, " or ".join(levels))
        _require_precision(self.precision)

    @property
    def head_dim(self) -> int:
        """H."""
        return self.width // self.num_heads

    @property
    def token_bits(self) -> int:
        """Z: bits predicted per token."""
        return self.latent_channels * (4 if self.spatial_patchify else 1)

    @property
    def latent_per_token(self) -> int:
        """Image-tokenizer cells per token and axis."""
        return 2 if self.spatial_patchify else 1

    @property
    def feed_forward_width(self) -> int:
        """Hidden width of the MLP: a multiple of 256, rounded half to even (layer32: 8192, layer48: 13312)."""
        return round(self.width * self.feed_forward_ratio / 256) * 256

    @property
    def pool_heads(self) -> int:
        """Heads of the attentive pooling; the head width is ``width / pool_heads`` (MODEL_SPEC 2.4)."""
        return self.text_width // (128 if self.width <= 4096 else 64)

    @classmethod
    def from_official(cls, options: Mapping[str, Any], *, precision: Precision = "exact") -> InfinityConfig:
        """From the original code's argument names (``depth``, ``embed_dim``, ``vae_codebook_dim``, ...).

        Raises:
          UserInputError: options that are missing, or that contradict each other.
        """
        required = ("depth", "embed_dim", "num_heads", "text_channels", "text_maxlen", "vae_codebook_dim")
        _require_options(options, *required)
        return cls(
            num_layers=options["depth"],
            width=options["embed_dim"],
            num_heads=options["num_heads"],
            text_width=options["text_channels"],
            text_length=options["text_maxlen"],
            latent_channels=options["vae_codebook_dim"],
            spatial_patchify=bool(options.get("apply_spatial_patchify", 0)),
            block_chunks=options.get("block_chunks", 1),
            feed_forward_ratio=float(options.get("mlp_ratio", 4)),
            norm_epsilon=float(options.get("norm_eps", 1e-6)),
            rope_mode=options.get("rope2d_normalized_by_hw", 2),
            level_embedding="first_block" if options.get("add_lvl_embeding_only_first_block", 1) else "every_chunk",
            precision=precision,
        )


@dataclasses.dataclass(frozen=True)
class ImageTokenizerConfig:
    """The BSQ-VAE. Static and hashable.

    Attributes:
      latent_channels: bits C per cell.
      stride: pixels per cell and axis, 8 or 16 in the released models (any power of two works).
      base_width: channels at full resolution.
      width_multipliers: channels of each level over ``base_width``, finest level first.
      num_res_blocks: residual blocks per encoder level; the decoder has one more.
      precision: see :data:`Precision`.
    """

    latent_channels: int
    stride: int = 16
    base_width: int = 128
    width_multipliers: tuple[int, ...] = (1, 2, 4, 4, 4)
    num_res_blocks: int = 2
    precision: Precision = "exact"

    def __post_init__(self) -> None:
        _require_positive(self, "latent_channels", "stride", "base_width", "num_res_blocks")
        _require_precision(self.precision)
        _require(min(self.width_multipliers, default=0) > 0, "width_multipliers", self.width_multipliers, "positive")
        _require(2**self.num_downsamples == self.stride, "stride", self.stride, "a power of two")
        _require(
            len(self.width_multipliers) > self.num_downsamples,
            "width_multipliers",
            self.width_multipliers,
            f"at least {self.num_downsamples + 1} levels for stride {self.stride}",
        )
        for width in self.widths:
            _require(width % 32 == 0 or width % 24 == 0, "channel width", width, "a multiple of 32 or of 24")

    @property
    def num_downsamples(self) -> int:
        """How many times the resolution is halved."""
        return max(0, round(math.log2(max(1, self.stride))))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels per level, finest first."""
        return tuple(self.base_width * multiplier for multiplier in self.width_multipliers)

    @classmethod
    def from_official(cls, options: Mapping[str, Any], *, precision: Precision = "exact") -> ImageTokenizerConfig:
        """From the original code's argument names (``codebook_dim``, ``base_ch``, ``ch_mult``, ...).

        Raises:
          UserInputError: options that are missing, or that contradict each other.
        """
        _require_options(options, "codebook_dim", "patch_size", "ch_mult")
        return cls(
            latent_channels=options["codebook_dim"],
            stride=options["patch_size"],
            base_width=options.get("base_ch", 128),
            width_multipliers=tuple(options["ch_mult"]),
            num_res_blocks=options.get("num_res_blocks", 2),
            precision=precision,
        )


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(isinstance(value, int) and value > 0, name, value, "a positive integer")


def _require_precision(precision: str) -> None:
    _require(precision in get_args(Precision), "precision", precision, " or ".join(get_args(Precision)))


def _require_options(options: Mapping[str, Any], *names: str) -> None:
    missing = [name for name in names if name not in options]
    _require(not missing, "options", f"({', '.join(options)})", f"given with {', '.join(missing)} as well")


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise UserInputError(f"{name}={value}", f"must be {rule}", "change the model configuration")
