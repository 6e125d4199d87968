"""What the benchmark of compiled pods lets through, and the table made of its results."""

import importlib
import json
import pathlib

import pytest

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
PAIRS = {"reduce-scatter": 2, "all-gather": 2}
LAST = "scale 13 (64x64)"


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def compiled(*loops, outside=None, peak=10, limit=20):
    return {"peak": peak, "limit": limit, "collectives": {"loops": loops, "outside": outside or {}}}


def test_copies_on_one_chip_may_exchange_nothing_at_any_scale(module):
    pods = module("aot_pods")
    alone = pods.Setting("v5e:4x4", "infinity-2b", 1, "dense")
    assert pods.wrong(alone, LAST, compiled()) is None
    assert "must exchange nothing" in pods.wrong(alone, LAST, compiled({"all-gather": 1}))
    assert "must exchange nothing" in pods.wrong(alone, LAST, compiled(outside={"all-reduce": 1}))


@pytest.mark.parametrize(("policy", "groups"), [("dense", 1), ("toprovar", 3)])
def test_chips_that_share_a_copy_must_do_two_pairs_in_each_block(module, policy, groups):
    pods = module("aot_pods")
    shared = pods.Setting("v5e:4x4", "infinity-2b", 4, policy)
    assert pods.wrong(shared, LAST, compiled(*[PAIRS] * groups)) is None
    for wrong in ([PAIRS] * (groups - 1), [PAIRS | {"all-gather": 3}] * groups, [PAIRS | {"all-to-all": 1}] * groups):
        assert "must exchange" in pods.wrong(shared, LAST, compiled(*wrong))


def test_only_a_scale_that_measures_importance_may_sum_outside_of_the_blocks(module):
    pods = module("aot_pods")
    shared = pods.Setting("v5e:4x4", "infinity-2b", 4, "toprovar")
    step = next(scale for scale in range(13) if shared.plan.step(scale).with_entropy)
    name, groups = f"scale {step + 1} (24x24)", len(shared.plan.step(step).groups)
    assert pods.wrong(shared, name, compiled(*[PAIRS] * groups, outside={"all-reduce": 1})) is None
    assert "must exchange" in pods.wrong(shared, name, compiled(*[PAIRS] * groups, outside={"all-gather": 1}))
    assert "must exchange" in pods.wrong(shared, LAST, compiled(*[PAIRS] * groups, outside={"all-reduce": 1}))


def test_what_does_not_fit_the_chip_is_wrong(module):
    pods = module("aot_pods")
    alone = pods.Setting("v5e:4x4", "infinity-2b", 1, "dense")
    assert "must be at most" in pods.wrong(alone, "decoder", compiled(peak=2 * 2**30, limit=2**30))


def test_the_table_has_a_line_per_slice_model_mesh_and_policy(module, tmp_path):
    facts = compiled(PAIRS, peak=12_300_000_000, limit=16_900_000_000) | {"predicted": 12e9, "failure": None}
    lost = {"predicted": 1, "failure": "no"}
    start = "v5e:4x4 infinity-8b data=4,tensor=4 batch 2"
    report = {f"{start} dense: {LAST}": facts, f"{start} any policy: text": facts, f"{start} toprovar: {LAST}": lost}
    (tmp_path / "aot_pods.json").write_text(json.dumps(report))
    _, _, dense, pruned, _, said = module("pod_tables").pods(tmp_path).split("\n")
    start = "| v5e:4x4 | infinity-8b | data=4,tensor=4 | 2"
    assert dense == f"{start} | dense | 12.3 | 12.3 (64x64) | – | 16.9 | 2 all-gather, 2 reduce-scatter |"
    assert pruned == f"{start} | toprovar | 12.3 | failed (64x64) | – |  | none |"
    assert "3 programs, of which 1 fail" in said


def test_the_table_goes_between_its_marks(module, tmp_path, monkeypatch):
    tables = module("pod_tables")
    page = tmp_path / "pods.md"
    page.write_text("before\n<!-- table: pods -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(tables, "PAGE", page)
    monkeypatch.setattr(tables, "pods", lambda: "new")
    assert tables.main(["--check"]) == 1
    assert tables.main([]) == 0
    assert page.read_text() == "before\n<!-- table: pods -->\nnew\n<!-- end -->\nafter\n"
    assert tables.main(["--check"]) == 0
