import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from toprovar_jax.errors import UserInputError
from toprovar_jax.training import scene_data, scenes, tokenizer_stage, transformer_stage
from toprovar_jax.training.loop import Stopped
from toprovar_jax.training.metrics import read_rows
from toprovar_jax.training.placement import Placement
from toprovar_jax.training.tokenizer_stage import load_image_tokenizer, train_image_tokenizer
from toprovar_jax.training.transformer_stage import read_text_tokenizer, train_transformer

from .scenes_run import RECIPE, EveryStep

COMMAND = ("--devices", "1", "--directory")


def quiet(_):
    pass


def trained_values(directory):
    """Step, name and value of what a stage logged while training, what the clock measured left out."""
    measured = {"steps_per_second", "images_per_second", "gflops", "utilisation", "memory_gib"}
    rows = read_rows(directory / "metrics.csv")
    return [(step, name, value) for kind, step, _, name, value in rows if kind == "train" and name not in measured]


def contents(path):
    """Header and tensors of a safetensors file; the order of entries in its header is not fixed."""
    packed = path.read_bytes()
    start = 8 + int.from_bytes(packed[:8], "little")
    return json.loads(packed[8:start]), packed[start:]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A folder with the (hardly trained) image tokenizer."""
    folder = tmp_path_factory.mktemp("scenes")
    train_image_tokenizer(folder, RECIPE, 2, report=quiet)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(directory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(transformer_stage, "LoopConfig", EveryStep)
        return jax.device_get(train_transformer(directory, RECIPE, 6, report=quiet))


def test_a_killed_run_ends_with_the_same_weights_and_table(directory, uninterrupted, tmp_path, monkeypatch):
    for name in ("image_tokenizer.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    program = Path(__file__).with_name("scenes_run.py")
    # The same compiler options as here, for the same bits.
    settings = {
        "PYTHONPATH": str(program.parents[2]),
        "JAX_DEFAULT_MATMUL_PRECISION": jax.config.jax_default_matmul_precision,
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    command = [sys.executable, str(program), str(tmp_path), "6"]
    process = subprocess.Popen(command, env=os.environ | settings, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any(step == "2" for step, *_ in trained_values(tmp_path / "transformer")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL

    lines = []
    monkeypatch.setattr(transformer_stage, "LoopConfig", EveryStep)
    resumed = jax.device_get(train_transformer(tmp_path, RECIPE, 6, report=lines.append))
    assert any(line.startswith("resumed at step") for line in lines)
    assert int(resumed.step) == 6
    assert jax.tree.structure(resumed) == jax.tree.structure(uninterrupted)
    for ours, theirs in zip(jax.tree.leaves(resumed), jax.tree.leaves(uninterrupted), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    tables = [trained_values(folder / "transformer") for folder in (tmp_path, directory)]
    assert tables[0] == tables[1]
    assert {step for step, *_ in tables[0]} == set("123456")


def test_the_run_leaves_metrics_of_every_scale_speed_and_samples(directory, uninterrupted):
    lines = (directory / "transformer" / "metrics.csv").read_text().splitlines()
    rows = list(csv.DictReader(lines))
    evaluated = {row["name"] for row in rows if row["kind"] == "evaluate"}
    assert {"loss", "image_bits", "accuracy0", "accuracy1", "accuracy2"} == evaluated
    trained = {row["name"] for row in rows if row["kind"] == "train"}
    assert {"loss", "gradient_norm", "images_per_second", "gflops", "memory_gib"} <= trained
    for stage in ("tokenizer", "transformer"):
        assert (directory / stage / "samples.png").stat().st_size > 100
        assert (directory / stage / "curves.png").stat().st_size > 100
        assert json.loads((directory / stage / "recipe.json").read_text())["recipe"]["num_scales"] == 3


def test_a_tokenizer_with_every_loss_is_trained_and_resumed(tmp_path, monkeypatch):
    recipe = dataclasses.replace(RECIPE, perceptual=0.5, entropy=0.5, adversarial=0.1, adversarial_from=1)
    # The judge wants larger pictures than these.
    judge = SimpleNamespace(load=lambda: SimpleNamespace(features=lambda images: jnp.mean(images, axis=(1, 2))))
    monkeypatch.setattr(tokenizer_stage, "Judge", judge)
    monkeypatch.setattr(tokenizer_stage, "LoopConfig", EveryStep)
    run = tokenizer_stage.run

    def interrupted(state, step_fn, *arguments, **options):
        def step(state, number):
            if number == 2:
                raise KeyboardInterrupt
            return step_fn(state, number)

        return run(state, step, *arguments, **options)

    def attempt(folder, recipe=recipe):
        train_image_tokenizer(folder, recipe, 3, report=quiet)

    with monkeypatch.context() as patched:
        patched.setattr(tokenizer_stage, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            attempt(tmp_path / "stopped")
    attempt(tmp_path / "stopped")
    attempt(tmp_path / "whole")
    tables = [trained_values(tmp_path / name / "tokenizer") for name in ("stopped", "whole")]
    assert tables[0] == tables[1]
    assert {name for _, name, _ in tables[0]} >= {"loss", "perceptual", "entropy", "adversarial", "discriminator"}
    assert [step for step, name, _ in tables[0] if name == "discriminator"] == ["1", "2", "3"]
    files = [contents(tmp_path / name / "image_tokenizer.safetensors") for name in ("stopped", "whole")]
    assert files[0] == files[1]
    with pytest.raises(UserInputError, match=r"recipe\.entropy=0\.5 \(asked for: None\)"):
        attempt(tmp_path / "whole", dataclasses.replace(recipe, entropy=0.0))


def test_records_from_before_a_field_serve_its_default_alone():
    younger = {"perceptual", "entropy", "adversarial", "adversarial_from", "scale_weights", "unroll", "guidance", "tau"}
    for record in (RECIPE.of_tokenizer, RECIPE.of_transformer):
        assert not younger & record.keys()
    changed = dataclasses.replace(RECIPE, perceptual=0.5, scale_weights="none")
    assert younger & changed.of_tokenizer.keys() == {"perceptual"}
    assert younger & changed.of_transformer.keys() == {"perceptual", "scale_weights"}
    assert changed.tokenizer_training(9).perceptual == 0.5
    assert changed.transformer_training(9).scale_weights == "none"


def test_parts_of_an_unfinished_first_stage_say_what_they_lack(tmp_path, capsys, monkeypatch):
    def stopped(*_, **__):
        raise Stopped(15)

    monkeypatch.setattr(scenes, "_train", stopped)
    for carry, said in (("weights", True), ("everything", False)):
        with pytest.raises(Stopped):
            scenes.main(["all", *COMMAND, str(tmp_path), "--parts-mb", "1", "--carry", carry], {"tiny": RECIPE})
        assert ("the image tokenizer is not finished" in capsys.readouterr().out) == said


def test_the_pool_is_encoded_once_and_again_for_another_recipe(directory, uninterrupted, monkeypatch):
    tokenizer = load_image_tokenizer(directory, RECIPE)

    def pools(recipe=RECIPE):
        source = (directory / "image_tokenizer.safetensors").read_bytes()
        return scene_data.make_pools(directory / "transformer", recipe, tokenizer, source)

    monkeypatch.setattr(scene_data, "_encode", lambda *_: pytest.fail("encoded again"))
    training, held_out = pools()
    assert training is not None
    assert training.latents.shape == (6, 4, 4, 4)
    assert not np.array_equal(training.latents[:4], held_out.latents)
    with pytest.raises(pytest.fail.Exception, match="encoded again"):
        pools(dataclasses.replace(RECIPE, seed=1))


def test_without_a_pool_every_step_shows_new_scenes_that_its_number_fixes(directory):
    tokenizer = read_text_tokenizer(directory)
    make = scene_data.batch_maker(dataclasses.replace(RECIPE, pool=None), tokenizer, None)
    first, again, other = make(3), make(3), make(4)
    for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, two)
    assert not np.array_equal(first.pictures.position, other.pictures.position)


def test_a_step_on_new_scenes_is_the_step_on_their_latents(directory):
    tokenizer, text = load_image_tokenizer(directory, RECIPE), read_text_tokenizer(directory)
    trainer = transformer_stage.transformer_trainer(RECIPE, text, 10)
    online = scene_data.batch_maker(dataclasses.replace(RECIPE, pool=None), text, None)(0)
    latents = np.asarray(tokenizer.encode(RECIPE.render(online.pictures)))
    placement, losses = Placement.over(jax.devices()[:1]), []
    for batch in (online, online._replace(pictures=latents)):
        state = placement.put_state(trainer.init(0))
        step = transformer_stage._step_on(placement, trainer, RECIPE, tokenizer, state)
        _, metrics = step(state, batch, np.uint32(0))
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_export_is_a_model_that_can_be_loaded_and_its_parts_another_machines_start(
    directory, uninterrupted, tmp_path
):
    from toprovar_jax.loading import load_model

    packed = ("--parts-mb", "0.2", "--carry", "everything")
    assert scenes.main(["export", *COMMAND, str(directory), *packed], {"tiny": RECIPE}) == 0
    folder = directory / "model"
    card = json.loads((folder / "model.json").read_text())
    assert (card["world"], card["training"]["samples"]) == ("scenes", 12)
    loaded = load_model(folder, precision="exact", with_encoder=True)
    exported = loaded.networks.transformer.layers.feed_forward.up.kernel[...]
    trained = dict(nnx.to_flat_state(uninterrupted.average["transformer"]))[("layers", "feed_forward", "up", "kernel")]
    np.testing.assert_allclose(exported, trained.get_value(), rtol=2**-8)
    assert loaded.tokenizer.encode(["a red cube"], max_length=24).lengths[0] == 4

    parts = sorted((directory / "parts").glob("*.bin"))
    assert len(parts) > 2
    assert max(part.stat().st_size for part in parts) <= 200_000
    arguments = ["export", *COMMAND, str(tmp_path), "--resume-parts", str(directory / "parts")]
    assert scenes.main(arguments, {"tiny": RECIPE}) == 0
    for name in ("transformer.safetensors", "image_tokenizer.safetensors", "text_encoder.safetensors"):
        assert contents(tmp_path / "model" / name) == contents(folder / name)
    parts[0].write_bytes(b"cut")
    arguments[arguments.index(str(tmp_path))] = str(tmp_path / "elsewhere")
    assert scenes.main(arguments, {"tiny": RECIPE}) == 2


@pytest.mark.parametrize(
    ("stage", "message"),
    [("transformer", "holds no image_tokenizer.safetensors"), ("export", "holds no transformer checkpoint")],
)
def test_a_stage_without_the_one_before_says_what_to_run(tmp_path, capsys, stage, message):
    assert scenes.main([stage, *COMMAND, str(tmp_path)], {"tiny": RECIPE}) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--minutes", "1", "--steps", "2"), "minutes and steps: exclude each other"),
        (("--minutes", "1", "--steps", "0"), "minutes and steps: exclude each other"),
        (("--minutes", "nan"), "minutes nan: must be a number above 0"),
        (("--steps", "0"), "steps 0: must be at least 1"),
        (("--tokenizer-steps", "-5"), "tokenizer steps -5: must be at least 1"),
        (("--parts-mb", "0"), "parts of megabytes 0.0: must be a number above 0"),
        (("--devices", "99"), "99 devices: must be 1 to 8"),
        (("--resume-parts", "nowhere"), "parts in nowhere: cannot be read"),
        (("--recipe", "large"), "recipe 'large': must be one of tiny"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(tmp_path, capsys, arguments, message):
    assert scenes.main(["all", "--directory", str(tmp_path), *arguments], {"tiny": RECIPE}) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
