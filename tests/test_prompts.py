"""Prompt files: what is read, and that every mistake names its line."""

from __future__ import annotations

import pathlib

import pytest

from toprovar_jax.errors import UserInputError
from toprovar_jax.prompts import PromptRequest, read_prompts, with_positive_prompt


@pytest.fixture
def write(tmp_path: pathlib.Path):
    def _write(name: str, content: str | bytes) -> pathlib.Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return _write


def test_text_files_hold_a_prompt_a_line(write):
    path = write("p.txt", "# colours\n\na red sphere\n   \n  ein grüner Würfel  \n")
    assert read_prompts(path) == [
        PromptRequest("a red sphere", origin="p.txt line 3"),
        PromptRequest("ein grüner Würfel", origin="p.txt line 5"),
    ]


def test_byte_order_mark_and_windows_line_ends_are_not_part_of_a_prompt(write):
    path = write("p.txt", b"\xef\xbb\xbfa cube\r\n\r\na cone\r\n")
    assert [request.prompt for request in read_prompts(str(path))] == ["a cube", "a cone"]


def test_lines_may_end_as_on_any_system_and_a_mark_may_start_each(write):
    path = write("p.txt", "a cube\ra cone\r\n\ufeffa ball\n\ufeff\r\r# none\ra ring".encode())
    assert [(request.prompt, request.origin) for request in read_prompts(path)] == [
        ("a cube", "p.txt line 1"),
        ("a cone", "p.txt line 2"),
        ("a ball", "p.txt line 3"),
        ("a ring", "p.txt line 7"),
    ]


def test_exotic_line_separators_stay_inside_a_prompt(write):
    path = write("p.txt", "a cube\u2028on the floor\x0bby a wall\na cone")
    assert [request.prompt for request in read_prompts(path)] == ["a cube\u2028on the floor\x0bby a wall", "a cone"]


def test_json_lines_carry_seeds_and_settings_in_their_final_form(write):
    path = write(
        "P.JSONL",
        '{"prompt": "a", "seed": 3}\n\n{"prompt": "b\\u00e9", "guidance": [3, 1.5], "tau": 1, "num_images": 2,'
        ' "aspect_ratio": "8:6", "negative_prompt": "", "positive_prompt": true}\n',
    )
    assert read_prompts(path) == [
        PromptRequest("a", 3, {}, "P.JSONL line 1"),
        PromptRequest(
            "bé",
            None,
            {
                "guidance": (3.0, 1.5),
                "tau": 1.0,
                "num_images": 2,
                "aspect_ratio": "4:3",
                "negative_prompt": "",
                "positive_prompt": True,
            },
            "P.JSONL line 3",
        ),
    ]


