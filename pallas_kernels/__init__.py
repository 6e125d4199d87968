"""Attention kernels for CPU, GPU and TPU behind one function. Independent of the rest of the project."""

from pallas_kernels.attention.api import AttentionOutput, attention

__all__ = ["AttentionOutput", "attention"]
