"""The programs of one generation on a mesh, compiled ahead of time: for chips that are only described, nothing is run.

They are traced by the very code that runs them, :class:`~toprovar_jax.distributed.mesh_drivers.MeshDrivers`, from
descriptions of the parameters as they would be placed.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Hashable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from convert.dtypes import fast_dtype
from toprovar_jax.acceleration.plan import GenerationPlan
from toprovar_jax.distributed.collectives import Collective, collectives_of
from toprovar_jax.distributed.mesh_drivers import MeshDrivers
from toprovar_jax.distributed.parts import TENSOR
from toprovar_jax.distributed.rules import ParameterShardings
from toprovar_jax.distributed.spmd import shardings_of
from toprovar_jax.drivers import TokenArrays
from toprovar_jax.generation import InfinityModel
from toprovar_jax.image_tokenizer import ImageTokenizer
from toprovar_jax.memory_options import ON_DEVICE, MemoryOptions
from toprovar_jax.model import Infinity
from toprovar_jax.model_card import ModelCard
from toprovar_jax.placement import Placement, describe
from toprovar_jax.sampling import Sampling
from toprovar_jax.text_encoder import T5Encoder


@dataclasses.dataclass(frozen=True)
class ProgramFacts:
    """What a compiled program takes of each chip.

    Attributes:
      name: which program.
      arguments, outputs, reused, temporaries: bytes; ``reused`` are outputs that take the place of arguments.
      flops: operations outside of kernels and, as the compiler counts, of one round of each loop.
      collectives: what the chips exchange.
      beside: what else lies on each chip while it runs, parameters that it does not read among it.
    """

    name: str
    arguments: int
    outputs: int
    reused: int
    temporaries: int
    flops: float
    collectives: tuple[Collective, ...]
    beside: int = 0

    @property
    def memory(self) -> int:
        """Bytes of the program on each chip; what is donated counts once."""
        return self.arguments + self.outputs - self.reused + self.temporaries

    @property
    def peak(self) -> int:
        """All of the chip."""
        return self.memory + self.beside


class PodPrograms(MeshDrivers):
    """The programs of one generation, traced for a mesh whose devices need not be there.

    Args:
      card: the model with its precision.
      plan: without alternatives; see :func:`toprovar_jax.distributed.pod_plan.slowest_way`.
      mesh: with the axes ``data``, ``fsdp`` and ``tensor``.
      batch: pictures of each copy of the model, of which ``data`` times ``fsdp`` are made at once.
      memory: what stays off the devices.
    """

    def __init__(
        self, card: ModelCard, plan: GenerationPlan, mesh: Mesh, *, batch: int, memory: MemoryOptions = ON_DEVICE
    ):
        if plan.alternatives:
            raise ValueError("a plan with alternatives is several: trace one of them")
        card = card.with_tensor_parts(mesh.shape[TENSOR])
        super().__init__(described_model(card, mesh, memory), mesh, memory=memory)
        self._traced: dict[str, jax.stages.Traced] = {}
        self._there: dict[str, int] = {}
        rows = batch * self.batch_parts
        ids = np.zeros((rows, card.transformer.text_length), np.int32)
        tokens = TokenArrays(ids, np.ones(rows, np.int32))
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
        sampling = jax.eval_shape(lambda: Sampling().for_scales(len(plan.schedule)))
        self._check(plan)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            tokens, keys, sampling = shardings_of((tokens, keys, sampling), mesh)
            self._compile_pieces(tokens, keys, sampling, plan)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all programs in the order in which they run, as :func:`toprovar_jax.memory.predict` names them."""
        return tuple(self._traced)

    def compile(self, name: str) -> jax.stages.Compiled:
        """The program of one of :attr:`names`."""
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh), warnings.catch_warnings():
            # The state is donated for its cache; its maps and inputs have another size at every scale.
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")
            return self._traced[name].lower().compile()

    def facts(self, name: str) -> ProgramFacts:
        """What the program of one of :attr:`names` takes."""
        found = facts_of(name, self.compile(name))
        return dataclasses.replace(found, beside=max(0, self._there[name] - found.arguments))

    def _compiled(
        self, kind: Hashable, function: Any, arguments: tuple, *, donate: tuple[int, ...] = (), **static: Any
    ) -> tuple[Any, Any]:
        given = [argument for argument in arguments if not isinstance(argument, nnx.Module | InfinityModel)]
        name, result = super()._compiled(kind, function, arguments, donate=donate, **static)
        # All parameters stay where they are, read or not; but for what is lent to texts and has no place of its own.
        stays = [leaf for leaf in jax.tree.leaves(self.model) if leaf.sharding is not None]
        lent = [leaf for leaf in jax.tree.leaves(arguments) if leaf.sharding is None and name.startswith("text")]
        self._there[name] = sum(map(_bytes_on_chip, (*stays, *lent, *jax.tree.leaves(given))))
        if name == "text":
            self._text_bytes = sum(map(_bytes_on_chip, jax.tree.leaves(result)))
        elif name == "decoder":
            self._there[name] += self._text_bytes
        return name, result

    def _made(self, key: tuple, traced: jax.stages.Traced) -> str:
        name = _name(key)
        self._traced[name] = traced
        return name


def described_model(card: ModelCard, mesh: Mesh, memory: MemoryOptions) -> InfinityModel:
    """The networks as they would be loaded on ``mesh``, as descriptions; nothing is allocated.

    Args:
      card: with its precision and as many tensor parts as the mesh has.
      mesh: with the axes ``data``, ``fsdp`` and ``tensor``.
      memory: what stays off the devices.
    """
    builds = {
        "transformer": lambda: Infinity(card.transformer, rngs=nnx.Rngs(0)),
        "image_tokenizer": lambda: ImageTokenizer(card.image_tokenizer, rngs=nnx.Rngs(0), with_encoder=False),
        "text_encoder": lambda: T5Encoder(card.text_encoder, rngs=nnx.Rngs(0)),
    }
    fast = card.transformer.precision == "fast"

    def network(name: str) -> Any:
        def dtype(path: str) -> np.dtype:
            return fast_dtype(name, path) if fast else np.dtype(np.float32)

        placement = Placement(name, ParameterShardings(mesh), memory)
        return describe(nnx.eval_shape(builds[name]), placement, dtype)

    return InfinityModel(*map(network, InfinityModel._fields))


def facts_of(name: str, compiled: jax.stages.Compiled) -> ProgramFacts:
    """What a compiled program says of itself."""
    analysis: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis() or {}
    return ProgramFacts(
        name,
        analysis.argument_size_in_bytes,
        analysis.output_size_in_bytes,
        analysis.alias_size_in_bytes,
        analysis.temp_size_in_bytes,
        float(cost.get("flops", 0.0)),
        collectives_of(compiled.as_text() or ""),
    )


def _name(key: tuple) -> str:
    """From a key of the drivers' executables to a name of the memory report's phases."""
    kind, _, static = key
    if kind == "scale":
        step = dict(static)["step"]
        return f"scale {step.scale + 1} ({step.grid[0]}x{step.grid[1]})"
    if isinstance(kind, tuple):
        return "text"
    return {"encode": "text encoder", "decode": "decoder"}.get(kind, str(kind))


def _bytes_on_chip(leaf: Any) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize
