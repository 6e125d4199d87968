"""Calibration files: what was written is read, what was not written by us is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from toprovar_jax.acceleration import ToProVAR
from toprovar_jax.acceleration.calibration import Calibration
from toprovar_jax.errors import UserInputError

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

CALIBRATION = Calibration(
    model="tiny",
    num_scales=5,
    num_layers=3,
    images=2,
    prompts_sha256="0" * 64,
    date="2026-01-31",
    versions={"toprovar_jax": "0.1.0", "jax": "0.10.2"},
    curves={"salient_share": {"mean": [0.0, 0.5, 0.4], "p5": [0.0, None, 0.4]}},
    profiles={
        "toprovar": {
            "depth_rule": "fixed",
            "depth": 4,
            "tau": 0.45,
            "layer_scores": (0.25, 1.0, 0.5),
            "patterns": ((0.25, 1.0, 0.5), (0.5, 0.5, 0.5)),
            "bucket": None,
        },
        "toprovar-fast": {"skip_last": 1, "sampled": False},
    },
)


@pytest.fixture
def written(tmp_path: pathlib.Path):
    """Writes the calibration with changes: ``written(images=0)``; ``...`` leaves a field out."""

    def write(**changes: Any) -> pathlib.Path:
        fields = {**json.loads(CALIBRATION.to_json()), **changes}
        path = tmp_path / "calibration.json"
        path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))
        return path

    return write


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "calibration.json"
    path.write_text(CALIBRATION.to_json())
    assert Calibration.read(path) == CALIBRATION
    assert Calibration.read(str(path)).to_json() == CALIBRATION.to_json()


def test_a_number_that_json_does_not_have_is_not_written():
    with pytest.raises(ValueError, match="JSON"):
        dataclasses.replace(CALIBRATION, curves={"ratio": float("inf")}).to_json()


def test_a_profile_is_a_policy_for_its_model_and_size(written):
    policy = ToProVAR.from_calibration(written())
    assert policy == ToProVAR(
        depth_rule="fixed",
        depth=4,
        tau=0.45,
        layer_scores=(0.25, 1.0, 0.5),
        patterns=((0.25, 1.0, 0.5), (0.5, 0.5, 0.5)),
        model="tiny",
        num_scales=5,
    )
    assert hash(policy) == hash(ToProVAR.from_calibration(written(), "toprovar"))
    fast = ToProVAR.from_calibration(written(), "toprovar-fast", tau=0.3)
    assert fast == ToProVAR(skip_last=1, tau=0.3, model="tiny", num_scales=5)


def test_whole_numbers_stand_for_shares(written):
    profile = {"alpha_min": 0, "alpha_max": 1, "layer_scores": [0, 1, 0.5]}
    values = Calibration.read(written(profiles={"toprovar": profile})).profiles["toprovar"]
    assert values == {"alpha_min": 0.0, "alpha_max": 1.0, "layer_scores": (0.0, 1.0, 0.5)}
    assert {type(value) for value in (values["alpha_max"], *values["layer_scores"])} == {float}


@pytest.mark.parametrize(
    ("profile", "changes", "expected"),
    [
        (
            "toprovar-fats",
            {},
            "profile of model tiny's calibration: 'toprovar-fats': must be one of toprovar, toprovar-fast",
        ),
        ("toprovar", {"tau": 1.5}, "tau 1.5: must be a number from 0 to 1"),
    ],
)
def test_what_no_profile_can_become_is_refused(profile, changes, expected):
    with pytest.raises(UserInputError, match=expected):
        ToProVAR.from_calibration(CALIBRATION, profile, **changes)


def one_profile(**values: Any) -> dict[str, Any]:
    return {"profiles": {"toprovar": values}}


REFUSED = {
    "another format": ({"format": 2}, "format 2: must be 1; upgrade toprovar_jax"),
    "no format": ({"format": ...}, "format null: must be 1"),
    "a missing field": ({"date": ...}, "must have date"),
    "missing fields": ({"date": ..., "model": ...}, "must have model, date"),
    "an unknown field": ({"colour": 1}, "field 'colour': is not known"),
    "a name that is none": ({"model": 3}, "model 3: must be text"),
    "a count that is text": ({"images": "50"}, 'images "50": must be an integer'),
    "a count that is a fraction": ({"num_layers": 1.5}, "num_layers 1.5: must be an integer"),
    "a count that is true": ({"num_scales": True}, "num_scales true: must be an integer"),
    "no images": ({"images": 0}, "images 0: must be at least 1"),
    "versions without names": ({"versions": ["0.1"]}, 'versions ["0.1"]: must be an object'),
    "a version that is a number": ({"versions": {"jax": 1}}, "versions"),
    "no profiles": ({"profiles": {}}, "no profiles: must hold at least one"),
    "a profile that is a list": ({"profiles": {"toprovar": []}}, "must be an object"),
    "an unknown profile field": (one_profile(speed=2), "profile 'toprovar': field 'speed': is not known"),
    "a profile's own model": (one_profile(model="other"), "field 'model': is not known"),
    "a share that is text": (one_profile(tau="0.4"), "profile 'toprovar': tau \"0.4\": must be a number"),
    "a share that is true": (one_profile(tau=True), "tau true: must be a number"),
    "a share above one": (
        one_profile(alpha_max=1.2),
        "profile 'toprovar': alpha_max 1.2: must be a number from 0 to 1",
    ),
    "shares the wrong way round": (one_profile(alpha_min=0.9, alpha_max=0.2), "must not exceed"),
    "an unknown rule": (one_profile(depth_rule="lt"), 'depth_rule "lt": must be one of le, ge, band, fixed'),
    "a fractional depth": (one_profile(depth=4.5), "depth 4.5: must be an integer"),
    "a bucket that is text": (one_profile(bucket="64"), 'bucket "64": must be an integer or null'),
    "a flag that is a number": (one_profile(sampled=1), "sampled 1: must be true or false"),
    "scores that are one": (one_profile(layer_scores=0.5), "layer_scores 0.5: must be a list"),
    "scores of another model": (one_profile(layer_scores=[0.5, 0.5]), "scores of 2 layers: must have 3"),
    "patterns of another model": (one_profile(patterns=[[0.5, 0.5]]), "scores of 2 layers: must have 3"),
    "patterns that are flat": (one_profile(patterns=[0.5, 0.5]), "patterns [0.5, 0.5]: must be a list"),
    "a score above one": (one_profile(layer_scores=[0.5, 2, 0.5]), "must be numbers from 0 to 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_says_what_cannot_be_is_refused_by_name(case, written):
    changes, expected = REFUSED[case]
    path = written(**changes)
    with pytest.raises(UserInputError) as caught:
        Calibration.read(path)
    message = str(caught.value)
    assert message.startswith(f"calibration {path}")
    assert expected in message
    assert message.count(";") >= 1
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"format": NaN}', b"[" * 100_000], ids=repr)
def test_what_is_not_json_is_refused(content, tmp_path):
    path = tmp_path / "calibration.json"
    path.write_bytes(content)
    with pytest.raises(UserInputError, match=r"must be JSON; delete it and make it again with toprovar calibrate"):
        Calibration.read(path)


def test_what_is_no_object_or_no_file_is_refused(tmp_path):
    path = tmp_path / "calibration.json"
    with pytest.raises(UserInputError, match="no such file or directory"):
        Calibration.read(path)
    with pytest.raises(UserInputError, match="is a directory"):
        Calibration.read(tmp_path)
    path.write_text("[]")
    with pytest.raises(UserInputError, match="must hold one object, not list"):
        Calibration.read(path)


def test_reading_one_imports_neither_jax_nor_numpy(written):
    code = (
        "import sys; from toprovar_jax.acceleration import ToProVAR; "
        f"ToProVAR.from_calibration({str(written())!r}); "
        "print([name for name in ('jax', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
