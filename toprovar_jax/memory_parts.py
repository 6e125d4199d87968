"""How many bytes each piece of a generation takes on its device, from configurations and plans alone.

Arguments and results of the compiled programs are counted exactly. Temporaries are those of XLA's schedules where they
are largest, written out term by term in the working sets below; layouts and the on-chip memory of TPUs shift them by up
to a third, which is a few parts in a hundred of a large model's peak.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from convert.dtypes import FLOAT32, fast_dtype
from toprovar_jax.acceleration.cost import state_bytes
from toprovar_jax.acceleration.step import ScaleStep
from toprovar_jax.image_tokenizer import ImageTokenizer
from toprovar_jax.memory_options import MemoryOptions
from toprovar_jax.model import Infinity
from toprovar_jax.model_card import ModelCard
from toprovar_jax.schedule import Grid
from toprovar_jax.text_encoder import T5Encoder
from toprovar_jax.text_placement import TEXT_PATHS

CHUNK = 512
"""Keys per round of the attention in plain XLA."""


class Weights(NamedTuple):
    """Bytes of the networks' parameters, by the programs that read them.

    Attributes:
      blocks: the transformer's blocks, but for what makes their text keys and values.
      text: that and the rest of the text's way into the transformer, where it lies on the device all the time.
      lent: the same where it does not.
      start: the first scale's token.
      word_embedding: the embedding of later scales' tokens.
      frame: level embedding and head, read at every scale.
      image_tokenizer, text_encoder: those networks.
      moving: where the blocks are streamed, two layers of their matrices, which are on their way.
    """

    blocks: int
    text: int
    lent: int
    start: int
    word_embedding: int
    frame: int
    image_tokenizer: int
    text_encoder: int
    moving: int = 0

    @property
    def transformer(self) -> int:
        """What of the transformer lies on the device all the time."""
        return self.blocks + self.text + self.start + self.word_embedding + self.frame


@functools.lru_cache(maxsize=8)
def _parameters(card: ModelCard) -> dict[str, tuple[tuple[str, tuple[int, ...]], ...]]:
    """Dotted paths and shapes of all parameters, network by network; nothing is allocated."""
    builds: dict[str, Callable[[], nnx.Module]] = {
        "transformer": lambda: Infinity(card.transformer, rngs=nnx.Rngs(0)),
        "image_tokenizer": lambda: ImageTokenizer(card.image_tokenizer, rngs=nnx.Rngs(0), with_encoder=False),
        "text_encoder": lambda: T5Encoder(card.text_encoder, rngs=nnx.Rngs(0)),
    }
    found = {}
    for network, build in builds.items():
        state: Any = nnx.to_flat_state(nnx.split(nnx.eval_shape(build))[1])
        found[network] = tuple((".".join(map(str, path)), tuple(leaf.get_value().shape)) for path, leaf in state)
    return found


@functools.lru_cache(maxsize=64)
def weight_bytes(card: ModelCard, memory: MemoryOptions) -> Weights:
    """Bytes of every network's parameters as they are loaded for the card's precision."""
    parts = dict.fromkeys(Weights._fields, 0)
    for network, path, _, size in parameter_bytes(card, memory):
        part = _part(network, path)
        if memory.stream_blocks and network == "transformer" and _is_block_matrix(path):
            part = "moving"
        elif part == "text" and memory.text_encoder != "device":
            part = "lent"
        parts[part] += size
    parts["moving"] = 2 * parts["moving"] // card.transformer.num_layers
    return Weights(**parts)


def parameter_bytes(card: ModelCard, memory: MemoryOptions) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Network, dotted path, shape and bytes of every parameter, as loaded for the card's precision."""
    fast = card.transformer.precision == "fast"
    for network, parameters in _parameters(card).items():
        for path, shape in parameters:
            dtype = fast_dtype(network, path) if fast else FLOAT32
            size = math.prod(shape) * dtype.itemsize
            if memory.quantization == "int8" and network == "transformer" and _is_block_matrix(path):
                # One byte a number and, for every output channel, a float32 scale.
                size = math.prod(shape) + 4 * math.prod(shape) // shape[-2]
            yield network, path, shape, size


