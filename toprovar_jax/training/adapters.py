"""Low-rank adapters: a few trained numbers beside frozen linear maps (LoRA, Hu et al. 2021, arXiv 2106.09685).

A kernel ``W`` becomes ``W + alpha / r * down @ up`` with ``down [in, r]`` random and ``up [r, out]`` zero at the start.
While training, the two factors are a path of their own beside the frozen map, instead of being added to it: a merged
kernel, and worse its gradient, would be as large as all the kernels together, whereas the path costs ``r`` numbers per
token and layer, and the backward pass then never forms a gradient of ``W``. For use they are merged once.
"""

from __future__ import annotations

import fnmatch
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx

from convert import infinity as infinity_table
from convert.safetensors_io import open_safetensors, save_safetensors
from toprovar_jax.config import InfinityConfig
from toprovar_jax.errors import UserInputError
from toprovar_jax.model import Infinity
from toprovar_jax.model.layers import Linear, matmul
from toprovar_jax.shapes import Array, Float, Key

ATTENTION = ("*attention.*",)
"""Patterns of the projections of self- and cross-attention, which is what the paper adapts."""

LINEAR_LAYERS = (
    *("self_attention.qkv", "self_attention.out"),
    *("cross_attention.query", "cross_attention.key_value", "cross_attention.out"),
    *("feed_forward.up", "feed_forward.down"),
)
"""The blocks' linear maps, which is what can be adapted."""

_FORMAT = "toprovar_jax lora 1"


class LowRank(NamedTuple):
    """The factors of one linear map of all layers; the added kernel is their product times a scale."""

    down: Float[Array, "L fan_in rank"]
    up: Float[Array, "L rank fan_out"]


Adapters = dict[str, LowRank]
"""By the name of the map in :data:`LINEAR_LAYERS`; a pytree."""


class AdaptedLinear(nnx.Module):
    """A linear map and the low-rank path beside it; takes the map's place in a block."""

    def __init__(self, base: Linear, factors: LowRank, scale: float):
        self.base, self.scale = base, scale
        self.down, self.up = nnx.Param(factors.down), nnx.Param(factors.up)

    def __call__(
        self, x: Float[Array, "*rows fan_in"], summed: Callable[[Array], Array] | None = None
    ) -> Float[Array, "*out_rows fan_out"]:
        """Apply both, in the base's precision; ``summed`` as in :meth:`toprovar_jax.model.layers.Linear.__call__`."""
        precision = self.base.precision
        added = self.scale * matmul(matmul(x, self.down[...], precision), self.up[...], precision)
        return self.base(x, summed) + (added if summed is None else summed(added))


def chosen_layers(patterns: Sequence[str]) -> tuple[str, ...]:
    """The linear maps whose names match one of the shell-style ``patterns``.

    Raises:
      UserInputError: a pattern that matches none.
    """
    for pattern in patterns:
        if not fnmatch.filter(LINEAR_LAYERS, pattern):
            raise UserInputError(
                f"adapters for {pattern!r}", f"must match one of {', '.join(LINEAR_LAYERS)}", "such as feed_forward.*"
            )
    return tuple(name for name in LINEAR_LAYERS if any(fnmatch.fnmatchcase(name, p) for p in patterns))


def init_adapters(
    config: InfinityConfig, key: Key[Array, ""], *, rank: int, patterns: Sequence[str] = ATTENTION
) -> Adapters:
    """Adapters that change nothing yet; float32.

    Args:
      config: the transformer.
      key: what ``down`` is drawn from: normal with variance ``1 / in``, so that its outputs are as large as its inputs
        (our choice: the paper says Gaussian, without its size).
      rank: of the added kernels.
      patterns: see :func:`chosen_layers`.

    Raises:
      UserInputError: a rank outside 1 to the width, or patterns that match nothing.
    """
    if not 1 <= rank <= config.width:
        raise UserInputError(f"rank {rank}", f"must be 1 to the model's width, {config.width}", "16 is usual")
    adapters = {}
    for number, name in enumerate(chosen_layers(patterns)):
        width_in, width_out = _widths(config)[name]
        shape = (config.num_layers, width_in, rank)
        down = jax.random.normal(jax.random.fold_in(key, number), shape, jnp.float32) / math.sqrt(width_in)
        adapters[name] = LowRank(down, jnp.zeros((config.num_layers, rank, width_out), jnp.float32))
    return adapters


def _widths(config: InfinityConfig) -> dict[str, tuple[int, int]]:
    width, hidden = config.width, config.feed_forward_width
    shapes = ((width, 3 * width), (width, width), (width, width), (width, 2 * width), (width, width))
    return dict(zip(LINEAR_LAYERS, (*shapes, (width, hidden), (hidden, width)), strict=True))


