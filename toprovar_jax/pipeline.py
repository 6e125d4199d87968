"""The pipeline: strings in, pictures out."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from toprovar_jax.acceleration import (
    POLICIES,
    AccelerationPolicy,
    AdaptivePolicy,
    GenerationPlan,
    ToProVAR,
    policy_named,
)
from toprovar_jax.assembling import OutputType, assemble, in_order
from toprovar_jax.config import Precision
from toprovar_jax.distributed.choosing import mesh_for
from toprovar_jax.distributed.mesh_drivers import MeshDrivers
from toprovar_jax.distributed.parts import TENSOR
from toprovar_jax.distributed.rules import ParameterShardings
from toprovar_jax.drivers import Drawn, Drivers, OnScaleEnd, TokenArrays
from toprovar_jax.errors import UserInputError, unknown_name
from toprovar_jax.generation import make_plan
from toprovar_jax.hub import CARD, find_model
from toprovar_jax.loading import LoadedModel, load_model
from toprovar_jax.memory import Driver, MemoryReport, attention_of, check_fits, device_limit, predict
from toprovar_jax.memory_options import ON_DEVICE, MemoryOptions
from toprovar_jax.model_card import ModelCard
from toprovar_jax.outputs import PipelineOutput
from toprovar_jax.presets import PRESETS
from toprovar_jax.request import (
    Number,
    Numbers,
    ResolvedRequest,
    cut_warnings,
    negatives_of,
    per_scale,
    plain_numbers,
    scenes_warnings,
    seeds_of,
    texts_of,
)
from toprovar_jax.sampling import Sampling, ScaleSampling
from toprovar_jax.scale_callbacks import ScaleBar, both, naming
from toprovar_jax.settings import check_setting
from toprovar_jax.shapes import Array, Key
from toprovar_jax.text_encoder import TokenBatch
from toprovar_jax.timings import Timings


class InfinityPipeline:
    """A loaded model that makes pictures of prompts.

    Use :meth:`from_pretrained`. What the user leaves out takes the model's defaults (``pipeline.default_guidance``
    and so on). With ``precision="exact"`` pictures are computed one by one and a picture's bits depend on its prompt,
    settings and seed alone; with ``"fast"`` a batch is computed at once.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        load_seconds: float = 0.0,
        memory: MemoryOptions = ON_DEVICE,
        mesh: Mesh | None = None,
    ):
        self.card, self.networks, self.tokenizer, self.calibration, self._quantization_error = loaded
        self.memory = memory
        self.mesh = mesh
        self.drivers = Drivers(loaded.networks, memory=memory)
        if mesh is not None:
            self.drivers = MeshDrivers(loaded.networks, mesh, memory=memory)
        self._load_seconds = load_seconds

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | os.PathLike[str] | None = None,
        *,
        variant: str | None = None,
        vae: str | os.PathLike[str] | None = None,
        text_encoder: str | os.PathLike[str] | None = None,
        precision: Precision | None = None,
        attention: str | Sequence[str] = (),
        memory: MemoryOptions = ON_DEVICE,
        mesh: str | Mesh | None = None,
        progress: bool = True,
    ) -> InfinityPipeline:
        """Load a model.

        Args:
          name_or_dir: a model folder, a folder of the original files, which are converted once, a name of
            ``toprovar_jax.list_models()``, or a repository on the Hugging Face hub such as
            ``"FoundationVision/Infinity"``; None for the embedded model.
          variant, vae, text_encoder: which of the original files, see :func:`toprovar_jax.hub.find_model`.
          precision: ``"exact"`` (float32) or ``"fast"`` (bfloat16 products); default exact on CPU, fast elsewhere.
          attention: an implementation of :func:`pallas_kernels.attention`, or several, of which the first that can run
            is taken; by default the fastest that is proven on the device.
          memory: how to fit a small device.
          mesh: the devices to use, by default one: text such as ``"data=8"`` or ``"data=2,tensor=4"`` for all devices
            of all processes (:func:`toprovar_jax.distributed.mesh.parse_mesh`), ``"auto"`` for as many copies of the
            model as fit on them, or a mesh with the axes ``data``, ``fsdp`` and ``tensor``. Every process of the mesh
            makes the same calls and gets all pictures.
          progress: tell on stderr what is fetched and converted; nothing is said about what is on this machine already.

        Raises:
          UserInputError: an unknown model, original files that make up none, attention that does not exist or cannot
            run here, or files that are missing, cut short or do not fit.
        """
        start = time.perf_counter()
        if precision not in (None, "exact", "fast"):
            raise UserInputError(
                f"precision {precision!r}", "must be exact or fast", "leave it out to choose by device"
            )
        folder = find_model(
            name_or_dir,
            variant=variant,
            vae=vae,
            text_encoder=text_encoder,
            precision=precision,
            progress=progress,
        )
        if precision is None:
            precision = "exact" if jax.default_backend() == "cpu" else "fast"
        implementations = (attention,) if isinstance(attention, str) else tuple(attention)
        placed: dict[str, Any] = {}
        devices = None
        if mesh is not None:
            card = ModelCard.read(folder / CARD, PRESETS).with_precision(precision)
            devices = mesh_for(mesh, card, memory)
            placed = {"shardings": ParameterShardings(devices), "tensor_parts": devices.shape[TENSOR]}
        loaded = load_model(folder, precision=precision, attention=implementations, memory=memory, **placed)
        return cls(loaded, load_seconds=time.perf_counter() - start, memory=memory, mesh=devices)

    @property
    def quantization_error(self) -> dict[str, float]:
        """How far quantised matrices are from the given ones: per kind of matrix the largest over the layers of
        ``norm(quantised - given) / norm(given)`` (Frobenius); empty without quantisation.
        """
        return dict(self._quantization_error)

    @property
    def model_name(self) -> str:
        """The model's name."""
        return self.card.name

    @property
    def default_guidance(self) -> float | tuple[float, ...]:
        """Guidance scale where none is given."""
        return self.card.guidance

    @property
    def default_tau(self) -> float | tuple[float, ...]:
        """Temperature where none is given."""
        return self.card.tau

    @property
    def default_top_k(self) -> int:
        """Top-k where none is given."""
        return self.card.top_k

    @property
    def default_top_p(self) -> float:
        """Top-p where none is given."""
        return self.card.top_p

    @property
    def default_pixels(self) -> str:
        """Pixel budget where none is given."""
        return self.card.default_pixels

    def resolve(
        self,
        prompt: str | Iterable[str],
        *,
        seed: Numbers = 0,
        policy: str | AccelerationPolicy = "dense",
        guidance_scale: Numbers | None = None,
        tau: Numbers | None = None,
        top_k: Number | None = None,
        top_p: Number | None = None,
        aspect_ratio: str = "1:1",
        pixels: str | None = None,
        negative_prompt: str | Iterable[str] | None = None,
        num_images_per_prompt: Number = 1,
        stop_after_scale: Number | None = None,
        text_length: Number | None = None,
        strict: bool = False,
        observe: bool = False,
    ) -> ResolvedRequest:
        """Check a request and fill in the defaults; no device work.

        Takes what :meth:`__call__` takes, and raises what it raises.
        """
        per_prompt = check_setting("num_images", plain_numbers(num_images_per_prompt), label="num_images_per_prompt")
        prompts = texts_of("prompt", prompt)
        given_seeds = seeds_of(seed, len(prompts), per_prompt)
        prompts = tuple(text for text in prompts for _ in range(per_prompt))
        schedule = self.card.schedule(
            check_setting("aspect_ratio", aspect_ratio),
            None if pixels is None else check_setting("pixels", pixels),
        )
        count = len(schedule)
        sampling = Sampling(
            per_scale("guidance", self.card.guidance if guidance_scale is None else guidance_scale, count),
            per_scale("tau", self.card.tau if tau is None else tau, count),
            check_setting("top_k", plain_numbers(self.card.top_k if top_k is None else top_k)),
            check_setting("top_p", plain_numbers(self.card.top_p if top_p is None else top_p)),
        )
        stop = stop_after_scale
        stop_after = None if stop is None else check_setting("stop_after_scale", plain_numbers(stop))
        chosen = self._policy(policy)
        plan = make_plan(schedule, sampling, chosen, num_layers=self.card.transformer.num_layers, stop_after=stop_after)
        if observe:
            plan = plan.observed()
        negatives = negatives_of(negative_prompt, len(prompts), per_prompt)
        length = self._text_length(text_length)
        tokens = self._tokenize("prompt", prompts, length, strict)
        arrays, warnings = TokenArrays(tokens.ids, tokens.lengths), cut_warnings("prompt", prompts, tokens)
        if self.card.world is not None:
            warnings += scenes_warnings(prompts, self.card.world)
        if schedule.aspect_ratio != "1:1" and self.card.world is not None:
            warnings.append(f"model {self.model_name} was trained at aspect ratio 1:1 only; expect a worse picture")
        if negatives is not None:
            others = self._tokenize("negative_prompt", negatives, length, strict)
            arrays = TokenArrays(tokens.ids, tokens.lengths, others.ids, others.lengths)
            warnings += cut_warnings("negative prompt", negatives, others)
            if not plan.guided:
                warnings.append("negative prompt: has no effect at guidance 1; raise the guidance scale")
        return ResolvedRequest(
            prompts,
            given_seeds,
            negatives,
            schedule.pixel_size,
            plan,
            chosen,
            sampling,
            arrays,
            tuple(dict.fromkeys(warnings)),
        )

    def plan_for(self, policy: str | AccelerationPolicy, **options: Any) -> GenerationPlan:
        """The plan of a policy, without running it; takes the options of :meth:`resolve`."""
        return self.resolve("a plan", policy=policy, **options).plan

    def _policy(self, policy: str | AccelerationPolicy) -> AccelerationPolicy:
        """A policy by name is the calibrated one, if the model comes with a calibration."""
        if isinstance(policy, AccelerationPolicy) and not isinstance(policy, str):
            made_for = getattr(policy, "model", None)
            if made_for not in (None, self.model_name):
                raise UserInputError(
                    f"policy {policy.name} calibrated for model {made_for}",
                    f"cannot be used with model {self.model_name}",
                    "calibrate this model",
                )
            return policy
        return policy_named(check_setting("policy", policy), self._calibrated)

    def _calibrated(self, name: str) -> AccelerationPolicy:
        if self.calibration is not None and name in self.calibration.profiles:
            return ToProVAR.from_calibration(self.calibration, name)
        return POLICIES[name]()

    def __call__(
        self,
        prompt: str | Iterable[str] | ResolvedRequest,
        *,
        output_type: OutputType = "pil",
        callback_on_scale_end: OnScaleEnd | None = None,
        progress: bool = False,
        **options: Any,
    ) -> PipelineOutput:
        """Make pictures.

        Args:
          prompt: one prompt or several; or what :meth:`resolve` made of them and all options, in some other thread.
          output_type: ``"pil"`` pictures, or float arrays in [0, 1] as ``"np"`` or ``"jax"``.
          callback_on_scale_end: called with ``(index, num_scales, info)`` after every scale; raising stops the call.
            ``info`` holds the scale's ``grid``, its ``seconds``, the summed ``latents`` and ``images``, the indices of
            the pictures they belong to.
          progress: show a bar over the scales on stderr.
          **options: of :meth:`resolve`:
            ``seed`` (an integer, image k of each prompt then has ``seed + k``; or one per prompt, or one per image),
            ``policy`` (a name or a policy), ``guidance_scale`` and ``tau`` (a number, or one per scale), ``top_k``,
            ``top_p``, ``aspect_ratio`` (``"height:width"``), ``pixels`` (the budget's name), ``negative_prompt``,
            ``num_images_per_prompt``, ``stop_after_scale``, ``text_length`` (how many tokens of text programs are made
            for, default all that the model reads; fewer take less time and memory, longer texts are cut), ``strict``
            (refuse prompts that are too long), ``observe`` (measure entropy in every layer at every scale, for
            :attr:`PipelineOutput.statistics`).

        Returns:
          Images, seeds, prompts, timings, the plan and warnings.

        Raises:
          UserInputError: anything that cannot be done as asked, before any device work.
        """
        start = time.perf_counter()
        if output_type not in ("pil", "np", "jax"):
            raise UserInputError(f"output_type {output_type!r}", "must be pil, np or jax", "choose one of them")
        if callback_on_scale_end is not None and not callable(callback_on_scale_end):
            raise UserInputError(
                f"callback_on_scale_end {callback_on_scale_end!r}", "must be a function", "leave it out for none"
            )
        for name in options:
            if name not in _OPTIONS:
                raise unknown_name("option", name, _OPTIONS)
        request = self._request(prompt, options)
        self._check_memory(request, stepwise=progress or callback_on_scale_end is not None)
        before = dict(self.drivers.seconds)
        with ScaleBar(request, progress) as bar:
            drawn = self._draw(request, both(callback_on_scale_end, bar.on_scale_end if progress else None))
        images, bits, statistics = assemble(drawn, output_type)
        plans = tuple(part.plan for part in in_order(drawn))
        spent = {name: seconds - before[name] for name, seconds in self.drivers.seconds.items()}
        timings = Timings(load=self._load_seconds, total=time.perf_counter() - start, **spent)
        return PipelineOutput(
            images,
            request.seeds,
            request.prompts,
            timings,
            request.plan,
            plans,
            statistics,
            request.warnings,
            bits,
        )

    def _request(self, prompt: str | Iterable[str] | ResolvedRequest, options: dict[str, Any]) -> ResolvedRequest:
        if not isinstance(prompt, ResolvedRequest):
            return self.resolve(prompt, **options)
        if options:
            rule = "belong to resolve, when what it returned is given"
            raise UserInputError(f"options {', '.join(options)}", rule, "leave them out")
        return prompt

    def memory_report(self, *, batch_size: int = 1, driver: Driver | None = None, **options: Any) -> MemoryReport:
        """Predict the device memory of calls with these options; nothing is run or allocated.

        It is that of one device which holds everything; of a mesh's devices, ``toprovar plan-pod`` tells.

        Args:
          batch_size: pictures per call.
          driver: ``"stepwise"`` for calls with ``progress`` or a callback; default: as without.
          **options: of :meth:`resolve`, but the prompt.

        Raises:
          UserInputError: what :meth:`resolve` raises.
        """
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise UserInputError(f"batch_size {batch_size!r}", "must be an integer >= 1", "leave it out for 1")
        return predict(*self._predicted(self.resolve(["a prompt"] * batch_size, **options)), driver=driver)

    def _predicted(self, request: ResolvedRequest) -> Any:
        pixels = "x".join(map(str, reversed(request.size)))
        return self.card, request.plan, request.batch_size, pixels, self.memory

    def _check_memory(self, request: ResolvedRequest, *, stepwise: bool) -> None:
        """Refuse what the device cannot hold, where it tells what it can."""
        limit = device_limit()
        if limit is None or self.mesh is not None:
            return
        report = predict(
            *self._predicted(request),
            driver="stepwise" if stepwise else None,
            attention=attention_of(self.card, request.plan),
            negative=request.tokens.negative_ids is not None and request.plan.guided,
        )
        check_fits(report, limit)

    def warmup(self, *, batch_size: int = 1, **options: Any) -> int:
        """Compile everything that calls with these options will need.

        That is one set of pictures, which is discarded, and for policies that decide per image the programs of every
        way that a picture may go (``plan.executables()`` lists them). Guidance 1 at every scale leaves the
        unconditional rows out, so it has programs of its own.

        Args:
          batch_size: prompts per call; with ``precision="exact"`` one warm-up serves every number of them.
          **options: of :meth:`__call__`, but the prompt. Give ``progress`` or a callback here too if calls will have
            one: with ``precision="fast"`` scales are then compiled one by one.

        Returns:
          How many programs are compiled by now.
        """
        if not isinstance(batch_size, int) or batch_size < 1:
            raise UserInputError(f"batch_size {batch_size!r}", "must be an integer >= 1", "leave it out for 1")
        prompts = ["warm up"] * batch_size
        self(prompts, **options)
        names = inspect.signature(self.resolve).parameters
        request = self.resolve(prompts, **{name: value for name, value in options.items() if name in names})
        if request.plan.alternatives:
            sampling = _on_device(request.sampling, len(request.plan.schedule))
            parts = self.drivers.batch_parts
            together = parts if self._one_by_one else -(-request.batch_size // parts) * parts
            rows = [min(row, request.batch_size - 1) for row in range(together)]
            keys = _keys([request.seeds[row] for row in rows])
            self.drivers.prepare(request.tokens.images(rows), keys, sampling, request.plan)
        return self.drivers.num_executables

    @property
    def _one_by_one(self) -> bool:
        return self.card.transformer.precision == "exact"

    def _draw(self, request: ResolvedRequest, on_scale_end: OnScaleEnd | None) -> list[Drawn]:
        sampling = _on_device(request.sampling, len(request.plan.schedule))
        everything = range(request.batch_size)
        replan = request.policy.replan if isinstance(request.policy, AdaptivePolicy) else None
        parts = self.drivers.batch_parts
        together = parts if self._one_by_one else -(-request.batch_size // parts) * parts
        drawn = []
        for start in range(0, request.batch_size, together):
            images = everything[start : start + together]
            # The last pictures of a mesh that has more devices are made again on them, and left out below.
            rows = [*images, *[images[-1]] * (together - len(images))]
            tokens, keys = request.tokens.images(rows), _keys([request.seeds[i] for i in rows])
            if not self._one_by_one and on_scale_end is None and not request.plan.alternatives:
                whole = [self.drivers.fused(tokens, keys, sampling, request.plan)]
            else:
                report = naming(on_scale_end, images)
                whole = self.drivers.stepwise(tokens, keys, sampling, request.plan, report, replan=replan)
            drawn += [part.of(images) for part in whole]
        return [part for part in drawn if part.indices]

    def _text_length(self, given: Number | None) -> int:
        longest = self.card.transformer.text_length
        if given is None:
            return longest
        length = plain_numbers(given)
        if isinstance(length, bool) or not isinstance(length, int) or not 2 <= length <= longest:
            raise UserInputError(
                f"text_length {length!r}", f"must be an integer from 2 to {longest}", "leave it out for all of them"
            )
        return length

    def _tokenize(self, name: str, texts: Sequence[str], length: int, strict: bool) -> TokenBatch:
        try:
            return self.tokenizer.encode(texts, max_length=length, strict=strict)
        except UserInputError as error:
            if name == "prompt":
                raise
            raise UserInputError(f"{name}: {error.value}", error.rule, error.remedy) from None


_OPTIONS = tuple(
    name for name in inspect.signature(InfinityPipeline.resolve).parameters if name not in ("self", "prompt")
)


def _on_device(sampling: Sampling, num_scales: int) -> ScaleSampling:
    """As arrays, filled on the host: filling them on the device would compile a program per form of the input."""

    def per_scale(value: Any) -> Array:
        return jax.device_put(np.broadcast_to(np.asarray(value, np.float32), (num_scales,)))

    return ScaleSampling(
        per_scale(sampling.guidance),
        per_scale(sampling.tau),
        jax.device_put(np.int32(min(sampling.top_k, np.iinfo(np.int32).max))),
        jax.device_put(np.float32(sampling.top_p)),
    )


def _keys(seeds: Sequence[int]) -> Key[Array, " B"]:
    return jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32))
