"""What a pipeline refuses: one line each, before anything is computed."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from toprovar_jax import InfinityPipeline
from toprovar_jax.errors import UserInputError

from .tiny_model import TEXT_LENGTH, write_tiny_model

PROMPT = "a red sphere"
BATCH = ["a red sphere", "a", "the blue cube on the left", "a cone"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def cold(folder):
    """A pipeline that is never asked for a picture."""
    return InfinityPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("", {}, ["prompt ''", "text"]),
        ("  \n", {}, ["prompt"]),
        ([], {}, ["prompt list", "empty"]),
        (["a", ""], {}, ["prompt ''"]),
        ("\ud800", {}, ["prompt", "text"]),
        ("!?", {}, ["!?", "word"]),
        (PROMPT, {"policy": "fastest"}, ["policy 'fastest'", "dense"]),
        (PROMPT, {"aspect_ratio": "5:1"}, ["5:1", "nearest", "3:1", "5:2"]),
        (PROMPT, {"aspect_ratio": "wide"}, ["aspect", "wide"]),
        (PROMPT, {"pixels": "1M"}, ["1M", "tiny", "less"]),
        (PROMPT, {"pixels": "les"}, ["did you mean less"]),
        (PROMPT, {"guidance_scale": [1.0, 2.0]}, ["guidance list of 2", "3 at this size"]),
        (PROMPT, {"guidance_scale": []}, ["guidance"]),
        (PROMPT, {"guidance_scale": -1.0}, ["guidance -1.0", ">= 0"]),
        (PROMPT, {"guidance_scale": float("nan")}, ["guidance nan"]),
        (PROMPT, {"tau": 0.0}, ["tau 0.0", "> 0"]),
        (PROMPT, {"tau": [1.0, 1.0, -1.0]}, ["tau", "> 0"]),
        (PROMPT, {"tau": [1.0] * 4}, ["tau list of 4", "3 at this size"]),
        (PROMPT, {"tau": float("inf")}, ["tau inf"]),
        (PROMPT, {"top_p": 0.0}, ["top_p 0.0", "(0, 1]"]),
        (PROMPT, {"top_p": 1.01}, ["top_p 1.01", "(0, 1]"]),
        (PROMPT, {"top_k": -1}, ["top_k -1"]),
        (PROMPT, {"top_k": 1.5}, ["top_k 1.5"]),
        (PROMPT, {"seed": -1}, ["seed -1"]),
        (PROMPT, {"seed": 2**32}, ["seed 4294967296"]),
        (PROMPT, {"seed": True}, ["seed True"]),
        (PROMPT, {"seed": np.array([True])}, ["seed True"]),
        (PROMPT, {"seed": 1.0}, ["seed 1.0"]),
        (PROMPT, {"seed": [1, 2]}, ["list of 2 seeds", "one per prompt (1)"]),
        (PROMPT, {"seed": []}, ["list of 0 seeds"]),
        (PROMPT, {"seed": np.array([[1]])}, ["seed [1]"]),
        (BATCH, {"seed": [1]}, ["list of 1 seeds", "one per prompt (4)", "one integer"]),
        (PROMPT, {"num_images_per_prompt": 0}, ["num_images_per_prompt 0"]),
        (PROMPT, {"num_images_per_prompt": 1.5}, ["num_images_per_prompt 1.5"]),
        (PROMPT, {"stop_after_scale": 0}, ["stop_after_scale 0"]),
        (PROMPT, {"stop_after_scale": 4}, ["4", "1 to 3"]),
        (BATCH, {"negative_prompt": ["a", "b"]}, ["2 negative prompts", "one per prompt (4)"]),
        (BATCH[:2], {"negative_prompt": ["a", ""]}, ["negative_prompt", "empty"]),
        (PROMPT, {"negative_prompt": []}, ["negative_prompt list"]),
        ("a " * 40, {"strict": True}, [f"at most {TEXT_LENGTH}", "41 tokens"]),
        (PROMPT, {"negative_prompt": "a " * 40, "strict": True}, ["negative_prompt", "41 tokens"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input_is_refused_in_one_line_before_anything_is_computed(cold, compiled, prompt, options, words):
    with pytest.raises(UserInputError) as refused:
        cold(prompt, **options)
    message = str(refused.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []
    assert cold.drivers.num_executables == 0
    assert compiled == []


WRONG_TYPES = """
import json, sys
import jax
from toprovar_jax import InfinityPipeline
from toprovar_jax.errors import UserInputError

