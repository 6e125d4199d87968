"""Tables of what was measured: read, written, checked, and applied only where they are legal."""

import dataclasses
import json
import types

import numpy as np
import pytest

from pallas_kernels.attention import api
from pallas_kernels.attention.problem import Problem
from pallas_kernels.attention.target import Target
from pallas_kernels.attention.tuning import (
    DIRECTORY,
    Proven,
    Table,
    Tuned,
    as_fields,
    proven,
    read,
    slug,
    tuned_config,
    write,
)

H200 = Target("cuda", "NVIDIA H200", (9, 0))
VERSIONS = {"jax": "0.11.2", "triton": None}


@dataclasses.dataclass(frozen=True)
class Tiles:
    query_tile: int
    stages: tuple[int, int]


def problem(**changes):
    fields = {"batch": 1, "num_queries": 2000, "num_keys": 3000, "heads": 2, "head_dim": 128}
    return Problem(**(fields | {"dtype": np.dtype("float16"), "with_entropy": True} | changes))


def tuned(**changes):
    fields = {"implementation": "triton", "head_dim": 128, "dtype": "float16", "size": "many queries"}
    config = {"query_tile": 64, "stages": [2, 3]}
    return Tuned(**(fields | {"with_entropy": True, "config": config, "milliseconds": 0.5} | changes))


def table(*entries, proven=()):
    return Table("NVIDIA H200", "2026-01-31T12:00:00+00:00", VERSIONS, tuple(proven), entries)


@pytest.fixture
def kernel(monkeypatch):
    candidates = (Tiles(128, (2, 2)), Tiles(64, (2, 3)))
    module = types.SimpleNamespace(candidates=lambda problem, target: candidates)
    monkeypatch.setattr(api, "implementation_module", lambda name: module)


def test_a_device_without_a_table_has_nothing_proven_and_nothing_tuned(tmp_path):
    assert proven(H200, with_entropy=True, directory=tmp_path) == ()
    assert tuned_config("triton", problem(), H200, directory=tmp_path) is None


def test_the_shipped_tables_can_be_read():
    for path in DIRECTORY.glob("*.json"):
        device = json.loads(path.read_text())["device"]
        assert slug(device) == path.stem
        table = read(device)
        assert table is not None
        assert {x.implementation for x in (*table.proven, *table.configs)} <= set(api.IMPLEMENTATIONS)


def test_the_fastest_proven_comes_first(tmp_path):
    times = [Proven("cudnn", True, 3.0), Proven("mosaic_gpu", True, 1.0), Proven("triton", True, 2.0)]
    path = write(table(proven=times), tmp_path)
    assert path.name == "nvidia_h200.json"
    assert proven(H200, with_entropy=True, directory=tmp_path) == ("mosaic_gpu", "triton", "cudnn")
    assert proven(Target("cuda", "NVIDIA L40S", (8, 9)), with_entropy=True, directory=tmp_path) == ()


def test_with_and_without_entropy_are_proven_apart(tmp_path):
    write(table(proven=[Proven("cudnn", False, 1.0), Proven("triton", True, 2.0)]), tmp_path)
    assert proven(H200, with_entropy=False, directory=tmp_path) == ("cudnn",)
    assert proven(H200, with_entropy=True, directory=tmp_path) == ("triton",)


def test_a_table_survives_writing(tmp_path):
    kept = table(tuned(), proven=[Proven("triton", True, 2.0)])
    write(kept, tmp_path)
    assert read("NVIDIA H200", tmp_path) == kept


@pytest.mark.usefixtures("kernel")
def test_a_tuned_configuration_is_the_candidate_with_its_fields(tmp_path):
    write(table(tuned()), tmp_path)
    assert tuned_config("triton", problem(), H200, directory=tmp_path) == Tiles(64, (2, 3))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    "changes",
    [{"head_dim": 64}, {"num_queries": 64}, {"num_queries": 1024}, {"with_entropy": False}, {"dtype": np.dtype("f4")}],
    ids=str,
)
def test_another_kind_of_problem_has_its_own_configuration(tmp_path, changes):
    write(table(tuned()), tmp_path)
    assert tuned_config("triton", problem(**changes), H200, directory=tmp_path) is None


