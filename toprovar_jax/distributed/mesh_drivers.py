"""Running a generation on a mesh from the host: the programs of :class:`toprovar_jax.drivers.Drivers`, in parts."""

from __future__ import annotations

import concurrent.futures
import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from toprovar_jax.acceleration.frequency import frequency_features
from toprovar_jax.acceleration.plan import GenerationPlan
from toprovar_jax.distributed.choosing import check_heads
from toprovar_jax.distributed.mesh import AXES
from toprovar_jax.distributed.parts import DATA, TENSOR, all_whole, spread_over_tensor
from toprovar_jax.distributed.rules import LOGICAL_AXES, batch_parts, copied, replicated
from toprovar_jax.distributed.spmd import over_mesh, shardings_of
from toprovar_jax.drivers import Drawn, Drivers, OnScaleEnd, Replan, TokenArrays
from toprovar_jax.generation import InfinityModel, Text, features_of
from toprovar_jax.image_tokenizer import ImageTokenizer
from toprovar_jax.memory_options import MemoryOptions
from toprovar_jax.sampling import ScaleSampling
from toprovar_jax.shapes import Array, Float, Key
from toprovar_jax.text_encoder import T5Encoder


class MeshDrivers(Drivers):
    """Runs generations on a mesh. Every process of the mesh makes the same calls, and gets all results.

    A batch is a multiple of :attr:`batch_parts`. Pictures whose policy decides for each of them on the host are made
    by every copy of the model on its own, so that none waits for another copy's; within a copy that keeps its
    parameters in parts, all go every way that one of them goes.
    """

    def __init__(self, model: InfinityModel, mesh: Mesh, *, memory: MemoryOptions):
        super().__init__(model, memory=memory)
        self.mesh = mesh
        self._tensor = mesh.shape[TENSOR]
        self._shared = any(device.process_index != jax.process_index() for device in mesh.devices.flat)
        self._copies: list[tuple[int, Drivers]] | None = None

    @property
    def batch_parts(self) -> int:
        """Into how many parts a batch is cut."""
        return batch_parts(self.mesh)

    @property
    def num_executables(self) -> int:
        """How many programs have been compiled, the copies' own included."""
        return len(self._executables) + sum(copy.num_executables for _, copy in self._copies or ())

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
        """As :meth:`Drivers.stepwise`; ``on_scale_end`` is called by every process for what it has."""
        self._check(plan)
        if plan.alternatives and self.mesh.shape[DATA] > 1:
            return self._apart(tokens, keys, sampling, plan, on_scale_end, replan)
        tokens, keys, sampling = self._placed(tokens, keys, sampling)
        drawn = super().stepwise(tokens, keys, sampling, plan, on_scale_end, replan=replan)
        return [part._replace(images=self._fetched(part.images)) for part in drawn] if self._shared else drawn

    def fused(
        self, tokens: TokenArrays, keys: Key[Array, " B"], sampling: ScaleSampling, plan: GenerationPlan
    ) -> Drawn:
        """As :meth:`Drivers.fused`."""
        self._check(plan)
        tokens, keys, sampling = self._placed(tokens, keys, sampling)
        drawn = super().fused(tokens, keys, sampling, plan)
        if not self._shared:
            return drawn
        return drawn._replace(**self._fetched({name: getattr(drawn, name) for name in ("images", "bits", "certainty")}))

    def prepare(
        self, tokens: TokenArrays, keys: Key[Array, " B"], sampling: ScaleSampling, plan: GenerationPlan
    ) -> None:
        """As :meth:`Drivers.prepare`."""
        self._check(plan)
        if plan.alternatives and self.mesh.shape[DATA] > 1:
            share = keys.shape[0] // self.mesh.shape[DATA]
            for _, copy in self._own_copies():
                copy.prepare(tokens.images(range(share)), keys[:share], sampling, plan)
            return
        tokens, keys, sampling = self._placed(tokens, keys, sampling)
        super().prepare(tokens, keys, sampling, plan)

    def _check(self, plan: GenerationPlan) -> None:
        check_heads(plan, self._tensor)

    def _placed(self, tokens: TokenArrays, keys: Any, sampling: ScaleSampling) -> tuple[Any, Any, Any]:
        rows = NamedSharding(self.mesh, PartitionSpec(LOGICAL_AXES["batch"]))
        tokens = jax.tree.map(lambda array: copied(np.asarray(array), rows), tokens)
        if isinstance(keys, jax.Array):
            keys = jax.random.wrap_key_data(copied(np.asarray(jax.random.key_data(keys)), rows))
        sampling = jax.tree.map(lambda array: copied(np.asarray(array), replicated(self.mesh)), sampling)
        return tokens, keys, sampling

    def _program(self, function: Callable[..., Any], arguments: tuple) -> Callable[..., Any]:
        return over_mesh(function, arguments, self.mesh)

    def _described(self, results: Any) -> Any:
        return shardings_of(results, self.mesh)

    def _fetched(self, tree: Any) -> Any:
        if self._shared:
            tree = jax.jit(lambda arrays: arrays, out_shardings=replicated(self.mesh))(tree)
        return jax.device_get(tree)

    def _features(self, encoder: T5Encoder | None, *arrays: Array) -> Text:
        return spread_over_tensor(lambda rows: features_of(encoder, *rows), arrays, self._tensor)

    def _frequencies(self, tokenizer: ImageTokenizer, coarse: Array) -> Array:
        return frequency_features(all_whole(tokenizer), coarse)

    def _pictures(
        self, tokenizer: ImageTokenizer, latents: Float[Array, "B h w C"], *, strips: int
    ) -> Float[Array, "B out_h out_w 3"]:
        decoder = all_whole(tokenizer)
        return spread_over_tensor(lambda rows: decoder.decode(rows, strips=strips), latents, self._tensor)

    def _taken(self, party: Any, rows: Sequence[int], batch: int) -> tuple[tuple[int, ...], tuple]:
        if self.batch_parts == 1:
            return super()._taken(party, rows, batch)
        # Pictures stay on their devices: all rows go on, of which only these count.
        state = self._run("transformer", "copy", lambda state: jax.tree.map(jnp.copy, state), (party.state,))
        return tuple(party.rows[row] for row in rows), (party.condition, state, party.keys)

    def _apart(
        self,
        tokens: TokenArrays,
        keys: Key[Array, " B"],
        sampling: ScaleSampling,
        plan: GenerationPlan,
        on_scale_end: OnScaleEnd | None,
        replan: Replan | None,
    ) -> list[Drawn]:
        """Every copy of the model makes its share, in a thread of its own."""
        share = keys.shape[0] // self.mesh.shape[DATA]
        report = None if on_scale_end is None else _one_at_a_time(on_scale_end)

        def draw(numbered: tuple[int, Drivers]) -> list[Drawn]:
            index, copy = numbered
            rows = range(index * share, (index + 1) * share)

            def named(scale: int, count: int, info: dict[str, Any]) -> None:
                if report is not None:
                    report(scale, count, info | {"images": tuple(rows[row] for row in info["images"])})

            own = (tokens.images(rows), keys[rows.start : rows.stop], sampling)
            drawn = copy.stepwise(*own, plan, None if report is None else named, replan=replan)
            return [part._replace(indices=tuple(rows[row] for row in part.indices)) for part in drawn]

        copies = self._own_copies()
        before = [dict(copy.seconds) for _, copy in copies]
        with concurrent.futures.ThreadPoolExecutor(max(1, len(copies))) as pool:
            drawn = [part for parts in pool.map(draw, copies) for part in parts]
        for name in self.seconds:
            spent = [copy.seconds[name] - was[name] for (_, copy), was in zip(copies, before, strict=True)]
            self.seconds[name] += max(spent, default=0.0)
        return _exchanged(drawn, self.mesh) if self._shared else drawn

    def _own_copies(self) -> list[tuple[int, Drivers]]:
        """The copies of the model with a device in this process, by their place on the axis ``data``."""
        if self._copies is None:
            blocks = enumerate(self.mesh.devices)
            mine = jax.process_index()
            self._copies = [
                (index, self._copy(block))
                for index, block in blocks
                if any(device.process_index == mine for device in block.flat)
            ]
        return self._copies

    def _copy(self, block: np.ndarray) -> Drivers:
        mesh = Mesh(block[None], AXES, axis_types=self.mesh.axis_types)
        transformer, image_tokenizer, text_encoder = (_on_block(network, mesh) for network in self.model)
        model = InfinityModel(transformer, image_tokenizer, text_encoder)
        if mesh.size > 1:
            return MeshDrivers(model, mesh, memory=self.memory)
        return Drivers(model, memory=self.memory)


