import functools
import json
import math
import pathlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from toprovar_jax import memory, memory_report
from toprovar_jax.acceleration import Dense, ToProVAR
from toprovar_jax.cli.main import main
from toprovar_jax.errors import UserInputError
from toprovar_jax.generation import Text, condition_on, initial_state, make_plan, scale_step
from toprovar_jax.memory import check_fits, predict
from toprovar_jax.memory_options import ON_DEVICE, MemoryOptions
from toprovar_jax.memory_parts import Weights, state_after, weight_bytes
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.presets import PRESETS
from toprovar_jax.sampling import Sampling

LIMIT_8B = 24 * 10**9


@pytest.fixture(scope="module")
def pipeline():
    return InfinityPipeline.from_pretrained(precision="fast")


def size_of(tree) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


MEMORIES = {
    "as they are": ON_DEVICE,
    "integers": MemoryOptions(quantization="int8"),
    "texts apart": MemoryOptions(text_encoder="on_demand"),
    "integers, texts apart": MemoryOptions(text_encoder="on_demand", quantization="int8"),
    "streamed": MemoryOptions(text_encoder="on_demand", stream_blocks=True),
}


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_weights_are_those_that_are_loaded(precision, memory):
    loaded = InfinityPipeline.from_pretrained(precision=precision, memory=MEMORIES[memory])
    weights = weight_bytes(loaded.card, MEMORIES[memory])

    def on_device(network):
        return size_of(
            [
                leaf
                for leaf in jax.tree.leaves(network)
                if isinstance(leaf, jax.Array) and leaf.sharding.memory_kind != "pinned_host"
            ]
        )

    def at_rest(network):
        return size_of([leaf for leaf in jax.tree.leaves(network) if not isinstance(leaf, jax.Array)])

    networks, apart = loaded.networks, MEMORIES[memory].text_encoder == "on_demand"
    assert weights.transformer == on_device(networks.transformer)
    assert weights.lent == at_rest(networks.transformer)
    assert weights.image_tokenizer == on_device(networks.image_tokenizer)
    assert weights.text_encoder == (at_rest if apart else on_device)(networks.text_encoder)
    assert bool(weights.lent) == apart


@pytest.fixture(scope="module")
def steps(pipeline):
    """Per policy: the plan, and every scale's arguments as shapes."""

    def of(policy, batch=2):
        card, model = pipeline.card, pipeline.networks.transformer
        schedule = card.schedule("1:1", None)
        plan = make_plan(schedule, Sampling(guidance=2.0), policy, num_layers=card.transformer.num_layers)
        text = jax.eval_shape(
            lambda: Text(
                jnp.zeros((batch, card.transformer.text_length, card.transformer.text_width)),
                jnp.zeros((batch,), jnp.int32),
            )
        )
        condition = jax.eval_shape(lambda m, t: condition_on(m, t, guided=True), model, text)
        state = jax.eval_shape(lambda m: initial_state(m, plan.step(0), batch), model)
        sampling = jax.eval_shape(lambda: Sampling().for_scales(len(schedule)))
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
        found = []
        for scale in range(plan.num_run):
            given = (model, condition, state, sampling, keys)
            found.append(given)
            state, *_ = jax.eval_shape(functools.partial(scale_step, step=plan.step(scale)), *given)
        return plan, found

    return of


POLICIES = {"dense": Dense(), "toprovar": ToProVAR(depth_rule="fixed", depth=4)}


@pytest.mark.parametrize("policy", POLICIES)
def test_states_are_counted_to_the_byte(pipeline, steps, policy):
    plan, given = steps(POLICIES[policy])
    for scale in range(plan.num_run - 1):
        state = given[scale + 1][2]
        predicted = state_after(pipeline.card, plan.step(scale), 2)
        assert predicted.total == size_of(state), plan.step(scale)
        assert predicted.layers["cache"] == size_of([group.cache for group in state.memory])


