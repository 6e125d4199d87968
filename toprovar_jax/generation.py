"""Generation: the loop over scales (MODEL_SPEC 6).

One :func:`scale_step` computes a scale. The fused driver, :func:`generate`, runs all of them inside the caller's
trace; the stepwise one, :class:`toprovar_jax.drivers.Drivers`, calls one compiled step after another from the host.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pallas_kernels.varying import as_varying
from toprovar_jax.acceleration.checking import check_plan
from toprovar_jax.acceleration.dense import Dense
from toprovar_jax.acceleration.entropy import salient_share, spectrum_ratio
from toprovar_jax.acceleration.frequency import coarse_latents
from toprovar_jax.acceleration.plan import GenerationPlan
from toprovar_jax.acceleration.policy import AccelerationPolicy
from toprovar_jax.acceleration.statistics import ScaleStatistics
from toprovar_jax.acceleration.step import ScaleStep
from toprovar_jax.errors import UserInputError
from toprovar_jax.image_tokenizer.autoencoder import ImageTokenizer
from toprovar_jax.image_tokenizer.bsq import bits_to_codes, next_scale_input, tokens_to_bits
from toprovar_jax.image_tokenizer.resize import resize_bilinear
from toprovar_jax.model.layer_memory import LayerMemory, empty_memory, map_rows
from toprovar_jax.model.scale_layers import GroupTrace
from toprovar_jax.model.shared_tokens import TokenHints, changed_share
from toprovar_jax.model.text_conditioning import TextCondition, map_text_rows
from toprovar_jax.model.transformer import Infinity
from toprovar_jax.sampling import Sampling, ScaleSampling, bit_probability, draw_uniforms, guide, sample_bits
from toprovar_jax.schedule import ScaleSchedule
from toprovar_jax.shapes import Array, Float, Int, Key, UInt8
from toprovar_jax.text_encoder import T5Encoder


class InfinityModel(NamedTuple):
    """The three networks of a text-to-image model. A pytree.

    Attributes:
      transformer: predicts bits scale by scale.
      image_tokenizer: turns summed codes into pictures.
      text_encoder: turns token ids into features; None where features come from elsewhere.
    """

    transformer: Infinity
    image_tokenizer: ImageTokenizer
    text_encoder: T5Encoder | None = None


class Text(NamedTuple):
    """Prompts as the transformer sees them.

    Attributes:
      features: text-encoder output, ``[B, P, E]``; rows at or past ``lengths`` are ignored.
      lengths: tokens of each prompt, end token included, ``[B]``.
      negative_features, negative_lengths: the same for negative prompts; None for the learned "no text".
    """

    features: Float[Array, "B P E"]
    lengths: Int[Array, " B"]
    negative_features: Float[Array, "B P E"] | None = None
    negative_lengths: Int[Array, " B"] | None = None


class Generation(NamedTuple):
    """What :func:`generate` returns.

    Attributes:
      images: float32 ``[B, h, w, 3]`` in [0, 1].
      bits: per computed scale, uint8 ``[B, T, Z]``.
      latents: summed codes, the decoder's input, float32 ``[B, h, w, C]``.
      statistics: ``certainty``: mean probability of the value drawn being the likelier one, ``[B, scales]``;
        ``scales``: :class:`~toprovar_jax.acceleration.statistics.ScaleStatistics` of every computed scale.
    """

    images: Float[Array, "B h w 3"]
    bits: tuple[UInt8[Array, "B _ Z"], ...]
    latents: Float[Array, "B lat_h lat_w C"]
    statistics: dict[str, Any]


class State(NamedTuple):
    """What one scale hands to the next; donated between steps.

    Attributes:
      memory: what the layers hand on: keys and values, and what pruning needs.
      latents: summed codes so far, at full size, ``[B, h, w, C]``.
      inputs: the next scale's transformer input, ``[B, T, Z]``; empty before the first scale and after the last.
      hints: what the scale tells the next of its tokens.
    """

    memory: LayerMemory
    latents: Float[Array, "B h w C"]
    inputs: Float[Array, "B T Z"]
    hints: TokenHints


class ScaleTrace(NamedTuple):
    """What a scale computed on the way, for tests and for looking inside.

    Attributes:
      bits: ``[B, T, Z]``.
      hidden: the head's input, ``[R, T, D]``.
      raw_scores: head output of the rows that were run through it, ``[R, T, Z, 2]``.
      guided_scores: after temperature and guidance, before top-k and top-p, ``[B, T, Z, 2]``.
      certainty: ``[B]``.
      statistics: what was measured of the layers.
    """

    bits: Array
    hidden: Array
    raw_scores: Array
    guided_scores: Array
    certainty: Array
    statistics: ScaleStatistics


def encode_text(
    model: InfinityModel,
    tokens: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    negative_tokens: Int[Array, "B P"] | None = None,
    negative_lengths: Int[Array, " B"] | None = None,
) -> Text:
    """Token ids to text features. Pure and traceable.

    Raises:
      ValueError: the model has no text encoder.
    """
    return features_of(model.text_encoder, tokens, lengths, negative_tokens, negative_lengths)


def features_of(
    text_encoder: T5Encoder | None,
    tokens: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    negative_tokens: Int[Array, "B P"] | None = None,
    negative_lengths: Int[Array, " B"] | None = None,
) -> Text:
    """:func:`encode_text` with an encoder that may be elsewhere than its model."""
    if text_encoder is None:
        raise ValueError("this model has no text encoder: pass features as Text(features, lengths)")
    features = text_encoder(tokens, lengths)
    if negative_tokens is None or negative_lengths is None:
        return Text(features, lengths)
    return Text(features, lengths, text_encoder(negative_tokens, negative_lengths), negative_lengths)


def condition_on(transformer: Infinity, text: Text, *, guided: bool) -> TextCondition:
    """The text's contribution to all scales; conditional rows first, then unconditional ones where ``guided``."""
    features, lengths = text.features.astype(jnp.float32), text.lengths
    if guided:
        if text.negative_features is None or text.negative_lengths is None:
            others = transformer.text.unconditional_rows(features.shape[0], features.shape[1])
            other_lengths = lengths
        else:
            others, other_lengths = text.negative_features.astype(jnp.float32), text.negative_lengths
        features = jnp.concatenate([features, others])
        lengths = jnp.concatenate([lengths, other_lengths])
    return transformer.condition(features, lengths)


