"""Pruned generation: equal to dense where nothing is pruned, independent of the batch, compiled in advance."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toprovar_jax.acceleration import Dense, FixedPlan, Selection, ToProVAR
from toprovar_jax.acceleration.entropy import resize_map
from toprovar_jax.errors import UserInputError
from toprovar_jax.generation import (
    advance,
    condition_on,
    generate,
    initial_state,
    make_plan,
)
from toprovar_jax.loading import load_model
from toprovar_jax.pipeline import InfinityPipeline
from toprovar_jax.sampling import Sampling, draw_uniforms
from toprovar_jax.schedule import ScaleSchedule

from .. import tiny
from ..tiny_model import write_tiny_model

SCALES = 4
SCHEDULE = ScaleSchedule.of("1:1", SCALES)
LAYERS = tiny.TRANSFORMER.num_layers
BITS = tiny.TRANSFORMER.token_bits
SCORES = (0.2, 0.9, 0.8, 0.3)
PRUNING = ToProVAR(depth_rule="fixed", depth=3, guard_first=0.0, guard_last=0.0, bucket=8, alpha_max=0.9)
GROUPED = dataclasses.replace(PRUNING, depth=4, layer_scores=SCORES)
ADAPTIVE = dataclasses.replace(PRUNING, depth_rule="le", min_depth=3, max_depth=4)


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@functools.partial(jax.jit, static_argnames=("policy", "schedule"))
def compiled(model, text, keys, guidance, policy=PRUNING, schedule=SCHEDULE):
    sampling = Sampling(guidance, 1.0, 0, 1.0)
    return generate(model, text, keys, schedule=schedule, sampling=sampling, policy=policy)


def bits_of(result):
    return [np.asarray(bits) for bits in result.bits]


@pytest.fixture(scope="module")
def pruned(model):
    return compiled(model, tiny.text(3), tiny.keys(3), jnp.float32(2.0))


def test_pruning_changes_later_scales_and_only_those(model, pruned):
    dense = compiled(model, tiny.text(3), tiny.keys(3), jnp.float32(2.0), policy=Dense())
    for scale, (ours, theirs) in enumerate(zip(bits_of(pruned), bits_of(dense), strict=True), start=1):
        share = np.mean(ours != theirs)
        assert (share == 0) if scale < 3 else (0.001 < share < 0.5), (scale, share)


@pytest.mark.parametrize("changes", [{}, {"sampled": True}], ids=["best", "sampled"])
def test_an_image_does_not_depend_on_its_batch_under_any_policy(model, pruned, changes):
    policy = dataclasses.replace(PRUNING, **changes)
    guidance = jnp.float32(2.0)
    batch = pruned if not changes else compiled(model, tiny.text(3), tiny.keys(3), guidance, policy=policy)
    alone = compiled(model, tiny.image(tiny.text(), 1), tiny.keys()[1:2], guidance, policy=policy)
    for ours, theirs in zip(bits_of(alone), bits_of(batch), strict=True):
        np.testing.assert_array_equal(ours, theirs[1:2])


def test_guidance_does_not_recompile(model, pruned):
    before = compiled._cache_size()
    other = compiled(model, tiny.text(3), tiny.keys(3), jnp.float32(3.0))
    assert compiled._cache_size() == before
    assert max(np.mean(a != b) for a, b in zip(bits_of(other), bits_of(pruned), strict=True)) > 0.01


@pytest.mark.parametrize(
    "changes",
    [
        {"importance": "distance"},
        {"importance": "random", "restoration": "identity"},
        {"prune": "layers"},
        {"prune": "scales"},
        {"sampled": True, "normalisation": "sum"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_every_variant_can_be_traced_under_vmap_over_guidance(model, changes):
    policy = dataclasses.replace(PRUNING, **changes)
    run = jax.vmap(lambda g: compiled(model, tiny.text(1), tiny.keys(1), g, policy=policy).images)
    assert jax.eval_shape(run, jnp.array([2.0, 3.0], jnp.float32)).shape[:2] == (2, 1)


def test_deciding_per_image_is_refused_in_a_trace(model):
    with pytest.raises(UserInputError, match='depth_rule="fixed"'):
        compiled(model, tiny.text(1), tiny.keys(1), jnp.float32(2.0), policy=ADAPTIVE)
    adaptive = ADAPTIVE.plan(SCHEDULE, num_layers=LAYERS)
    chosen = FixedPlan(adaptive.alternatives[0])
    assert len(compiled(model, tiny.text(1), tiny.keys(1), jnp.float32(2.0), policy=chosen).bits) == SCALES


@pytest.fixture(scope="module")
def arrived(model):
    """State before the first pruned scale, and the observed statistics before it."""
    plan = make_plan(SCHEDULE, Sampling(), GROUPED, num_layers=LAYERS).observed()
    condition = condition_on(model.transformer, tiny.text(1), guided=True)
    state = initial_state(model.transformer, plan.step(0), 1)
    step = jax.jit(advance, static_argnames="step")
    for scale in range(3):
        uniforms = draw_uniforms(tiny.keys(1), scale, SCHEDULE.token_counts[scale], BITS)
        state, trace = step(
            *(model.transformer, condition, state, Sampling().for_scales(SCALES), uniforms), step=plan.step(scale)
        )
    return plan, condition, state, trace.statistics


class TestOneLayer:
    """What a pruned scale does to its tokens, seen from outside."""

    def run(self, model, arrived, plan):
        _, condition, state, _ = arrived
        uniforms = draw_uniforms(tiny.keys(1), 3, SCHEDULE.token_counts[3], BITS)
        arguments = (model.transformer, condition, state, Sampling().for_scales(SCALES), uniforms)
        return jax.jit(advance, static_argnames="step")(*arguments, step=plan.step(3), selection_keys=tiny.keys(1))

    def test_the_tokens_of_lowest_entropy_are_kept_and_refreshed(self, model, arrived):
        plan, _, _, before = arrived
        _, trace = self.run(model, arrived, plan)
        kept, after = np.asarray(trace.statistics.kept)[0], np.asarray(trace.statistics.entropy)[0]
        counts = [group.kept for group in plan.scales[3].groups for _ in range(group.stop - group.start)]
        np.testing.assert_array_equal(kept.sum(axis=-1), counts)
        old = np.asarray(resize_map(before.entropy[0], SCHEDULE.grids[2], SCHEDULE.grids[3]))
        for layer in range(LAYERS):
            np.testing.assert_allclose(after[layer][~kept[layer]], old[layer][~kept[layer]], rtol=1e-6)
            assert np.abs(after[layer][kept[layer]] - old[layer][kept[layer]]).max() > 1e-3
            # The one region of a grid this small keeps two of its lowest anyway: the lowest entropies are kept.
            out = np.sort(old[layer][~kept[layer]])
            worst = np.sort(old[layer][kept[layer]])
            assert worst.max() <= out.min() + 1e-6

    @pytest.mark.parametrize("name", ["distance", "random", "sampled"])
    def test_other_choices_keep_the_tokens_their_score_names(self, model, arrived, name):
        """Against numpy: the first two layers' kept tokens, without a region minimum."""
        plan, _, state, before = arrived
        changes = {"sampled": True, "alpha_min": 0.3, "alpha_max": 0.9} if name == "sampled" else {"importance": name}
        selection = Selection(**changes)
        chosen = dataclasses.replace(plan, selection=selection)
        _, trace = self.run(model, arrived, chosen)
        kept = np.asarray(trace.statistics.kept)[0]
        old = np.asarray(resize_map(before.entropy[0], SCHEDULE.grids[2], SCHEDULE.grids[3]), np.float64)
        weights = [group.weight for group in plan.scales[3].groups for _ in range(group.start, group.stop)]
        layers = {"distance": [0], "random": [0, 1], "sampled": [0, 1]}[name]
        for layer in layers:
            stream = jax.random.fold_in(jax.random.fold_in(tiny.keys(1)[0], 2**20 + 3), layer)
            uniforms = np.asarray(jax.random.uniform(stream, (36,), jnp.float32), np.float64)
            if name == "distance":
                x = np.asarray(model.transformer.embed(state.inputs), np.float64)[0]
                score = np.sum((x - x.mean(axis=0)) ** 2, axis=-1)
            elif name == "random":
                score = uniforms
            else:
                ranks = np.argsort(np.argsort(old[layer])) / 35
                score = 1 - np.clip(0.3 + 0.6 * weights[layer] * ranks, 0, 1) - uniforms
            best = np.argsort(-score)[: kept[layer].sum()]
            assert set(np.flatnonzero(kept[layer])) == set(best.tolist())
        if name == "random":
            assert set(np.flatnonzero(kept[0])) != set(np.flatnonzero(kept[1]))

    def test_tokens_that_are_not_computed_get_the_increments_of_the_last_dense_scale(self, model, arrived):
        """With every layer left out, the residual stream is the input plus all resized increments."""
        from toprovar_jax.acceleration.restoration import resize_increments

        plan, _, state, _ = arrived
        skipping = dataclasses.replace(
            plan,
            scales=tuple(
                dataclasses.replace(scale, groups=tuple(dataclasses.replace(g, kept=0) for g in scale.groups))
                if index >= 3
                else scale
                for index, scale in enumerate(plan.scales)
            ),
        )
        _, trace = self.run(model, arrived, skipping)
        transformer = model.transformer
        x = transformer.embed(jnp.concatenate([state.inputs, state.inputs]))
        x = x + transformer.level_embedding[...][3][None, None]
        for group in state.memory:
            for increments in group.increments:
                x = x + resize_increments(increments, SCHEDULE.grids[2], SCHEDULE.grids[3])
        np.testing.assert_allclose(trace.hidden, x, rtol=0, atol=2e-5 * float(jnp.abs(x).max()))
        assert not np.asarray(trace.statistics.kept).any()
        nothing = dataclasses.replace(skipping, restoration="identity")
        _, bare = self.run(model, arrived, nothing)
        embedded = transformer.embed(jnp.concatenate([state.inputs, state.inputs]))
        expected = embedded + transformer.level_embedding[...][3][None, None]
        np.testing.assert_allclose(bare.hidden, expected, rtol=0, atol=1e-5)

    def test_pruned_tokens_write_no_keys(self, model, arrived):
        plan, _, state, _ = arrived
        after, _ = self.run(model, arrived, plan)
        for group, before, now in zip(plan.step(3).groups, state.memory, after.memory, strict=True):
            filled = np.asarray(jnp.abs(now.cache.keys).sum(axis=(0, 1, 3, 4)) > 0)
            np.testing.assert_array_equal(filled, np.arange(group.cache_length) < group.written + group.kept)
            np.testing.assert_array_equal(
                now.cache.keys[:, :, : group.written], before.cache.keys[:, :, : group.written]
            )

    def test_guidance_rows_share_the_selection(self, model, arrived):
        """Both rows' hidden states of a token are either computed or restored; the selection is the conditional's."""
        plan, condition, state, _ = arrived
        _, trace = self.run(model, arrived, plan)
        swapped = jax.tree.map(lambda x: x, state)
        memory = tuple(
            group._replace(cache=jax.tree.map(lambda a: a.at[:, 1].set(0), group.cache)) for group in swapped.memory
        )
        other = (plan, condition, swapped._replace(memory=memory), None)
        _, changed = self.run(model, other, plan)
        # Layer 0 selects by maps alone; what the unconditional rows saw does not move it, nor any layer after.
        np.testing.assert_array_equal(trace.statistics.kept, changed.statistics.kept)
        assert np.abs(np.asarray(trace.hidden[1]) - np.asarray(changed.hidden[1])).max() > 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def pipe(folder):
    return InfinityPipeline(load_model(folder, precision="exact"))