@pytest.mark.parametrize("policy", POLICIES)
def test_arguments_results_and_what_is_reused_are_xlas(pipeline, steps, policy):
    plan, given = steps(POLICIES[policy])
    report = predict(pipeline.card, plan, 2, "0.004M", ON_DEVICE, driver="stepwise")
    for scale in (0, 3, plan.num_run - 1):
        phase = next(phase for phase in report.phases if phase.name.startswith(f"scale {scale + 1} "))
        step = jax.jit(scale_step, static_argnames="step", donate_argnums=2)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")
            traced = step.trace(*given[scale], step=plan.step(scale)).lower()
        found: Any = traced.compile().memory_analysis()
        # XLA keeps a pointer for every result, and lets go of fields without elements.
        slack = 8 * len(jax.tree.leaves(traced.out_info)) + 64
        # Groups that compute every token do not read their maps.
        slack += size_of([group.maps for group in given[scale][2].memory])
        assert phase.arguments == pytest.approx(found.argument_size_in_bytes, abs=slack)
        assert phase.outputs == pytest.approx(found.output_size_in_bytes, abs=slack)
        assert phase.reused == pytest.approx(found.alias_size_in_bytes, abs=slack)


def test_each_option_spares_what_it_says():
    report = functools.partial(memory_report, "infinity-8b", batch_size=1)
    plain = report()
    without = report(memory=MemoryOptions(text_encoder="on_demand"))
    card = PRESETS["infinity-8b"].with_precision("fast")
    weights = weight_bytes(card, ON_DEVICE)
    assert plain.peak - without.peak == weights.text_encoder + weights.text
    int8 = report(memory=MemoryOptions(quantization="int8"))
    assert plain.weights["transformer"] / int8.weights["transformer"] == pytest.approx(2, rel=0.1)
    streamed = report(memory=MemoryOptions(stream_blocks=True))
    assert streamed.weights["transformer"] < plain.weights["transformer"] / 10
    strips = report(memory=MemoryOptions(decoder_strips=8))
    assert strips.phases[-1].temporaries < plain.phases[-1].temporaries


RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks" / "results"


@pytest.mark.parametrize("name", json.loads((RESULTS / "decoder_memory.json").read_text())["programs"])
def test_decoders_take_what_the_compiler_says(name):
    compiled = json.loads((RESULTS / "decoder_memory.json").read_text())["programs"][name]
    memory = MemoryOptions(decoder_strips=compiled["strips"])
    model = f"infinity-{compiled['model']}"
    phase = memory_report(model, pixels="1M", batch_size=compiled["batch"], memory=memory).phases[-1]
    assert phase.name == "decoder"
    assert phase.outputs == pytest.approx(compiled["output_bytes"], abs=1e4)
    assert phase.temporaries == pytest.approx(compiled["temporary_bytes"], rel=0.2)


@pytest.mark.parametrize("name", json.loads((RESULTS / "memory_report.json").read_text()))
def test_predictions_are_within_a_tenth_of_what_the_compiler_says(name):
    """Of programs of both released models, compiled ahead of time; see ``benchmarks/memory_report.py``."""
    compiled = json.loads((RESULTS / "memory_report.json").read_text())[name]["compiled"]
    if "program" not in compiled:
        assert "failure" in compiled
        return
    setting, phase_name = name.split(": ")
    target, model, pixels, _, batch, policy = setting.split()
    del target
    chosen = ToProVAR(depth_rule="fixed", depth=10) if policy == "toprovar" else policy
    driver: Any = "fused" if phase_name == "scales" else "stepwise"
    report = memory_report(model, pixels=pixels, batch_size=int(batch), policy=chosen, driver=driver)
    phase = next(phase for phase in report.phases if phase.name == phase_name)
    assert phase.program == pytest.approx(compiled["program"], rel=0.1)


def test_the_released_models_fit_8_and_24_gigabytes():
    memory = MemoryOptions(text_encoder="on_demand")
    assert memory_report("infinity-2b", pixels="1M", memory=memory).peak < 8e9
    assert memory_report("infinity-8b", pixels="1M", memory=memory).peak < 24e9


def test_what_does_not_fit_is_told_what_would(capsys):
    assert main(["memory", "--model", "infinity-8b", "--device-memory", "9.3GB"]) == 2
    assert "--low-memory --int8, needs 9.1" in capsys.readouterr().err
    assert main(["memory", "--model", "infinity-8b", "--device-memory", "9.3GB", "--low-memory", "--int8"]) == 0


