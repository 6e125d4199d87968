import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import BlockMask

CHECKER = np.array([[True, False, True], [False, True, False]])


def test_is_a_static_argument():
    mask, same = (BlockMask.from_array(CHECKER) for _ in range(2))
    assert mask == same
    assert hash(mask) == hash(same)
    assert mask != BlockMask.from_array(~CHECKER)
    assert mask != BlockMask.from_array(CHECKER, key_block=256)


def test_tokens_lie_in_blocks():
    tokens = BlockMask.from_array(CHECKER, query_block=128, key_block=256).tokens(200, 600)
    assert tokens.shape == (200, 600)
    assert tokens[0, 0]
    assert not tokens[127, 256]
    assert tokens[128, 256]
    assert tokens[0, 599]
    assert not tokens[199, 599]


def test_density_is_the_share_of_visible_blocks():
    assert BlockMask.from_array(CHECKER).density == 0.5


def test_a_predicate_makes_a_block_visible_where_any_of_its_tokens_is():
    mask = BlockMask.from_predicate(lambda q, k: k == 2 * q, 300, 600, key_block=256)
    found = np.zeros((3, 3), bool)
    for query in range(300):
        found[query // 128, 2 * query // 256] = True
    np.testing.assert_array_equal(mask.array, found)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_tiles_visit_exactly_the_visible_tokens(data):
    queries, keys = data.draw(st.integers(1, 700)), data.draw(st.integers(1, 900))
    query_block, key_block = (128 * data.draw(st.integers(1, 3)) for _ in range(2))
    shape = (-(-queries // query_block), -(-keys // key_block))
    pattern = np.array(data.draw(st.lists(st.booleans(), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])))
    mask = BlockMask.from_array(pattern.reshape(shape), query_block=query_block, key_block=key_block)
    query_tile = query_block // data.draw(st.sampled_from([1, 2, 4]))
    key_tile = key_block // data.draw(st.sampled_from([1, 2, 4]))
    indices, counts = mask.tiles(queries, keys, query_tile, key_tile)
    assert indices.dtype == counts.dtype == np.int32
    seen = np.zeros((queries, keys), bool)
    for row, (visits, count) in enumerate(zip(indices, counts, strict=True)):
        assert np.all(np.diff(visits[:count]) > 0)
        assert np.all(visits[count:] == (visits[count - 1] if count else 0))
        for tile in visits[:count]:
            seen[row * query_tile : (row + 1) * query_tile, tile * key_tile : (tile + 1) * key_tile] = True
    np.testing.assert_array_equal(seen, mask.tokens(queries, keys))


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (
            lambda: BlockMask.from_array(CHECKER, query_block=64),
            "query_block 64: must be an integer multiple of 128; merge",
        ),
        (lambda: BlockMask.from_array(CHECKER, key_block=200), "key_block 200: must be an integer multiple of 128"),
        (lambda: BlockMask(((True,),), query_block="128"), "query_block '128': must be an integer multiple"),
        (lambda: BlockMask(((True,),), key_block=128.0), r"key_block 128\.0: must be an integer multiple"),
        (lambda: BlockMask(((2,),)), "entries that are not bool"),
        (lambda: BlockMask.from_array(CHECKER.astype(int)), r"block_mask int64\[2, 3\]: must be boolean"),
        (lambda: BlockMask.from_array(np.ones((1, 2, 3), bool)), r"block_mask bool\[1, 2, 3\].*one pattern serves all"),
        (lambda: BlockMask(((True,), (True, False))), r"rows of \[1, 2\] blocks: must be a rectangle"),
        (lambda: BlockMask(((), ())), r"rows of \[0\] blocks"),
        (lambda: BlockMask(()), r"rows of \[\] blocks"),
        (lambda: BlockMask.from_array(CHECKER).check(257, 300), r"\(2, 3\) blocks: must be \(3, 3\).*257 queries"),
        (lambda: BlockMask.from_array(CHECKER).tiles(200, 300, 96, 128), "query tile 96: must divide.*128"),
        (lambda: BlockMask.from_array(CHECKER).tiles(200, 300, 128, 256), "key tile 256: must divide.*128"),
    ],
)
def test_bad_patterns_name_the_value_the_rule_and_the_remedy(build, told, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=told):
        build()
