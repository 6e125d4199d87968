"""Attention with entropy on Hopper (sm_90): the kernel, warp-specialised.

A block of threads is one memory warpgroup and a few compute warpgroups. The memory warpgroup copies tiles of queries,
keys and values into shared memory with the tensor memory accelerator; every compute warpgroup owns ``query_tile`` rows
of queries and multiplies on the tensor cores. Keys and values pass through a ring of ``stages`` slots.

Synchronisation (arrivals per phase in brackets; an arrival is a whole warpgroup):

- ``q_full`` [one per copy], ``q_empty`` [compute warpgroups]: the query tile, released after its last product, or,
  where its memory also takes the output, when that has been read back out.
- ``k_full``, ``v_full`` [one per copy] and ``k_empty``, ``v_empty`` [compute warpgroups], one of each per slot.
- ``turn`` [2]: schedule ``pingpong``. Both compute warpgroups meet twice per tile of keys, half a tile apart, so that
  one multiplies while the other takes exponentials.
- ``order`` [1], one per compute warpgroup: schedule ``overlap_pingpong``. A warpgroup waits for its own before it
  issues its products and then arrives at the other's; the first one's is arrived at once before the start, and waited
  for once after the end.
- ``tail_full`` [one per copy]: the memory warpgroup's own, for a tile of values whose invisible rows it clears.

Compute warpgroups release every slot once before they start, and once per fill after that; the memory warpgroup waits
for one release before every fill, and for the ones left over at the end. So every phase of every barrier is waited for
exactly once by each of its waiters, whatever the number of fills, and nothing is fetched that is not used. All roles
derive the number of fills from the same expression. The compute warpgroups' phases of ``turn`` are equal in number too:
two per tile of keys, and one more per tile of queries, for the second at its start and for the first at its end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.constants import LOG2_E
from pallas_kernels.attention.mosaic_gpu_rows import Rows, finish_rows, softmax_tile, spread
from pallas_kernels.attention.reference import MASKED

# Where 64-bit types are enabled, a Python number handed to a function of JAX is 64 bits wide.
int32 = np.int32
Accumulator = plgpu.WGMMAAccumulatorRef
Hook = Callable[[], None]

ROWS = 64
"""Rows of one tensor-core instruction of a warpgroup."""
CHUNK = 64
"""Columns of one 128-byte swizzle atom of 16-bit values: the unit in which the head dimension is stored."""

REGISTERS = {2: (232, 40), 3: (160, 32)}
"""Registers per thread of a compute and of the memory warpgroup, by the number of compute warpgroups. Together they
must not exceed what the block was started with, 168 each for three warpgroups and 128 each for four: asking for more
waits forever. One compute warpgroup has what it needs from the start."""


@dataclass(frozen=True)
class Launch:
    """Everything static about one launch.

    Attributes:
      batch: batch rows.
      heads: heads.
      num_queries: query tokens.
      num_keys: key tokens.
      head_dim: head dimension.
      scale: factor on the dot products.
      query_tile: rows of queries per compute warpgroup.
      key_tile: keys per slot of the ring.
      stages: slots of the ring.
      compute_warpgroups: warpgroups that multiply.
      schedule: see MosaicGpuConfig.
      blocks: blocks of the grid; a block walks over the tiles with this stride.
      with_entropy: whether the entropy is computed.
      ragged: whether an operand holds the number of visible keys per batch row.
      table_width: columns of the table of visited key tiles; 0 without a block mask.
      output_apart: whether the output has shared memory of its own, so that the next queries come in beside it.
    """

    batch: int
    heads: int
    num_queries: int
    num_keys: int
    head_dim: int
    scale: float
    query_tile: int
    key_tile: int
    stages: int
    compute_warpgroups: int
    schedule: str
    blocks: int
    with_entropy: bool
    ragged: bool
    table_width: int
    output_apart: bool

    @property
    def chunks(self) -> int:
        """Swizzle atoms per row."""
        return pl.cdiv(self.head_dim, CHUNK)

    @property
    def block_queries(self) -> int:
        """Rows of queries per block."""
        return self.query_tile * self.compute_warpgroups

    @property
    def query_tiles(self) -> int:
        """Tiles of queries per head."""
        return pl.cdiv(self.num_queries, self.block_queries)

    @property
    def tiles(self) -> int:
        """Tiles of queries in all."""
        return self.batch * self.heads * self.query_tiles

    @property
    def has_tail(self) -> bool:
        """Whether a tile of keys can be visible in part."""
        return self.ragged or self.num_keys % self.key_tile != 0

    def next_slot(self, slot: jax.Array) -> jax.Array:
        """The slot of the ring after this one; carried along, since a remainder costs more."""
        return jnp.where(slot == self.stages - 1, int32(0), slot + 1)

    def previous_slot(self, slot: jax.Array) -> jax.Array:
        """The slot of the ring before this one."""
        return jnp.where(slot == 0, int32(self.stages - 1), slot - 1)

    def over(self, blocks: int) -> Launch:
        """The same on a grid of this many blocks."""
        return replace(self, blocks=blocks)


def buffer(slots: int, launch: Launch, rows: int, dtype: Any) -> Any:
    """Shared memory for ``slots`` tiles of ``rows`` rows, in pieces of ``CHUNK`` columns.

    The groups of eight rows are spelled out instead of left to a tiling transform, which would ask for a number of rows
    in global memory that is a multiple of eight; this way any row and any column may be the last.
    """
    shape = (slots, launch.chunks, rows // 8, 1, 8, CHUNK)
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.SwizzleTransform(128),))


def zeros(rows: int, columns: int) -> jax.Array:
    """Float32 zeros as the tensor cores hold an accumulator."""
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), plgpu.Layout.WGMMA)


def plain(piece: Any) -> Any:
    """A piece of shared memory ``[rows / 8, 1, 8, CHUNK]`` as the copy engine sees it, ``[rows, CHUNK]``."""
    return piece.reshape(piece.shape[0] * 8, CHUNK)


def matrix(piece: Any) -> Any:
    """The same piece as a matrix ``[rows, CHUNK]`` of the tensor cores, made of groups of eight rows."""
    return type(piece)(piece.ref, (*piece.transforms, plgpu.TilingTransform((8, CHUNK)).undo(piece.type)))


def block_of_rows(piece: Any, index: jax.Array) -> Any:
    """Rows ``ROWS * index`` to ``ROWS * (index + 1)`` of a piece, as a matrix."""
    return matrix(piece.at[pl.ds(index * (ROWS // 8), ROWS // 8)])


def scores(q: Any, k: Any, launch: Launch, issued: Hook) -> jax.Array:
    """Dot products ``[query_tile, key_tile]`` of the chunks in shared memory; calls ``issued`` while they run."""

    def multiply(products):
        for chunk in range(launch.chunks):
            plgpu.wgmma(products, matrix(q.at[chunk]), matrix(k.at[chunk]).transpose((1, 0)))
        issued()
        return products[...]

    return pl.run_scoped(multiply, Accumulator((launch.query_tile, launch.key_tile), jnp.float32))


def add_values(out: jax.Array, weights: jax.Array, v: Any, launch: Launch, issued: Hook) -> jax.Array:
    """``out + weights @ v`` with the weights in registers; calls ``issued`` while they run."""

    def multiply(accumulator):
        for chunk in range(launch.chunks):
            columns = pl.ds(chunk * CHUNK, CHUNK)
            plgpu.wgmma(accumulator.at[:, columns], weights, matrix(v.at[chunk]))
        issued()

    return cast(jax.Array, pl.run_state(multiply)(Accumulator.init(out)))


def scores_beside_values(
    q: Any,
    k: Any,
    v: Any,
    launch: Launch,
    state: tuple,
    before_values: Hook,
    issued: Hook,
    take_in: Callable,
    after: Hook,
) -> tuple:
    """``(out + weights @ v, take_in(q @ k.T))``; the values are still being multiplied while ``take_in`` runs.

    ``state`` is ``(out, weights, results)``, the last of the structure that ``take_in`` returns. ``before_values`` is
    called before the values are touched, ``issued`` when all products are on their way, ``after`` after ``take_in``; it
    must contain a wait, past which the compiler does not move ``take_in``.
    """
    out, weights, results = state

    def multiply(refs):
        accumulator, products, results = refs
        for chunk in range(launch.chunks):
            plgpu.wgmma(products, matrix(q.at[chunk]), matrix(k.at[chunk]).transpose((1, 0)))
        before_values()
        for chunk in range(launch.chunks):
            plgpu.wgmma(accumulator.at[:, pl.ds(chunk * CHUNK, CHUNK)], weights, matrix(v.at[chunk]))
        issued()
        # One group of instructions per chunk: all that is left in flight after this are the values.
        taken = take_in(plgpu.wgmma_accumulator_load(products, wait_n=launch.chunks))
        for ref, value in zip(results, lax.optimization_barrier(taken), strict=True):
            ref[...] = value
        after()

    products = zeros(launch.query_tile, launch.key_tile)
    accumulators = (Accumulator.init(out), Accumulator.init(products))
    out, _, results = pl.run_state(multiply)((*accumulators, results))
    return out, results


def attention_sm90(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    limits: jax.Array | None,
    visits: jax.Array | None,
    table: jax.Array | None,
    launch: Launch,
) -> tuple[jax.Array, ...]:
    """Runs the kernel.

    Args:
      q: ``[B, T, N, H]``.
      k: ``[B, S, N, H]``.
      v: ``[B, S, N, H]``.
      limits: visible keys of every batch row, int32 ``[B]`` in ``[0, S]``; given if ``launch.ragged``.
      visits: key tiles visited per batch row and block of queries, int32 ``[B * query tiles]``; given with ``table``.
      table: the key tiles that a block of queries visits, ascending, int32 ``[query tiles * table_width]``.
      launch: everything static.

    Returns:
      ``out [B, T, N, H]``, log-sum-exp and, if asked for, entropy, ``[B, N, T rounded up to 4]`` float32.
    """
    stages, wgs = launch.stages, launch.compute_warpgroups
    statistics = plgpu.SMEM((wgs, launch.query_tile), jnp.float32)
    scratch = {
        "q_smem": buffer(wgs, launch, launch.query_tile, q.dtype),
        "k_smem": buffer(stages, launch, launch.key_tile, q.dtype),
        "v_smem": buffer(stages, launch, launch.key_tile, q.dtype),
        "lse_smem": statistics,
        "q_full": plgpu.Barrier(num_arrivals=wgs * launch.chunks),
        "q_empty": plgpu.Barrier(num_arrivals=wgs),
        "k_full": plgpu.Barrier(num_arrivals=launch.chunks, num_barriers=stages),
        "v_full": plgpu.Barrier(num_arrivals=launch.chunks, num_barriers=stages),
        "k_empty": plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
        "v_empty": plgpu.Barrier(num_arrivals=wgs, num_barriers=stages),
    }
    if launch.output_apart:
        scratch["out_smem"] = buffer(wgs, launch, launch.query_tile, q.dtype)
    if launch.with_entropy:
        scratch["entropy_smem"] = statistics
    if launch.ragged:
        scratch["tail_full"] = plgpu.Barrier(num_arrivals=launch.chunks)
    if launch.schedule == "pingpong":
        scratch["turn"] = plgpu.Barrier(num_arrivals=wgs)
    if launch.schedule == "overlap_pingpong":
        scratch["order"] = plgpu.Barrier(num_barriers=wgs)
    rounded = pl.cdiv(launch.num_queries, 4) * 4
    row_type = jax.ShapeDtypeStruct((launch.batch, launch.heads, rounded), jnp.float32)
    operands = tuple(x for x in (q, k, v, limits, visits, table) if x is not None)

    def body(*refs, **scratch):
        names = ["q", "k", "v"] + ["limits"] * launch.ragged + ["visits", "table"] * bool(launch.table_width)
        names += ["out", "lse"] + ["entropy"] * launch.with_entropy
        memory = dict(zip(names, refs, strict=True)) | scratch
        warpgroup = lax.axis_index("warpgroup")
        # One branch with two sides: nothing that only one role needs is kept in registers while the other runs.
        lax.cond(warpgroup < wgs, lambda: _compute(warpgroup, launch, memory), lambda: _copy(launch, memory))

    return plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct(q.shape, v.dtype), row_type) + (row_type,) * launch.with_entropy,
        scratch_types=scratch,
        grid=(launch.blocks,),
        grid_names=("block",),
        num_threads=wgs + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane, reduction_scratch_bytes=0
        ),
    )(*operands)


class Tile(NamedTuple):
    """One tile of queries: where it lies and which key tiles it visits.

    Attributes:
      batch: batch row.
      head: head.
      query: first row of queries.
      limit: keys visible to this batch row.
      full: visited key tiles that are visible as a whole.
      visits: visited key tiles; the last may be visible in part.
      row: start of this tile's row in the table of visited tiles.
    """

    batch: jax.Array
    head: jax.Array
    query: jax.Array
    limit: jax.Array | int
    full: jax.Array | np.int32
    visits: jax.Array | np.int32
    row: jax.Array | int


def _tile(index: jax.Array, launch: Launch, memory: dict) -> Tile:
    """The tile of queries with this index; the tiles of a head follow each other, so that they share its keys in L2."""
    query_tiles, heads = int32(launch.query_tiles), int32(launch.heads)
    query_tile, rest = lax.rem(index, query_tiles), lax.div(index, query_tiles)
    head, batch = lax.rem(rest, heads), lax.div(rest, heads)
    limit = memory["limits"][batch] if launch.ragged else launch.num_keys
    if launch.table_width:
        visits = memory["visits"][batch * launch.query_tiles + query_tile]
        row = query_tile * launch.table_width
        last = memory["table"][row + jnp.maximum(visits - 1, int32(0))]
        partial = (visits > 0) & ((last + 1) * launch.key_tile > limit)
        full = visits - partial.astype(jnp.int32)
    else:
        row, size = 0, int32(launch.key_tile)
        full, visits = int32(launch.num_keys // launch.key_tile), int32(pl.cdiv(launch.num_keys, launch.key_tile))
        if launch.ragged:
            full, visits = lax.div(limit, size), lax.div(limit + (size - 1), size)
    return Tile(batch, head, query_tile * launch.block_queries, limit, full, visits, row)


def _key_start(visit: jax.Array, tile: Tile, launch: Launch, memory: dict) -> jax.Array:
    index = memory["table"][tile.row + visit] if launch.table_width else visit
    return index * launch.key_tile


def _for_each_tile(launch: Launch, memory: dict, visit, carry: jax.Array) -> None:
    """``carry = visit(tile, carry)`` for the tiles of this block."""
    block = lax.axis_index("block")
    if launch.blocks == launch.tiles:
        visit(_tile(block, launch, memory), carry)
        return
    count = lax.div(launch.tiles - block + launch.blocks - 1, int32(launch.blocks))
    lax.fori_loop(
        int32(0), count, lambda i, carry: visit(_tile(block + i * launch.blocks, launch, memory), carry), carry
    )


def _for_each_key_tile(start: jax.Array | int, tile: Tile, launch: Launch, step, carry):
    """``step(visit, carry, partial)`` for the visited key tiles from ``start`` on; only the last can be partial."""
    start = jnp.asarray(start, jnp.int32)
    whole = jnp.maximum(start, tile.full)
    carry = lax.fori_loop(start, whole, lambda i, carry: step(i, carry, False), carry)
    if launch.has_tail:
        carry = lax.fori_loop(whole, tile.visits, lambda i, carry: step(i, carry, True), carry)
    return carry


def _copy(launch: Launch, memory: dict) -> None:
    """The memory warpgroup."""
    if launch.compute_warpgroups in REGISTERS:
        plgpu.set_max_registers(REGISTERS[launch.compute_warpgroups][1], action="decrease")
    stages = launch.stages

    def copy(source, destination, barrier):
        # The start of a chunk is made a traced value: the last chunk may reach past the head dimension, where the copy
        # engine fills in zeros, as it does past the last row.
        def chunk(i, _):
            plgpu.copy_gmem_to_smem(source.at[:, pl.ds(i * CHUNK, CHUNK)], plain(destination.at[i]), barrier)

        lax.fori_loop(int32(0), int32(launch.chunks), chunk, None)

    def rows(name, tile, start, size):
        return memory[name].at[tile.batch, pl.ds(start, size), tile.head]

    def visit_tile(tile: Tile, slot):
        plgpu.barrier_wait(memory["q_empty"])
        for wg in range(launch.compute_warpgroups):
            source = rows("q", tile, tile.query + wg * launch.query_tile, launch.query_tile)
            copy(source, memory["q_smem"].at[wg], memory["q_full"])

        def fill(visit, slot, partial):
            start = _key_start(visit, tile, launch, memory)
            plgpu.barrier_wait(memory["k_empty"].at[slot])
            copy(rows("k", tile, start, launch.key_tile), memory["k_smem"].at[slot], memory["k_full"].at[slot])
            plgpu.barrier_wait(memory["v_empty"].at[slot])
            values, target = rows("v", tile, start, launch.key_tile), memory["v_smem"].at[slot]
            if partial and launch.ragged:
                copy(values, target, memory["tail_full"])
                plgpu.barrier_wait(memory["tail_full"])
                _clear_rows(target, tile.limit - start, launch)
                plgpu.commit_smem()
                for _ in range(launch.chunks):
                    plgpu.barrier_arrive(memory["v_full"].at[slot])
            else:
                copy(values, target, memory["v_full"].at[slot])
            return launch.next_slot(slot)

        return _for_each_key_tile(0, tile, launch, fill, slot)

    _for_each_tile(launch, memory, visit_tile, jnp.int32(0))
    # One release of everything is left over: seeing it leaves every barrier as it was found.
    plgpu.barrier_wait(memory["q_empty"])
    for slot in range(stages):
        plgpu.barrier_wait(memory["k_empty"].at[slot])
        plgpu.barrier_wait(memory["v_empty"].at[slot])


def _clear_rows(values: Any, first: jax.Array, launch: Launch) -> None:
    """Zeros the rows from ``first`` on: a weight of 0 does not silence a NaN that lies past the visible keys."""

    def clear(index, _):
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS, CHUNK), 0, layout=plgpu.Layout.WGMMA) + index * ROWS
        for chunk in range(launch.chunks):
            piece = block_of_rows(values.at[chunk], index)
            piece[...] = jnp.where(row < first, piece[...], jnp.zeros((), values.dtype))

    lax.fori_loop(lax.div(first, int32(ROWS)), int32(launch.key_tile // ROWS), clear, None)


def _compute(warpgroup: jax.Array, launch: Launch, memory: dict) -> None:
    """A compute warpgroup."""
    if launch.compute_warpgroups in REGISTERS:
        plgpu.set_max_registers(REGISTERS[launch.compute_warpgroups][0], action="increase")
    shape, row_layout = (launch.query_tile, launch.key_tile), plgpu.Layout.WGMMA.reduce(1)
    stages, factor = launch.stages, launch.scale * LOG2_E
    q = memory["q_smem"].at[warpgroup]

    plgpu.barrier_arrive(memory["q_empty"])
    for slot in range(stages):
        plgpu.barrier_arrive(memory["k_empty"].at[slot])
        plgpu.barrier_arrive(memory["v_empty"].at[slot])

    def constant(value):
        return plgpu.layout_cast(jnp.full((launch.query_tile,), value, jnp.float32), row_layout)

    def take_turn():
        if launch.schedule == "pingpong":
            plgpu.barrier_arrive(memory["turn"])
            plgpu.barrier_wait(memory["turn"])

    def await_keys(visit, tile, slot):
        pl.when(visit < tile.visits)(lambda: plgpu.barrier_wait(memory["k_full"].at[slot]))

    def visible_keys(visit, tile):
        keys = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        return keys < tile.limit - _key_start(visit, tile, launch, memory)

    def take_in(products, rows, visit, tile, partial):
        visible = visible_keys(visit, tile) if partial else None
        weights, rows, rescale = softmax_tile(products, rows, visible, factor, launch.with_entropy)
        return weights, *rows, rescale

    def rounded(weights):
        return weights.astype(memory["v"].dtype)

    def in_turns(tile: Tile, slot, out, rows):
        """Scores, weights, values, one after the other; the two warpgroups half a tile apart if they take turns."""
        pl.when(warpgroup == 1)(take_turn)

        def step(visit, carry, partial):
            out, rows, slot = carry
            products = scores(q, memory["k_smem"].at[slot], launch, take_turn)
            plgpu.barrier_arrive(memory["k_empty"].at[slot])
            weights, *rows, rescale = take_in(products, rows, visit, tile, partial)
            out = out * spread(rescale, out.shape)
            # Whatever the compiler would move past the barriers takes the tensor cores' time instead of being hidden.
            out, weights, rows = lax.optimization_barrier((out, rounded(weights), Rows(*rows)))
            if launch.schedule == "pingpong":
                plgpu.barrier_arrive(memory["turn"])
            plgpu.barrier_wait(memory["v_full"].at[slot])
            if launch.schedule == "pingpong":
                plgpu.barrier_wait(memory["turn"])
            values, following = memory["v_smem"].at[slot], launch.next_slot(slot)
            out = add_values(out, weights, values, launch, lambda: await_keys(visit + 1, tile, following))
            plgpu.barrier_arrive(memory["v_empty"].at[slot])
            return out, rows, following

        carry = _for_each_key_tile(0, tile, launch, step, (out, rows, slot))
        pl.when(warpgroup == 0)(take_turn)
        return carry

    def overlapped(tile: Tile, slot, out, rows):
        """The values of a tile are multiplied beside the weights of the next one."""

        def first(visit, carry):
            out, rows, _, slot = carry
            following = launch.next_slot(slot)
            products = scores(q, memory["k_smem"].at[slot], launch, lambda: await_keys(visit + 1, tile, following))
            plgpu.barrier_arrive(memory["k_empty"].at[slot])
            weights, *rows, _ = take_in(products, rows, visit, tile, launch.has_tail)
            return out, Rows(*rows), rounded(weights), following

        def step(visit, carry, partial):
            out, rows, weights, slot = carry
            before, following = launch.previous_slot(slot), launch.next_slot(slot)

            def pass_on():
                if launch.schedule == "overlap_pingpong":
                    plgpu.barrier_arrive(memory["order"].at[1 - warpgroup])

            def taken(products):
                plgpu.barrier_arrive(memory["k_empty"].at[slot])
                return take_in(products, rows, visit, tile, partial)

            if launch.schedule == "overlap_pingpong":
                plgpu.barrier_wait(memory["order"].at[warpgroup])
            out, (weights, *rows, rescale) = scores_beside_values(
                *(q, memory["k_smem"].at[slot], memory["v_smem"].at[before], launch),
                state=(out, weights, (zeros(*shape), *rows, constant(1.0))),
                before_values=lambda: plgpu.barrier_wait(memory["v_full"].at[before]),
                issued=pass_on,
                take_in=taken,
                after=lambda: await_keys(visit + 1, tile, following),
            )
            plgpu.barrier_arrive(memory["v_empty"].at[before])
            # Rounded only now: the registers of the weights before are operands until the values are in.
            return out * spread(rescale, out.shape), Rows(*rows), rounded(weights), following

        def last(_, out):
            before = launch.previous_slot(slot)
            plgpu.barrier_wait(memory["v_full"].at[before])
            out = add_values(out, weights, memory["v_smem"].at[before], launch, lambda: None)
            plgpu.barrier_arrive(memory["v_empty"].at[before])
            return out

        weights = rounded(zeros(*shape))
        once = jnp.minimum(tile.visits, int32(1))
        carry = lax.fori_loop(int32(0), once, first, (out, rows, weights, slot))
        out, rows, weights, slot = _for_each_key_tile(once, tile, launch, step, carry)
        return lax.fori_loop(int32(0), once, last, out), rows, slot

    def visit_tile(tile: Tile, slot):
        plgpu.barrier_wait(memory["q_full"])
        out = zeros(launch.query_tile, launch.chunks * CHUNK)
        rows = Rows(constant(MASKED), constant(0.0), constant(0.0))
        await_keys(0, tile, slot)
        run = overlapped if launch.schedule.startswith("overlap") else in_turns
        out, rows, slot = run(tile, slot, out, rows)
        if launch.output_apart:
            plgpu.barrier_arrive(memory["q_empty"])
        _store(out, rows, tile, warpgroup, launch, memory)
        return slot

    if launch.schedule == "overlap_pingpong":
        pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(memory["order"].at[0]))
    _for_each_tile(launch, memory, visit_tile, jnp.int32(0))
    if launch.schedule == "overlap_pingpong":
        pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(memory["order"].at[0]))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _store(out: jax.Array, rows: Rows, tile: Tile, warpgroup: jax.Array, launch: Launch, memory: dict) -> None:
    """Writes a warpgroup's rows; the copy engine leaves out what lies past the last row or the head dimension."""
    inverse, log_sum_exp, entropy = finish_rows(rows)
    out = (out * spread(inverse, out.shape)).astype(memory["out"].dtype)
    staged = memory["out_smem" if launch.output_apart else "q_smem"].at[warpgroup]
    # What the copy engine still reads of the tile before must not be overwritten.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for chunk in range(launch.chunks):
        matrix(staged.at[chunk])[...] = out[:, chunk * CHUNK : (chunk + 1) * CHUNK]
    memory["lse_smem"].at[warpgroup][...] = log_sum_exp
    if launch.with_entropy:
        memory["entropy_smem"].at[warpgroup][...] = entropy
    plgpu.commit_smem()
    queries = pl.ds(tile.query + warpgroup * launch.query_tile, launch.query_tile)

    def store_chunk(i, _):
        target = memory["out"].at[tile.batch, queries, tile.head, pl.ds(i * CHUNK, CHUNK)]
        plgpu.copy_smem_to_gmem(plain(staged.at[i]), target)

    lax.fori_loop(int32(0), int32(launch.chunks), store_chunk, None)
    plgpu.copy_smem_to_gmem(memory["lse_smem"].at[warpgroup], memory["lse"].at[tile.batch, tile.head, queries])
    if launch.with_entropy:
        source = memory["entropy_smem"].at[warpgroup]
        plgpu.copy_smem_to_gmem(source, memory["entropy"].at[tile.batch, tile.head, queries])
    if not launch.output_apart:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(memory["q_empty"])