def test_original_files_are_not_converted_to_tell_their_memory(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TOPROVAR_MODELS", str(tmp_path / "models"))
    (tmp_path / "infinity_2b_reg.pth").touch()
    for model in (str(tmp_path), "FoundationVision/Infinity"):
        assert main(["memory", "--model", model]) == 2
        assert "name the preset" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


def test_larger_batches_and_pictures_take_more():
    peaks = [memory_report("infinity-2b", pixels=p, batch_size=b).peak for p, b in (("0.25M", 1), ("1M", 1), ("1M", 4))]
    assert peaks == sorted(set(peaks))


def test_exact_precision_computes_pictures_one_by_one():
    one, four = (memory_report("infinity-2b", precision="exact", batch_size=size) for size in (1, 4))
    assert (one.peak, four.together, four.driver) == (four.peak, 1, "stepwise")


def test_images_that_go_different_ways_wait_with_their_states():
    apart = memory_report("infinity-2b", policy="toprovar", batch_size=4)
    assert any(phase.name.startswith("parting") for phase in apart.phases)
    alone = memory_report("infinity-2b", policy="toprovar", batch_size=1)
    assert not any(phase.name.startswith("parting") for phase in alone.phases)


def test_what_does_not_fit_is_refused_with_numbers_and_what_would():
    report = memory_report("infinity-8b", batch_size=4)
    with pytest.raises(UserInputError) as refused:
        check_fits(report, LIMIT_8B)
    for part in ("infinity-8b at 1M, batch 4", f"{report.peak / 1e9:.2f} GB", "24.00 GB", "MemoryOptions("):
        assert part in str(refused.value)
    check_fits(report, report.peak)


def test_what_nothing_helps_is_refused_too():
    with pytest.raises(UserInputError, match="use a smaller model"):
        check_fits(memory_report("infinity-8b"), 10**6)


def test_a_pipeline_refuses_before_device_work(pipeline, monkeypatch):
    monkeypatch.setattr("toprovar_jax.pipeline.device_limit", lambda: 1000)
    monkeypatch.setattr(pipeline.drivers, "_run", None)
    with pytest.raises(UserInputError, match=r"must fit the device's 0\.00 MB"):
        pipeline("a red sphere")


def test_a_cpu_tells_no_limit():
    assert memory.device_limit() is None


def test_a_pipeline_reports_on_its_own_model_and_options(pipeline):
    report = pipeline.memory_report(batch_size=3)
    assert (report.model, report.batch_size, report.driver) == (pipeline.model_name, 3, "fused")
    assert pipeline.memory_report(driver="stepwise").driver == "stepwise"
    with pytest.raises(UserInputError, match="batch_size 0"):
        pipeline.memory_report(batch_size=0)


class TestCommand:
    def test_prints_a_line_per_program(self, capsys):
        assert main(["memory", "--model", "infinity-2b", "--driver", "stepwise"]) == 0
        printed = capsys.readouterr().out
        for word in ("text", "scale 13 (64x64)", "decoder", "peak"):
            assert word in printed

    def test_json_holds_the_report(self, capsys):
        assert main(["memory", "--model", "infinity-2b", "--batch-size", "2", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        report = memory_report("infinity-2b", batch_size=2)
        assert (told["peak"], told["phases"][0]["name"]) == (report.peak, "text")

    def test_what_does_not_fit_is_exit_code_2_and_one_line(self, capsys):
        assert main(["memory", "--model", "infinity-8b", "--device-memory", "24GB"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "24.00 GB" in error

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--device-memory", "many"], "--device-memory 'many'"),
            (["--device-memory", "0GB"], "--device-memory '0GB'"),
            (["--batch-size", "0"], "--batch-size '0'"),
            (["--model", "infinity-3b"], "infinity-3b"),
            (["--policy", "fastest"], "fastest"),
            (["--precision", "half"], "--precision 'half'"),
            (["--driver", "none"], "--driver 'none'"),
            (["--text-encoder-on", "nowhere"], "--text-encoder-on 'nowhere'"),
            (["--decoder-strips", "0"], "--decoder-strips '0'"),
            (["--pixels", "9M"], "9M"),
        ],
    )
    def test_mistakes_are_one_line(self, capsys, words, said):
        assert main(["memory", *words]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_weights_name_every_part():
    weights = weight_bytes(PRESETS["infinity-2b"].with_precision("fast"), ON_DEVICE)
    assert all(getattr(weights, name) for name in Weights._fields if name not in ("lent", "moving"))
