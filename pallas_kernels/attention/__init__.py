"""Attention with its log-sum-exp and the entropy of its rows."""

from pallas_kernels.attention.api import IMPLEMENTATIONS, attention
from pallas_kernels.attention.block_mask import BlockMask
from pallas_kernels.attention.output import AttentionOutput

__all__ = ["IMPLEMENTATIONS", "AttentionOutput", "BlockMask", "attention"]
