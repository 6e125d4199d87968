"""The pipeline: what may be asked, what comes back, what is compiled, and what a picture depends on."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from PIL import Image

from toprovar_jax import InfinityPipeline
from toprovar_jax.acceleration import Dense
from toprovar_jax.errors import UserInputError
from toprovar_jax.images import to_uint8

from .tiny_model import SCALES, SCENES_CARD, SIDE, TEXT_LENGTH, write_tiny_model

PROMPT = "a red sphere"
BATCH = ["a red sphere", "a", "the blue cube on the left", "a cone"]
SEEDS = [5, 7, 2**32 - 1, 7]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def pipe(folder):
    return InfinityPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def cold(folder):
    """A pipeline that nothing has been asked of, for questions that must be answered without computing."""
    return InfinityPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def fast(folder):
    return InfinityPipeline.from_pretrained(folder, precision="fast")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return InfinityPipeline.from_pretrained(write_tiny_model(tmp_path_factory.mktemp("models") / "s", SCENES_CARD))


@pytest.fixture(scope="module")
def batch(pipe):
    return pipe(BATCH, seed=SEEDS, output_type="np")


def same(left, right) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(left.bits, right.bits, strict=True)) and np.array_equal(
        np.asarray(left.images), np.asarray(right.images)
    )


# What comes back.


def test_pictures_come_as_asked(pipe, batch):
    assert batch.images.shape == (4, SIDE, SIDE, 3)
    assert batch.images.dtype == np.float32
    assert 0 <= batch.images.min() < batch.images.max() <= 1
    pictures = pipe(BATCH[0], seed=SEEDS[0]).images
    assert [(type(picture), picture.mode, picture.size) for picture in pictures] == [(Image.Image, "RGB", (SIDE, SIDE))]
    assert np.array_equal(np.asarray(pictures[0]), to_uint8(batch.images)[0])
    for prompts, count in ((BATCH[0], 1), (BATCH[:2], 2)):
        arrays = pipe(prompts, seed=SEEDS[:count], output_type="jax").images
        assert isinstance(arrays, jax.Array)
        assert np.array_equal(np.asarray(arrays), batch.images[:count])


def test_what_was_resolved_before_gives_the_same_pictures(pipe, batch):
    assert same(pipe(pipe.resolve(BATCH, seed=SEEDS), output_type="np"), batch)


def test_what_made_the_pictures_comes_with_them(pipe, batch):
    assert batch.prompts == tuple(BATCH)
    assert batch.seeds == tuple(SEEDS)
    assert batch.warnings == ()
    assert [scale.shape for scale in batch.bits] == [(4, 1, 4), (4, 4, 4), (4, 16, 4)]
    assert {int(bit) for scale in batch.bits for bit in np.unique(scale)} == {0, 1}
    assert "policy dense, 8x8 pixels" in str(batch.plan)
    assert batch.plan.num_run == SCALES
    assert batch.plan.guided


def test_time_is_split_and_compiling_is_paid_once(folder):
    fresh = InfinityPipeline.from_pretrained(folder)
    first, second = (fresh(PROMPT).timings for _ in range(2))
    assert first.compile > 0
    assert second.compile == 0
    for timings in (first, second):
        assert timings.load > 0
        assert min(timings.text, timings.transformer, timings.decoder) > 0
        assert timings.total >= timings.steady + timings.compile


# What a picture depends on.


@pytest.mark.parametrize("index", range(4))
def test_a_picture_alone_equals_the_one_in_a_batch(pipe, batch, index):
    alone = pipe(BATCH[index], seed=SEEDS[index], output_type="np")
    for of_batch, own in zip(batch.bits, alone.bits, strict=True):
        assert np.array_equal(of_batch[index : index + 1], own)
    assert np.array_equal(batch.images[index : index + 1], alone.images)


def test_a_picture_does_not_depend_on_its_position(pipe, batch):
    turned = pipe(BATCH[::-1], seed=SEEDS[::-1], output_type="np")
    assert np.array_equal(turned.images[::-1], batch.images)


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 1},
        {"guidance_scale": 6.0},
        {"guidance_scale": 1.0},
        {"guidance_scale": 0},
        {"guidance_scale": [2.0, 2.0, 9.0]},
        {"tau": 0.1},
        {"tau": [1.0, 1.0, 0.1]},
        {"top_k": 1},
        {"top_p": 0.6},
        {"negative_prompt": "a blue cube"},
    ],
    ids=str,
)
def test_every_option_changes_the_picture(pipe, changed):
    plain = pipe(PROMPT, output_type="np", seed=0)
    assert not same(plain, pipe(PROMPT, output_type="np", **changed))


def test_the_prompt_changes_the_picture(pipe):
    assert not same(pipe(PROMPT, output_type="np"), pipe("the blue cube", output_type="np"))


def test_the_negative_prompts_text_matters(pipe):
    pictures = [pipe(PROMPT, output_type="np", negative_prompt=text) for text in ("a blue cube", "the cone on left")]
    assert not same(*pictures)


def test_numbers_may_be_lists_or_arrays_of_any_library(pipe):
    plain = pipe(PROMPT, seed=3, guidance_scale=2.5, tau=0.5, top_k=3, top_p=0.75, output_type="np")
    for kind in (np.array, jax.numpy.asarray, list, tuple):
        values = {"guidance_scale": kind([2.5] * SCALES), "tau": kind([0.5] * SCALES), "seed": kind([3])}
        assert same(plain, pipe(PROMPT, top_k=np.int64(3), top_p=np.float32(0.75), output_type="np", **values))
    scalars = {"guidance_scale": np.float32(2.5), "tau": np.array(0.5), "seed": np.uint32(3)}
    assert same(plain, pipe(PROMPT, top_k=3, top_p=0.75, output_type="np", **scalars))


def test_top_k_may_be_as_large_as_it_is_allowed_to_be(pipe):
    assert same(pipe(PROMPT, top_k=2**32 - 1, output_type="np"), pipe(PROMPT, top_k=0, output_type="np"))


def test_fewer_scales_give_a_picture_of_the_same_size(pipe):
    full, cut = (pipe(PROMPT, stop_after_scale=stop, output_type="np") for stop in (None, 2))
    assert len(cut.bits) == 2
    assert cut.images.shape == full.images.shape
    assert all(np.array_equal(a, b) for a, b in zip(full.bits, cut.bits, strict=False))
    assert not np.array_equal(cut.images, full.images)


# Prompts, seeds and how they spread over pictures.


@pytest.mark.parametrize("prompts", [("a", "the cube"), iter(["a", "the cube"]), (w for w in ("a", "the cube"))])
def test_prompts_may_come_in_any_order_giving_container(cold, prompts):
    assert cold.resolve(prompts).prompts == ("a", "the cube")


@pytest.mark.parametrize("prompt", ["un café ☕", "赤い球", "🟥" * 3, "a\nred\tsphere", "א ب"])
def test_prompts_may_be_in_any_script(cold, prompt):
    resolved = cold.resolve(prompt)
    assert resolved.prompts == (prompt,)
    assert 1 < resolved.tokens.lengths[0] <= TEXT_LENGTH


@pytest.mark.parametrize(
    ("seed", "prompts", "each", "expected"),
    [
        (4, 1, 1, (4,)),
        (4, 2, 1, (4, 4)),
        (4, 2, 2, (4, 5, 4, 5)),
        ([4, 9], 2, 2, (4, 5, 9, 10)),
        ([1, 2, 3, 4], 2, 2, (1, 2, 3, 4)),
        ([1, 2], 1, 2, (1, 2)),
        (range(2), 2, 1, (0, 1)),
        (np.array([3, 1]), 2, 1, (3, 1)),
        (2**32 - 1, 1, 2, (2**32 - 1, 0)),
    ],
)
def test_seeds_spread_over_prompts_and_pictures(cold, seed, prompts, each, expected):
    resolved = cold.resolve(BATCH[:prompts], seed=seed, num_images_per_prompt=each)
    assert resolved.seeds == expected
    assert resolved.prompts == tuple(prompt for prompt in BATCH[:prompts] for _ in range(each))
    assert resolved.batch_size == prompts * each


def test_pictures_of_one_prompt_have_the_following_seeds(pipe):
    together = pipe(PROMPT, seed=8, num_images_per_prompt=2, output_type="np")
    assert np.array_equal(together.images[1:], pipe(PROMPT, seed=9, output_type="np").images)


def test_negative_prompts_are_one_for_all_or_one_each(cold):
    assert cold.resolve(BATCH[:2], negative_prompt="a").negative_prompts == ("a", "a")
    each = cold.resolve(BATCH[:2], negative_prompt=["a", "cube"], num_images_per_prompt=2)
    assert each.negative_prompts == ("a", "a", "cube", "cube")
    assert each.tokens.negative_ids.shape == (4, TEXT_LENGTH)
    for nothing in (None, "", "  ", ["", ""]):
        assert cold.resolve(BATCH[:2], negative_prompt=nothing).negative_prompts is None


def test_what_is_left_out_is_the_models(cold):
    resolved = cold.resolve(PROMPT)
    assert (cold.model_name, cold.default_pixels) == ("tiny", "tiny")
    defaults = (cold.default_guidance, cold.default_tau, cold.default_top_k, cold.default_top_p)
    assert tuple(resolved.sampling) == defaults
    assert resolved.size == (SIDE, SIDE)
    assert resolved.seeds == (0,)


def test_size_follows_pixels_and_aspect_ratio(cold):
    assert cold.resolve(PROMPT, pixels="less").size == (4, 4)
    wide = cold.resolve(PROMPT, aspect_ratio="2:4", pixels="tiny")
    assert wide.plan.schedule.aspect_ratio == "1:2"
    assert wide.size == (4, 8)


# Warnings.


def test_a_prompt_that_is_cut_is_named_with_both_counts(cold):
    (warning,) = cold.resolve(["a " * 40] * 2, num_images_per_prompt=2).warnings
    assert "41 tokens" in warning
    assert f"reads {TEXT_LENGTH}" in warning
    assert "\n" not in warning
    (warning,) = cold.resolve(PROMPT, negative_prompt="cube " * 20).warnings
    assert warning.startswith("negative prompt")
    assert "21 tokens" in warning


def test_a_cut_prompt_still_makes_its_picture(pipe):
    words = "a red sphere on the left " * 3
    assert len(pipe(words).images) == 1


def test_a_negative_prompt_without_guidance_is_said_to_do_nothing(pipe):
    plain, warned = (
        pipe(PROMPT, guidance_scale=1, negative_prompt=text, output_type="np") for text in (None, "a cube")
    )
    assert "no effect at guidance 1" in warned.warnings[0]
    assert same(plain, warned)


def test_the_embedded_world_ends_somewhere(scenes):
    (warning,) = scenes.resolve(["a cat", "a red sphere", "a cat"]).warnings
    assert "'a cat'" in warning
    assert "one to five objects" in warning
    assert "\n" not in warning
    (warning,) = scenes.resolve("a red sphere and\na blue dog").warnings
    assert "dog" in warning
    assert "\n" not in warning


def test_the_embedded_world_is_square(scenes, cold):
    (warning,) = scenes.resolve(PROMPT, aspect_ratio="4:3").warnings
    assert "1:1" in warning
    assert scenes.resolve(PROMPT, aspect_ratio="2:2").warnings == ()
    assert cold.resolve(PROMPT, aspect_ratio="4:3").warnings == ()


# Callbacks and progress.


def test_the_callback_follows_every_scale_of_every_picture(pipe):
    calls = []
    output = pipe(
        BATCH[:2], seed=[1, 2], callback_on_scale_end=lambda index, count, info: calls.append((index, count, info))
    )
    assert [(index, count) for index, count, _ in calls] == [(i, SCALES) for _ in range(2) for i in range(SCALES)]
    assert [info["images"] for *_, info in calls] == [(0,)] * SCALES + [(1,)] * SCALES
    assert [info["grid"] for *_, info in calls[:SCALES]] == [(1, 1), (2, 2), (4, 4)]
    assert all(0 < info["seconds"] < output.timings.total for *_, info in calls)


def test_what_a_callback_keeps_is_not_overwritten_by_later_scales(pipe):
    kept, copied = [], []

    def keep(index, count, info):
        kept.append(info["latents"])
        copied.append(info["latents"].copy())

    pipe(PROMPT, callback_on_scale_end=keep)
    assert all(np.array_equal(a, b) for a, b in zip(kept, copied, strict=True))
    assert not np.array_equal(kept[0], kept[-1])


def test_a_callback_stops_the_call_by_raising(pipe):
    seen = []

    def stop(index, count, info):
        seen.append(index)
        if index == 1:
            raise KeyboardInterrupt

    before = pipe(PROMPT, output_type="np")
    with pytest.raises(KeyboardInterrupt):
        pipe(PROMPT, callback_on_scale_end=stop)
    assert seen == [0, 1]
    assert same(before, pipe(PROMPT, output_type="np"))


def test_the_bar_is_drawn_on_stderr_and_only_when_asked(pipe, capfd):
    pipe(PROMPT)
    assert capfd.readouterr() == ("", "")
    pipe(BATCH[:2], progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert f"{2 * SCALES}/{2 * SCALES}" in err


def test_the_bar_and_the_callback_go_together(pipe, capfd):
    calls = []
    pipe(PROMPT, progress=True, callback_on_scale_end=lambda *call: calls.append(call))
    assert len(calls) == SCALES
    assert f"{SCALES}/{SCALES}" in capfd.readouterr().err


# Compilation.


def test_once_warm_nothing_is_compiled_whatever_is_asked(folder, compiled):
    fresh = InfinityPipeline.from_pretrained(folder)
    count = fresh.warmup()
    assert count == fresh.drivers.num_executables == SCALES + 3
    assert compiled
    compiled.clear()
    fresh("the blue cube on the left", seed=11)
    fresh(PROMPT, guidance_scale=4.0, tau=0.7, top_p=0.9, top_k=1, output_type="np")
    fresh(PROMPT, guidance_scale=[3.0, 2.0, 1.0], tau=[1.0, 0.5, 0.25], output_type="jax")
    fresh(BATCH, seed=SEEDS, progress=False, callback_on_scale_end=lambda *call: None)
    fresh(PROMPT, num_images_per_prompt=3, output_type="jax")
    assert fresh.drivers.num_executables == count
    assert compiled == []


def test_in_fast_mode_a_warm_batch_compiles_nothing_either(fast, compiled):
    count = fast.warmup(batch_size=2)
    compiled.clear()
    outputs = [fast(BATCH[:2], seed=[i, 5], guidance_scale=[2.0, 3.0, float(i)], output_type="np") for i in (2, 3)]
    assert not same(*outputs)
    assert fast.drivers.num_executables == count
    assert compiled == []


def test_fused_and_stepwise_driving_agree(fast):
    fused = fast(BATCH[:2], seed=[1, 2], output_type="np")
    stepwise = fast(BATCH[:2], seed=[1, 2], output_type="np", callback_on_scale_end=lambda *call: None)
    assert same(fused, stepwise)


def test_fast_is_close_to_exact(fast, batch):
    quick = fast(BATCH[:2], seed=SEEDS[:2], output_type="np")
    agreement = [np.mean(a == b[:2]) for a, b in zip(quick.bits, batch.bits, strict=True)]
    assert agreement[0] == 1.0
    assert min(agreement) > 0.9


# The model that travels with the package.


def test_without_a_name_the_embedded_model_is_loaded():
    pipe = InfinityPipeline.from_pretrained()
    assert pipe.model_name == "scenes-small"
    resolved = pipe.resolve("a red sphere")
    assert resolved.warnings == ()
    assert min(resolved.size) >= 64
    (warning,) = pipe.resolve("two cats").warnings
    assert "cats" in warning
    assert "--model" in warning


def test_a_policy_may_be_given_as_an_object(pipe):
    assert pipe.resolve("a red cone", policy=Dense()).plan == pipe.resolve("a red cone", policy="dense").plan


def test_shorter_texts_may_be_computed_in_fewer_tokens(pipe):
    whole, short = pipe("a cone", seed=3), pipe("a cone", seed=3, text_length=6)
    assert pipe.resolve("a cone", text_length=6).tokens.ids.shape == (1, 6)
    np.testing.assert_array_equal(np.asarray(whole.images[0]), np.asarray(short.images[0]))
    assert "has 7 tokens, the model reads 4" in pipe.resolve("a red cube on the left", text_length=4).warnings[0]
    for wrong in (1, 13, 2.5, True):
        with pytest.raises(UserInputError, match=r"text_length .* must be an integer from 2 to 12"):
            pipe.resolve("a cone", text_length=wrong)
