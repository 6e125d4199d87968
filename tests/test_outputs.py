"""Results: once-only time stays apart from steady time, and arrays are what they say."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from toprovar_jax.outputs import PipelineOutput, Timings


def test_steady_time_is_what_a_warm_picture_costs():
    timings = Timings(load=5.0, compile=20.0, text=0.25, transformer=1.0, decoder=0.5, total=27.0)
    assert timings.steady == 1.75
    assert json.loads(json.dumps(timings.as_dict())) == {
        **{"load": 5.0, "compile": 20.0, "text": 0.25, "transformer": 1.0, "decoder": 0.5},
        **{"total": 27.0, "steady": 1.75},
    }


def test_calls_add_up_but_loading_counts_once():
    first = Timings(load=5.0, compile=20.0, text=1.0, transformer=2.0, decoder=3.0, total=31.0)
    second = Timings(load=5.0, text=1.0, transformer=2.0, decoder=3.0, total=6.0)
    combined = Timings.combined(iter([first, second]), total=40.0)
    assert combined == Timings(load=5.0, compile=20.0, text=2.0, transformer=4.0, decoder=6.0, total=40.0)
    assert Timings.combined([], total=1.0) == Timings(total=1.0)


@pytest.mark.parametrize(
    "images",
    [[Image.new("RGB", (2, 2))], np.zeros((1, 2, 2, 3), np.float32), jnp.zeros((1, 2, 2, 3))],
    ids=["pil", "numpy", "jax"],
)
def test_an_output_holds_each_kind_of_picture_and_cannot_be_changed(images):
    output = PipelineOutput(images, seeds=(3,), prompts=("a",), timings=Timings(), plan=None)
    assert output.images is images
    assert (output.warnings, output.bits) == ((), None)
    with pytest.raises(AttributeError):
        output.seeds = (4,)  # pyright: ignore[reportAttributeAccessIssue]
