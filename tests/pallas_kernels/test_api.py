import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import BlockMask, attention

from .twin import draw

E4 = jnp.float8_e4m3fn
Q, K, V = (jnp.asarray(x) for x in draw(0, 2, 3, 5, 2, 4))


def test_entropy_is_only_returned_on_request():
    for name in ("reference", "xla"):
        assert attention(Q, K, V, scale=1.0, implementation=name).entropy is None
        assert attention(Q, K, V, scale=1.0, implementation=name, with_entropy=True).entropy.shape == (2, 2, 3)


def test_the_output_has_the_dtype_of_the_values():
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        assert attention(Q.astype(dtype), K.astype(dtype), V.astype(dtype), scale=1.0).out.dtype == dtype


def score_matrices(length: int, num_keys: int) -> int:
    """How many arrays of ``length x num_keys`` the default choice holds."""
    q = jax.ShapeDtypeStruct((1, length, 2, 4), jnp.float32)
    kv = jax.ShapeDtypeStruct((1, num_keys, 2, 4), jnp.float32)
    program = str(jax.make_jaxpr(lambda q, k, v: attention(q, k, v, scale=1.0))(q, kv, kv))
    return len(re.findall(rf"f32\[1,2,{length},{num_keys}\]", program))


def test_small_problems_are_solved_densely_and_large_ones_in_linear_memory():
    assert score_matrices(64, 4096) > 0
    assert score_matrices(4096, 10521) == 0


def test_works_inside_jit_and_vmap():
    plain = attention(Q, K, V, scale=1.0).out
    np.testing.assert_allclose(jax.jit(lambda *a: attention(*a, scale=1.0).out)(Q, K, V), plain, rtol=1e-6, atol=1e-6)
    mapped = jax.vmap(lambda q: attention(q, K, V, scale=1.0).out)(jnp.stack([Q, Q]))
    np.testing.assert_allclose(mapped[1], plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"q": Q[0]}, r"q \(3, 2, 4\).*rank 4.*add the missing axes"),
        ({"k": K[:, :4]}, r"k \(2, 4, 2, 4\), v \(2, 5, 2, 4\).*alike"),
        ({"k": K[:, :0], "v": V[:, :0]}, r"k \(2, 0, 2, 4\).*at least one key"),
        ({"q": Q[:1]}, r"q \(1, 3, 2, 4\).*batch, heads and head dim must agree"),
        ({"q": Q[:, :, :1]}, r"q \(2, 3, 1, 4\).*must agree"),
        ({"q": Q[..., :2]}, r"q \(2, 3, 2, 2\).*must agree"),
        ({"q": Q.astype(jnp.int32)}, "int32.*floating.*cast"),
        ({"q": Q.astype(jnp.bfloat16)}, "bfloat16, float32, float32.*one floating dtype"),
        ({"scale": 0.0}, r"scale 0\.0: must be a positive number"),
        ({"scale": "1"}, r"scale '1': must be a positive number"),
        ({"scale": None}, "scale None: must be a positive number"),
        ({"scale": 1e39}, r"scale 1e\+39: must be a positive number up to 1e\+30"),
        ({"scale": float("nan")}, "scale nan: must be a positive number"),
        ({"key_length": jnp.ones((2, 1), jnp.int32)}, r"key_length \(2, 1\).*\(2,\)"),
        ({"key_length": jnp.ones((3,), jnp.int32)}, r"key_length \(3,\).*\(2,\)"),
        ({"key_length": jnp.ones((2,), jnp.float32)}, "key_length dtype float32.*integer"),
        ({"q": Q[..., :0], "k": K[..., :0], "v": V[..., :0]}, "head dim of at least 1"),
        ({"q": Q.astype(E4), "k": K.astype(E4), "v": V.astype(E4)}, "float8_e4m3fn.*one floating dtype, bfloat16"),
        ({"key_length": np.array([2**32 + 1, 3])}, r"key_length 4294967297: must be in 0\.\.5"),
        ({"key_length": [1, 2**40]}, r"key_length 1099511627776: must be in 0\.\.5"),
        ({"key_length": [1.0, 2.0]}, "key_length dtype float64.*integer"),
        ({"implementation": 5}, "implementation 5: must be a name or a list"),
        ({"implementation": True}, "implementation True: must be a name or a list"),
        ({"key_length": jnp.array([3, 6])}, r"key_length 6: must be in 0\.\.5, the number of keys; clip"),
        ({"key_length": jnp.array([-1, 5])}, r"key_length -1: must be in 0\.\.5"),
        ({"block_mask": np.ones((1, 2), bool)}, r"block_mask of \(1, 2\) blocks: must be \(1, 1\).*rebuild"),
        ({"block_mask": np.ones((1, 1))}, r"block_mask float64\[1, 1\]: must be boolean"),
        ({"block_mask": jnp.ones((1, 1), bool)}, "block_mask of a JAX array: must be static"),
        ({"implementation": "cudnn9"}, r"'cudnn9'.*reference, xla.*None"),
    ],
    ids=lambda case: "-".join(case) if isinstance(case, dict) else "",
)
def test_bad_calls_name_the_value_the_rule_and_the_remedy(change, told, monkeypatch):
    # Checked annotations would refuse most of these first; users do not have them switched on.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=told) as caught:
        attention(**({"q": Q, "k": K, "v": V, "scale": 1.0} | change))
    assert "\n" not in str(caught.value)


def test_lengths_inside_a_trace_are_clipped():
    run = jax.jit(lambda length: attention(Q, K, V, scale=1.0, key_length=length).out)
    for given, meant in ([-3, 9], [0, 5]), ([5, -1], [5, 0]):
        np.testing.assert_array_equal(run(jnp.array(given)), run(jnp.array(meant)))


def test_numpy_arrays_and_lists_of_lengths_are_taken(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    q, k, v = draw(0, 2, 3, 5, 2, 4)
    got = attention(q, k, v, scale=np.float32(0.5), key_length=[5, 2])
    np.testing.assert_array_equal(got.out, attention(Q, K, V, scale=0.5, key_length=jnp.array([5, 2])).out)


def test_a_traced_scale_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"scale of a traced array.*multiply the queries"):
        jax.jit(lambda scale: attention(Q, K, V, scale=scale).out)(1.0)


def test_a_matrix_is_a_pattern_of_128_by_128():
    q, k, v = (jnp.asarray(x) for x in draw(1, 1, 200, 300, 1, 4))
    pattern = np.array([[True, False, True], [False, True, False]])
    want = attention(q, k, v, scale=1.0, block_mask=BlockMask.from_array(pattern), with_entropy=True)
    for a, b in zip(attention(q, k, v, scale=1.0, block_mask=pattern, with_entropy=True), want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_package_stands_alone():
    folder = pathlib.Path(pallas_kernels.__file__).parent
    for file in folder.rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (toprovar_jax|convert)", file.read_text(), re.MULTILINE), file
    program = "import sys, pallas_kernels; print(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", program], cwd=folder.parent, check=True, capture_output=True, text=True)
    assert "pallas_kernels" in run.stdout.split()
    assert not {"toprovar_jax", "convert", "flax"} & set(run.stdout.split())
