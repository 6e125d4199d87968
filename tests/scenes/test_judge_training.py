"""The judge learns from renders what it is asked afterwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toprovar_jax.scenes import detector, judge_training
from toprovar_jax.scenes.detector import CELL, HEADS
from toprovar_jax.scenes.disturbance import DOUBTFUL, GONE, STANDS, Truth
from toprovar_jax.scenes.judge import Judge


def truth(standing: list) -> Truth:
    """Objects at three places of one picture."""
    centre = jnp.array([[[-0.3, -0.4], [0.5, 0.2], [-0.5, 0.6]]])
    shape, colour, size = (jnp.array([row], jnp.int32) for row in ([0, 3, 4], [7, 2, 1], [0, 1, 0]))
    position = detector.usual_position(centre) + jnp.array([0.1, -0.05])[None, None]
    return Truth(jnp.array([standing], jnp.int32), shape, colour, size, position, centre, jnp.full((1, 3), 0.2))


def softmax_loss(logits: np.ndarray, label: int) -> float:
    return float(np.log(np.exp(logits - logits[label]).sum()))


def slow_loss(said: dict[str, np.ndarray], answer: Truth, height: int, width: int) -> float:
    """One picture's loss, cell by cell and object by object, in double precision."""
    t = jax.tree.map(lambda field: np.asarray(field, np.float64)[0], answer)
    half = 0.5 * min(height, width)
    heat, described, weights = 0.0, 0.0, 0.0
    standing = [k for k in range(3) if t.standing[k] == STANDS]
    for row, column in np.ndindex(*said["object"].shape):
        middle = np.array([(column + 0.5) * CELL - 0.5 * width, (row + 0.5) * CELL - 0.5 * height])
        ways = (t.centre * half - middle) / CELL
        distances = np.linalg.norm(ways, axis=-1)
        owner = min(standing, key=lambda k: distances[k]) if standing else 0
        near = min(max(1.75 - distances[owner], 0.0), 1.0) if standing else 0.0
        doubt = any(t.standing[k] == DOUBTFUL and distances[k] < t.radius[k] * half / CELL + 1.0 for k in range(3))
        logit = float(said["object"][row, column])
        if near > 0.0 or not doubt:
            heat += np.log1p(np.exp(-logit)) * near + np.log1p(np.exp(logit)) * (1.0 - near)
        if near > 0.0:
            cell = {name: said[name][row, column] for name in said if name != "object"}
            loss = softmax_loss(cell["shape"], int(t.shape[owner])) + softmax_loss(cell["colour"], int(t.colour[owner]))
            loss += 0.5 * softmax_loss(cell["size"], int(t.size[owner]))
            loss += 0.5 * np.abs(cell["offset"] - ways[owner]).sum()
            usual = np.asarray(detector.usual_position(jnp.asarray(middle / half, jnp.float32)), np.float64)
            loss += np.abs(cell["floor"] - (t.position[owner] - usual)).sum()
            described, weights = described + near * loss, weights + near
    return heat / max(1, len(standing)) + described / max(1.0, weights)


@pytest.mark.parametrize(
    "standing", [[STANDS, STANDS, GONE], [STANDS, DOUBTFUL, GONE], [GONE, GONE, GONE], [DOUBTFUL, GONE, STANDS]]
)
def test_the_loss_agrees_with_its_slow_twin(standing, monkeypatch):
    height, width = 32, 48
    rng = np.random.default_rng(2)
    said = {name: rng.normal(size=(1, 8, 12, count)) for name, count in HEADS.items()}
    said = {name: values.astype(np.float32) for name, values in said.items()}
    said["object"] = said["object"][..., 0]
    monkeypatch.setattr(detector, "heads", lambda weights, features: jax.tree.map(jnp.asarray, said))
    monkeypatch.setattr(detector, "feature_maps", lambda weights, images: (images, images))
    loss = judge_training.detection_loss({}, jnp.zeros((1, height, width, 3)), truth(standing))
    exact = {name: values[0].astype(np.float64) for name, values in said.items()}
    np.testing.assert_allclose(loss, slow_loss(exact, truth(standing), height, width), rtol=1e-5)


def test_training_lowers_the_loss_and_leaves_weights_that_load(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(judge_training, "_FRAMES", ((32, 32),))
    monkeypatch.setattr(judge_training, "_GROUPS", 2)
    monkeypatch.setattr(judge_training, "_GROUP", 2)
    monkeypatch.setattr(judge_training, "_REPORT_EVERY", 4)
    out = tmp_path / "judge.npz"
    monkeypatch.setattr("sys.argv", ["judge_training", "--out", str(out), "--steps", "24", "--seed", "3"])
    judge_training.main()
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 6
    assert losses[-1] < 0.8 * losses[0]
    judge = Judge.load(out)
    assert np.abs(judge.weights["head"] - detector.initial_weights(3)["head"]).max() > 1e-3
    assert list(tmp_path.iterdir()) == [out]