def ask(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except UserInputError as error:
        return str(error)
    except Exception as error:
        return repr(error)

folder = sys.argv[1]
load = InfinityPipeline.from_pretrained
before = [ask(load, 3), ask(load, b"tiny"), ask(load, folder, precision="half"), ask(load, folder, precision=16)]
pipe = load(folder)
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None
)
prompt = "a red sphere"
wrong = {
    "prompt": [None, 3, b"a red sphere", {"prompt": prompt}, [prompt, None], [[prompt]]],
    "negative_prompt": [3, b"a", [None], {"a": 1}],
    "seed": ["7", None, 1.5, [1.5], {"seed": 1}, b"7", "seven", 1j],
    "num_images_per_prompt": ["2", None, True, [1]],
    "policy": [None, 3, ["dense"], {}],
    "guidance_scale": ["3", {}, [[1.0] * 3], [None] * 3, True, 1j],
    "tau": ["1", {}, [True] * 3],
    "top_k": ["1", [1], 1j],
    "top_p": ["1", [1.0], True],
    "aspect_ratio": [None, 1, (1, 1), ["1:1"]],
    "pixels": [64, ["tiny"], {}],
    "stop_after_scale": ["1", 1.5, True],
    "output_type": ["jpeg", None, ["pil"]],
    "callback_on_scale_end": ["print", 3],
}
answers = [
    [name, repr(value), ask(pipe, **({"prompt": prompt} | {name: value}))]
    for name, values in wrong.items()
    for value in values
]
print(json.dumps([before, answers, len(compiled), pipe.drivers.num_executables]))
"""


def test_values_of_another_type_are_refused_in_one_line_too(folder):
    # In a Python of its own: in this one every annotation is checked, and would refuse them first.
    ran = subprocess.run([sys.executable, "-c", WRONG_TYPES, str(folder)], capture_output=True, text=True, check=True)
    before, answers, compiled, executables = json.loads(ran.stdout)
    assert ["must be" in (answer or "") and "\n" not in answer for answer in before] == [True] * len(before)
    shrugged = [
        (name, value, answer)
        for name, value, answer in answers
        if not answer or "\n" in answer or name.removesuffix("_scale") not in answer or "must be" not in answer
    ]
    assert shrugged == []
    assert (compiled, executables) == (0, 0)


def test_an_unknown_option_is_refused_with_a_suggestion(cold):
    with pytest.raises(UserInputError, match="did you mean guidance_scale"):
        cold("a red cone", guidance_scal=2.0)


@pytest.mark.parametrize("option", [{"tau": 1e-39}, {"tau": 1e39}, {"guidance_scale": 1e39}, {"tau": [1.0, 1.0, 1e-6]}])
def test_numbers_that_float32_cannot_carry_are_refused(cold, option):
    with pytest.raises(UserInputError, match="must be from"):
        cold.resolve("a red cone", **option)


@pytest.mark.parametrize("size", [0, -1])
def test_warmup_names_a_bad_batch_size(cold, size):
    with pytest.raises(UserInputError, match="batch_size"):
        cold.warmup(batch_size=size)


def test_options_beside_a_resolved_request_are_refused(cold):
    with pytest.raises(UserInputError, match="options seed, tau: belong to resolve"):
        cold(cold.resolve(PROMPT), seed=1, tau=2.0)
