"""One batch of 64 scenes of all kinds, their pictures, and the judge."""

import jax
import pytest

from toprovar_jax.scenes.judge import Judge
from toprovar_jax.scenes.renderer import render
from toprovar_jax.scenes.sampling import sample_scenes
from toprovar_jax.scenes.world import Scenes


@pytest.fixture(scope="session")
def scenes() -> Scenes:
    return sample_scenes(jax.random.key(2024), 64, held_out=True)


@pytest.fixture(scope="session")
def images(scenes: Scenes) -> jax.Array:
    return render(scenes, height=64, width=64)


@pytest.fixture(scope="session")
def judge() -> Judge:
    return Judge.load()
