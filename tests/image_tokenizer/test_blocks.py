import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from toprovar_jax.image_tokenizer.blocks import Conv, GroupNorm, ResBlock, upsample_nearest


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def random_conv(width_in, width_out, size=3, **options):
    conv = Conv(width_in, width_out, size, **({"precision": "exact", "rngs": nnx.Rngs(0)} | options))
    conv.kernel[...] = jnp.asarray(draw(size, size, width_in, width_out, seed=1))
    conv.bias[...] = jnp.asarray(draw(width_out, seed=2))
    return conv


def correlate(x, kernel, bias, stride, before, after):
    """A convolution, one output cell at a time."""
    padded = np.pad(np.float64(x), ((0, 0), (before, after), (before, after), (0, 0)))
    size = kernel.shape[0]
    heights, widths = (range(0, extent - size + 1, stride) for extent in padded.shape[1:3])
    rows = [
        [np.einsum("byxi,yxio->bo", padded[:, y : y + size, x : x + size], kernel) + bias for x in widths]
        for y in heights
    ]
    return np.array(rows).transpose(2, 0, 1, 3)


@pytest.mark.parametrize(
    ("size", "stride", "before", "after"), [(3, 1, 1, 1), (1, 1, 0, 0), (3, 2, 0, 1)], ids=["3x3", "1x1", "halving"]
)
def test_convolutions_pad_as_the_original_does(size, stride, before, after):
    conv, x = random_conv(3, 5, size, stride=stride), draw(2, 6, 8, 3)
    want = correlate(x, np.asarray(conv.kernel[...]), np.asarray(conv.bias[...]), stride, before, after)
    assert want.shape == (2, 6 // stride, 8 // stride, 5)
    np.testing.assert_allclose(conv(jnp.asarray(x)), want, rtol=1e-5, atol=1e-5)


def test_halving_looks_right_and_down_only():
    """The first row and column are not touched by padding, the last are."""
    conv = random_conv(1, 1, stride=2)
    conv.kernel[...], conv.bias[...] = jnp.ones((3, 3, 1, 1), jnp.float32), jnp.zeros(1, jnp.float32)
    got = conv(jnp.ones((1, 4, 4, 1), jnp.float32))[0, ..., 0]
    np.testing.assert_array_equal(got, [[9, 6], [6, 4]])


def test_fast_convolutions_are_close_and_float32():
    exact, x = random_conv(4, 4), jnp.asarray(draw(1, 5, 5, 4))
    fast = random_conv(4, 4, precision="fast")
    assert fast(x).dtype == jnp.float32
    error = jnp.max(jnp.abs(fast(x) - exact(x))) / jnp.max(jnp.abs(exact(x)))
    assert 0 < error < 1e-2


@pytest.mark.parametrize(("width", "groups"), [(32, 32), (64, 32), (96, 32), (24, 24), (48, 24), (72, 24)])
def test_groups_are_normalised_over_their_channels_and_all_cells(width, groups):
    norm, x = GroupNorm(width), draw(2, 3, 5, width) * 3 + 1
    norm.scale[...], norm.bias[...] = jnp.asarray(draw(width, seed=1)), jnp.asarray(draw(width, seed=2))
    grouped = np.float64(x).reshape(2, 15, groups, width // groups)
    mean, variance = (f(grouped, axis=(1, 3), keepdims=True) for f in (np.mean, np.var))
    want = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * draw(width, seed=1) + draw(width, seed=2)
    np.testing.assert_allclose(norm(jnp.asarray(x)), want, rtol=1e-5, atol=1e-5)


def test_the_norms_epsilon_shows_on_small_inputs():
    x = draw(1, 4, 4, 32) * 1e-3
    got = GroupNorm(32)(jnp.asarray(x))
    deviation = x.std(axis=(1, 2), dtype=np.float64)
    np.testing.assert_allclose(np.asarray(got).std(axis=(1, 2)), deviation / np.sqrt(deviation**2 + 1e-6), rtol=1e-4)


def test_a_large_common_offset_does_not_spoil_the_variance():
    x = draw(1, 8, 8, 32)
    shifted = GroupNorm(32)(jnp.asarray(x + 512.0))
    np.testing.assert_allclose(shifted, GroupNorm(32)(jnp.asarray(x)), atol=2e-4)


def test_doubling_repeats_every_cell():
    x = draw(2, 3, 4, 2)
    np.testing.assert_array_equal(upsample_nearest(jnp.asarray(x)), x.repeat(2, axis=1).repeat(2, axis=2))


def test_blocks_of_one_width_have_no_shortcut_and_others_a_pointwise_one():
    build = lambda a, b: ResBlock(a, b, precision="exact", rngs=nnx.Rngs(0))
    assert build(32, 32).shortcut is None
    assert build(32, 64).shortcut.kernel.shape == (1, 1, 32, 64)


@pytest.fixture(scope="module")
def parts(golden):
    folder = golden / "e_blocks"
    return np.load(folder / "io.npz"), load_file(folder / "vae_parts.safetensors")


def channels_last(x):
    return jnp.asarray(x.transpose(0, 2, 3, 1))


def load_conv(conv, weights, name):
    conv.kernel[...] = jnp.asarray(weights[f"{name}.weight"].transpose(2, 3, 1, 0))
    conv.bias[...] = jnp.asarray(weights[f"{name}.bias"])


@pytest.mark.parametrize("case", ["resblock", "resblock_small", "resblock24"])
def test_residual_blocks_agree_with_the_reference(parts, case):
    data, weights = parts
    name = case.removesuffix("_small")
    x = channels_last(data[f"vae_{case}_in"])
    want = channels_last(data[f"vae_{case}_out"])
    block = ResBlock(x.shape[-1], want.shape[-1], precision="exact", rngs=nnx.Rngs(0))
    for i in (1, 2):
        load_conv(getattr(block, f"conv{i}"), weights, f"{name}.conv{i}.conv")
        norm = getattr(block, f"norm{i}")
        norm.scale[...] = jnp.asarray(weights[f"{name}.norm{i}.norm.weight"])
        norm.bias[...] = jnp.asarray(weights[f"{name}.norm{i}.norm.bias"])
    if block.shortcut is not None:
        load_conv(block.shortcut, weights, f"{name}.nin_shortcut.conv")
    np.testing.assert_allclose(jax.jit(lambda block, x: block(x))(block, x), want, atol=2e-5)


@pytest.mark.parametrize(("name", "stride"), [("downsample", 2), ("upsample", 1)])
def test_resampling_agrees_with_the_reference(parts, name, stride):
    data, weights = parts
    x, want = channels_last(data[f"vae_{name}_in"]), channels_last(data[f"vae_{name}_out"])
    conv = Conv(x.shape[-1], want.shape[-1], stride=stride, precision="exact", rngs=nnx.Rngs(0))
    load_conv(conv, weights, f"{name}.conv.conv")
    np.testing.assert_allclose(conv(upsample_nearest(x) if name == "upsample" else x), want, atol=2e-5)
