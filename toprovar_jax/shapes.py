"""The vocabulary of array axes. Every annotation in the project uses these letters and no others.

==  =====================================================================
B   images in a batch
R   rows of a guided batch: ``2B`` (conditional first, then unconditional) or ``B``
T   query tokens: the tokens of the scale at hand
K   kept tokens: those of them that a pruned layer computes
S   cached or visible tokens (keys and values)
P   padded text length
N   attention heads
H   head dimension
D   transformer width
E   text-encoder width
L   layers
C   latent channels of the image tokenizer = bits per latent cell
Z   bits per transformer token (``C``, or ``4C`` with spatial patchify)
h w latent cells, tokens or pixels down and across, as the name says
==  =====================================================================
"""

from jaxtyping import Array, Bool, Float, Int, Key, UInt8

__all__ = ["Array", "Bool", "Float", "Int", "Key", "UInt8"]
