"""Attention in float64 numpy, one row at a time: what every implementation is held to."""

import numpy as np


def attend(q, k, v, *, scale, key_length=None):
    """``(out [B, T, N, H], log_sum_exp [B, N, T], entropy [B, N, T])``; rows without keys are zero, -inf and zero."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, length, heads, _ = q.shape
    lengths = np.full(batch, k.shape[1]) if key_length is None else np.clip(np.asarray(key_length), 0, k.shape[1])
    out = np.zeros(q.shape)
    log_sum_exp = np.full((batch, heads, length), -np.inf)
    entropy = np.zeros((batch, heads, length))
    for b, visible in enumerate(lengths):
        if visible == 0:
            continue
        logits = scale * np.einsum("tnh,snh->nts", q[b], k[b, :visible])
        peak = logits.max(axis=-1, keepdims=True)
        log_sum_exp[b] = (peak + np.log(np.exp(logits - peak).sum(axis=-1, keepdims=True)))[..., 0]
        log_p = logits - log_sum_exp[b][..., None]
        p = np.exp(log_p)
        out[b] = np.einsum("nts,snh->tnh", p, v[b, :visible])
        entropy[b] = -np.sum(p * log_p, axis=-1)
    return out, log_sum_exp, entropy


def draw(seed, batch, length, num_keys, heads, width, *, spread=1.0):
    """Random float32 ``q, k, v``; ``spread`` is the standard deviation of the scores at scale 1."""
    random = np.random.default_rng(seed)
    q = random.standard_normal((batch, length, heads, width)) * spread / np.sqrt(width)
    k, v = (random.standard_normal((batch, num_keys, heads, width)) for _ in range(2))
    return tuple(np.float32(x) for x in (q, k, v))
