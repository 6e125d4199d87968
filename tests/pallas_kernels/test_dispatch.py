"""Which implementation runs, and what is said when none can."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention
from pallas_kernels.attention import api
from pallas_kernels.attention.output import AttentionOutput
from pallas_kernels.attention.problem import Problem
from pallas_kernels.attention.reference import dense_attention
from pallas_kernels.attention.target import Target, current_target, describe

from .twin import draw

Q, K, V = (jnp.asarray(x) for x in draw(0, 2, 3, 5, 2, 4))
KERNELS = ("cudnn", "mosaic_gpu", "triton", "mosaic_tpu")
H200 = Target("cuda", "NVIDIA H200", (9, 0))


@pytest.fixture
def fake_kernels(monkeypatch):
    """Kernels that run everywhere except where ``reasons`` says why not, and record their calls."""
    reasons, calls = {}, []

    def module(name):
        def run(q, k, v, *, scale, key_length, block_mask, with_entropy, config) -> AttentionOutput:
            calls.append((name, q.shape, config))
            options = {"key_length": key_length, "block_mask": block_mask, "with_entropy": with_entropy}
            return dense_attention(q, k, v, scale=scale, **options)

        return types.SimpleNamespace(**{"why_not": lambda problem, target: reasons.get(name), f"{name}_attention": run})

    monkeypatch.setattr(api, "implementation_module", module)
    return types.SimpleNamespace(reasons=reasons, calls=calls)


def problem(num_queries=4096, num_keys=10521):
    return Problem(2, num_queries, num_keys, 16, 128, np.dtype(jnp.bfloat16))


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_runs_through_the_same_door(fake_kernels, name):
    got = attention(Q, K, V, scale=1.0, with_entropy=True, implementation=name)
    want = attention(Q, K, V, scale=1.0, with_entropy=True, implementation="reference")
    assert [call[0] for call in fake_kernels.calls] == [name]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_list_is_tried_in_order(fake_kernels):
    fake_kernels.reasons["mosaic_gpu"] = "needs Hopper"
    attention(Q, K, V, scale=1.0, implementation=["mosaic_gpu", "triton", "cudnn"])
    assert [call[0] for call in fake_kernels.calls] == ["triton"]


def test_when_none_can_run_every_reason_is_told(fake_kernels):
    fake_kernels.reasons |= {"mosaic_gpu": "needs Hopper", "triton": "needs triton"}
    with pytest.raises(NotImplementedError) as caught:
        attention(Q, K, V, scale=1.0, implementation=("mosaic_gpu", "triton"))
    text = "cannot run on cpu: mosaic_gpu: needs Hopper; triton: needs triton; implementation='reference' can"
    assert str(caught.value) == text


@pytest.mark.parametrize("name", KERNELS)
def test_real_kernels_refuse_the_cpu_and_say_so(name):
    with pytest.raises(NotImplementedError, match=f"cannot run on cpu: {name}: .*implementation='reference' can") as e:
        attention(Q, K, V, scale=1.0, implementation=name)
    assert "\n" not in str(e.value)


def test_by_default_only_what_is_proven_is_chosen(fake_kernels, monkeypatch):
    assert api.choose(problem(), H200, None) == "xla"
    monkeypatch.setattr(api, "proven", lambda target, with_entropy: ("mosaic_gpu", "cudnn") if target == H200 else ())
    assert api.choose(problem(), H200, None) == "mosaic_gpu"
    fake_kernels.reasons["mosaic_gpu"] = "not this dtype"
    assert api.choose(problem(), H200, None) == "cudnn"
    fake_kernels.reasons["cudnn"] = "nor this"
    assert api.choose(problem(), H200, None) == "xla"
    assert api.choose(problem(), Target("tpu", "TPU v6 lite"), None) == "xla"


def test_what_is_not_proven_runs_densely_where_that_is_small():
    assert api.choose(problem(64, 4096), H200, None) == "reference"
    assert api.choose(problem(1024, 1024), H200, None) == "reference"
    assert api.choose(problem(1024, 1025), H200, None) == "xla"


@pytest.mark.parametrize("names", [(), [], ("xla", "flash")], ids=str)
def test_unknown_names_and_empty_lists_are_refused(names):
    with pytest.raises(ValueError, match=r"implementation (\[\]|'flash'): must be of reference, xla, cudnn.*None"):
        attention(Q, K, V, scale=1.0, implementation=names)


@pytest.mark.parametrize("axis", ["batch", "queries", "heads"])
def test_empty_arrays_are_for_xla(axis):
    q, kv = {
        "batch": (Q[:0], K[:0]),
        "queries": (Q[:, :0], K),
        "heads": (Q[:, :, :0], K[:, :, :0]),
    }[axis]
    assert attention(q, kv, kv, scale=1.0, with_entropy=True).out.shape == q.shape
    with pytest.raises(NotImplementedError, match="triton: an array is empty"):
        attention(q, kv, kv, scale=1.0, implementation="triton")


def test_under_vmap_a_kernel_sees_a_larger_batch(fake_kernels):
    q = jnp.stack([Q, 2 * Q, -Q])
    lengths = jnp.array([[1, 5], [2, 4], [5, 0]])

    def one(q, v, length):
        return attention(q, K, v, scale=1.0, key_length=length, with_entropy=True, implementation="triton")

    got = jax.vmap(one, in_axes=(0, None, 0))(q, V, lengths)
    assert fake_kernels.calls[-1][1] == (6, 3, 2, 4)
    for row in range(3):
        options = {"key_length": lengths[row], "with_entropy": True, "implementation": "reference"}
        for a, b in zip(got, attention(q[row], K, V, scale=1.0, **options), strict=True):
            np.testing.assert_allclose(a[row], b, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("fake_kernels")
def test_under_a_vmap_over_nothing():
    got = jax.vmap(lambda q: attention(q, K, V, scale=1.0, with_entropy=True, implementation="triton"))(
        jnp.zeros((0, *Q.shape), Q.dtype)
    )
    assert (got.out.shape, got.entropy.shape) == ((0, 2, 3, 2, 4), (0, 2, 2, 3))


def test_under_two_vmaps_and_jit(fake_kernels):
    q = jnp.stack([Q, 2 * Q, -Q])
    pair = jnp.stack([q, q[::-1]])
    run = jax.jit(jax.vmap(jax.vmap(lambda q: attention(q, K, V, scale=1.0, implementation="triton").out)))
    want = [[attention(one, K, V, scale=1.0).out for one in three] for three in pair]
    np.testing.assert_allclose(run(pair), np.asarray(want), rtol=1e-6, atol=1e-6)
    assert fake_kernels.calls[-1][1] == (12, 3, 2, 4)


@pytest.mark.parametrize("platform", ["gpu", "cuda"])
def test_the_device_is_that_of_the_arrays_unless_a_mesh_describes_another(platform):
    assert current_target(Q) == current_target() == Target("cpu", "cpu")
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform=platform)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert current_target() == Target("cuda", "NVIDIA H100 80GB HBM3", (9, 0))


@pytest.mark.parametrize(
    ("platform", "kind", "version", "capability", "want"),
    [
        ("gpu", "NVIDIA L40", "cuda 13000", "8.9", Target("cuda", "NVIDIA L40", (8, 9))),
        ("gpu", "AMD Instinct MI300X", "rocm 60300", None, Target("rocm", "AMD Instinct MI300X")),
        ("tpu", "TPU v5 lite", "libtpu", None, Target("tpu", "TPU v5 lite")),
        ("gpu", "NVIDIA A100-SXM4-80GB", "cuda 12080", None, Target("cuda", "NVIDIA A100-SXM4-80GB", (8, 0))),
        ("gpu", "NVIDIA GB200", "cuda 12080", "10.0", Target("cuda", "NVIDIA GB200", (10, 0))),
        ("gpu", "NVIDIA T1000", "cuda 12080", None, Target("cuda", "NVIDIA T1000")),
    ],
)
def test_devices_are_described_by_platform_kind_and_capability(platform, kind, version, capability, want):
    client = types.SimpleNamespace(platform_version=version)
    device = types.SimpleNamespace(platform=platform, device_kind=kind, client=client, compute_capability=capability)
    assert describe(device) == want
