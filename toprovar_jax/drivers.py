"""Running a generation from the host: compiled pieces, kept and counted, with compile and run time told apart."""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from toprovar_jax.acceleration.budgets import padded_sizes
from toprovar_jax.acceleration.frequency import frequency_features
from toprovar_jax.acceleration.plan import GenerationPlan
from toprovar_jax.acceleration.statistics import ScaleStatistics
from toprovar_jax.generation import (
    InfinityModel,
    State,
    Text,
    condition_on,
    features_of,
    initial_state,
    run_scales,
    scale_step,
)
from toprovar_jax.image_tokenizer import ImageTokenizer
from toprovar_jax.memory_options import ON_DEVICE, MemoryOptions
from toprovar_jax.model import Infinity
from toprovar_jax.model.text_conditioning import TextCondition
from toprovar_jax.regroup import partition, take_images
from toprovar_jax.sampling import ScaleSampling
from toprovar_jax.shapes import Array, Float, Key, UInt8
from toprovar_jax.text_encoder import T5Encoder
from toprovar_jax.text_placement import borrowed, described_borrowed, home, host_device

OnScaleEnd = Callable[[int, int, dict[str, Any]], object]
"""``(index, num_scales, info)`` after every scale; ``info`` holds ``grid``, ``seconds`` and the summed ``latents``."""

Replan = Callable[[GenerationPlan, int, Sequence[ScaleStatistics]], GenerationPlan]
"""See :meth:`toprovar_jax.acceleration.policy.AdaptivePolicy.replan`."""


AnyArray = Array | np.ndarray


class TokenArrays(NamedTuple):
    """Token ids ``[B, P]`` and lengths ``[B]`` of prompts, and of negative prompts or None; host arrays."""

    ids: np.ndarray
    lengths: np.ndarray
    negative_ids: np.ndarray | None = None
    negative_lengths: np.ndarray | None = None

    def images(self, indices: Sequence[int]) -> TokenArrays:
        """The rows of some images, as a batch of their own."""
        return jax.tree.map(lambda array: array[list(indices)], self)


class Drawn(NamedTuple):
    """The result for some images that went by one plan.

    Attributes:
      images: pictures ``[B, h, w, 3]``.
      bits: per computed scale, ``[B, T, Z]``.
      certainty: ``[B, scales]``.
      statistics: per computed scale.
      plan: what was run.
      indices: which images of the batch these are.
    """

    images: Float[AnyArray, "B h w 3"]
    bits: tuple[UInt8[AnyArray, "B T Z"], ...]
    certainty: Float[AnyArray, "B scales"]
    statistics: tuple[ScaleStatistics, ...]
    plan: GenerationPlan
    indices: tuple[int, ...]

    def of(self, numbers: Sequence[int]) -> Drawn:
        """The same under other numbers: image i becomes ``numbers[i]``; those beyond are left out."""
        rows = [row for row, index in enumerate(self.indices) if index < len(numbers)]
        named = tuple(numbers[self.indices[row]] for row in rows)
        if len(rows) == len(self.indices):
            return self._replace(indices=named)

        def take(array: AnyArray) -> np.ndarray:
            return np.asarray(array)[rows]

        statistics = tuple(ScaleStatistics(*map(take, measured)) for measured in self.statistics)
        bits = tuple(map(take, self.bits))
        return Drawn(take(self.images), bits, take(self.certainty), statistics, self.plan, named)


class _Sampled(NamedTuple):
    """Images whose scales are done, without what only further scales would need."""

    latents: Float[Array, "B h w C"]
    plan: GenerationPlan
    indices: tuple[int, ...]
    rows: tuple[int, ...]
    bits: tuple[np.ndarray, ...]
    certainty: tuple[np.ndarray, ...]
    statistics: tuple[ScaleStatistics, ...]


class _Party(NamedTuple):
    """Images that have gone by the same plan so far.

    ``rows`` says where on the device each of ``indices`` is; the other rows there count for nothing.
    """

    plan: GenerationPlan
    indices: tuple[int, ...]
    rows: tuple[int, ...]
    condition: TextCondition
    state: State
    keys: Key[Array, " B"]
    bits: tuple[np.ndarray, ...]
    certainty: tuple[np.ndarray, ...]
    statistics: tuple[ScaleStatistics, ...]