def initial_state(transformer: Infinity, step: ScaleStep, batch: int) -> State:
    """The state before ``step``, a plan's first one."""
    config = transformer.config
    latents = jnp.zeros((batch, *step.schedule.latent_grids[-1], config.latent_channels), jnp.float32)
    inputs = jnp.zeros((batch, 0, config.token_bits), jnp.float32)
    return State(empty_memory(config, step, batch), latents, inputs, _no_hints(batch, config.token_bits))


def _no_hints(batch: int, token_bits: int) -> TokenHints:
    return TokenHints(jnp.zeros((batch, 0), jnp.float32), jnp.zeros((batch, 0, token_bits, 2), jnp.float32))


def _rows_of(step: ScaleStep, array: Array, axis: int, batch: int) -> Array:
    """The rows that a step computes of an array that may hold more."""
    if step.rows == "both" or array.shape[axis] == batch:
        return array
    first = 0 if step.rows == "conditional" else batch
    return jax.lax.slice_in_dim(array, first, first + batch, axis=axis)


def advance(
    transformer: Infinity,
    condition: TextCondition,
    state: State,
    sampling: ScaleSampling,
    uniforms: Float[Array, "B T Z"],
    *,
    step: ScaleStep,
    forced: UInt8[Array, "B T Z"] | None = None,
    selection_keys: Key[Array, " B"] | None = None,
) -> tuple[State, ScaleTrace]:
    """Compute one scale: transformer, head, bits, codes, next input.

    Args:
      transformer, condition, state: the model, the text, what the scales before left.
      sampling: as arrays (:meth:`Sampling.for_scales`).
      uniforms: one number per bit.
      step: which scale, and what of it is computed (:meth:`GenerationPlan.step`); static.
      forced: bits to take instead of sampled ones.
      selection_keys: one key per image, for selections of tokens that draw.
    """
    schedule, config = step.schedule, transformer.config
    batch = state.latents.shape[0]
    cut = functools.partial(_rows_of, step, batch=batch)
    condition = map_text_rows(cut, condition)
    memory = tuple(map_rows(cut, group) for group in state.memory)
    if step.scale == 0:
        tokens = transformer.start_tokens(condition)
    else:
        tokens = transformer.embed(state.inputs)
        tokens = jnp.concatenate([tokens, tokens]) if step.guided else tokens
    guidance, tau = sampling.guidance[step.scale], sampling.tau[step.scale]
    output = transformer.run_scale(
        tokens, condition, memory, step, guidance=guidance, selection_keys=selection_keys, hints=state.hints
    )
    both = step.guided and 0 in step.guidance_at
    rows = 2 * batch if both else batch
    raw = transformer.head(output.hidden[:rows], condition.head_modulation[:rows])
    scores = raw / tau
    if both:
        scores = guide(scores[:batch], scores[batch:], guidance)
    probability = bit_probability(scores, sampling.top_k, sampling.top_p)
    bits = sample_bits(probability, uniforms) if forced is None else forced
    certainty = jnp.mean(jnp.maximum(probability, 1.0 - probability), axis=(1, 2))

    codes = bits_to_codes(tokens_to_bits(bits, step.grid, config.spatial_patchify))
    if output.served is not None:
        cells = output.served.reshape(batch, *step.grid, 1)
        per_token = schedule.latent_per_token
        codes = jnp.where(jnp.repeat(jnp.repeat(cells, per_token, axis=1), per_token, axis=2), codes, 0.0)
    latents = state.latents + resize_bilinear(codes, schedule.latent_grids[-1])
    inputs = jnp.zeros((batch, 0, config.token_bits), jnp.float32)
    if not step.last:
        inputs = next_scale_input(latents, schedule, step.scale + 1)
    hints = _no_hints(batch, config.token_bits)
    if step.measures_change is not None:
        hints = TokenHints(output.change, raw[:batch])
    statistics = _statistics(output.traces, step)
    if step.previews:
        statistics = statistics._replace(coarse=coarse_latents(state.latents, latents, schedule))
    if step.measures_change is not None:
        statistics = statistics._replace(changed_share=changed_share(output.change, step.measures_change.threshold))
    trace = ScaleTrace(bits, output.hidden, raw, scores, certainty, statistics)
    return State(output.memory, latents, inputs, hints), trace