def _on_block(network: Any, mesh: Mesh) -> Any:
    """A network as the devices of ``mesh`` have it, which hold a copy of it; nothing is moved."""

    def own(array: Any) -> Any:
        if not isinstance(array, jax.Array) or not isinstance(array.sharding, NamedSharding):
            return array
        sharding: jax.sharding.Sharding = NamedSharding(
            mesh, array.sharding.spec, memory_kind=array.sharding.memory_kind
        )
        if mesh.size == 1:
            sharding = jax.sharding.SingleDeviceSharding(mesh.devices.flat[0], memory_kind=array.sharding.memory_kind)
        parts = {shard.device: shard.data for shard in array.addressable_shards}
        owned = [parts[device] for device in mesh.devices.flat if device in parts]
        return jax.make_array_from_single_device_arrays(array.shape, sharding, owned)

    return jax.tree.map(own, network)


def _one_at_a_time(on_scale_end: OnScaleEnd) -> OnScaleEnd:
    lock = threading.Lock()

    def call(index: int, count: int, info: dict[str, Any]) -> None:
        with lock:
            on_scale_end(index, count, info)

    return call


def _exchanged(drawn: list[Drawn], mesh: Mesh) -> list[Drawn]:
    """What all processes have drawn; each picture once, though several processes may have had a part in it."""
    processes = sorted({device.process_index for device in mesh.devices.flat})
    if processes != list(range(jax.process_count())):
        raise ValueError("a mesh of several processes must be of all of them")
    packed = np.frombuffer(pickle.dumps([_on_host(part) for part in drawn]), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.asarray([packed.size], np.int32))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: packed.size] = packed
    everything = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    found: dict[tuple[int, ...], Drawn] = {}
    for row, size in zip(everything, sizes, strict=True):
        for part in pickle.loads(row[:size].tobytes()):
            found.setdefault(part.indices, part)
    return [found[indices] for indices in sorted(found)]


def _on_host(part: Drawn) -> Drawn:
    return part._replace(
        images=np.asarray(part.images),
        bits=tuple(map(np.asarray, part.bits)),
        certainty=np.asarray(part.certainty),
        statistics=jax.tree.map(np.asarray, part.statistics),
    )
