import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from toprovar_jax.errors import UserInputError
from toprovar_jax.text_encoder import T5Config
from toprovar_jax.training import image_tokenizer, transformer
from toprovar_jax.training.image_tokenizer import TokenizerTraining
from toprovar_jax.training.self_correction import self_correct
from toprovar_jax.training.transformer import (
    TransformerTrainer,
    TransformerTraining,
    decayed,
    drop_text,
    keep_factors,
)

STEPS = 100


@pytest.fixture(scope="module")
def trainer(make_trainer):
    return make_trainer(
        TransformerTraining(
            STEPS,
            learning_rate=5e-3,
            warmup_steps=10,
            constant=0.5,
            clip=1.0,
            text_dropout=0.0,
            correction_strength=0.0,
            initial_gate=0.3,
            ema_decay=0.8,
        )
    )


@pytest.fixture(scope="module")
def noisy(make_trainer):
    """Every source of noise, and no sample keeps its text."""
    training = TransformerTraining.for_scenes(10)
    changes = {"warmup_steps": 0, "weight_decay": 0.0, "text_dropout": 1.0, "drop_path": 0.2}
    return make_trainer(dataclasses.replace(training, **changes))


@pytest.fixture(scope="module")
def trained(trainer, batch):
    """A state after ``STEPS`` steps on one batch, and the metrics of the first step."""
    state = trainer.init(0)
    first = None
    for number in range(STEPS):
        state, metrics = trainer.step(state, *batch, jax.random.key(number))
        first = first or jax.device_get(metrics)
    return state, first


def paths(tree):
    return {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(tree)}


def test_the_loss_starts_at_one_bit_per_bit_and_falls_on_a_repeated_batch(trainer, trained, batch):
    state, first = trained
    bits = trainer.schedule.num_tokens * trainer.config.token_bits
    assert first["loss"] == pytest.approx(np.log(2), rel=0.01)
    assert first["image_bits"] == pytest.approx(bits, rel=0.01)
    last = jax.device_get(trainer.evaluate(state, *batch))
    assert last["loss"] < 0.5 * first["loss"]
    assert {f"accuracy{k}" for k in range(3)} < last.keys()
    assert min(last[f"accuracy{k}"] for k in range(3)) > 0.75


def test_evaluation_has_no_noise_and_uses_the_average(trainer, trained, batch):
    state, _ = trained
    before = jax.device_get(trainer.evaluate(state, *batch))
    other = state._replace(parameters=jax.tree.map(jnp.zeros_like, state.parameters))
    assert jax.device_get(trainer.evaluate(other, *batch)) == before


def test_networks_hold_the_averaged_weights(trainer, trained):
    state, _ = trained
    transformer, text_encoder = trainer.networks(state)
    np.testing.assert_array_equal(transformer.start[...], paths(state.average["transformer"])["start"])
    np.testing.assert_array_equal(text_encoder.embedding[...], paths(state.average["text_encoder"])["embedding"])


def test_averaging_lags_behind(noisy, batch):
    state = noisy.init(0)
    start = np.asarray(paths(state.parameters["transformer"])["head.scores.kernel"])
    state, _ = noisy.step(state, *batch, jax.random.key(0))
    now, average = (
        np.asarray(paths(t["transformer"])["head.scores.kernel"]) for t in (state.parameters, state.average)
    )
    # The memory grows with the run: after the first step a tenth of the start is left.
    np.testing.assert_allclose(average, 0.1 * start + 0.9 * now, atol=1e-6)
    assert np.abs(now - start).max() > 1e-4


def test_gates_start_where_asked_and_else_tiny(trainer, make_trainer):
    gates = paths(trainer.init(0).parameters["transformer"])["layers.modulation"][:, :2]
    np.testing.assert_array_equal(gates, np.full(gates.shape, 0.3, np.float32))
    tiny = paths(make_trainer(TransformerTraining(10)).init(0).parameters["transformer"])["layers.modulation"][:, :2]
    assert 0 < np.abs(tiny).max() < 1e-4


def test_dropped_samples_read_the_unconditional_rows_up_to_the_prompts_length(trainer, batch):
    transformer, text_encoder = trainer.networks(trainer.init(0))
    latents, captions = batch
    inputs = jax.jit(self_correct, static_argnums=1)(latents, trainer.schedule, ()).inputs
    features = jax.jit(lambda captions: text_encoder(*captions))(captions)
    dropped = jnp.array([True, False, True, False])
    mixed = drop_text(transformer, features, dropped)
    table = transformer.text.unconditional[...]
    for row, length in enumerate(captions.lengths):
        expected = table[:length] if dropped[row] else features[row, :length]
        np.testing.assert_array_equal(mixed[row, :length], expected)

    @jax.jit
    def logits(features):
        return transformer.parallel_logits(inputs, features, captions.lengths, trainer.schedule)

    beyond = jnp.arange(features.shape[1])[None] >= captions.lengths[:, None]
    np.testing.assert_array_equal(logits(mixed), logits(jnp.where(beyond[..., None], 7.0, mixed)))
    replaced = jnp.max(jnp.abs(logits(mixed) - logits(features)), axis=(1, 2, 3))
    np.testing.assert_array_equal(replaced > 0, dropped)


def moved(before, after):
    """Largest change of each parameter, by path."""
    after = paths(after)
    return {name: np.abs(np.asarray(value) - np.asarray(after[name])) for name, value in paths(before).items()}


