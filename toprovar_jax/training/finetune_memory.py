"""How much memory a finetuning needs, from shapes alone: nothing is loaded, compiled or placed on a device."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from toprovar_jax.image_tokenizer import ImageTokenizer
from toprovar_jax.model import Infinity
from toprovar_jax.schedule import ScaleSchedule
from toprovar_jax.text_encoder import T5Encoder
from toprovar_jax.training.finetune import Encoded, Finetuner, FinetuneState


class Part(NamedTuple):
    """One thing that is held in memory while training; ``numbers`` counts parameters, 0 where it holds none."""

    name: str
    numbers: int
    bytes: int


def memory_parts(
    finetuner: Finetuner, schedule: ScaleSchedule, *, batch_size: int, text_length: int
) -> tuple[Part, ...]:
    """What is held at the end of a forward pass, when memory is fullest, part by part.

    Activations are those that the backward pass is given by the forward pass on this machine's kind of device, each
    counted once; what a single layer needs besides, and what the compiler adds or spares, is not in it.
    """
    card, config = finetuner.card, finetuner.config
    fast = card.transformer.precision == "fast"
    transformer = nnx.eval_shape(lambda: Infinity(card.transformer, rngs=nnx.Rngs(0)))
    text_encoder = nnx.eval_shape(lambda: T5Encoder(card.text_encoder, rngs=nnx.Rngs(0)))
    image_tokenizer = nnx.eval_shape(lambda: ImageTokenizer(card.image_tokenizer, rngs=nnx.Rngs(0)))
    if config.rank is not None and fast:
        transformer = _halved(transformer, inside="layers")
    state: Any = jax.eval_shape(finetuner.init, transformer)
    trained = Part("trained parameters (float32)", _count(state.trained), _bytes(state.trained))
    frozen = [] if config.rank is None else [_part("transformer (frozen)", transformer)]
    for name, network in (("text encoder (frozen)", text_encoder), ("image tokenizer (frozen)", image_tokenizer)):
        frozen.append(_part(name, _halved(network) if fast else network))
    base = None if config.rank is None else transformer
    kept = kept_activations(finetuner, state, base, schedule, batch_size=batch_size, text_length=text_length)
    average = [] if state.average is None else [Part("averaged parameters", 0, _bytes(state.average))]
    parts = [*frozen, trained, *average, Part("gradients", 0, trained.bytes)]
    optimizer = Part("optimiser state", 0, _bytes(state.optimizer))
    return (*parts, optimizer, Part(f"activations, batch {batch_size}", 0, kept))


def kept_activations(
    finetuner: Finetuner,
    state: FinetuneState,
    base: Infinity | None,
    schedule: ScaleSchedule,
    *,
    batch_size: int,
    text_length: int,
) -> int:
    """Bytes that the forward pass keeps for the backward pass, parameters left out; arrays or their shapes will do."""
    card = finetuner.card
    latents: Any = jax.ShapeDtypeStruct(
        (batch_size, *schedule.latent_grids[-1], card.transformer.latent_channels), jnp.float32
    )
    features: Any = jax.ShapeDtypeStruct((batch_size, text_length, card.transformer.text_width), jnp.float32)
    lengths: Any = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    batch = Encoded(latents, features, lengths)
    key = jax.eval_shape(lambda: jax.random.key(0))

    def backward(trained, base, batch, key):
        # What a backward pass holds on to are the leaves of the function that computes it.
        return jax.vjp(lambda trained: finetuner.loss(trained, base, batch, key, schedule)[0], trained)[1]

    traced: Any = jax.make_jaxpr(backward)(state.trained, base, batch, key).jaxpr
    given = set(map(id, (*traced.invars, *traced.constvars)))
    made = {id(variable): variable.aval for variable in traced.outvars if id(variable) not in given}
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in made.values())


def memory_table(parts: tuple[Part, ...]) -> str:
    """The parts and their sum, for people."""
    lines = [f"{'part':<28}  {'parameters':>14}  {'GiB':>8}"]
    lines += [
        f"{part.name:<28}  {f'{part.numbers:,}' if part.numbers else '':>14}  {part.bytes / 2**30:>8.3f}"
        for part in parts
    ]
    return "\n".join([*lines, f"{'sum':<28}  {'':>14}  {sum(part.bytes for part in parts) / 2**30:>8.3f}"])


def _halved(network: Any, inside: str = "") -> Any:
    """Matrices as bfloat16, as they are loaded for ``fast``: all, or those of the part named ``inside``."""

    def halve(path, leaf):
        matrix = len(leaf.shape) >= 2 and ("kernel" in jax.tree_util.keystr(path) or not inside)
        return (
            jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16) if matrix and inside in jax.tree_util.keystr(path) else leaf
        )

    return jax.tree_util.tree_map_with_path(halve, network)


def _part(name: str, tree: Any) -> Part:
    return Part(name, _count(tree), _bytes(tree))


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
