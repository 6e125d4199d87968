"""The judge's network agrees with a slow twin, and its cells are read as objects."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toprovar_jax.scenes import detector
from toprovar_jax.scenes.detector import CELL, HEADS, LARGE_FROM, MIDDLE, MOST_DETECTIONS
from toprovar_jax.scenes.world import projected


def convolve_slowly(features: np.ndarray, kernel: np.ndarray, bias: np.ndarray, stride: int = 1) -> np.ndarray:
    height, width, _ = features.shape
    # As XLA pads for "SAME": with stride 2 and even sides, the one missing row and column lie at the end.
    first = 1 if stride == 1 else 0
    padded = np.zeros((height + 2, width + 2, features.shape[2]))
    padded[first : first + height, first : first + width] = features
    out = np.zeros((height // stride, width // stride, kernel.shape[3]))
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            window = padded[row * stride : row * stride + 3, column * stride : column * stride + 3]
            out[row, column] = np.einsum("ijc,ijcd->d", window, kernel) + bias
    return out


def gelu(values: np.ndarray) -> np.ndarray:
    return 0.5 * values * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (values + 0.044715 * values**3)))


def normalise(values: np.ndarray) -> np.ndarray:
    return values / np.sqrt((values**2).mean(axis=-1, keepdims=True) + 1e-6)


def look_slowly(weights: dict[str, np.ndarray], image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The last features and the numbers of all cells, in double precision."""
    w = {name: values.astype(np.float64) for name, values in weights.items()}
    height, width = -(-image.shape[0] // CELL) * CELL, -(-image.shape[1] // CELL) * CELL
    pixels = np.zeros((height, width, 3))
    for row in range(height):
        for column in range(width):
            pixels[row, column] = image[min(row, image.shape[0] - 1), min(column, image.shape[1] - 1)]
    folded = np.zeros((height // 2, width // 2, 12))
    for row, column, part in np.ndindex(2, 2, 3):
        folded[..., (row * 2 + column) * 3 + part] = 2.0 * pixels[row::2, column::2, part] - 1.0
    features = convolve_slowly(gelu(convolve_slowly(folded, w["stem"], w["stem_bias"])), w["down"], w["down_bias"], 2)
    for index in range(len(w["first"])):
        inner = gelu(convolve_slowly(normalise(features), w["first"][index], w["first_bias"][index]))
        features = features + convolve_slowly(inner, w["second"][index], w["second_bias"][index])
    features = normalise(features)
    return features, features @ w["head"] + w["head_bias"]


@pytest.mark.parametrize("size", [(16, 16), (18, 25)])
def test_the_network_agrees_with_its_slow_twin(size):
    rng = np.random.default_rng(5)
    weights = {
        name: values + rng.normal(0.0, 0.02, values.shape) for name, values in detector.initial_weights(3).items()
    }
    weights = {name: values.astype(np.float32) for name, values in weights.items()}
    image = rng.uniform(size=(*size, 3)).astype(np.float32)
    features, numbers = look_slowly(weights, image)
    on_device = jax.tree.map(jnp.asarray, weights)
    _, found = detector.feature_maps(on_device, jnp.asarray(image)[None])
    np.testing.assert_allclose(found[0], features, rtol=2e-5, atol=2e-5)
    said = detector.heads(on_device, found)
    start = 0
    for name, count in HEADS.items():
        wanted = numbers[..., start] if name == "object" else numbers[..., start : start + count]
        np.testing.assert_allclose(said[name][0], wanted, rtol=2e-5, atol=2e-5)
        start += count


def silent(down: int, right: int) -> dict[str, np.ndarray]:
    """Cells that say nothing."""
    said = {name: np.zeros((1, down, right, count), np.float32) for name, count in HEADS.items()}
    return said | {"object": np.full((1, down, right), -6.0, np.float32)}


def test_planted_objects_are_read_with_the_most_confident_first():
    said = silent(16, 16)
    for row, column, logit, shape, colour, size in [(3, 4, 1.0, 2, 5, 1), (10, 12, 4.0, 4, 7, 0)]:
        said["object"][0, row, column] = logit
        said["shape"][0, row, column, shape] = 3.0
        said["colour"][0, row, column, colour] = 3.0
        said["size"][0, row, column, size] = 3.0
    said["offset"][0, 10, 12] = 0.5, -0.25
    said["floor"][0, 10, 12] = 0.3, -0.1
    seen = detector.decode(jax.tree.map(jnp.asarray, said), 64, 64)
    assert seen.found[0].tolist() == [True, True] + [False] * (MOST_DETECTIONS - 2)
    assert [field[0, :2].tolist() for field in (seen.shape, seen.colour, seen.size)] == [[4, 2], [7, 5], [0, 1]]
    np.testing.assert_allclose(seen.confidence[0, :2], 1.0 / (1.0 + np.exp([-4.0, -1.0])), rtol=1e-6)
    middles = np.array([[(12.5 * 4 - 32) / 32, (10.5 * 4 - 32) / 32], [(4.5 * 4 - 32) / 32, (3.5 * 4 - 32) / 32]])
    np.testing.assert_allclose(seen.centre[0, :2], middles + np.array([[0.5 / 8, -0.25 / 8], [0.0, 0.0]]), atol=1e-6)
    usual = detector.usual_position(jnp.asarray(middles, jnp.float32))
    np.testing.assert_allclose(seen.position[0, :2], usual + np.array([[0.3, -0.1], [0.0, 0.0]]), atol=1e-5)


def test_cells_beside_a_better_one_are_no_objects():
    said = silent(12, 20)
    said["object"][0] = np.random.default_rng(1).normal(0.0, 2.0, (12, 20))
    seen = detector.decode(jax.tree.map(jnp.asarray, said), 48, 80)
    logits = np.pad(said["object"][0], 1, constant_values=-np.inf)
    peaks = [
        logits[row + 1, column + 1]
        for row, column in np.ndindex(12, 20)
        if logits[row + 1, column + 1] == logits[row : row + 3, column : column + 3].max()
    ]
    best = np.sort(peaks)[::-1][:MOST_DETECTIONS]
    np.testing.assert_allclose(seen.confidence[0], 1.0 / (1.0 + np.exp(-best)), rtol=1e-6)
    assert seen.found[0].tolist() == (best > 0.0).tolist()


@pytest.mark.parametrize("place", [(0.0, 0.0), (-1.3, 2.5), (1.7, -1.0)])
def test_the_usual_position_undoes_the_projection_of_a_medium_object(place):
    centre, _ = projected(jnp.array([place]), jnp.array([MIDDLE * LARGE_FROM], jnp.float32))
    np.testing.assert_allclose(detector.usual_position(centre)[0], place, atol=1e-5)


def test_places_above_the_horizon_have_a_finite_position():
    places = detector.usual_position(jnp.array([[0.5, -4.0], [0.0, -3.1]]))
    assert np.abs(places).max() < 100.0


def test_cells_lie_about_the_middle_of_a_picture_in_half_shorter_sides():
    cells = detector.cell_centres(16, 24, 64, 96)
    np.testing.assert_allclose(cells[:, 0, 0], -1.5 + 1 / 16)
    np.testing.assert_allclose(cells[0, :, 1], -1.0 + 1 / 16)
    np.testing.assert_allclose(cells, -np.asarray(cells)[::-1, ::-1], atol=1e-6)


@pytest.mark.parametrize(("size", "working"), [((64, 64), (64, 64)), ((128, 200), (64, 100)), ((96, 32), (192, 64))])
def test_pictures_are_looked_at_with_one_shorter_side(size, working):
    assert detector.to_working_size(jnp.ones((1, *size, 3))).shape == (1, *working, 3)
