"""Selection against brute force in plain Python; moving tokens against plain indexing."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from toprovar_jax.acceleration.budgets import region_grid, region_minimums
from toprovar_jax.acceleration.selection import (
    gather_rotary,
    gather_tokens,
    region_of_tokens,
    scatter_tokens,
    select_tokens,
)
from toprovar_jax.errors import UserInputError
from toprovar_jax.model.rope import RotaryTable, rotary_table
from toprovar_jax.schedule import ScaleSchedule

UNEVEN = [(9, 6), (30, 15)]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def select(importance, grid, kept, regions=1, region_minimum=0.0):
    return np.asarray(
        select_tokens(jnp.asarray(importance), grid, kept, regions=regions, region_minimum=region_minimum)
    )


def selected(importance, grid, kept, regions, share):
    """One image: every region's first tokens, then the first of the rest; lower index first, NaN last."""
    importance = np.where(np.isnan(importance), -np.inf, importance.astype(np.float64))
    order = sorted(range(importance.size), key=lambda token: (-importance[token], token))
    region = region_of_tokens(grid, regions)
    chosen = set()
    for number, minimum in enumerate(region_minimums(grid, regions, share)):
        chosen |= set([token for token in order if region[token] == number][:minimum])
    rest = [token for token in order if token not in chosen]
    return sorted(chosen | set(rest[: kept - len(chosen)]))


@pytest.mark.parametrize("grid", [(64, 64), (30, 15), (9, 6), (3, 3), (1, 1)], ids=str)
def test_regions_are_rectangles_of_nearly_equal_size(grid):
    region = region_of_tokens(grid, 8).reshape(grid)
    down, across = region_grid(grid, 8)
    assert sorted(set(region.ravel().tolist())) == list(range(down * across))
    for number in range(down * across):
        rows, columns = np.nonzero(region == number)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert height * width == rows.size
        assert abs(height - grid[0] / down) < 1
        assert abs(width - grid[1] / across) < 1