EVERYTHING = ToProVAR(alpha_min=0.0, alpha_max=0.0)
DECIDING = ToProVAR(min_depth=2, bucket=1, guard_first=0.0, guard_last=0.0, alpha_max=0.6, region_minimum=0.0)
PROMPTS = ["a red sphere", "a green cube", "the blue cone on the left", "a cube", "a sphere"]


@pytest.mark.parametrize("ratio", ["5:4", "1:3"])  # that the steps are the same at all of them: test_plan.py
def test_keeping_everything_draws_the_dense_picture(pipe, ratio):
    options = {"aspect_ratio": ratio, "pixels": "less", "output_type": "np", "seed": 3}
    for more in ({}, {"guidance_scale": 1.0}, {"negative_prompt": "a blue cone"}):
        dense = pipe(PROMPTS[0], **options, **more)
        count = pipe.drivers.num_executables
        everything = pipe(PROMPTS[0], policy=EVERYTHING, **options, **more)
        assert pipe.drivers.num_executables == count, "the same programs"
        np.testing.assert_array_equal(everything.images, dense.images)


@pytest.mark.parametrize("batch", [2, 3, 4, 5])
@pytest.mark.parametrize("more", [{}, {"guidance_scale": 1.0}, {"negative_prompt": "a blue cone"}])
def test_keeping_everything_draws_the_dense_pictures_of_a_batch(pipe, batch, more):
    pictures = [
        pipe(PROMPTS[:batch], seed=list(range(batch)), policy=policy, output_type="np", **more)
        for policy in ("dense", EVERYTHING)
    ]
    np.testing.assert_array_equal(pictures[0].images, pictures[1].images)
    for ours, theirs in zip(pictures[0].bits, pictures[1].bits, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def depths(result):
    return [plan.depth for plan in result.plans]


def tau_that_divides(pipe):
    """A threshold that some of the pictures reach before their last scale, and some do not."""
    seen = pipe(PROMPTS, seed=0, observe=True, output_type="np").statistics
    shares = sorted(set(np.asarray(seen[1].salient_share).tolist()))
    assert len(shares) > 1, "the pictures differ"
    return float(np.mean(shares[:2]))


def test_each_image_has_its_own_depth_alone_and_in_a_batch(pipe):
    policy = dataclasses.replace(DECIDING, tau=tau_that_divides(pipe), min_depth=3, max_depth=3)
    together = pipe(PROMPTS, seed=0, policy=policy, output_type="np")
    assert set(depths(together)) == {3, None}
    for index, prompt in enumerate(PROMPTS):
        alone = pipe(prompt, seed=0, policy=policy, output_type="np")
        assert depths(alone) == [depths(together)[index]]
        np.testing.assert_array_equal(alone.images[0], together.images[index])


def test_after_warm_up_nothing_compiles_whatever_the_depth(folder):
    pipe = InfinityPipeline(load_model(folder, precision="exact"))
    deciding = dataclasses.replace(DECIDING, depth_rule="ge")
    count = pipe.warmup(policy=deciding)
    plan = pipe.plan_for(deciding)
    # The listed programs, and nothing else: the prompt has one text program.
    assert count == len(plan.executables())
    found = set()
    for tau in (0.0, 0.3, 0.5, 1.0):
        policy = dataclasses.replace(deciding, tau=tau)
        found |= set(depths(pipe(PROMPTS, seed=7, policy=policy, guidance_scale=1.5 + tau)))
    assert {2, None} <= found
    assert pipe.drivers.num_executables == count


def test_a_preview_draws_the_first_scales_of_the_whole(pipe):
    policy = dataclasses.replace(DECIDING, min_depth=3, tau=1.0)
    whole = pipe(PROMPTS[0], seed=4, policy=policy, output_type="np")
    part = pipe(PROMPTS[0], seed=4, policy=policy, stop_after_scale=2, output_type="np")
    assert depths(whole) == [3]
    for ours, theirs in zip(part.bits, whole.bits[:2], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_batch_whose_images_part_ways_goes_on_in_padded_groups(folder):
    """In fast precision a batch is computed at once; images with another depth leave it, and nothing compiles."""
    pipe = InfinityPipeline(load_model(folder, precision="fast"))
    tau = tau_that_divides(InfinityPipeline(load_model(folder, precision="fast")))
    policy = dataclasses.replace(DECIDING, tau=tau, min_depth=3, max_depth=3)
    assert pipe.warmup(policy=policy, num_images_per_prompt=5) == pipe.warmup(policy=policy, batch_size=5)
    count = pipe.drivers.num_executables
    assert count == len(pipe.plan_for(policy).executables(batch_size=5))
    together = pipe(PROMPTS, seed=0, policy=policy, output_type="np")
    assert set(depths(together)) == {3, None}
    assert pipe.drivers.num_executables == count
    uniform = {None: pipe(PROMPTS, seed=0, output_type="np")}
    uniform[3] = pipe(PROMPTS, seed=0, policy=dataclasses.replace(policy, tau=1.0), output_type="np")
    assert set(depths(uniform[3])) == {3}
    for index, depth in enumerate(depths(together)):
        difference = np.abs(together.images[index] - uniform[depth].images[index])
        assert np.mean(difference) < 0.05, "another batch size may round a bit the other way, and no more"


def test_observing_leaves_the_dense_bits_alone(pipe):
    plain, observed = (pipe(PROMPTS[:2], seed=1, observe=o, output_type="np") for o in (False, True))
    for ours, theirs in zip(plain.bits, observed.bits, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert all(np.isnan(scale.salient_share).all() for scale in plain.statistics)
    for scale, measured in enumerate(observed.statistics):
        tokens = observed.plan.scales[scale].tokens
        assert measured.entropy.shape == measured.kept.shape == (2, 2, tokens)
        assert measured.kept.all()
        mean = measured.entropy.astype(np.float64).mean(axis=1)
        share = (mean < mean.mean(axis=1, keepdims=True)).mean(axis=1)
        np.testing.assert_allclose(measured.salient_share, share, atol=1 / tokens + 1e-6)
        visible = sum(earlier.tokens for earlier in observed.plan.scales[: scale + 1])
        assert (measured.entropy <= np.log(visible) + 1e-5).all()


def test_a_policy_of_another_model_is_refused_by_both_names(pipe):
    with pytest.raises(UserInputError, match=r"calibrated for model large.*model tiny"):
        pipe.resolve("a cube", policy=ToProVAR(model="large"))
    with pytest.raises(UserInputError, match="13"):
        pipe.resolve("a cube", policy=ToProVAR(num_scales=13))