BAD_LINES = {
    "malformed": ('{"prompt": "a"', "p.jsonl line 2: must be a JSON object"),
    "nested without end": ("[" * 100_000, "p.jsonl line 2: must be a JSON object"),
    "endless number": ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "p.jsonl line 2: must be a JSON object"),
    "a list": ('["a"]', "p.jsonl line 2: must be a JSON object, not list"),
    "a comment": ("# colours", "p.jsonl line 2"),
    "no prompt": ('{"seed": 1}', 'p.jsonl line 2: must have the key "prompt"'),
    "empty prompt": ('{"prompt": " "}', "p.jsonl line 2: prompt ' '"),
    "prompt of another type": ('{"prompt": 3}', "p.jsonl line 2: prompt 3"),
    "half a surrogate pair": ('{"prompt": "\\ud800"}', "p.jsonl line 2: prompt"),
    "a zero byte": ('{"prompt": "a\\u0000"}', "p.jsonl line 2: prompt"),
    "unknown key": ('{"prompt": "a", "guidence": 3}', "p.jsonl line 2: key 'guidence': must be one of prompt,"),
    "misspelt key": ('{"prompt": "a", "guidence": 3}', "did you mean guidance"),
    "key given twice": ('{"prompt": "a", "seed": 1, "seed": 2}', "p.jsonl line 2: key 'seed': must not be given twice"),
    "unknown policy": (
        '{"prompt": "a", "policy": "denser"}',
        "p.jsonl line 2: policy: policy 'denser': must be one of",
    ),
    "seed of another type": ('{"prompt": "a", "seed": "1"}', "p.jsonl line 2: seed '1': must be an integer"),
    "fractional seed": ('{"prompt": "a", "seed": 1.5}', "p.jsonl line 2: seed 1.5"),
    "true for a seed": ('{"prompt": "a", "seed": true}', "p.jsonl line 2: seed True"),
    "true for a number": ('{"prompt": "a", "tau": true}', "p.jsonl line 2: tau True"),
    "null": ('{"prompt": "a", "top_p": null}', "p.jsonl line 2: top_p None"),
    "out of range": ('{"prompt": "a", "top_p": 0}', "p.jsonl line 2: top_p 0: must be a number in (0, 1]"),
    "not finite": ('{"prompt": "a", "guidance": NaN}', "p.jsonl line 2: guidance nan"),
    "too large for a float": ('{"prompt": "a", "guidance": 1' + "0" * 400 + "}", "p.jsonl line 2: guidance 1000"),
    "empty list": ('{"prompt": "a", "guidance": []}', "p.jsonl line 2: guidance []"),
    "list of text": ('{"prompt": "a", "guidance": ["3"]}', "p.jsonl line 2: guidance ['3']"),
    "flag of another type": ('{"prompt": "a", "positive_prompt": 1}', "p.jsonl line 2: positive_prompt 1"),
    "illegal ratio": ('{"prompt": "a", "aspect_ratio": "5:1"}', "the nearest are 3:1 and 5:2"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named(case, write):
    line, expected = BAD_LINES[case]
    with pytest.raises(UserInputError) as caught:
        read_prompts(write("p.jsonl", f'{{"prompt": "fine"}}\n{line}\n'))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


BAD_FILES = {
    "empty": ("p.txt", "", "must hold at least one prompt"),
    "only comments": ("p.txt", "# a\n\n", "must hold at least one prompt"),
    "empty jsonl": ("p.jsonl", "\n", "must hold at least one prompt"),
    "another ending": ("p.json", '{"prompt": "a"}', "must end in .txt"),
    "not utf-8": ("p.txt", "a\nb\nWürfel".encode("latin-1"), "p.txt line 3: must be UTF-8 text"),
    "not utf-8 after old line ends": ("p.txt", b"a\rb\r\nc\xff", "p.txt line 3: must be UTF-8 text"),
    "utf-16": ("p.txt", "a cube".encode("utf-16"), "line 1: must be UTF-8 text"),
    "binary": ("p.txt", b"a\nPK\x03\x04\x00\x00", "p.txt line 2: must be text, but holds binary data"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused(case, write):
    name, content, expected = BAD_FILES[case]
    with pytest.raises(UserInputError) as caught:
        read_prompts(write(name, content))
    assert expected in str(caught.value)


def test_files_that_cannot_be_opened_are_refused(tmp_path):
    with pytest.raises(UserInputError, match="no such file"):
        read_prompts(tmp_path / "absent.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(UserInputError, match="is a directory"):
        read_prompts(tmp_path / "folder.txt")


@pytest.mark.parametrize("prompt", ["a woman", "many seasons", "my grandfather's hat"])
def test_positive_prompt_is_appended_once_where_people_are_named(prompt):
    extended = with_positive_prompt(prompt)
    assert extended == (f"{prompt}. very smooth faces, good looking faces, face to the camera, perfect facial features")
    assert with_positive_prompt(extended) == extended


@pytest.mark.parametrize("prompt", ["a red sphere", "A MAN", ""])
def test_positive_prompt_leaves_other_prompts_alone(prompt):
    assert with_positive_prompt(prompt) == prompt
