"""The benchmark that kills workers, in short."""

import importlib
import json
import pathlib

import pytest

from toprovar_jax.distributed.batch.ledger import Ledger
from toprovar_jax.distributed.batch.storage import open_storage

FOLDER = pathlib.Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def kills(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    return importlib.import_module("batch_kills")


@pytest.mark.parametrize("layout", ["files", "tar"])
def test_killed_workers_lose_nothing_and_make_nothing_twice(kills, layout, tmp_path):
    words = ["--pictures", "300", "--kills", "6", "--chunk", "20", "--layouts", layout, "--folder", str(tmp_path)]
    assert kills.main([*words, "--results", str(tmp_path / "results.json"), "--command", *kills.FAKE]) == 0
    report = json.loads((tmp_path / "results.json").read_text())["layouts"][layout]
    assert report["kills"]["processes"] >= report["kills"]["moments"] >= 1
    assert set(report["faults"].values()) == {0}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_the_benchmark_sees_what_is_missing_doubled_or_torn(kills, tmp_path):
    run = importlib.import_module("batch_kills_worker")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"picture {number}"}) for number in range(8)))
    for out in ("alone", "killed"):
        ledger = Ledger(open_storage(str(tmp_path / out)), layout="files", worker="w0", lease_seconds=4.0)
        run.Run(prompts, ledger, 4, 4.0).to_the_end()
    alone, killed = kills.content(tmp_path / "alone"), tmp_path / "killed"
    assert set(kills.faults(killed, alone, 8).values()) == {0}
    torn = killed / "images" / "000000" / "00000001-000.png"
    torn.write_bytes(torn.read_bytes()[:-1])
    (killed / ".work" / "left").write_bytes(b"")
    (killed / "job.json").unlink()
    found = kills.faults(killed, alone, 9)
    expected = {"missing": 1, "wrong_sha256": 1, "left_in_work": 1, "files_missing": 1, "files_too_many": 1}
    assert found == {"twice": 0, "files_that_differ": 1, **expected}
