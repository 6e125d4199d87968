"""Numbers of the kernels that compute in base two and of all that mask scores."""

from __future__ import annotations

import math

import numpy as np

from pallas_kernels.attention.reference import MASKED

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
# Where 64-bit types are enabled, a Python number handed to a function of JAX is 64 bits wide, which no TPU computes.
MASKED_SCORE, ZERO, ONE = np.float32(MASKED), np.float32(0.0), np.float32(1.0)