def _is_block_matrix(path: str) -> bool:
    return path.startswith("layers.") and path.endswith(".kernel")


def _part(network: str, path: str) -> str:
    if network != "transformer":
        return network
    if path.startswith(TEXT_PATHS):
        return "text"
    if path.startswith("layers."):
        return "blocks"
    named = path.partition(".")[0]
    return named if named in ("start", "word_embedding") else "frame"


class Condition(NamedTuple):
    """Bytes of the text's contribution to all scales; ``pooled`` is read by the first alone."""

    pooled: int
    rest: int


def condition_bytes(card: ModelCard, batch: int, *, guided: bool) -> Condition:
    """The text condition of ``batch`` images."""
    config = card.transformer
    rows, width = batch * (2 if guided else 1), config.width
    keys = 2 * config.num_layers * rows * config.text_length * width * _item(card)
    return Condition(4 * rows * width, keys + 4 * rows * (6 + 2) * width + 4 * rows)


class Handed(NamedTuple):
    """Bytes of the state between two scales.

    Attributes:
      layers: by purpose, see :func:`toprovar_jax.acceleration.cost.state_bytes`.
      latents: summed codes.
      inputs: of the next scale.
      hints: what is told of its tokens.
    """

    layers: dict[str, int]
    latents: int
    inputs: int
    hints: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.layers.values()) + self.latents + self.inputs + self.hints


def first_state(card: ModelCard, step: ScaleStep, batch: int) -> Handed:
    """What lies there before a plan's first step."""
    layers = dict.fromkeys(state_bytes(step, card.transformer), 0)
    rows = batch * (2 if step.guided else 1)
    for group in step.groups:
        count = group.stop - group.start
        layers["cache"] += 2 * count * rows * group.cache_length * card.transformer.width * _item(card)
    return Handed(layers, _latents(card, step, batch), 0, 0)


def state_after(card: ModelCard, step: ScaleStep, batch: int) -> Handed:
    """What a scale hands on."""
    config = card.transformer
    layers = {name: batch * size for name, size in state_bytes(step, config).items()}
    inputs = 0 if step.last else 4 * batch * step.schedule.token_counts[step.scale + 1] * config.token_bits
    hints = 0 if step.measures_change is None else 4 * batch * step.tokens * (1 + 2 * config.token_bits)
    return Handed(layers, _latents(card, step, batch), inputs, hints)


def reused_bytes(card: ModelCard, step: ScaleStep, before: Handed, after: Handed) -> int:
    """What of a scale's state is written where it was: it has the same shape before and after."""
    reused = before.latents
    if all(group.budget is None and group.arrives is None for group in step.groups):
        reused += min(before.layers["cache"], after.layers["cache"])
    if step.increments_from is not None and not step.records_increments:
        reused += min(before.layers["increments"], after.layers["increments"])
    return reused


def result_bytes(card: ModelCard, step: ScaleStep, batch: int) -> int:
    """Bits, their certainty and the measurements that a scale returns beside its state."""
    config = card.transformer
    per_image = step.tokens * config.token_bits + 4  # bits are bytes
    per_image += 4 * (1 + 1 + 2)  # salient share, changed share, frequencies
    if step.spectrum is not None:
        per_image += 4 * config.num_layers
    if step.observe:
        per_image += 5 * config.num_layers * step.tokens
    if step.previews:
        per_image += 2 * _latents(card, step, 1)  # at most
    return batch * per_image


