"""The conformance table on the CPU: the shared cases against float64, and the table's own teeth."""

import dataclasses
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, conformance
from pallas_kernels.attention.block_mask import BlockMask
from pallas_kernels.attention.cases import CASES, INFINITY_SIDES, Case
from pallas_kernels.attention.float64 import attend
from pallas_kernels.attention.output import AttentionOutput
from pallas_kernels.attention.xla_chunked import chunked_attention

CHUNK = inspect.signature(chunked_attention).parameters["chunk"].default


def shortened(case, num_queries=512):
    """All keys for fewer queries, which are independent of each other; of a pattern, rows from all over it."""
    if case.num_queries <= num_queries:
        return case
    mask = case.block_mask
    if mask is not None:
        apart = -(-len(mask.array) * mask.query_block // num_queries)
        mask = BlockMask.from_array(mask.array[::apart], query_block=mask.query_block, key_block=mask.key_block)
    return dataclasses.replace(case, num_queries=num_queries, block_mask=mask)


def path(case):
    """What of a case decides which code runs on the CPU: two that agree in it differ in numbers only."""
    chunks, tail = divmod(case.num_keys, CHUNK)
    kinds = (case.scores, case.key_length is not None, case.block_mask is not None, case.head_dim.bit_count() == 1)
    return *kinds, case.num_queries == 1, min(chunks, 2), tail == 0


def one_of_each_path():
    """The longest of the cases beyond the edges; the command ``python -m pallas_kernels.conformance`` runs them all."""
    named = [(group, case) for group, cases in CASES.items() if group != "edges" for case in cases]
    longest = {path(case): (group, case) for group, case in sorted(named, key=lambda pair: pair[1].num_keys)}
    for group, case in longest.values():
        yield group, shortened(case.shrunk(heads=1, batch=min(case.batch, 2))), "float32"


CHECKED = [
    *(("edges", case.shrunk(heads=1), dtype) for case in CASES["edges"] for dtype in ("float32", "bfloat16")),
    *one_of_each_path(),
]


@pytest.mark.parametrize(("group", "case", "dtype"), CHECKED, ids=lambda x: x.name if isinstance(x, Case) else x)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_every_edge_and_every_path_conforms(implementation, group, case, dtype):
    line = conformance.check(implementation, case, dtype, group=group)
    assert line.passed, line


# One token; a query tile that is no power of two; one product per key tile, and two; several key tiles; several of
# queries, too, with all keys of the last scale.
SIDES = (1, 6, 12, 16, 24, 64)
INTERPRETED = [
    *((case, "float32") for case in CASES["edges"]),
    *(
        (shortened(case.shrunk(heads=1, batch=1), 1100), "bfloat16")
        for side, case in zip(INFINITY_SIDES, CASES["infinity"], strict=True)
        if side in SIDES
    ),
]


@pytest.mark.parametrize(("case", "dtype"), INTERPRETED, ids=lambda x: x.name if isinstance(x, Case) else x)
def test_the_tpu_kernel_conforms_in_its_interpreter(case, dtype):
    line = conformance.check("mosaic_tpu", case, dtype, interpret=True)
    assert line.passed, line


def test_infinity_cases_are_the_thirteen_scales_with_all_keys_so_far():
    cases = CASES["infinity"]
    assert [case.num_queries for case in cases] == [side**2 for side in INFINITY_SIDES]
    assert [cases[0].num_keys, cases[-2].num_keys, cases[-1].num_keys] == [1, 6425, 10521]
    assert {(case.batch, case.heads, case.head_dim) for case in cases} == {(2, 16, 128)}


def test_half_of_the_rows_of_cosine_attention_at_scale_100_are_sharp():
    case = next(case for case in CASES["edges"] if case.name == "sharp")
    q, k, v = case.draw()
    entropy = attend(q, k, v, scale=case.scale).entropy
    assert np.all(entropy[..., ::2] < 1e-9)
    assert np.median(entropy[..., 1::2]) > 0.1


@pytest.fixture
def exact():
    case = Case("small", 2, 20, 30, 2, 8, 0.5, key_length=(30, 0))
    q, k, v = case.draw()
    want = attend(q, k, v, scale=0.5, key_length=np.array(case.key_length))
    log_sum_exp = np.where(np.isfinite(want.log_sum_exp), want.log_sum_exp, -1e30)
    return AttentionOutput(*map(jnp.asarray, map(np.float32, (want.out, log_sum_exp, want.entropy)))), want


@pytest.mark.parametrize(
    ("part", "spoil"),
    [
        ("out", lambda got: got._replace(out=got.out.at[0, 3, 1, 2].add(1e-3))),
        ("out", lambda got: got._replace(out=got.out.at[0, 3, 1, 2].set(jnp.nan))),
        ("out", lambda got: got._replace(out=got.out.at[1, 3, 1, 2].set(1e-9))),
        ("log_sum_exp", lambda got: got._replace(log_sum_exp=got.log_sum_exp.at[1, 0, 0].set(0.0))),
        ("log_sum_exp", lambda got: got._replace(log_sum_exp=got.log_sum_exp.at[1, 0, 0].set(jnp.nan))),
        ("log_sum_exp", lambda got: got._replace(log_sum_exp=got.log_sum_exp.at[1, 0, 0].set(-jnp.inf))),
        ("log_sum_exp", lambda got: got._replace(log_sum_exp=got.log_sum_exp.at[0, 1, 3].add(1e-3))),
        ("entropy", lambda got: got._replace(entropy=got.entropy.at[0, 1, 3].add(1e-3))),
        ("entropy", lambda got: got._replace(entropy=got.entropy.at[0, 1, 3].set(-1e-9))),
        ("entropy", lambda got: got._replace(entropy=got.entropy.at[1, 1, 3].set(1e-9))),
        ("entropy", lambda got: got._replace(entropy=got.entropy.at[0, 1, 3].set(jnp.nan))),
    ],
)
def test_every_kind_of_error_is_measured(exact, part, spoil):
    got, want = exact
    rows = np.arange(20)
    assert conformance.measure(got, want, rows)[part] < 1e-6
    assert conformance.measure(spoil(got), want, rows)[part] > 5e-5


def test_rank_correlation_notices_a_wrong_order_however_small_the_errors():
    rows = np.arange(20)
    entropy = np.linspace(3.0, 3.02, 20)[None, None]
    blank = np.zeros((1, 20, 1, 1))
    want = conformance.ExactAttention(blank, np.zeros((1, 1, 20)), entropy)
    for order, rank in ((slice(None), 1.0), (slice(None, None, -1), -1.0)):
        got = AttentionOutput(
            jnp.zeros((1, 20, 1, 1)), jnp.zeros((1, 1, 20)), jnp.asarray(entropy[..., order], "float32")
        )
        assert conformance.measure(got, want, rows)["rank"] == pytest.approx(rank)


@pytest.mark.parametrize("part", ["out", "log_sum_exp", "entropy", "rank"])
def test_every_bound_counts(part):
    bounds = conformance.Bounds(1e-5, 1e-5, 1e-5)
    good = {"out": 1e-5, "log_sum_exp": 1e-5, "entropy": 1e-5, "rank": 0.999}
    assert bounds.hold(good)
    assert not bounds.hold(good | {part: 0.99})
    assert not bounds.hold(good | {part: float("nan")})


def spoiled(spoil):
    def run(*arrays, implementation, **options):
        return spoil(attention(*arrays, implementation="reference", **options), options["with_entropy"])

    return run


def test_what_does_not_repeat_fails(monkeypatch):
    calls = iter(range(10))

    def unsteady(got, with_entropy):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        noise = jax.pure_callback(lambda: np.float32(1e-7 * next(calls)), shape)
        return got._replace(out=got.out + noise)

    monkeypatch.setattr(conformance, "attention", spoiled(unsteady))
    line = conformance.check("xla", CASES["infinity"][3].shrunk(heads=1), "float32")
    assert (line.repeats, line.passed) == (False, False)
    assert line.out < 1e-5


@pytest.mark.parametrize("part", ["out", "log_sum_exp"])
def test_the_result_without_entropy_is_compared_too(monkeypatch, part):
    def off(got, with_entropy):
        return got if with_entropy else got._replace(**{part: getattr(got, part) + 1e-3})

    monkeypatch.setattr(conformance, "attention", spoiled(off))
    line = conformance.check("xla", CASES["infinity"][3].shrunk(heads=1), "float32")
    assert getattr(line, part) > 1e-4
    assert not line.passed


def test_a_table_in_which_nothing_ran_is_a_failure(capsys, monkeypatch):
    monkeypatch.setattr(conformance, "CASES", {"edges": CASES["edges"][:1]})
    assert conformance.main(["--implementations", "triton", "--dtypes", "float32", "--cases", "edges"]) == 1
    assert "nothing ran" in capsys.readouterr().err


def test_a_crash_is_a_line_of_the_table(monkeypatch):
    def broken(*arrays, **options):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(conformance, "attention", broken)
    line = conformance.check("xla", CASES["infinity"][0], "float32")
    assert (line.passed, line.reason) == (False, "RuntimeError: out of")


def test_sampled_rows_hold_both_ends_and_tile_edges():
    rows = conformance.sample_rows(4096)
    assert len(rows) == conformance.MAX_ROWS == len(set(rows.tolist()))
    assert {0, 4095} <= set(rows.tolist())
    assert sum(row % 64 in (0, 63) for row in rows) >= conformance.MAX_ROWS // 2
    np.testing.assert_array_equal(conformance.sample_rows(5), np.arange(5))


def test_the_command_writes_all_lines_and_says_why_kernels_did_not_run(tmp_path, capsys, monkeypatch):
    few = {"edges": CASES["edges"][:1]}
    monkeypatch.setattr(conformance, "CASES", few)
    file = tmp_path / "table.json"
    arguments = ["--implementations", "xla", "triton", "--dtypes", "float32", "--json", str(file), "--heads", "1"]
    assert conformance.main([*arguments, "--cases", "edges"]) == 0
    done, refused = json.loads(file.read_text())
    assert (done["implementation"], done["passed"], done["repeats"]) == ("xla", True, True)
    assert (refused["implementation"], refused["passed"]) == ("triton", None)
    assert "cpu" in refused["reason"]
    assert capsys.readouterr().out.endswith("1 passed, 0 failed, of 2\n")


def test_the_command_fails_when_a_bound_is_missed(monkeypatch):
    few = {"edges": CASES["edges"][:1]}
    monkeypatch.setattr(conformance, "CASES", few)
    strict = dataclasses.replace(conformance.BOUNDS["float32"], out=1e-12)
    monkeypatch.setitem(conformance.BOUNDS, "float32", strict)
    arguments = ["--implementations", "reference", "--dtypes", "float32", "--heads", "1"]
    assert conformance.main([*arguments, "--cases", "edges"]) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--implementations", "flash"], "flash"),
        (["--cases", "all"], "all"),
        (["--heads", "0"], "--heads 0"),
        (["--json", "/"], "--json: /: is a directory"),
        (["--json", "/proc/none/table.json"], "/proc/none/table.json: /proc is not writable"),
        (["--implementations", "xla", "--interpret"], "--interpret: must come with"),
    ],
)
def test_bad_options_exit_with_two(arguments, told, capsys):
    with pytest.raises(SystemExit) as caught:
        conformance.main(arguments)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err