@pytest.mark.usefixtures("kernel")
def test_a_configuration_that_is_no_candidate_any_more_is_passed_over(tmp_path):
    write(table(tuned(config={"query_tile": 256, "stages": [2, 3]})), tmp_path)
    assert tuned_config("triton", problem(), H200, directory=tmp_path) is None


def test_a_new_table_replaces_the_old_one(tmp_path):
    write(table(proven=[Proven("triton", True, 2.0)]), tmp_path)
    assert proven(H200, with_entropy=True, directory=tmp_path) == ("triton",)
    write(table(proven=[Proven("cudnn", True, 2.0), Proven("triton", True, 2.5)]), tmp_path)
    assert proven(H200, with_entropy=True, directory=tmp_path) == ("cudnn", "triton")


def broken(change):
    fields = json.loads(json.dumps(dataclasses.asdict(table(tuned(), proven=[Proven("triton", True, 2.0)]))))
    change(fields)
    return json.dumps(fields)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "Expecting"),
        ("[]", "table: must be an object"),
        (broken(lambda fields: fields.pop("date")), "fields date are missing"),
        (broken(lambda fields: fields.update(extra=1)), "fields extra"),
        (broken(lambda fields: fields.update(proven={})), "table.proven: must be a list"),
        (broken(lambda fields: fields["proven"][0].update(milliseconds="2")), r"proven\[0\].milliseconds '2'"),
        (broken(lambda fields: fields["configs"][0].update(head_dim=True)), r"configs\[0\].head_dim True: must be int"),
        (
            broken(
                lambda fields: fields["proven"].append(
                    {"implementation": "cudnn", "with_entropy": True, "milliseconds": 1}
                )
            ),
            "must be ordered",
        ),
        (
            broken(lambda fields: fields["proven"][0].update(implementation="cuda")),
            r"proven\[0\].implementation 'cuda'",
        ),
        (broken(lambda fields: fields["configs"][0].update(implementation="")), r"configs\[0\].implementation ''"),
        (broken(lambda fields: fields.update(device="NVIDIA H100")), "device 'NVIDIA H100'.*named for"),
        (broken(lambda fields: fields["proven"][0].update(milliseconds=float("nan"))), "milliseconds nan: must be pos"),
        (broken(lambda fields: fields["configs"][0].update(milliseconds=float("inf"))), "milliseconds inf: must be"),
        (broken(lambda fields: fields["proven"][0].update(milliseconds=0)), "milliseconds 0.0: must be positive"),
        (broken(lambda fields: fields["proven"][0].update(milliseconds=10**400)), "too large"),
        ("[" * 200_000, "recursion"),
    ],
    ids=[
        *("text", "list", "missing", "unknown", "object", "string", "bool", "order", "implementation", "configuration"),
        *("device", "nan", "infinite", "zero", "huge", "deep"),
    ],
)
def test_a_broken_table_is_told_in_one_line(tmp_path, text, told):
    (tmp_path / "nvidia_h200.json").write_text(text)
    with pytest.raises(ValueError, match=told) as caught:
        proven(H200, with_entropy=True, directory=tmp_path)
    assert "\n" not in str(caught.value)
    assert "nvidia_h200.json" in str(caught.value)
    assert "gpu_suite" in str(caught.value)


@pytest.mark.parametrize(
    ("device", "name"), [("NVIDIA H100 80GB HBM3", "nvidia_h100_80gb_hbm3"), ("TPU v5 lite", "tpu_v5_lite")]
)
def test_file_names_of_devices(device, name):
    assert slug(device) == name


def test_fields_of_a_configuration_are_those_that_json_returns():
    assert as_fields(Tiles(64, (2, 3))) == {"query_tile": 64, "stages": [2, 3]}
