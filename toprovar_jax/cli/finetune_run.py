"""What the finetune command does once it has started: find the data, train, write a model folder.

Nothing imported at the top imports jax: the backend is chosen first, and ``--help`` answers at once.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from toprovar_jax.cli.backend import start_backend
from toprovar_jax.cli.finetune_options import FinetuneOptions, FinetuneRequest, request_of
from toprovar_jax.cli.interrupts import Interrupts
from toprovar_jax.cli.model_options import files_of
from toprovar_jax.errors import UserInputError
from toprovar_jax.files import check_output_dir, ensure_output_dir

ADAPTER_FILE = "adapter.safetensors"
RUN_FOLDER = "run"
_TEXT_ROWS = 16  # captions are padded to a multiple of this


def run(options: FinetuneOptions, interrupts: Interrupts) -> None:
    """Carries out parsed options.

    Args:
      options: the command line.
      interrupts: lets a Ctrl-C end the process at once as long as nothing is trained.

    Raises:
      UserInputError: something that was asked for cannot be done; nearly always raised before any device work.
      OSError: a file could not be written.
    """
    request = request_of(options)
    with interrupts.nothing_to_lose():
        if request.out is not None:
            _check_out(request.out)
        start_backend(options.backend)
        card, folder = _card(options)
        card.schedule("1:1", options.pixels)
        samples: list[Any] = []
        problems: Any = None
        if request.data is not None:
            from toprovar_jax.training.image_text import find_samples

            samples, problems = find_samples(request.data, aspect_ratio=request.aspect)
        import jax

        precision = options.precision or ("exact" if jax.default_backend() == "cpu" else "fast")
        buckets = sorted({sample.bucket for sample in samples}) or [request.aspect or "1:1"]
        schedules = {bucket: card.schedule(bucket, options.pixels) for bucket in buckets}
        placement = _placement(request)
        card = card.with_precision(precision)
        if placement.devices > 1:
            card = card.with_attention("xla")  # which a compiler can split; it cannot split kernels
        finetuner = _finetuner(options, request, card, schedules)
        if options.dry_run:
            _show_plan(finetuner, request, samples, problems)
            return
        job = _Job(options, request, finetuner, placement, folder, samples, problems, precision)
    print(job.carry_out())


def _placement(request: FinetuneRequest) -> Any:
    import jax

    from toprovar_jax.training.placement import Placement

    there = jax.devices()
    if request.devices > len(there):
        raise UserInputError(f"--devices {request.devices}", f"must be at most {len(there)} here", "lower it")
    placement = Placement.over(there[: request.devices])
    placement.check_batch(request.batch_size)
    return placement


def _check_out(out: pathlib.Path) -> None:
    for name in ("model.json", ADAPTER_FILE):
        if (out / name).exists():
            raise UserInputError(f"--out {out}", f"holds a {name} already", "choose another folder")
    check_output_dir(out)


def _card(options: FinetuneOptions) -> tuple[Any, pathlib.Path | None]:
    """The model's description and its folder; a dry run needs no more than the description of a released model."""
    from toprovar_jax.hub import CARD, find_model
    from toprovar_jax.model_card import ModelCard
    from toprovar_jax.presets import PRESETS

    if options.dry_run and options.model is not None and options.model in PRESETS:
        return PRESETS[options.model], None
    wanted: dict[str, Any] = files_of(options) | {"precision": options.precision}
    folder = find_model(options.model, **wanted)
    return ModelCard.read(folder / CARD, PRESETS), folder


def _finetuner(options: FinetuneOptions, request: FinetuneRequest, card: Any, schedules: Mapping[str, Any]) -> Any:
    from toprovar_jax.training.adapters import chosen_layers
    from toprovar_jax.training.finetune import FinetuneConfig, Finetuner

    if request.rank is not None:
        chosen_layers(request.patterns)
        if request.rank > card.transformer.width:
            raise UserInputError(
                f"--rank {request.rank}", f"must be at most the model's width, {card.transformer.width}", "16 is usual"
            )
    config = FinetuneConfig(
        request.steps,
        rank=request.rank,
        alpha=request.alpha,
        patterns=request.patterns,
        learning_rate=request.learning_rate,
        warmup_steps=request.warmup,
        decay="cosine" if options.decay == "cosine" else "constant",
        ema_decay=request.ema,
        accumulate=request.accumulate,
        gradient_checkpointing=options.gradient_checkpointing,
        seed=request.seed,
    )
    return Finetuner(card, config, schedules)


