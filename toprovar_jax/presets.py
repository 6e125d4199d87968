"""The released models by name (MODEL_SPEC 1)."""

from __future__ import annotations

from collections.abc import Mapping

from toprovar_jax.config import ImageTokenizerConfig, InfinityConfig
from toprovar_jax.model_card import ModelCard
from toprovar_jax.schedule import PIXEL_BUDGETS
from toprovar_jax.text_encoder.config import FLAN_T5_XL

_BUDGETS = tuple(PIXEL_BUDGETS.items())
_STRIDE_16 = ImageTokenizerConfig(latent_channels=32, stride=16, width_multipliers=(1, 2, 4, 4, 4))
_STRIDE_8 = ImageTokenizerConfig(latent_channels=14, stride=8, width_multipliers=(1, 2, 4, 4))


def _transformer(
    num_layers: int, width: int, num_heads: int, *, chunks: int = 4, bits: int = 32, patchify: bool = False
) -> InfinityConfig:
    return InfinityConfig(
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        text_width=FLAN_T5_XL.width,
        text_length=512,
        latent_channels=bits,
        spatial_patchify=patchify,
        block_chunks=chunks,
    )


def _card(
    name: str, transformer: InfinityConfig, tokenizer: ImageTokenizerConfig, default_pixels: str, tau: float
) -> ModelCard:
    return ModelCard(name, transformer, tokenizer, FLAN_T5_XL, _BUDGETS, default_pixels, tau=tau)


_2B = _transformer(32, 2048, 16, chunks=8)
_8B = _transformer(40, 3584, 28, chunks=8, bits=14, patchify=True)
_STUDY = {
    12: _transformer(12, 768, 8),
    16: _transformer(16, 1152, 12),
    24: _transformer(24, 1536, 16),
    32: _transformer(32, 2080, 20),
    40: _transformer(40, 2688, 24),
    48: _transformer(48, 3360, 28),
}

PRESETS: Mapping[str, ModelCard] = {
    card.name: card
    for card in (
        _card("infinity-2b", _2B, _STRIDE_16, "1M", 0.5),
        _card("infinity-8b", _8B, _STRIDE_8, "1M", 1.0),
        _card("infinity-8b-512", _8B, _STRIDE_8, "0.25M", 1.0),
        *(
            _card(f"infinity-layer{depth}", transformer, _STRIDE_16, "0.06M", 0.5)
            for depth, transformer in _STUDY.items()
        ),
    )
}
"""Name to description; guidance, tau, top-k and top-p are those of the official notebooks (MODEL_SPEC 11)."""
