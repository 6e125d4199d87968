"""The verdicts on the paper's statements: each can come out either way."""

import importlib.util
import pathlib
import sys

import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "entropy_shape.py"
SCALES, LAYERS, PICTURES = 7, 9, 20


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("entropy_shape", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["entropy_shape"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["entropy_shape"]


def as_published(script):
    """Pictures that behave as the paper says."""
    rng = np.random.default_rng(0)
    rho = np.array([0.0, 0.5, 0.52, 0.5, 0.45, 0.39, 0.35]) + rng.uniform(-0.005, 0.005, (PICTURES, 1))
    similarity = np.tile([0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0], (PICTURES, 1))
    entropy = rng.uniform(0.6, 0.601, (PICTURES, SCALES, LAYERS))
    depth = np.array([5.0, 4.5, 4.0, 1.2, 1.1, 1.3, 3.8, 4.4, 4.9])
    varrho = depth + rng.uniform(-0.04, 0.04, (PICTURES, SCALES, LAYERS))
    return script.Observed(rho, similarity, entropy, varrho, np.arange(PICTURES) % 2)


def holding(script, seen) -> list[bool]:
    return [verdict.holds for verdict in script.verdicts(seen)]


def test_every_statement_holds_of_pictures_that_behave_as_published(script):
    assert holding(script, as_published(script)) == [True] * 6


@pytest.mark.parametrize(
    ("broken", "change"),
    [
        (0, lambda seen: {"rho": seen.rho + np.linspace(0, 0.3, SCALES)}),
        (1, lambda seen: {"rho": np.maximum(seen.rho, 0.42)}),
        (2, lambda seen: {"similarity": seen.similarity[:, ::-1] * 0.9}),
        (3, lambda seen: {"entropy": seen.entropy * np.where(seen.group == 0, 1.0, 1.1)[:, None, None]}),
        (4, lambda seen: {"varrho": 6.0 - seen.varrho}),
        (5, lambda seen: {"varrho": np.random.default_rng(1).permuted(seen.varrho, axis=2)}),
    ],
)
def test_each_statement_fails_where_pictures_behave_otherwise(script, broken, change):
    seen = as_published(script)
    assert not holding(script, seen._replace(**change(seen)))[broken]


def test_figure_and_numbers_are_of_all_scales_and_layers(script, tmp_path):
    seen = as_published(script)
    script.draw(seen, "made up", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    numbers = [verdict.numbers for verdict in script.verdicts(seen)]
    assert len(numbers[0].split()) == SCALES + 3
    assert len(numbers[4].split()) == LAYERS + 4