def _show_plan(finetuner: Any, request: FinetuneRequest, samples: list[Any], problems: Any) -> None:
    from toprovar_jax.training.finetune_memory import memory_parts, memory_table

    if samples:
        _show_data(samples, problems)
    largest = max(finetuner.schedules.values(), key=lambda schedule: schedule.num_tokens)
    height, width = largest.pixel_size
    rows = finetuner.card.transformer.text_length
    print(f"{finetuner.card.name} at {height} x {width} pixels, {largest.num_tokens} tokens, {rows} text rows at most:")
    print(memory_table(memory_parts(finetuner, largest, batch_size=request.batch_size, text_length=rows)))


def _show_data(samples: list[Any], problems: Any) -> None:
    counts: dict[str, int] = {}
    for sample in samples:
        counts[sample.bucket] = counts.get(sample.bucket, 0) + 1
    listed = ", ".join(f"{bucket} {count}" for bucket, count in sorted(counts.items()))
    print(f"{len(samples)} pictures; by aspect ratio (height:width): {listed}")
    for line in problems.lines():
        print(f"warning: {line}", file=sys.stderr)


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    """One run, everything checked."""

    options: FinetuneOptions
    request: FinetuneRequest
    finetuner: Any
    placement: Any
    folder: Any
    samples: list[Any]
    problems: Any
    precision: Any

    def carry_out(self) -> pathlib.Path:
        """Trains and writes; returns the folder."""
        import jax
        import jax.numpy as jnp

        from toprovar_jax.loading import IMAGE_TOKENIZER, TEXT_ENCODER, TOKENIZER, TRANSFORMER, load_model
        from toprovar_jax.training.ahead import Ahead
        from toprovar_jax.training.finetune import FrozenEncoders
        from toprovar_jax.training.image_text import ImageTextData
        from toprovar_jax.training.loop import LoopConfig
        from toprovar_jax.training.loop import run as train

        options, request, finetuner = self.options, self.request, self.finetuner
        out = request.out
        if out is None:  # only a dry run goes without
            raise ValueError("no folder for the result")
        attention = finetuner.card.transformer.attention or ()
        loaded = load_model(self.folder, precision=self.precision, attention=attention, with_encoder=True)
        networks, tokenizer = self.placement.put_everywhere(loaded.networks), loaded.tokenizer
        del loaded
        checksum = _sha256(self.folder, TRANSFORMER)
        start = self.placement.put_state(finetuner.init(networks.transformer))
        if request.rank is None:
            # What is trained is a copy, and a second one would take as much memory again.
            networks = networks._replace(transformer=None)
        base = networks.transformer
        if not options.quiet:
            _show_data(self.samples, self.problems)
        data = ImageTextData(
            self.samples,
            {bucket: schedule.pixel_size for bucket, schedule in finetuner.schedules.items()},
            batch_size=request.batch_size,
            seed=request.seed,
            held_out=request.held_out,
            problems=self.problems,
        )
        rows, cut = _text_rows(tokenizer, self.samples, finetuner.card.transformer.text_length)
        if cut and not options.quiet:
            print(f"warning: {cut} captions are longer than {rows} tokens; their last words are lost", file=sys.stderr)
        directory = ensure_output_dir(out) / RUN_FOLDER
        cache, model = None, ""
        if options.cache:
            cache = directory / "cache"
            model = " ".join(_sha256(self.folder, name) for name in (IMAGE_TOKENIZER, TEXT_ENCODER))
        frozen = FrozenEncoders(
            finetuner, networks, tokenizer, rows, cache=cache, model=model, placement=self.placement
        )
        noise = jax.random.key(request.seed)
        ahead = Ahead(data.batch, request.steps * request.accumulate, depth=3, threads=2)

        def step(state: Any, number: int) -> tuple[Any, Any]:
            gradient, losses = None, []
            for index in range(number * request.accumulate, (number + 1) * request.accumulate):
                batch = ahead(index)
                key = jax.random.fold_in(noise, index)
                gradient, metrics = finetuner.gradient(state.trained, base, frozen(batch), key, batch.bucket, gradient)
                losses.append(metrics["loss"])
            state, metrics = finetuner.update(state, gradient)
            return state, {"loss": jnp.mean(jnp.stack(losses)), **metrics}

        def evaluate(state: Any, _: int) -> dict[str, float]:
            losses: list[float] = []
            for batch, count in data.held_out_batches():
                losses += map(float, finetuner.evaluate(state, base, frozen(batch), batch.bucket)[:count])
            return {"loss": sum(losses) / len(losses)}

        recipe = {
            **dataclasses.asdict(finetuner.config),
            "model": checksum,
            "precision": self.precision,
            "data": _fingerprint(self.samples),
            "pixels": [schedule.pixel_size for schedule in finetuner.schedules.values()],
            "batch_size": request.batch_size,
            "held_out": request.held_out,
        }
        config = LoopConfig(
            directory,
            request.steps,
            evaluate_every=request.eval_every,
            recipe=recipe,
            images_per_step=request.batch_size * request.accumulate,
            flops_per_step=finetuner.step_flops(_main_bucket(self.samples), request.batch_size, rows),
        )
        report = (lambda line: None) if options.quiet else print
        try:
            measure = evaluate if data.held_out else None
            state = train(start, step, config, evaluate=measure, report=report)
        finally:
            ahead.close()
        if not options.quiet:
            for line in self.problems.lines():
                print(f"warning: {line}", file=sys.stderr)
        self._write(out, state, networks, checksum, (self.folder / TOKENIZER).read_text(encoding="utf-8"))
        return out

    def _write(self, out: pathlib.Path, state: Any, networks: Any, checksum: str, tokenizer_json: str) -> None:
        from toprovar_jax.loading import save_model
        from toprovar_jax.training.adapters import save_adapters

        finetuner, config = self.finetuner, self.finetuner.config
        card = finetuner.card
        if config.rank is not None:
            save_adapters(
                out / ADAPTER_FILE,
                finetuner.adapters(state),
                card.transformer,
                alpha=config.scale * config.rank,
                base=card.name,
                base_sha256=checksum,
            )
        if self.options.adapter_only:
            return
        record = (
            ("program", "finetune"),
            ("base", card.name),
            ("base_sha256", checksum),
            ("steps", config.num_steps),
            ("samples", config.num_steps * config.accumulate * self.request.batch_size),
            ("rank", config.rank),
            ("learning_rate", config.learning_rate),
            ("seed", config.seed),
        )
        # It has been shown something new, so what its base could not draw is no longer known.
        made = dataclasses.replace(card, name=f"{card.name}-finetuned", world=None, training=record)
        transformer = finetuner.transformer(state, networks.transformer)
        save_model(out, made, networks._replace(transformer=transformer), tokenizer_json)


