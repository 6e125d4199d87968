"""Finetuning: it overfits, resumes exactly, keeps memory small, and the command leaves a model that loads."""

import csv
import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from convert.safetensors_io import open_safetensors
from toprovar_jax.cli import finetune_run
from toprovar_jax.cli.finetune import main
from toprovar_jax.loading import load_model
from toprovar_jax.model import Infinity
from toprovar_jax.presets import PRESETS
from toprovar_jax.training import loop
from toprovar_jax.training.adapters import load_adapters, merge
from toprovar_jax.training.finetune import FinetuneConfig, Finetuner, FrozenEncoders
from toprovar_jax.training.finetune_memory import kept_activations, memory_parts, memory_table
from toprovar_jax.training.image_text import ImageTextData, find_samples
from toprovar_jax.training.losses import bit_cross_entropy, token_weights, weighted_loss
from toprovar_jax.training.metrics import read_rows
from toprovar_jax.training.self_correction import self_correct

from ..tiny_model import CARD, TOKENIZER_JSON, networks, write_tiny_model

SCHEDULE = CARD.schedule("1:1", None)
SCHEDULES = {"1:1": SCHEDULE}
CAPTIONS = ["a red sphere", "the blue cube", "a green cone", "an orange cube on the left"]


@pytest.fixture(scope="module")
def model():
    return networks()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight noisy pictures of 8 x 8 pixels, four captions."""
    folder = tmp_path_factory.mktemp("data")
    noise = np.random.default_rng(0)
    for number in range(8):
        pixels = noise.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(CAPTIONS[number % 4])
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from toprovar_jax.text_encoder import TextTokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(TOKENIZER_JSON)
    return TextTokenizer.from_file(path)


@pytest.fixture(scope="module")
def data(folder):
    return ImageTextData(find_samples(folder)[0], {"1:1": SCHEDULE.pixel_size}, batch_size=8)


@pytest.fixture(scope="module")
def batch(model, tokenizer, data):
    finetuner = Finetuner(CARD, FinetuneConfig(1), SCHEDULES)
    return FrozenEncoders(finetuner, model, tokenizer, 12)(data.batch(0))


QUIET = {"text_dropout": 0.0, "correction_strength": 0.0}


def trained(finetuner, model, batch, steps):
    base = None if finetuner.config.rank is None else model.transformer
    state = finetuner.init(model.transformer)
    before = finetuner.evaluate(state, base, batch, "1:1")
    for number in range(steps):
        gradient, _ = finetuner.gradient(state.trained, base, batch, jax.random.key(number), "1:1")
        state, _ = finetuner.update(state, gradient)
    return state, before, finetuner.evaluate(state, base, batch, "1:1")


@pytest.mark.parametrize("rank", [8, None])
def test_eight_pictures_are_learned_by_heart(model, batch, rank):
    rate = 1e-2 if rank else 3e-3
    config = FinetuneConfig(80, rank=rank, patterns=("*",), learning_rate=rate, weight_decay=0.0, **QUIET)
    finetuner = Finetuner(CARD, config, SCHEDULES)
    state, before, after = trained(finetuner, model, batch, 80)
    assert float(jnp.mean(after)) < 0.8 * float(jnp.mean(before))
    # The result is a plain transformer with the same loss.
    base = None if rank is None else model.transformer
    plain = Finetuner(CARD, dataclasses.replace(config, rank=None), SCHEDULES)
    result = plain.init(finetuner.transformer(state, base))
    np.testing.assert_allclose(plain.evaluate(result, None, batch, "1:1"), after, rtol=2e-5)


def test_the_loss_is_the_training_loss_of_the_frozen_encoders_outputs(model, batch, data, tokenizer):
    latents = model.image_tokenizer.encode(jnp.asarray(data.batch(0).images, jnp.float32) / 255.0)
    np.testing.assert_allclose(batch.latents, latents, rtol=0, atol=2e-5)
    ids = tokenizer.encode([sample.caption for sample in data.batch(0).samples], max_length=12)
    np.testing.assert_array_equal(batch.lengths, ids.lengths)
    finetuner = Finetuner(CARD, FinetuneConfig(1, **QUIET), SCHEDULES)
    state = finetuner.init(model.transformer)
    tokens = self_correct(batch.latents, SCHEDULE, ())
    scores = model.transformer.parallel_logits(tokens.inputs, batch.features, batch.lengths, SCHEDULE)
    expected = weighted_loss(bit_cross_entropy(scores, tokens.targets), jnp.asarray(token_weights(SCHEDULE)))
    _, metrics = finetuner.gradient(state.trained, model.transformer, batch, jax.random.key(0), "1:1")
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(
        jnp.mean(finetuner.evaluate(state, model.transformer, batch, "1:1")), expected, rtol=1e-5
    )


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_two_halves_accumulated_are_the_whole_batch(model, batch):
    config = FinetuneConfig(2, rank=4, clip=1e9, **QUIET)
    whole, halves = (Finetuner(CARD, dataclasses.replace(config, accumulate=k), SCHEDULES) for k in (1, 2))
    state = whole.init(model.transformer)
    key = jax.random.key(0)
    together, _ = whole.gradient(state.trained, model.transformer, batch, key, "1:1")
    summed = None
    for part in (slice(0, 4), slice(4, 8)):
        half = jax.tree.map(lambda x, part=part: x[part], batch)
        summed, _ = halves.gradient(state.trained, model.transformer, half, key, "1:1", summed)
    expected = flat(together)
    np.testing.assert_allclose(flat(summed) / 2, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    _, metrics = halves.update(halves.init(model.transformer), summed)
    np.testing.assert_allclose(metrics["gradient_norm"], np.linalg.norm(np.float64(expected)), rtol=1e-5)


def test_checkpointing_changes_memory_and_nothing_else(model, batch):
    """Also what the compiler says, for a model deep enough that activations are most of it."""
    plain, again = (
        Finetuner(CARD, FinetuneConfig(1, gradient_checkpointing=remat), SCHEDULES) for remat in (False, True)
    )
    state, key = plain.init(model.transformer), jax.random.key(5)
    # Fresh adapters get no gradient in ``down``; trained ones do.
    adapters = jax.tree.map(lambda x: x + 0.05, state.trained)
    first, second = (f.gradient(adapters, model.transformer, batch, key, "1:1")[0] for f in (plain, again))
    np.testing.assert_allclose(flat(second), flat(first), rtol=0, atol=5e-6 * np.abs(flat(first)).max())

    config = dataclasses.replace(CARD.transformer, num_layers=12)
    card = dataclasses.replace(CARD, transformer=config)
    deep = nnx.eval_shape(lambda: Infinity(config, rngs=nnx.Rngs(0)))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct((64, *x.shape[1:]), x.dtype), batch)
    counted, compiled = [], []
    for remat in (False, True):
        finetuner = Finetuner(card, FinetuneConfig(1, gradient_checkpointing=remat), SCHEDULES)
        start = jax.eval_shape(finetuner.init, deep)
        counted.append(kept_activations(finetuner, start, deep, SCHEDULE, batch_size=64, text_length=12))
        abstract_key = jax.eval_shape(lambda: jax.random.key(0))
        gradient = jax.jit(jax.grad(lambda *a, f=finetuner: f.loss(*a, SCHEDULE)[0]))
        memory = gradient.lower(start.trained, deep, abstract, abstract_key).compile().memory_analysis()
        compiled.append(memory.temp_size_in_bytes)
    assert counted[1] < 0.2 * counted[0]
    assert compiled[1] < 0.5 * compiled[0]


def test_the_base_gets_neither_gradient_nor_optimiser_state():
    card = PRESETS["infinity-2b"].with_precision("fast")
    finetuner = Finetuner(card, FinetuneConfig(1, gradient_checkpointing=True), {"1:1": card.schedule("1:1", "0.25M")})
    parts = memory_parts(finetuner, card.schedule("1:1", "0.25M"), batch_size=1, text_length=64)
    sizes = {part.name.split(",")[0]: part for part in parts}
    width, layers, rank = 2048, 32, 16
    pairs = [(width, 3 * width), (width, width), (width, width), (width, 2 * width), (width, width)]
    count = sum(layers * rank * (a + b) for a, b in pairs)
    adapters = sizes["trained parameters (float32)"]
    assert (adapters.numbers, adapters.bytes) == (count, 4 * count)
    assert sizes["gradients"].bytes == 4 * count
    assert 8 * count <= sizes["optimiser state"].bytes < 8 * count + 64
    assert sizes["transformer (frozen)"].numbers > 2e9
    assert 2 * 2e9 < sizes["transformer (frozen)"].bytes < 2.2 * sizes["transformer (frozen)"].numbers
    assert memory_table(parts).splitlines()[-1].startswith("sum")


def test_averaged_weights_are_the_result(model, batch):
    finetuner = Finetuner(CARD, FinetuneConfig(3, rank=2, ema_decay=0.9, **QUIET), SCHEDULES)
    state, _, after = trained(finetuner, model, batch, 3)
    assert finetuner.adapters(state) is state.average
    other = state._replace(trained=jax.tree.map(jnp.zeros_like, state.trained))
    np.testing.assert_array_equal(finetuner.evaluate(other, model.transformer, batch, "1:1"), after)
    assert np.abs(flat(state.average) - flat(state.trained)).max() > 0


@pytest.mark.parametrize(
    ("decay", "warmup", "expected"),
    [("constant", 0, [1, 1, 1, 1, 1]), ("constant", 2, [0, 0.5, 1, 1, 1]), ("cosine", 1, [0, 1, 0.75, 0.25, 0])],
)
def test_the_learning_rate_rises_then_stays_or_falls(decay, warmup, expected):
    from toprovar_jax.training.finetune import _learning_rate

    steps = 4 if decay == "cosine" else 5
    config = FinetuneConfig(steps, learning_rate=1.0, decay=decay, warmup_steps=warmup)
    with jax.numpy_dtype_promotion("standard"):
        rates = [float(_learning_rate(config)(step)) for step in range(5)]
    np.testing.assert_allclose(rates, expected, atol=1e-6)


def test_stored_encodings_are_used_instead_of_the_networks(tmp_path, model, tokenizer, data, batch):
    finetuner = Finetuner(CARD, FinetuneConfig(1), SCHEDULES)
    first = FrozenEncoders(finetuner, model, tokenizer, 12, cache=tmp_path)(data.batch(0))
    assert len(list(tmp_path.iterdir())) == 8
    jax.tree.map(np.testing.assert_array_equal, first, batch)
    zeros = jax.tree.map(jnp.zeros_like, model)
    again = FrozenEncoders(finetuner, zeros, tokenizer, 12, cache=tmp_path)(data.batch(0))
    jax.tree.map(np.testing.assert_array_equal, again, batch)
    changed = FrozenEncoders(finetuner, zeros, tokenizer, 12, cache=tmp_path, model="other")(data.batch(0))
    assert float(jnp.max(jnp.abs(changed.latents))) == 0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def command(tiny, folder, out, *more):
    words = ["--model", tiny, "--data", folder, "--out", out, "--steps", 3, "--batch-size", 4, "--rank", 2]
    return main(list(map(str, (*words, "--learning-rate", 1e-2, "--held-out", 0.2, *more))))


def losses(out):
    with (out / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {(row["kind"], row["step"]): row["value"] for row in rows if row["name"] == "loss"}


class Killed(BaseException):
    pass


def test_the_command_resumes_exactly_and_leaves_a_merged_model(tiny, folder, tmp_path, monkeypatch, capsys):
    original = loop.LoopConfig

    def every_step(*args, **options):
        return original(*args, **options, log_every=1, checkpoint_minutes=0.0)

    monkeypatch.setattr(loop, "LoopConfig", every_step)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert command(tiny, folder, straight, "--cache") == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(straight)

    update = Finetuner.update

    def killed(self, state, gradient):
        if int(state.step) == 2:
            raise Killed
        return update(self, state, gradient)

    with monkeypatch.context() as patch:
        patch.setattr(Finetuner, "update", killed)
        with pytest.raises(Killed):
            command(tiny, folder, broken)
    assert not (broken / "model.json").exists()
    assert command(tiny, folder, broken, "--seed", 1) == 2
    assert "must have been made with the recipe" in capsys.readouterr().err
    assert command(tiny, folder, broken) == 0
    assert losses(broken) == losses(straight)
    assert ("evaluate", "3") in losses(straight)
    for name in ("adapter.safetensors", "transformer.safetensors"):
        resumed, at_once = (open_safetensors(path / name) for path in (broken, straight))
        assert resumed.keys() == at_once.keys()
        for tensor in resumed:
            np.testing.assert_array_equal(resumed[tensor]().view(np.uint8), at_once[tensor]().view(np.uint8))

    loaded, base = (load_model(path, precision="exact") for path in (straight, tiny))
    assert loaded.card.name == "tiny-finetuned"
    adapters, scale = load_adapters(
        straight / "adapter.safetensors", base.card.transformer, base_sha256=dict(loaded.card.training)["base_sha256"]
    )
    assert max(float(jnp.max(jnp.abs(pair.up))) for pair in adapters.values()) > 1e-3
    expected = merge(base.networks.transformer, adapters, scale)
    got, wanted = (net.layers.self_attention.qkv.kernel[...] for net in (loaded.networks.transformer, expected))
    np.testing.assert_allclose(got, wanted, rtol=2**-8)
    assert command(tiny, folder, straight) == 2
    assert "holds a model.json already" in capsys.readouterr().err


def test_adapters_can_be_all_that_is_written_and_full_training_needs_none(tiny, folder, tmp_path, capsys):
    assert command(tiny, folder, tmp_path / "small", "--adapter-only", "--quiet") == 0
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == ["adapter.safetensors", "run"]
    words = ["--model", tiny, "--data", folder, "--out", tmp_path / "full", "--full", "--steps", 1, "--quiet"]
    assert main(list(map(str, (*words, "--batch-size", 4, "--held-out", 0)))) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "small"), str(tmp_path / "full")]
    assert not (tmp_path / "full" / "adapter.safetensors").exists()
    assert json.loads((tmp_path / "full" / "model.json").read_text())["training"]["rank"] is None


def test_a_dry_run_says_what_a_released_model_needs_without_its_weights(folder, capsys):
    words = ["--model", "infinity-2b", "--data", str(folder), "--pixels", "0.25M", "--precision", "fast", "--dry-run"]
    assert main([*words, "--gradient-checkpointing"]) == 0
    out = capsys.readouterr().out
    assert "8 pictures; by aspect ratio (height:width): 1:1 8" in out
    assert "infinity-2b at 512 x 512 pixels, 2521 tokens" in out
    assert "13,631,488" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rank", "0"], "--rank '0': must be an integer from 1"),
        (["--rank", "65"], "--rank 65: must be at most the model's width, 64"),
        (["--adapt", "attn"], "adapters for 'attn': must match one of"),
        (["--steps", "many"], "--steps 'many': must be an integer"),
        (["--warmup", "3"], "--warmup 3: must be below --steps 3"),
        (["--learning-rate", "nan"], "--learning-rate 'nan': must be a number above 0"),
        (["--held-out", "1"], "--held-out '1': must be a number from 0 to below 1"),
        (["--full"], "--rank with --full: there are no adapters then"),
        (["--precision", "half"], "--precision 'half': must be one of exact, fast"),
        (["--aspect", "5:1"], "aspect ratio '5:1'"),
        (["--pixels", "1M"], "pixel budget of model tiny: '1M'"),
        (["--model", "infinity-3b"], "model 'infinity-3b': must be one of"),
        (["--data", "nowhere"], "data nowhere: does not exist"),
        (["--out", "taken"], "--out taken: holds a model.json already"),
        (["--devices", "9"], "--devices 9: must be at most 8 here"),
        (["--devices", "3"], "batch 4: must be a multiple of 3 devices"),
        (["--out", " "], "no --out: it is needed"),
        (["--speed", "3"], "option --speed: is not known"),
    ],
)
def test_mistakes_are_one_line_before_any_training(tiny, folder, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "model.json").write_text("{}")
    monkeypatch.setattr(finetune_run._Job, "carry_out", lambda self: pytest.fail("began to train"))
    assert command(tiny, folder, "new", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_two_devices_share_the_batches_and_the_losses_stay(tiny, folder, tmp_path):
    for out, words in ((tmp_path / "one", ()), (tmp_path / "two", ("--devices", 2))):
        assert command(tiny, folder, out, "--adapter-only", "--quiet", *words) == 0
    one, two = (losses(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    np.testing.assert_allclose(*[[float(value) for value in run.values()] for run in (two, one)], rtol=1e-4)
    rows = read_rows(tmp_path / "two" / "run" / "metrics.csv")
    assert "gflops" in {row[3] for row in rows}


def test_operations_without_gradients_of_frozen_kernels_are_two_thirds_of_all():
    counts = []
    for config in (FinetuneConfig(1, rank=1), FinetuneConfig(1, rank=None)):
        plain, again = (
            Finetuner(CARD, dataclasses.replace(config, gradient_checkpointing=remat, accumulate=k), SCHEDULES)
            for remat, k in ((False, 1), (True, 2))
        )
        counts.append(plain.step_flops("1:1", 4, 12))
        assert again.step_flops("1:1", 4, 12) == 2 * counts[-1]
    assert 0.6 < counts[0] / counts[1] < 0.8


def test_what_was_skipped_is_said_in_one_line_each(tiny, folder, tmp_path, monkeypatch, capsys):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for name in ("x.png", "y.png"):
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "PNG")
        (tmp_path / name).write_bytes(file.getvalue())
    assert command(tiny, tmp_path, tmp_path / "out", "--dry-run") == 0
    assert capsys.readouterr().err == "warning: 2 skipped, no caption: x.png and others\n"
