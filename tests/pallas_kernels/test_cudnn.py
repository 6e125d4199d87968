"""cuDNN attention as far as it goes without a GPU: refusals, the entropy's arithmetic, the lowered program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from pallas_kernels.attention import cudnn
from pallas_kernels.attention.block_mask import BlockMask
from pallas_kernels.attention.cudnn import (
    blank_empty_rows,
    candidates,
    cudnn_attention,
    default_config,
    entropy_from_averaged_key,
    why_not,
)
from pallas_kernels.attention.output import AttentionOutput
from pallas_kernels.attention.problem import Problem
from pallas_kernels.attention.reference import MASKED, dense_attention
from pallas_kernels.attention.target import Target

from .twin import attend, draw

HOPPER = Target("cuda", "NVIDIA H200", (9, 0))
AMPERE = Target("cuda", "NVIDIA A100", (8, 0))


def problem(**changes):
    fields = {"batch": 1, "num_queries": 9, "num_keys": 17, "heads": 2, "head_dim": 128, "dtype": np.dtype("float16")}
    return Problem(**(fields | changes))


@pytest.mark.parametrize(
    ("posed", "target", "told"),
    [
        (problem(), Target("cpu", "cpu"), "platform cpu"),
        (problem(), Target("cuda", "Tesla V100", (7, 0)), "compute capability 7.0"),
        (problem(dtype=np.dtype("float32")), HOPPER, "dtype float32"),
        (problem(head_dim=100), HOPPER, "head dim 100.*multiple of 8 up to 256"),
        (problem(head_dim=136), AMPERE, "head dim 136.*up to 128"),
        (problem(head_dim=264), HOPPER, "head dim 264"),
        (problem(block_mask=BlockMask(((True,),))), HOPPER, "block_mask"),
    ],
    ids=["cpu", "volta", "float32", "head dim", "ampere", "wide", "mask"],
)
def test_refusals_name_value_and_rule(posed, target, told):
    reason = why_not(posed, target)
    assert reason is not None
    assert "\n" not in reason
    assert re.search(told, reason)


@pytest.mark.parametrize("head_dim", [64, 96, 104, 112, 120, 128])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_it_can_run_is_not_refused_where_cudnn_is(monkeypatch, head_dim, dtype):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    posed = problem(head_dim=head_dim, dtype=np.dtype(dtype), ragged=True, with_entropy=True)
    assert why_not(posed, HOPPER) is None
    assert why_not(posed, AMPERE) is None
    assert candidates(posed, HOPPER) == (default_config(posed, HOPPER),)


def test_a_machine_without_cudnn_is_refused_by_name(monkeypatch):
    def missing():
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", missing)
    assert "jax[cuda13]" in why_not(problem(), HOPPER)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_the_averaged_key_gives_the_entropy(scale):
    q, k, v = (jnp.asarray(x) for x in draw(0, 2, 5, 33, 3, 16, spread=2.0))
    averaged, log_sum_exp, _ = dense_attention(
        q, k, k, scale=scale, key_length=None, block_mask=None, with_entropy=False
    )
    got = entropy_from_averaged_key(q, averaged, log_sum_exp, scale)
    _, _, want = attend(q, k, v, scale=scale)
    np.testing.assert_allclose(got, want, atol=3e-5)
    assert np.all(np.asarray(got) >= 0.0)


def test_rows_without_keys_are_blanked_whatever_the_kernel_left_there():
    nan = jnp.full((2, 3, 2), jnp.nan)
    result = AttentionOutput(jnp.full((2, 3, 2, 4), jnp.nan, jnp.bfloat16), nan.swapaxes(1, 2), nan.swapaxes(1, 2))
    got = blank_empty_rows(result, jnp.array([0, 1]))
    np.testing.assert_array_equal(got.out[0].astype(jnp.float32), 0.0)
    np.testing.assert_array_equal(got.log_sum_exp[0], np.float32(MASKED))
    np.testing.assert_array_equal(got.entropy[0], 0.0)
    assert np.all(np.isnan(got.log_sum_exp[1]))


@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("with_entropy", [False, True], ids=["plain", "entropy"])
def test_results_agree_with_the_twin_when_the_kernel_is_played_by_the_reference(monkeypatch, ragged, with_entropy):
    def played(q, k, v, *, scale, return_residual, mask_type=None, q_seqlen=None, kv_seqlen=None):
        assert return_residual
        assert (mask_type is None) == (kv_seqlen is None) == (q_seqlen is None)
        return dense_attention(q, k, v, scale=scale, key_length=kv_seqlen, block_mask=None, with_entropy=False)[:2]

    monkeypatch.setattr(fused_attention_stablehlo, "dot_product_attention", played)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in draw(1, 3, 5, 40, 2, 16))
    lengths = jnp.array([40, 0, 7]) if ragged else None
    hidden = jnp.arange(40)[None, :, None, None] >= (jnp.array([40, 40, 40]) if lengths is None else lengths).reshape(
        3, 1, 1, 1
    )
    poisoned = (jnp.where(hidden, jnp.bfloat16(jnp.nan), x) for x in (k, v))
    got = cudnn_attention(q, *poisoned, scale=0.5, key_length=lengths, with_entropy=with_entropy)
    out, log_sum_exp, entropy = attend(q, k, v, scale=0.5, key_length=lengths)
    seen = np.isfinite(log_sum_exp)
    np.testing.assert_allclose(got.out.astype(jnp.float32), out, atol=5e-3)
    np.testing.assert_allclose(np.asarray(got.log_sum_exp)[seen], log_sum_exp[seen], rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(got.log_sum_exp)[~seen], np.float32(MASKED))
    if with_entropy:
        np.testing.assert_allclose(got.entropy, entropy, atol=5e-3)
    else:
        assert got.entropy is None


def test_the_kernel_is_given_clipped_lengths_and_no_hidden_garbage(monkeypatch):
    given = []

    def played(q, k, v, scale, key_length):
        given.append((k, v, key_length))
        out, log_sum_exp, _ = dense_attention(
            q, k, v, scale=scale, key_length=key_length, block_mask=None, with_entropy=False
        )
        return out, log_sum_exp

    monkeypatch.setattr(cudnn, "_call", played)
    q, k, v = (jnp.asarray(x) for x in draw(4, 4, 5, 12, 2, 16))
    asked, clipped = jnp.array([-3, 99, 7, 0]), np.array([0, 12, 7, 0])
    hidden = (np.arange(12)[None] >= clipped[:, None])[:, :, None, None]
    poisoned = (jnp.where(hidden, jnp.nan, x) for x in (k, v))
    got = cudnn_attention(q, *poisoned, scale=0.5, key_length=asked, with_entropy=True)
    assert len(given) == 2
    for keys, values, lengths in given:
        np.testing.assert_array_equal(keys, np.where(hidden, 0.0, k))
        assert np.all(np.isfinite(values))
        np.testing.assert_array_equal(lengths, [1, 12, 7, 1])
    out, _, entropy = attend(q, k, v, scale=0.5, key_length=jnp.asarray(clipped))
    np.testing.assert_allclose(got.out, out, atol=1e-5)
    np.testing.assert_allclose(got.entropy, entropy, atol=3e-5)
    np.testing.assert_array_equal(np.asarray(got.log_sum_exp)[[0, 3]], np.float32(MASKED))


@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
def test_the_lowered_program_calls_cudnn_and_keeps_the_statistics_in_float32(monkeypatch, ragged):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    q = jax.ShapeDtypeStruct((2, 100, 3, 104), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((2, 333, 3, 104), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32) if ragged else None

    def run(q, k, v, lengths):
        return cudnn_attention(q, k, v, scale=0.3, key_length=lengths, with_entropy=True)

    text = jax.jit(run).trace(q, k, k, lengths).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__cudnn$fmhaSoftmax(") == 2
    assert ("PADDING" in text) == ragged
    assert "tensor<2x3x100xf32>" in text


def test_a_block_mask_is_refused_by_name():
    q, k, v = (jnp.asarray(x, jnp.float16) for x in draw(2, 1, 4, 4, 1, 8))
    with pytest.raises(NotImplementedError, match="block_mask"):
        cudnn_attention(*(q, k, v), scale=1.0, key_length=None, block_mask=BlockMask(((True,),)), with_entropy=False)


def test_a_machine_without_cudnn_is_told_what_to_install():
    q, k, v = (jnp.asarray(x, jnp.float16) for x in draw(3, 1, 4, 4, 1, 8))
    with pytest.raises(NotImplementedError, match=r"jax\[cuda13\]"):
        cudnn_attention(q, k, v, scale=1.0, key_length=None, with_entropy=False)