def _main_bucket(samples: list[Any]) -> str:
    """The aspect ratio of most pictures; the others' templates have nearly as many tokens."""
    return collections.Counter(sample.bucket for sample in samples).most_common(1)[0][0]


def _text_rows(tokenizer: Any, samples: list[Any], most: int) -> tuple[int, int]:
    """Rows that hold every caption, at most the model's, and how many captions do not fit."""
    tokens = tokenizer.encode([sample.caption for sample in samples], max_length=most)
    rows = min(-(-int(tokens.lengths.max()) // _TEXT_ROWS) * _TEXT_ROWS, most)
    return rows, sum(length is not None for length in tokens.truncated)


def _fingerprint(samples: list[Any]) -> str:
    """Changes with the pictures' names and captions, which fix the order of the data."""
    return hashlib.sha256(repr([(sample.name, sample.caption) for sample in samples]).encode()).hexdigest()


def _sha256(folder: pathlib.Path, name: str) -> str:
    """Of a network's file; of a converted network, of the files that it was made from."""
    path = folder / name
    if path.with_suffix("").is_dir():
        record = json.loads((folder / "model.json").read_text(encoding="utf-8"))["conversion"]["parts"][path.stem]
        return hashlib.sha256(repr([file["sha256"] for file in record["files"]]).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