@settings(max_examples=30, deadline=None)
@given(data=st.data(), grid=st.sampled_from(UNEVEN), seed=st.integers(0, 10**6))
def test_selection_agrees_with_brute_force_also_among_ties(data, grid, seed):
    tokens, regions = grid[0] * grid[1], 8
    share = data.draw(st.sampled_from([0.0, 0.05, 0.3]))
    least = max(1, sum(region_minimums(grid, regions, share)))
    kept = data.draw(st.sampled_from([least, (least + tokens) // 2, tokens - 1, tokens]))
    levels = data.draw(st.sampled_from([1, 3, 1000]))
    random = np.random.default_rng(seed)
    importance = (random.integers(-levels, levels + 1, (2, tokens)) / 7).astype(np.float32)
    importance[0, random.integers(tokens)] = data.draw(st.sampled_from([np.nan, -np.inf, np.inf, -0.0, 1e-41, -3e38]))
    indices = select(importance, grid, kept, regions, share)
    assert indices.dtype == np.int32
    for image in range(2):
        assert indices[image].tolist() == selected(importance[image], grid, kept, regions, share)


def test_no_other_choice_that_respects_the_minimums_keeps_more():
    grid, kept, share = (4, 8), 3, 0.05
    region, minimums = region_of_tokens(grid, 8), region_minimums(grid, 8, share)
    assert minimums == (1, 1)
    importance = np.abs(draw(1, 32)) + np.float32(5) * (region == 1)
    legal = [tokens for tokens in itertools.combinations(range(32), kept) if {*region[list(tokens)]} == {0, 1}]
    best = max(legal, key=lambda tokens: np.float64(importance[0, list(tokens)]).sum())
    assert select(importance, grid, kept, 8, share)[0].tolist() == list(best)
    assert set(region[select(importance, grid, kept)[0]]) == {1}


@pytest.mark.parametrize("grid", [*UNEVEN, (16, 16)], ids=str)
def test_keeping_all_tokens_is_counting_them(grid):
    tokens = grid[0] * grid[1]
    indices = select(draw(3, tokens), grid, tokens, 8, 0.05)
    np.testing.assert_array_equal(indices, np.tile(np.arange(tokens), (3, 1)))


def test_nan_comes_after_everything_else_and_both_zeros_are_equal():
    importance = np.array([[np.nan, -1.0, 0.0, -0.0, 2.0, np.inf, -np.nan, -3.0]], np.float32)
    for kept, expected in [(1, [5]), (2, [4, 5]), (3, [2, 4, 5]), (5, [1, 2, 3, 4, 5]), (6, [1, 2, 3, 4, 5, 7])]:
        assert select(importance, (2, 4), kept)[0].tolist() == expected


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_importance_is_compared_exactly(dtype):
    importance = jnp.asarray(draw(2, 54), dtype)
    np.testing.assert_array_equal(
        select(importance, (9, 6), 20, 8, 0.05), select(importance.astype(jnp.float32), (9, 6), 20, 8, 0.05)
    )


def test_an_image_is_selected_alike_alone_and_in_any_transformation():
    grid, kept = (9, 6), 20
    importance = jnp.asarray(draw(8, 54))
    run = functools.partial(select_tokens, grid=grid, kept=kept, regions=8, region_minimum=0.05)
    expected = np.stack([selected(image, grid, kept, 8, 0.05) for image in np.asarray(importance)])
    np.testing.assert_array_equal(np.concatenate([jax.jit(run)(importance[k : k + 1]) for k in range(8)]), expected)
    np.testing.assert_array_equal(jax.jit(run)(importance), expected)
    np.testing.assert_array_equal(jax.vmap(run)(importance.reshape(4, 2, 54)).reshape(8, kept), expected)
    scanned = jax.lax.scan(lambda carry, rows: (carry, run(rows)), None, importance.reshape(4, 2, 54))[1]
    np.testing.assert_array_equal(scanned.reshape(8, kept), expected)
    spec, mesh = PartitionSpec("images"), jax.make_mesh((8,), ("images",), axis_types=(AxisType.Auto,))
    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec))
    np.testing.assert_array_equal(sharded(importance), expected)


def test_a_budget_below_the_region_minimums_is_refused_with_both_numbers():
    needed = sum(region_minimums((16, 16), 8, 0.3))
    with pytest.raises(UserInputError) as error:
        select(draw(1, 256), (16, 16), needed - 1, 8, 0.3)
    assert str(needed - 1) in error.value.value
    assert str(needed) in error.value.rule
    assert "region_minimum" in error.value.remedy
    assert select(draw(1, 256), (16, 16), needed, 8, 0.3).shape == (1, needed)


@pytest.mark.parametrize("kept", [0, 55])
def test_a_budget_outside_the_grid_is_refused(kept):
    with pytest.raises(UserInputError, match=f"{kept} kept tokens on a 9x6 grid: must be 1 to 54"):
        select(draw(1, 54), (9, 6), kept)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [2, 4, 6])
def test_guidance_rows_share_the_indices_of_their_image(rows, dtype):
    x, indices = jnp.asarray(draw(rows, 20, 3), dtype), select(draw(2, 20, seed=1), (4, 5), 7)
    kept = gather_tokens(x, jnp.asarray(indices))
    assert kept.dtype == dtype
    for row in range(rows):
        np.testing.assert_array_equal(kept[row], np.asarray(x)[row, indices[row % 2]])


def test_scattering_replaces_the_kept_tokens_and_nothing_else():
    x, values = draw(4, 20, 3), draw(4, 7, 3, seed=1)
    indices = select(draw(2, 20, seed=2), (4, 5), 7)
    expected = x.copy()
    for row in range(4):
        expected[row, indices[row % 2]] = values[row]
    got = scatter_tokens(jnp.asarray(x), jnp.asarray(indices), jnp.asarray(values))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("kept", [1, 7, 20])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gathering_and_scattering_the_same_values_is_the_identity_bit_for_bit(kept, dtype):
    x = draw(4, 20, 3)
    x[0, :4, 0] = np.nan, -0.0, np.inf, 1e-41
    x = jnp.asarray(x, dtype)
    indices = jnp.asarray(select(draw(2, 20, seed=1), (4, 5), kept))
    assert np.asarray(scatter_tokens(x, indices, gather_tokens(x, indices))).tobytes() == np.asarray(x).tobytes()


def test_the_rotary_table_follows_the_kept_tokens():
    table = rotary_table(ScaleSchedule.of("3:2", 5), 4, 8, 2)
    indices = select(draw(2, 54), (9, 6), 20)
    kept = jax.jit(functools.partial(gather_rotary, table, rows=4))(indices)
    assert isinstance(kept, RotaryTable)
    for part, whole in zip(kept, table, strict=True):
        assert part.shape == (4, 20, 4)
        for row in range(4):
            np.testing.assert_array_equal(part[row], whole[indices[row % 2]])
