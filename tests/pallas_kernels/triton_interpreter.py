"""Runs the Triton kernel in Triton's CPU interpreter, from the launch that the JAX wrapper prepares.

A program: it reads pickled keyword arguments of :func:`interpret` from its input and writes pickled results. In a
process of its own, because Triton reads ``TRITON_INTERPRET`` when a kernel is defined, for better or worse.
"""

from __future__ import annotations

import os
import pickle
import sys

os.environ["TRITON_INTERPRET"] = "1"

import ml_dtypes
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from pallas_kernels.attention import triton_gpu
from pallas_kernels.attention.output import AttentionOutput
from pallas_kernels.attention.problem import Problem

_GUARD = 2**16
"""Elements of NaN before and after every input, more than any tile reads past its end."""


def _repair_interpreter() -> None:
    """Four things that a GPU does and the interpreter of Triton 3.6 does not."""
    patch_tensor = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):
        # It converts one-element arrays by int(), which numpy 2.4 refuses.
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def fma(self, x, y, z):
        # It rounds the product, too. That of two float32 is exact in float64.
        wide = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        # It multiplies the bit patterns of bfloat16 as integers.
        del input_precision, max_num_imprecise_acc
        a, b = (x.data.view(ml_dtypes.bfloat16) if x.dtype.scalar == tl.bfloat16 else x.data for x in (a, b))
        return interpreter.TensorHandle(a.astype(np.float32) @ b.astype(np.float32) + d.data, d.dtype.scalar)

    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_to_nearest(self, src, dst_type):
        # It cuts float32 off to bfloat16.
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        return interpreter.TensorHandle(src.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)

    interpreter._patch_lang_tensor = patch_with_index
    interpreter.InterpreterBuilder.cast_impl = cast_to_nearest
    interpreter.InterpreterBuilder.create_fma = fma
    interpreter.InterpreterBuilder.create_dot = dot


_repair_interpreter()

from pallas_kernels.attention import triton_gpu_kernel  # noqa: E402 - defined for the interpreter by the lines above


def interpret(q, k, v, *, scale, key_length=None, block_mask=None, with_entropy=True, config) -> AttentionOutput:
    """Attention of numpy arrays ``[B, T, N, H]``, which lie between NaNs; ``key_length`` is a sequence or None."""
    problem = Problem.of(q, k, key_length=key_length, block_mask=block_mask, with_entropy=with_entropy)
    launch = triton_gpu.prepare(problem, config, scale=scale)
    lengths = np.full(problem.batch, problem.num_keys) if key_length is None else np.asarray(key_length)
    lengths = torch.from_numpy(lengths.astype(np.int32))
    indices, counts = (lengths, lengths) if launch.table is None else map(torch.from_numpy, launch.table)
    out = _guarded(np.full(q.shape, np.nan, q.dtype))
    statistics = torch.full((2, problem.batch, problem.heads, problem.num_queries), np.nan)
    triton_gpu_kernel.attention_kernel[launch.grid](
        *map(_guarded, (q, k, v)), lengths, indices, counts, *launch.scalars, out, *statistics, **launch.constants
    )
    log_sum_exp, entropy = statistics.numpy()
    return AttentionOutput(_to_numpy(out), log_sum_exp, entropy if with_entropy else None)


def _guarded(array: np.ndarray) -> torch.Tensor:
    dtype = getattr(torch, array.dtype.name)
    buffer = torch.full((array.size + 2 * _GUARD,), np.nan, dtype=dtype)
    inner = buffer[_GUARD : _GUARD + array.size].view(array.shape)
    inner.copy_(torch.from_numpy(array.astype(np.float32)))
    return inner


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    dtype = ml_dtypes.bfloat16 if tensor.dtype == torch.bfloat16 else None
    return tensor.float().numpy().astype(dtype) if dtype else tensor.numpy()


def serve() -> None:
    """Answer requests until the input ends."""
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(interpret(**request), sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve()
