"""The transformer."""

from toprovar_jax.model.transformer import Infinity

__all__ = ["Infinity"]
