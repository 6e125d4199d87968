"""Attention kernels for CPU, GPU and TPU behind one function. Independent of the rest of the project."""

from pallas_kernels.attention.api import IMPLEMENTATIONS, attention
from pallas_kernels.attention.block_mask import BlockMask
from pallas_kernels.attention.output import AttentionOutput
from pallas_kernels.spectrum import entropy_spectrum_ratio

__all__ = ["IMPLEMENTATIONS", "AttentionOutput", "BlockMask", "attention", "entropy_spectrum_ratio"]