def _statistics(traces: Sequence[GroupTrace], step: ScaleStep) -> ScaleStatistics:
    maps = jnp.concatenate([trace.maps for trace in traces])
    layers, batch, _ = maps.shape
    share = salient_share(jnp.mean(maps, axis=0)) if step.measures else jnp.full((batch,), jnp.nan, jnp.float32)
    ratio = jnp.zeros((batch, 0), jnp.float32)
    if step.spectrum is not None:
        ratio = spectrum_ratio(maps, step.grid, center=step.spectrum == "centred")
    entropy, kept = jnp.zeros((batch, layers, 0), jnp.float32), jnp.zeros((batch, layers, 0), jnp.bool_)
    if step.observe:
        entropy = maps.swapaxes(0, 1)
        kept = jnp.concatenate([trace.kept for trace in traces]).swapaxes(0, 1)
    unknown = jnp.full((batch,), jnp.nan, jnp.float32)
    frequency = jnp.full((batch, 2), jnp.nan, jnp.float32)
    return ScaleStatistics(share, ratio, entropy, kept, unknown, frequency, jnp.zeros((batch, 0, 0, 0, 0), jnp.float32))


def scale_step(
    transformer: Infinity,
    condition: TextCondition,
    state: State,
    sampling: ScaleSampling,
    keys: Key[Array, " B"],
    *,
    step: ScaleStep,
    forced: UInt8[Array, "B T Z"] | None = None,
) -> tuple[State, UInt8[Array, "B T Z"], Float[Array, " B"], ScaleStatistics]:
    """:func:`advance` with each image's own random numbers: the state, the bits, their certainty, the statistics."""
    uniforms = draw_uniforms(keys, step.scale, step.tokens, transformer.config.token_bits)
    state, trace = advance(
        transformer, condition, state, sampling, uniforms, step=step, forced=forced, selection_keys=keys
    )
    return state, trace.bits, trace.certainty, trace.statistics


