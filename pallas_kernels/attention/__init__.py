"""Attention with its log-sum-exp and the entropy of its rows."""

from pallas_kernels.attention.api import AttentionOutput, attention

__all__ = ["AttentionOutput", "attention"]
