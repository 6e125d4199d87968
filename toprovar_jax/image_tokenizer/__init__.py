"""The image tokenizer (BSQ-VAE): pictures <-> latents <-> bits on a pyramid of scales."""

from toprovar_jax.image_tokenizer.autoencoder import ImageTokenizer
from toprovar_jax.image_tokenizer.bsq import bits_to_codes, encode_scales, latents_to_bits

__all__ = ["ImageTokenizer", "bits_to_codes", "encode_scales", "latents_to_bits"]