def run_scales(
    transformer: Infinity,
    condition: TextCondition,
    keys: Key[Array, " B"],
    sampling: ScaleSampling,
    *,
    plan: GenerationPlan,
    forced: Sequence[UInt8[Array, "B _ Z"]] = (),
) -> tuple[
    Float[Array, "B h w C"], tuple[UInt8[Array, "B _ Z"], ...], Float[Array, "B scales"], tuple[ScaleStatistics, ...]
]:
    """All scales of a plan in one trace: summed codes, bits per scale, certainty per image and scale, statistics."""
    state = as_varying(initial_state(transformer, plan.step(0), keys.shape[0]), (keys, condition, sampling))
    bits, certainty, statistics = [], [], []
    for scale in range(plan.num_run):
        given = forced[scale] if scale < len(forced) else None
        state, drawn, sure, measured = scale_step(
            transformer, condition, state, sampling, keys, step=plan.step(scale), forced=given
        )
        bits.append(drawn)
        certainty.append(sure)
        statistics.append(measured)
    return state.latents, tuple(bits), jnp.stack(certainty, axis=1), tuple(statistics)


def make_plan(
    schedule: ScaleSchedule,
    sampling: Sampling,
    policy: AccelerationPolicy,
    *,
    num_layers: int,
    stop_after: int | None = None,
    guidance_at: Sequence[int] = (0,),
) -> GenerationPlan:
    """The policy's plan. Unconditional rows are left out where guidance is known to be 1 at every scale."""
    guidance = sampling.guidance
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(guidance))
    unguided = not traced and bool(np.all(np.asarray(guidance) == 1))
    plan = policy.plan(
        schedule,
        num_layers=num_layers,
        guided=not unguided,
        stop_after=stop_after,
        guidance_at=tuple(guidance_at),
    )
    asked = (schedule, num_layers, tuple(guidance_at))
    if not isinstance(plan, GenerationPlan) or (plan.schedule, plan.num_layers, plan.guidance_at) != asked:
        raise UserInputError(
            f"plan of policy {policy.name}",
            f"must be a GenerationPlan for the {len(schedule)} scales, {num_layers} layers and guidance asked for",
            "correct the policy",
        )
    check_plan(plan)
    return plan


def generate(
    model: InfinityModel,
    text: Text,
    keys: Key[Array, " B"],
    *,
    schedule: ScaleSchedule,
    sampling: Sampling = Sampling(),  # noqa: B008 - an immutable tuple of numbers
    policy: AccelerationPolicy = Dense(),  # noqa: B008 - frozen
    stop_after: int | None = None,
    guidance_at: Sequence[int] = (0,),
    forced_bits: Sequence[UInt8[Array, "B _ Z"]] = (),
) -> Generation:
    """Pictures from text features. Pure and traceable: call it inside your own ``jit``, ``vmap`` or ``shard_map``.

    Args:
      model: transformer and image tokenizer.
      text: prompts (:func:`encode_text`), and negative prompts if any.
      keys: one PRNG key per image, ``[B]``; image i depends on key i alone.
      schedule: scales, aspect ratio and size; static.
      sampling: guidance, temperature, top-k, top-p; traced, so changing them never recompiles.
      policy: what is computed; static.
      stop_after: number of scales to run; the codes so far are decoded at full size. Default all.
      guidance_at: 0 for the logits, negative numbers for block outputs counted from the end.
      forced_bits: bits of the first scales, taken instead of sampled ones, ``[B, T, Z]`` each.

    Returns:
      Images in [0, 1], the bits of every scale, the summed codes, and statistics.

    Raises:
      UserInputError: batches, widths or grids that do not agree; a plan that cannot be made, or that is decided per
        image, on the host.

    With ``precision="exact"`` images are computed one by one, so that the tokens of an image do not depend on what
    else is in its batch, down to the last bit.
    """
    check_shapes(model, text, keys, schedule, forced_bits)
    layers = model.transformer.config.num_layers
    plan = make_plan(schedule, sampling, policy, num_layers=layers, stop_after=stop_after, guidance_at=guidance_at)
    if plan.alternatives:
        raise UserInputError(
            f"policy {plan.policy} that decides per image",
            "cannot run inside a trace: it looks at each image between scales",
            'fix what it decides (ToProVAR(depth_rule="fixed"), SkipVAR.fixed(), SparseVAR(share=0.5)), or use '
            "InfinityPipeline",
        )
    numbers = sampling.for_scales(len(schedule))

    def run(text: Text, keys: Key[Array, " B"], forced: tuple[Array, ...]) -> Generation:
        condition = condition_on(model.transformer, text, guided=plan.guided)
        latents, bits, certainty, measured = run_scales(
            model.transformer, condition, keys, numbers, plan=plan, forced=forced
        )
        images = model.image_tokenizer.decode(latents)
        return Generation(images, bits, latents, {"certainty": certainty, "scales": measured})

    arguments = (text, keys, tuple(forced_bits))
    if model.transformer.config.precision == "exact":
        return _one_by_one(run, arguments, numbers)
    return run(*arguments)


