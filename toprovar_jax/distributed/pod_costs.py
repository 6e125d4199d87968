"""What one batch costs each chip of a mesh, program by program: operations, memory traffic and exchanges.

Counted from the model and the plan alone, nothing is run or compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from toprovar_jax.acceleration.cost import step_flops
from toprovar_jax.acceleration.plan import GenerationPlan
from toprovar_jax.acceleration.step import GroupStep, ScaleStep
from toprovar_jax.distributed.chips import Chip
from toprovar_jax.distributed.choosing import parameter_parts
from toprovar_jax.distributed.mesh import MeshSpec
from toprovar_jax.distributed.parts import FSDP, TENSOR
from toprovar_jax.generation import Text, condition_on
from toprovar_jax.image_tokenizer import ImageTokenizer
from toprovar_jax.memory_options import MemoryOptions
from toprovar_jax.memory_parts import condition_bytes, image_bytes
from toprovar_jax.model import Infinity
from toprovar_jax.model_card import ModelCard
from toprovar_jax.text_encoder import T5Encoder
from toprovar_jax.text_placement import TEXT_PATHS
from toprovar_jax.training.flops import count_flops


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """What a program does on each chip for one batch.

    Attributes:
      name: as in :func:`toprovar_jax.memory.predict`'s phases.
      flops: operations.
      traffic: bytes that the chip's memory gives and takes: parameters once, keys and values that attention reads,
        what the blocks' products read and write. For texts and pictures parameters alone.
      sent: bytes that the chip sends to those with which it shares a copy of the model, by mesh axis.
    """

    name: str
    flops: float
    traffic: float
    sent: dict[str, float]

    def seconds(self, chip: Chip, spec: MeshSpec, utilisation: float) -> Seconds:
        """How long it takes if products run at ``utilisation`` of the chip's peak, and memory and links at theirs."""
        reach = {TENSOR: spec.tensor, FSDP: spec.model_size}
        exchanged = sum(size / _link(chip, reach[axis]) for axis, size in self.sent.items())
        return Seconds(self.flops / (chip.flops * utilisation), self.traffic / chip.bandwidth, exchanged)


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Time of a program; computing and memory overlap, exchanges are taken not to."""

    computing: float
    memory: float
    exchanging: float

    @property
    def total(self) -> float:
        """Of the program."""
        return max(self.computing, self.memory) + self.exchanging


def program_costs(
    card: ModelCard, plan: GenerationPlan, memory: MemoryOptions, spec: MeshSpec, batch: int
) -> tuple[ProgramCost, ...]:
    """The programs of one batch in order: the text, the scales, the decoder.

    Args:
      card: with its precision.
      plan: without alternatives.
      memory: what stays off the devices.
      spec: the mesh.
      batch: pictures of each copy of the model, of which there are ``data`` times ``fsdp``.
    """
    counted = _flops_of_ends(card, plan.schedule.latent_grids[-1], plan.guided)
    # Texts and pictures go to the chips of a copy one by one.
    share = -(-batch // spec.tensor)
    parts = tuple(parameter_parts(card, memory, spec))

    def held(belongs: Callable[[str, str], bool]) -> tuple[float, dict[str, float]]:
        """Bytes on a chip of some parameters, whole as they are used, and what gathering them sends."""
        sent: dict[str, float] = {TENSOR: 0.0, FSDP: 0.0}
        whole = 0.0
        for network, path, size, over in parts:
            if belongs(network, path):
                times = math.prod({TENSOR: spec.tensor, FSDP: spec.fsdp}[axis] for axis in over)
                whole += size * times
                if over:
                    sent[FSDP if FSDP in over else TENSOR] += size * (times - 1)
        return whole, sent

    def gathered(size: int) -> float:
        return size * (spec.tensor - 1) / spec.tensor

    def is_text(network: str, path: str) -> bool:
        return network == "text_encoder" or (network == "transformer" and path.startswith(TEXT_PATHS))

    def is_scale(network: str, path: str) -> bool:
        return network == "transformer" and not path.startswith(TEXT_PATHS)

    texts, text_sent = held(is_text)
    text_sent[TENSOR] += gathered(4 * batch * card.transformer.text_length * card.text_encoder.width)
    text = ProgramCost("text", share * counted["encoder"] + batch * counted["condition"], texts, text_sent)

    blocks, blocks_sent = held(is_scale)
    scales = []
    for scale in range(plan.num_run):
        step = plan.step(scale)
        traffic = blocks + batch * scale_traffic(card, step) / spec.tensor
        sent = blocks_sent | {TENSOR: blocks_sent[TENSOR] + block_exchanges(card, step, spec.tensor, batch)}
        flops = batch * step_flops(step, card.transformer) / spec.tensor
        scales.append(ProgramCost(f"scale {scale + 1} ({step.grid[0]}x{step.grid[1]})", flops, traffic, sent))

    decoder, decoder_sent = held(lambda network, path: network == "image_tokenizer")
    decoder_sent[TENSOR] += gathered(image_bytes(plan.schedule.pixel_size, batch))
    return (text, *scales, ProgramCost("decoder", share * counted["decoder"], decoder, decoder_sent))


def block_exchanges(card: ModelCard, step: ScaleStep, tensor: int, batch: int) -> float:
    """Bytes that a chip sends in a scale's blocks: two sums scattered over tokens, and tokens gathered twice.

    The sums and the first gathering are of what enters products, the second of the float32 stream between blocks.
    """
    rows = batch * (2 if step.guided else 1)
    per_channel = 3 * _item(card) + 4
    total = 0.0
    for group in step.groups:
        padded = -(-group.kept // tensor) * tensor
        total += (group.stop - group.start) * rows * padded * card.transformer.width * per_channel
    return total * (tensor - 1) / tensor


def scale_traffic(card: ModelCard, step: ScaleStep) -> int:
    """Bytes of one picture's tokens, keys and values that a scale's blocks read and write, parameters left out."""
    text = condition_bytes(card, 1, guided=step.guided).rest
    return text + (2 if step.guided else 1) * sum(_layer_traffic(card, group) for group in step.groups)


def _layer_traffic(card: ModelCard, group: GroupStep) -> int:
    """Of one layer group and row."""
    width, hidden, item = card.transformer.width, card.transformer.feed_forward_width, _item(card)
    if not group.kept:
        return 0
    # Channels in and out: of the projections 4 and 2, of both attentions 4 and 2, of cross-attention's maps 4, of the
    # feed-forward's its input, output and hidden units twice; and three sums of float32 streams, read and written.
    per_token = item * (18 * width + 2 * hidden) + 3 * 2 * 4 * width
    keys = 2 * max(group.visible) * width * item
    return (group.stop - group.start) * (group.kept * per_token + keys)


@functools.lru_cache(maxsize=8)
def _flops_of_ends(card: ModelCard, latent_grid: tuple[int, int], guided: bool) -> dict[str, float]:
    """Operations of the text encoder, of what is computed of its features, and of the decoder, for one picture."""
    config, encoder_config = card.transformer, card.text_encoder
    transformer, tokenizer, encoder = (
        nnx.eval_shape(build)
        for build in (
            lambda: Infinity(config, rngs=nnx.Rngs(0)),
            lambda: ImageTokenizer(card.image_tokenizer, rngs=nnx.Rngs(0), with_encoder=False),
            lambda: T5Encoder(encoder_config, rngs=nnx.Rngs(0)),
        )
    )

    def described(*shape: int, dtype: Any = np.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    tokens, lengths = described(1, config.text_length, dtype=np.int32), described(1, dtype=np.int32)
    text = Text(described(1, config.text_length, encoder_config.width), lengths)
    latents = described(1, *latent_grid, config.latent_channels)
    return {
        "encoder": count_flops(lambda network, *given: network(*given), encoder, tokens, lengths),
        "condition": count_flops(lambda network, text: condition_on(network, text, guided=guided), transformer, text),
        "decoder": count_flops(lambda network, latents: network.decode(latents), tokenizer, latents),
    }


def _link(chip: Chip, reach: int) -> float:
    """Bytes per second that a chip sends to one of so many next to each other."""
    if chip.network is not None and chip.neighbours is not None and reach > chip.neighbours:
        return chip.network
    return chip.link


def _item(card: ModelCard) -> int:
    return 4 if card.transformer.precision == "exact" else 2
