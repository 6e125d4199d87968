"""From prompts to features: the T5 encoder, its configuration and its tokenizer."""

from toprovar_jax.text_encoder.build import build_word_tokenizer
from toprovar_jax.text_encoder.config import FLAN_T5_XL, T5Config
from toprovar_jax.text_encoder.t5 import T5Encoder
from toprovar_jax.text_encoder.tokenizer import TextTokenizer, TokenBatch

__all__ = ["FLAN_T5_XL", "T5Config", "T5Encoder", "TextTokenizer", "TokenBatch", "build_word_tokenizer"]