def check_shapes(
    model: InfinityModel, text: Text, keys: Array, schedule: ScaleSchedule, forced_bits: Sequence[Array]
) -> None:
    """Refuse what does not fit; only shapes are looked at, so this works inside a trace."""
    config = model.transformer.config
    batch, length = text.features.shape[0], text.features.shape[1]
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) or keys.shape != (batch,):
        raise UserInputError(
            f"keys of shape {keys.shape} and dtype {keys.dtype}",
            f"must be {batch} PRNG keys, one per prompt",
            "make them with jax.random.split(jax.random.key(seed), number)",
        )
    if length > config.text_length or text.features.shape[2] != config.text_width:
        raise UserInputError(
            f"text features of shape {text.features.shape}",
            f"must be [B, P, {config.text_width}] with P at most {config.text_length}",
            "make them with encode_text",
        )
    for name, array, wanted in (
        ("text lengths", text.lengths, (batch,)),
        ("negative features", text.negative_features, text.features.shape),
        ("negative lengths", text.negative_lengths, (batch,)),
    ):
        if array is not None and array.shape != wanted:
            raise UserInputError(f"{name} of shape {array.shape}", f"must have shape {wanted}", "pad them alike")
    if (text.negative_features is None) != (text.negative_lengths is None):
        raise UserInputError("negative text", "must have both features and lengths, or neither", "pass both")
    if schedule.latent_per_token != config.latent_per_token:
        raise UserInputError(
            f"schedule with {schedule.latent_per_token} cells per token and axis",
            f"must have the model's {config.latent_per_token}",
            f"make it with latent_per_token={config.latent_per_token}",
        )
    if len(forced_bits) > len(schedule):
        raise UserInputError(
            f"forced bits of {len(forced_bits)} scales", f"must be {len(schedule)} at most", "cut them"
        )
    for scale, bits in enumerate(forced_bits):
        wanted = (batch, schedule.token_counts[scale], config.token_bits)
        if bits.shape != wanted:
            raise UserInputError(f"forced bits of scale {scale}, shape {bits.shape}", f"must have {wanted}", "fix them")


def _one_by_one(run, arguments: tuple[Text, Array, tuple[Array, ...]], numbers: ScaleSampling) -> Any:
    """``run`` on batches of one, in a loop whose body is the same program whatever the batch.

    The number of rounds is computed from data: a loop known to run once would be dissolved into its surroundings and
    could round differently there.
    """

    def one(index):
        return run(*jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1), arguments))

    lengths = arguments[0].lengths
    shapes = jax.eval_shape(one, jax.ShapeDtypeStruct((), jnp.int32))
    empty = jax.tree.map(lambda x: jnp.zeros((lengths.shape[0], *x.shape[1:]), x.dtype), shapes)
    empty = as_varying(empty, (arguments, numbers))

    def body(index, filled):
        return jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_slice_in_dim(whole, part, index, 0), filled, one(index)
        )

    rounds = jnp.sum((lengths >= 0).astype(jnp.int32))
    return jax.lax.fori_loop(0, rounds, body, empty)
