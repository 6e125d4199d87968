import csv
import json

import jax
import numpy as np
import pytest
from flax import nnx

from toprovar_jax.config import ImageTokenizerConfig, InfinityConfig
from toprovar_jax.training import scenes
from toprovar_jax.training.loop import LoopConfig

RECIPE = scenes.Recipe(
    name="tiny",
    image_tokenizer=ImageTokenizerConfig(4, 2, 24, (1, 1), 1),
    transformer=InfinityConfig(
        num_layers=2, width=64, num_heads=2, text_width=128, text_length=24, latent_channels=4, block_chunks=2
    ),
    text_layers=1,
    num_scales=3,
    tokenizer_batch=2,
    batch=2,
    pool=6,
    held_out=4,
    pixels="0.0001M",
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A folder with the (hardly trained) image tokenizer."""
    folder = tmp_path_factory.mktemp("scenes")
    scenes.train_image_tokenizer(folder, RECIPE, 2)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(directory):
    return jax.device_get(scenes.train_transformer(directory, RECIPE, 6))


def test_a_killed_run_ends_with_the_same_weights(directory, uninterrupted, tmp_path, monkeypatch):
    for name in ("image_tokenizer.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())

    class Killed(Exception):
        pass

    def killed_at_three(state, step_fn, config, **options):
        def step(state, number):
            if number == 3:
                raise Killed
            return step_fn(state, number)

        # Checkpoint after every step: no time passes between the last one and the end.
        return original(state, step, LoopConfig(config.directory, config.num_steps, checkpoint_minutes=0.0), **options)

    original = scenes.run
    with monkeypatch.context() as patched:
        patched.setattr(scenes, "run", killed_at_three)
        with pytest.raises(Killed):
            scenes.train_transformer(tmp_path, RECIPE, 6)
    resumed = jax.device_get(scenes.train_transformer(tmp_path, RECIPE, 6))
    assert int(resumed.step) == 6
    assert jax.tree.structure(resumed) == jax.tree.structure(uninterrupted)
    for ours, theirs in zip(jax.tree.leaves(resumed), jax.tree.leaves(uninterrupted), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_run_leaves_metrics_of_every_scale(directory, uninterrupted):
    lines = (directory / "transformer" / "metrics.csv").read_text().splitlines()
    rows = list(csv.DictReader(lines))
    evaluated = {row["name"] for row in rows if row["kind"] == "evaluate"}
    assert {"loss", "image_bits", "accuracy0", "accuracy1", "accuracy2"} == evaluated
    assert (directory / "tokenizer" / "samples.png").stat().st_size > 100


def test_the_pool_is_encoded_once_and_again_for_another_recipe(directory, uninterrupted, monkeypatch):
    first = scenes._pools(directory, RECIPE)
    monkeypatch.setattr(scenes, "_encode", lambda *_: pytest.fail("encoded again"))
    for stored, again in zip(jax.tree.leaves(first), jax.tree.leaves(scenes._pools(directory, RECIPE)), strict=True):
        np.testing.assert_array_equal(stored, again)
    assert first[0].latents.shape == (6, 4, 4, 4)
    assert not np.array_equal(first[0].latents[:4], first[1].latents)
    with pytest.raises(pytest.fail.Exception, match="encoded again"):
        scenes._pools(directory, scenes.dataclasses.replace(RECIPE, seed=1))


def test_the_export_is_a_model_that_can_be_loaded(directory, uninterrupted):
    from toprovar_jax.loading import load_model

    assert scenes.main(["export", "--directory", str(directory), "--steps", "6"], {"tiny": RECIPE}) == 0
    folder = directory / "model"
    card = json.loads((folder / "model.json").read_text())
    assert (card["world"], card["training"]["samples"]) == ("scenes", 12)
    loaded = load_model(folder, precision="exact", with_encoder=True)
    exported = loaded.networks.transformer.layers.feed_forward.up.kernel[...]
    trained = dict(nnx.to_flat_state(uninterrupted.average["transformer"]))[("layers", "feed_forward", "up", "kernel")]
    np.testing.assert_allclose(exported, trained.get_value(), rtol=2**-8)
    assert loaded.tokenizer.encode(["a red cube"], max_length=24).lengths[0] == 4


@pytest.mark.parametrize(
    ("stage", "message"),
    [("transformer", "holds no image_tokenizer.safetensors"), ("export", "holds no transformer checkpoint")],
)
def test_a_stage_without_the_one_before_says_what_to_run(tmp_path, capsys, stage, message):
    assert scenes.main([stage, "--directory", str(tmp_path)], {"tiny": RECIPE}) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