def working_set(card: ModelCard, step: ScaleStep, batch: int, attention: str) -> int:
    """The temporaries of one scale.

    Through all layers there are the residual stream and its sum with a layer's result, float32. Beside them there is
    the largest of three sets: queries, what they attended to, and the keys and values in front of them, put together
    from cache and scale; queries, keys and values as they are projected, two of them float32 for their norms and
    rotation; the feed-forward's input and hidden units. Pruned layers gather and scatter, which takes the residual
    stream of all tokens once more, and resized increments.
    """
    config, item = card.transformer, _item(card)
    rows, width = batch * (2 if step.guided else 1), config.width
    residual = 4 * rows * step.tokens * width
    largest = 0
    for group in step.groups:
        computed = rows * group.kept * width
        visible = max(group.visible)
        attending = 2 * computed * item + 2 * rows * visible * width * item
        attending += _scores(rows, config.num_heads, group.kept, visible, computed, item, attention)
        projecting = computed * (3 * item + 2 * 4)
        feeding = computed * item + rows * group.kept * config.feed_forward_width * item
        extra = 0
        if group.kept < step.tokens:
            extra = residual + (residual if step.increments_from is not None else 0)
        elif group.keeps_increments and step.records_increments:
            extra = computed * item
        largest = max(largest, extra + max(attending, projecting, feeding))
    return 2 * residual + largest


def _scores(rows: int, heads: int, queries: int, keys: int, computed: int, item: int, attention: str) -> int:
    """What attention itself needs beside its operands: nothing in a kernel."""
    if attention == "kernel":
        return 0
    if attention == "reference":
        return 2 * 4 * rows * heads * queries * keys
    # The running sum, the scores of a chunk and their exponentials, float32; keys and values padded to whole chunks.
    return 2 * 4 * computed + 2 * 4 * rows * heads * queries * CHUNK + 2 * computed * item * keys // max(1, queries)


def text_working_set(card: ModelCard, batch: int, *, encodes: bool) -> int:
    """The temporaries of the text encoder's largest layer, float32: scores, their exponentials and bias; features."""
    config, length = card.text_encoder, card.transformer.text_length
    rows = 2 * batch
    conditioning = 4 * rows * length * (2 * config.width + 3 * card.transformer.width)
    if not encodes:
        return conditioning
    scores = 3 * 4 * batch * config.num_heads * length * length
    hidden = 4 * batch * length * (3 * config.width + max(3 * config.feed_forward_width, 0))
    return max(conditioning, hidden + scores)


def decoder_working_set(card: ModelCard, latent_grid: Grid, batch: int, strips: int) -> int:
    """The temporaries of the decoder, which are largest where a level begins at its full size.

    There its input is, float32, with the operand that the first convolution makes of it. In strips, of one picture
    after the other, only so much smaller an operand is made, and the convolution's result.
    """
    config, item = card.image_tokenizer, _item(card)
    height, across = latent_grid
    largest = 0
    for level in range(len(config.widths)):
        times = 2 ** (config.num_downsamples - level)
        cells = math.prod((height, across)) * max(1, times) ** 2
        entering = config.widths[min(level + 1, len(config.widths) - 1)]
        kept, operand = 4 * cells * entering, cells * entering * item
        if strips == 1:
            largest = max(largest, batch * (kept + operand))
        else:
            largest = max(largest, kept + (operand + cells * config.widths[level] * item) // strips)
    return largest


def image_bytes(schedule_size: Grid, batch: int) -> int:
    """Finished pictures, float32."""
    return 4 * 3 * batch * math.prod(schedule_size)


def latents_bytes(card: ModelCard, step: ScaleStep, batch: int) -> int:
    """Summed codes, the decoder's input."""
    return _latents(card, step, batch)


def _latents(card: ModelCard, step: ScaleStep, batch: int) -> int:
    return 4 * batch * math.prod(step.schedule.latent_grids[-1]) * card.transformer.latent_channels


def sampling_bytes(step: ScaleStep, batch: int) -> int:
    """Guidance and temperature of every scale, top-k and top-p, and a key per image."""
    return 4 * (2 * len(step.schedule) + 2) + 2 * np.dtype(np.uint32).itemsize * batch


def _item(card: ModelCard) -> int:
    return 4 if card.transformer.precision == "exact" else 2