def adapt(transformer: Infinity, adapters: Adapters, scale: float) -> Infinity:
    """The transformer with the low-rank paths beside its maps; the given one stays as it is.

    Args:
      transformer: the frozen base.
      adapters: of the same depth and widths.
      scale: ``alpha / rank``.
    """
    adapted = nnx.clone(transformer)
    for name, factors in adapters.items():
        owner, last = _owner(adapted, name)
        setattr(owner, last, AdaptedLinear(getattr(owner, last), factors, scale))
    return adapted


def merge(transformer: Infinity, adapters: Adapters, scale: float) -> Infinity:
    """A plain transformer that computes what the adapted one does, within the rounding of its kernels' dtype."""
    merged = nnx.clone(transformer)
    for name, factors in adapters.items():
        owner, last = _owner(merged, name)
        linear = getattr(owner, last)
        linear.kernel = nnx.Param(_merged(linear.kernel[...], factors, scale))
    return merged


@functools.partial(jax.jit, static_argnames="scale")
def _merged(kernel: Float[Array, "L fan_in fan_out"], factors: LowRank, scale: float) -> Array:
    added = jnp.einsum("lir,lro->lio", *factors, precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + scale * added).astype(kernel.dtype)


def _owner(transformer: Infinity, name: str) -> tuple[Any, str]:
    *path, last = name.split(".")
    return functools.reduce(getattr, path, cast(Any, transformer.layers)), last


def save_adapters(
    path: Path, adapters: Adapters, config: InfinityConfig, *, alpha: float, base: str, base_sha256: str
) -> None:
    """Write a safetensors file with the names that diffusers and peft use for LoRA.

    ``transformer.<official layer name>.lora_A.weight`` has shape ``[rank, in]`` and ``lora_B.weight`` ``[out, rank]``.

    Args:
      path: the file; it appears whole or not at all.
      adapters: what to write.
      config: the transformer, which fixes the official names.
      alpha: the scale is ``alpha / rank``.
      base: name of the model that was adapted.
      base_sha256: of the file with its transformer.
    """
    ranks = {factors.down.shape[-1] for factors in adapters.values()}
    tensors = {}
    for name, factors in adapters.items():
        for layer, official in enumerate(_official_names(config, name)):
            tensors[f"{official}.lora_A.weight"] = np.ascontiguousarray(np.asarray(factors.down[layer]).T)
            tensors[f"{official}.lora_B.weight"] = np.ascontiguousarray(np.asarray(factors.up[layer]).T)
    metadata = {"format": _FORMAT, "rank": str(ranks.pop()), "alpha": str(alpha)}
    save_safetensors(path, tensors, metadata | {"base_model": base, "base_sha256": base_sha256})


def load_adapters(path: Path, config: InfinityConfig, *, base_sha256: str | None = None) -> tuple[Adapters, float]:
    """What :func:`save_adapters` wrote, and its scale.

    Args:
      path: the file.
      config: the transformer that they are for.
      base_sha256: of the file with that transformer; None takes adapters of any base of the same shape.

    Raises:
      UserInputError: not such a file, or adapters of another model.
    """
    readers = open_safetensors(path)
    with safetensors.safe_open(str(path), framework="np") as opened:
        metadata = opened.metadata() or {}
    if metadata.get("format") != _FORMAT:
        raise UserInputError(f"file {path}", "holds no adapters written by this program", "take another")
    if base_sha256 not in (None, metadata["base_sha256"]):
        raise UserInputError(
            f"file {path}",
            f"was trained beside other weights (of model {metadata['base_model']})",
            "load it with the model it was made from",
        )
    adapters, known = {}, set()
    for name in LINEAR_LAYERS:
        names = [tuple(f"{official}.lora_{half}.weight" for half in "AB") for official in _official_names(config, name)]
        if names[0][0] in readers:
            known.update(*names)
            missing = sorted(tensor for pair in names for tensor in pair if tensor not in readers)
            shapes = [tuple(readers[tensor]().shape) for pair in names for tensor in pair if tensor in readers]
            width_in, width_out = _widths(config)[name]
            rank = int(metadata["rank"])
            if missing or shapes != [(rank, width_in), (width_out, rank)] * config.num_layers:
                raise _does_not_fit(path)
            down, up = (np.stack([readers[pair[half]]().T for pair in names]) for half in range(2))
            adapters[name] = LowRank(jnp.asarray(down), jnp.asarray(up))
    if known != readers.keys():
        raise _does_not_fit(path)
    return adapters, float(metadata["alpha"]) / int(metadata["rank"])


def _does_not_fit(path: Path) -> UserInputError:
    return UserInputError(
        f"file {path}", "does not fit the model's layers and widths", "load it with the model it was made from"
    )


def _official_names(config: InfinityConfig, name: str) -> list[str]:
    """One per layer, without the ``.weight`` at its end."""
    rules = infinity_table.rules(config)
    own = {rule.layer: rule.official for rule in rules if rule.target == f"layers.{name}.kernel"}
    return [f"transformer.{own[layer].removesuffix('.weight')}" for layer in range(config.num_layers)]