class Drivers:
    """Compiles every piece of a generation once per step of a plan and batch size, and runs it.

    The pieces are the text (encoder and conditioning), the scales (one executable each, or all in one), and the
    decoder. Everything that is not static (guidance, temperature, top-p, keys, token ids) is an argument.

    Attributes:
      seconds: time spent so far in ``compile``, ``text``, ``transformer`` and ``decoder``.
    """

    def __init__(self, model: InfinityModel, *, memory: MemoryOptions = ON_DEVICE):
        self.model = model
        self.memory = memory
        self.seconds: dict[str, float] = {"compile": 0.0, "text": 0.0, "transformer": 0.0, "decoder": 0.0}
        self._executables: dict[Hashable, Any] = {}

    @property
    def num_executables(self) -> int:
        """How many programs have been compiled."""
        return len(self._executables)

    def stepwise(
        self,
        tokens: TokenArrays,
        keys: Key[Array, " B"],
        sampling: ScaleSampling,
        plan: GenerationPlan,
        on_scale_end: OnScaleEnd | None = None,
        *,
        replan: Replan | None = None,
    ) -> list[Drawn]:
        """One executable per scale, called from the host; ``on_scale_end`` may stop it by raising.

        Where ``plan`` has alternatives, ``replan`` picks one for each image. Images that pick differently go on apart,
        in batches padded to a power of two: none waits for another, none is computed more densely than it needs, and
        the sizes that have to be compiled are few. (A mask inside one batch would have to be as wide as its densest
        image.) The results come in one entry per way that images went.
        """
        # What the scales need is gone, with this call's variables, when the first picture is decoded.
        sampled = self._sample(tokens, keys, sampling, plan, on_scale_end, replan)
        return [self._finish(images) for images in sampled]

    def _sample(
        self,
        tokens: TokenArrays,
        keys: Key[Array, " B"],
        sampling: ScaleSampling,
        plan: GenerationPlan,
        on_scale_end: OnScaleEnd | None,
        replan: Replan | None,
    ) -> list[_Sampled]:
        batch = keys.shape[0]
        waiting, finished, scale = [self._start(tokens, keys, plan)], [], 0
        while waiting:
            # Each list gives up what the next one gets: a party that has parted, or is done, is not kept alive.
            split = []
            while waiting:
                split += self._part_ways(waiting.pop(0), scale, batch, replan)
            finished += [_sampled(party) for party in split if party.plan.num_run <= scale]
            split = [party for party in split if party.plan.num_run > scale]
            while split:
                waiting.append(self._next(split.pop(0), scale, sampling, on_scale_end))
            scale += 1
        return finished

    def fused(
        self, tokens: TokenArrays, keys: Key[Array, " B"], sampling: ScaleSampling, plan: GenerationPlan
    ) -> Drawn:
        """All scales in one executable; for plans without alternatives."""
        # No variable holds the condition: it is not to be there while pictures are decoded.
        latents, bits, certainty, statistics = self._run(
            "transformer",
            "scales",
            run_scales,
            (self.model.transformer, self._condition(tokens, plan), keys, sampling),
            plan=plan,
        )
        everything = tuple(range(keys.shape[0]))
        return Drawn(self._decode(latents), bits, certainty, jax.device_get(statistics), plan, everything)

    def prepare(
        self, tokens: TokenArrays, keys: Key[Array, " B"], sampling: ScaleSampling, plan: GenerationPlan
    ) -> None:
        """Compile what :meth:`stepwise` needs for a batch like this one whatever its images pick; nothing is run."""
        self._compile_pieces(tokens, keys, sampling, plan)

    def _compile_pieces(self, tokens: Any, keys: Any, sampling: Any, plan: GenerationPlan) -> None:
        """The same of descriptions."""
        batch = keys.shape[0]
        transformer = self.model.transformer
        conditions = {batch: self._compile_condition(tokens, plan)}
        own = batch // self.batch_parts
        empty = self._compiled("state", initial_state, (transformer,), step=plan.step(0), batch=own)[1]
        states = {(batch, 0): empty}
        for scale in range(plan.num_run):
            self._compile_scale(plan, scale, states, conditions, keys, sampling)
            if scale + 1 in plan.decisions:
                self._compile_parting(plan, scale + 1, states, conditions, keys)
                for other in plan.alternatives:
                    if other.branches_at == scale + 1:
                        branch = {key: state for key, state in states.items() if key[1] == scale + 1}
                        for later in range(scale + 1, other.num_run):
                            self._compile_scale(other, later, branch, conditions, keys, sampling)
        latents = (*plan.schedule.latent_grids[-1], transformer.config.latent_channels)
        for size in conditions:
            shape = jax.ShapeDtypeStruct((size, *latents), np.float32)
            self._compiled(
                "decode", self._pictures, (self.model.image_tokenizer, shape), strips=self.memory.decoder_strips
            )

    def _compile_scale(self, plan, scale, states, conditions, keys, sampling) -> None:
        for size in [size for size, reached in states if reached == scale]:
            arguments = (
                self.model.transformer,
                conditions[size],
                states[size, scale],
                sampling,
                _keys_like(keys, size),
            )
            _, result = self._compiled("scale", scale_step, arguments, donate=(2,), step=plan.step(scale))
            states[size, scale + 1] = result[0]
            if plan.step(scale).previews:
                self._compiled("frequency", self._frequencies, (self.model.image_tokenizer, result[-1].coarse))

    def _compile_parting(self, plan, scale, states, conditions, keys) -> None:
        batch = max(conditions)
        if batch == 1:
            return
        for before in [size for size, reached in states if reached == scale]:
            for after in padded_sizes(batch):
                if after <= before:
                    rows = jax.ShapeDtypeStruct((after,), np.int32)
                    whole = (conditions[before], states[before, scale], _keys_like(keys, before))
                    _, (condition, state, _) = self._compiled("part", take_images, (whole, rows))
                    conditions.setdefault(after, condition)
                    states.setdefault((after, scale), state)

    def _part_ways(self, party: _Party, scale: int, batch: int, replan: Replan | None) -> list[_Party]:
        """The party, or the smaller ones that its images form before ``scale``."""
        if replan is None or scale not in party.plan.decisions:
            return [party]
        own = [[measured.image(row) for measured in party.statistics] for row in range(len(party.indices))]
        picked = [replan(party.plan, scale, statistics) for statistics in own]
        parts = partition(picked)
        if len(parts) == 1:
            return [party._replace(plan=picked[0])]
        return [self._subset(party, plan, rows, batch) for plan, rows in parts]

    def _subset(self, party: _Party, plan: GenerationPlan, rows: Sequence[int], batch: int) -> _Party:
        places, (condition, state, keys) = self._taken(party, rows, batch)

        def take(array):
            return array[list(rows)]

        return _Party(
            plan,
            tuple(party.indices[row] for row in rows),
            places,
            condition,
            state,
            keys,
            tuple(take(bits) for bits in party.bits),
            tuple(take(sure) for sure in party.certainty),
            tuple(ScaleStatistics(*map(take, measured)) for measured in party.statistics),
        )

    def _taken(self, party: _Party, rows: Sequence[int], batch: int) -> tuple[tuple[int, ...], tuple]:
        """Some of a party's images on the device: in which rows they are, and condition, state and keys."""
        size = next(size for size in padded_sizes(batch) if size >= len(rows))
        padded = np.asarray([*rows, *[rows[-1]] * (size - len(rows))], np.int32)
        whole = (party.condition, party.state, party.keys)
        return tuple(range(len(rows))), self._run("transformer", "part", take_images, (whole, padded))

    def _next(self, party: _Party, scale: int, sampling: ScaleSampling, on_scale_end: OnScaleEnd | None) -> _Party:
        """The party after its next scale."""
        start, compiled_before = time.perf_counter(), self.seconds["compile"]
        arguments = (self.model.transformer, party.condition, party.state, sampling, party.keys)
        state, *results = self._run(
            "transformer", "scale", scale_step, arguments, donate=(2,), step=party.plan.step(scale)
        )
        rows = list(party.rows)
        bits, sure, measured = jax.tree.map(lambda x: x[rows], self._fetched(tuple(results)))
        if party.plan.step(scale).previews:
            arguments = (self.model.image_tokenizer, results[-1].coarse)
            features = self._fetched(self._run("decoder", "frequency", self._frequencies, arguments))
            measured = measured._replace(frequency=features[rows], coarse=measured.coarse[:, :0])
        if on_scale_end is not None:
            seconds = time.perf_counter() - start - (self.seconds["compile"] - compiled_before)
            info = {
                "grid": party.plan.scales[scale].grid,
                "seconds": seconds,
                "latents": self._fetched(state.latents)[rows],
                "images": party.indices,
            }
            on_scale_end(scale, party.plan.num_run, info)
        if party.plan.step(scale).last:
            # The decoder needs the room.
            state = state._replace(memory=())
        return party._replace(
            state=state,
            bits=(*party.bits, bits),
            certainty=(*party.certainty, sure),
            statistics=(*party.statistics, measured),
        )

    def _finish(self, sampled: _Sampled) -> Drawn:
        images = self._decode(sampled.latents)
        if images.shape[0] > len(sampled.rows):
            images = self._fetched(images)[list(sampled.rows)]
        certainty = np.stack(sampled.certainty, axis=1)
        return Drawn(images, sampled.bits, certainty, sampled.statistics, sampled.plan, sampled.indices)

    def _start(self, tokens: TokenArrays, keys: Key[Array, " B"], plan: GenerationPlan) -> _Party:
        batch = keys.shape[0]
        condition = self._condition(tokens, plan)
        first, own = plan.step(0), batch // self.batch_parts
        state = self._run("transformer", "state", initial_state, (self.model.transformer,), step=first, batch=own)
        everything = tuple(range(batch))
        return _Party(plan, everything, everything, condition, state, keys, (), (), ())

    @property
    def _encodes_apart(self) -> bool:
        """Whether the text encoder is elsewhere than the other networks, and has a program of its own."""
        if self.memory.text_encoder == "host":
            return home(self.model.image_tokenizer).device_set != {host_device()}
        return self.memory.text_encoder == "on_demand"

    def _condition(self, tokens: TokenArrays, plan: GenerationPlan) -> TextCondition:
        arrays = self._token_arguments(tokens, plan)
        if not self._encodes_apart:
            return self._run("text", ("text", plan.guided), self._condition_step(plan), (self.model, *arrays))
        text = self._encode(arrays)
        with self._lent(self.model.transformer) as transformer:
            return self._run("text", ("condition", plan.guided), self._features_step(plan), (transformer, text))

    def _encode(self, arrays: tuple) -> Text:
        encoder = self.model.text_encoder
        if self.memory.text_encoder == "host" or encoder is None:
            # As arrays of the host, features go wherever the transformer is.
            return jax.device_get(self._run("text", "encode", self._features, (encoder, *arrays)))
        with self._lent(encoder) as there:
            return self._run("text", "encode", self._features, (there, *arrays))

    @contextlib.contextmanager
    def _lent(self, network: Any) -> Iterator[Any]:
        start = time.perf_counter()
        # Blocks of the transformer may rest elsewhere than they compute; the image tokenizer does not.
        with borrowed(network, home(self.model.image_tokenizer)) as there:
            self.seconds["text"] += time.perf_counter() - start
            yield there

    def _compile_condition(self, tokens: TokenArrays, plan: GenerationPlan) -> Any:
        arrays = self._token_arguments(tokens, plan)
        if not self._encodes_apart:
            return self._compiled(("text", plan.guided), self._condition_step(plan), (self.model, *arrays))[1]
        there = home(self.model.image_tokenizer)
        encoder = described_borrowed(self.model.text_encoder, there)
        text = self._compiled("encode", self._features, (encoder, *arrays))[1]
        arguments = (described_borrowed(self.model.transformer, there), text)
        return self._compiled(("condition", plan.guided), self._features_step(plan), arguments)[1]

    def _condition_step(self, plan: GenerationPlan):
        def condition(model: InfinityModel, *arrays: Array) -> TextCondition:
            return condition_on(model.transformer, self._features(model.text_encoder, *arrays), guided=plan.guided)

        return condition

    def _features_step(self, plan: GenerationPlan):
        def condition(transformer: Infinity, text: Text) -> TextCondition:
            return condition_on(transformer, text, guided=plan.guided)

        return condition

    def _token_arguments(self, tokens: TokenArrays, plan: GenerationPlan) -> tuple:
        negative = tokens.negative_ids is not None and plan.guided
        return tuple(tokens) if negative else (tokens.ids, tokens.lengths)

    def _decode(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B out_h out_w 3"]:
        arguments = (self.model.image_tokenizer, latents)
        return self._run("decoder", "decode", self._pictures, arguments, strips=self.memory.decoder_strips)

    def _features(self, encoder: T5Encoder | None, *arrays: Array) -> Text:
        return features_of(encoder, *arrays)

    def _frequencies(self, tokenizer: ImageTokenizer, coarse: Array) -> Array:
        return frequency_features(tokenizer, coarse)

    def _pictures(
        self, tokenizer: ImageTokenizer, latents: Float[Array, "B h w C"], *, strips: int
    ) -> Float[Array, "B out_h out_w 3"]:
        return tokenizer.decode(latents, strips=strips)

    @property
    def batch_parts(self) -> int:
        """A batch has to be a multiple of this."""
        return 1

    def _fetched(self, tree: Any) -> Any:
        """Results as arrays of the host."""
        return jax.device_get(tree)

    def _described(self, results: Any) -> Any:
        """Results as the next program's arguments are described."""
        return results

    def _program(self, function: Callable[..., Any], arguments: tuple) -> Callable[..., Any]:
        """What is compiled to compute ``function`` of such arguments."""
        del arguments
        return function

    def _run(
        self, part: str, kind: Hashable, function, arguments: tuple, *, donate: tuple[int, ...] = (), **static: Any
    ) -> Any:
        """Call the executable, compiled at first use; time goes to ``part`` and to ``compile``."""
        executable, _ = self._compiled(kind, function, arguments, donate=donate, **static)
        start = time.perf_counter()
        result = jax.block_until_ready(executable(*arguments))
        self.seconds[part] += time.perf_counter() - start
        return result

    def _compiled(
        self, kind: Hashable, function, arguments: tuple, *, donate: tuple[int, ...] = (), **static: Any
    ) -> tuple[Any, Any]:
        """The executable for arguments of these shapes, and the shapes of what it returns."""
        # The networks are the same in every call; hashing their shapes each time would be most of the work.
        own = {id(network) for network in (self.model, *self.model)}
        shapes = tuple(
            (leaf.shape, leaf.dtype)
            for argument in arguments
            if id(argument) not in own
            for leaf in jax.tree.leaves(argument)
        )
        key = (kind, shapes, tuple(sorted(static.items(), key=lambda item: item[0])))
        if key not in self._executables:
            start = time.perf_counter()
            program = self._program(functools.partial(function, **static), arguments)
            traced = jax.jit(program, donate_argnums=donate).trace(*arguments)
            with warnings.catch_warnings():
                # The state is donated for its cache; its maps and inputs have another size at every scale.
                warnings.filterwarnings("ignore", "Some donated buffers were not usable")
                self._executables[key] = (self._made(key, traced), self._described(traced.out_info))
            self.seconds["compile"] += time.perf_counter() - start
        return self._executables[key]

    def _made(self, key: tuple, traced: jax.stages.Traced) -> Any:
        """What is called to run a program; ``key`` says which it is."""
        del key
        return traced.lower().compile()


def _sampled(party: _Party) -> _Sampled:
    own = (party.indices, party.rows, party.bits, party.certainty, party.statistics)
    return _Sampled(party.state.latents, party.plan, *own)


def _keys_like(keys: Any, size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size,), keys.dtype)