def test_dropped_text_trains_the_unconditional_rows_alone(noisy, batch):
    before = jax.device_get(noisy.init(0).parameters)
    after = noisy.step(noisy.init(0), *batch, jax.random.key(0))[0].parameters
    rows = moved(before["transformer"], after["transformer"])["text.unconditional"].max(axis=1)
    np.testing.assert_array_equal(rows > 0, np.arange(len(rows)) < int(batch[1].lengths.max()))
    assert max(change.max() for change in moved(before["text_encoder"], after["text_encoder"]).values()) == 0


def test_kept_text_trains_the_text_encoder_alone(trainer, trained):
    before, after = jax.device_get(trainer.init(0).parameters), trained[0].parameters
    assert moved(before["transformer"], after["transformer"])["text.unconditional"].max() == 0
    assert moved(before["text_encoder"], after["text_encoder"])["embedding"].max() > 0


def test_weight_decay_touches_matrices_alone(trainer):
    marked = decayed(trainer.init(0).parameters)
    text = {name for name, value in paths(marked["text_encoder"]).items() if value}
    assert text == {f"layers.attention.{name}" for name in ("query", "key", "value", "output")} | {
        f"layers.feed_forward.{name}" for name in ("gate", "up", "down")
    }
    own = paths(marked["transformer"])
    assert {name for name, value in own.items() if value} == {name for name in own if name.endswith(".kernel")}
    spared = ("text.unconditional", "start", "level_embedding", "layers.modulation", "text.pool.query")
    assert not any(
        own[name] for name in (*spared, "layers.self_attention.log_scale", "layers.self_attention.query_bias")
    )


def test_stochastic_depth_is_linear_in_depth_and_keeps_the_mean():
    factors = keep_factors(jax.random.key(0), 3, 20_000, 0.4)
    np.testing.assert_array_equal(factors[0], 1.0)
    for layer, rate in ((1, 0.2), (2, 0.4)):
        np.testing.assert_allclose(jnp.mean((factors[layer] == 0.0).astype(jnp.float32)), rate, atol=0.02)
        np.testing.assert_allclose(jnp.mean(factors[layer]), 1.0, atol=0.02)
    assert keep_factors(jax.random.key(0), 3, 4, 0.0) is None


def test_all_noise_comes_from_the_key(noisy, batch):
    losses = [float(noisy.step(noisy.init(0), *batch, jax.random.key(seed))[1]["loss"]) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_a_text_encoder_of_another_width_is_refused(tiny_config, schedule):
    with pytest.raises(UserInputError, match="width 64: must be as wide as the transformer's text_width=128"):
        TransformerTrainer(tiny_config, T5Config(16, 64, 8, 32, 1, 2), TransformerTraining(10), schedule)


@pytest.mark.parametrize("steps", [3, 60, 100, 2000])
@pytest.mark.parametrize(
    "of", [TransformerTraining.for_scenes, lambda steps: TokenizerTraining(((1, 1),), num_steps=steps)]
)
def test_learning_rates_rise_once_and_fall_once_without_a_jump_however_short_the_run(of, steps):
    training = of(steps)
    schedule = (transformer if isinstance(training, TransformerTraining) else image_tokenizer)._learning_rate(training)
    with jax.numpy_dtype_promotion("standard"):
        rates = np.asarray(schedule(jnp.arange(steps + 1)))
    changes = np.diff(rates) / training.learning_rate
    peak = int(np.argmax(rates))
    assert rates[peak] == pytest.approx(training.learning_rate)
    assert rates[-1] < 1e-6 * training.learning_rate
    assert (changes[:peak] > 0).all()
    assert (changes[peak:] <= 1e-6).all()
    if steps >= 60:
        assert np.abs(changes).max() < 0.07


def test_bfloat16_products_keep_float32_weights_and_give_nearly_the_same_gradient(trainer, tiny_text, batch):
    fast = TransformerTrainer(
        dataclasses.replace(trainer.config, precision="fast"),
        dataclasses.replace(tiny_text, compute_dtype="bfloat16"),
        trainer.training,
        trainer.schedule,
    )
    parameters = trainer.init(0).parameters
    gradients = [
        jax.jit(jax.grad(lambda p, t=t: t._loss(p, *batch, jax.random.key(0))[0]))(parameters) for t in (fast, trainer)
    ]
    ours, theirs = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for g in gradients)
    assert ours.dtype == np.float32
    assert 1e-5 < np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 0.05


def test_layers_compiled_one_by_one_give_the_same_gradient(make_trainer, trainer, batch):
    unrolled = make_trainer(dataclasses.replace(trainer.training, unroll=True))
    parameters = trainer.init(0).parameters

    def gradient(of):
        return jax.jit(jax.grad(lambda p: of._loss(p, *batch, jax.random.key(0))[0]))

    loops = [gradient(of).lower(parameters).as_text().count("stablehlo.while") for of in (trainer, unrolled)]
    assert loops[0] > loops[1]
    ours, theirs = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient(of)(parameters))]) for of in (unrolled, trainer)
    )
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 1e-5


def test_a_steps_operations_are_counted_whatever_is_computed_twice(make_trainer, trainer):
    again = make_trainer(dataclasses.replace(trainer.training, remat=True))
    flops = trainer.step_flops(4, 6)
    assert again.step_flops(4, 6) == flops
    # A token's layer has 4 products of attention, 2 across to the text and 8 of the feed-forward layer, D by D each.
    width, tokens = trainer.config.width, trainer.schedule.num_tokens
    layers = 2.0 * 3 * 4 * tokens * trainer.config.num_layers * 14 * width**2
    assert layers < flops < 2 * layers
