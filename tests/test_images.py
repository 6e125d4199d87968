"""Pictures as PNG files: pixels, recipes, names and contact sheets."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from toprovar_jax.errors import UserInputError
from toprovar_jax.images import RECIPE_CHUNK, file_stem, make_grid, read_recipe, save_png, to_uint8

RECIPE = {"prompt": 'un café — 球 🔴\n"zwei"', "seed": 7, "guidance": [3.0, 1.0], "tau": 0.5, "top_k": None}


def _picture(height: int = 4, width: int = 6, value: int | None = None) -> np.ndarray:
    if value is not None:
        return np.full((height, width, 3), value, np.uint8)
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def _text_of(path) -> dict[str, str]:
    with Image.open(path) as image:
        image.load()
        return dict(image.info)


def test_a_saved_picture_comes_back_pixel_for_pixel(tmp_path):
    path = save_png(_picture(), tmp_path / "new" / "folder", "name", None)
    assert path == tmp_path / "new" / "folder" / "name.png"
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), _picture())


def test_the_recipe_comes_back_exactly_and_unknown_viewers_can_read_its_parts(tmp_path):
    path = save_png(_picture(), tmp_path, "name", RECIPE)
    assert read_recipe(path) == RECIPE
    text = _text_of(path)
    assert (text["prompt"], text["seed"], text["guidance"]) == (RECIPE["prompt"], "7", "[3.0, 1.0]")
    assert "top_k" not in text
    assert json.loads(text[RECIPE_CHUNK]) == RECIPE


def test_without_a_recipe_there_is_no_text(tmp_path):
    path = save_png(_picture(), tmp_path, "name", None)
    assert _text_of(path) == {}
    with pytest.raises(UserInputError, match="carries no recipe"):
        read_recipe(path)


@pytest.mark.parametrize("content", [None, b"", b"not a picture", b"\x89PNG\r\n\x1a\n"])
def test_a_recipe_cannot_be_read_from_what_is_no_png(tmp_path, content):
    path = tmp_path / "x.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserInputError, match="must be a readable PNG"):
        read_recipe(path)


def test_a_truncated_png_is_no_png(tmp_path):
    path = save_png(_picture(64, 64), tmp_path, "name", RECIPE)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserInputError, match="must be a readable PNG"):
        read_recipe(path)


def test_pixels_are_truncated_and_clipped():
    values = np.array([-0.5, 0.0, 0.999 / 255, 1 / 255, 254.99 / 255, 1.0, 1.5], np.float32)
    image = np.broadcast_to(values[None, :, None], (1, 7, 3))
    np.testing.assert_array_equal(to_uint8(image)[0, :, 0], [0, 0, 0, 1, 254, 255, 255])
    assert to_uint8(image[None]).shape == (1, 1, 7, 3)


@pytest.mark.parametrize(
    ("prompt", "slug"),
    [
        ("A red  Sphere!", "a-red-sphere"),
        ("Ein grüner Würfel", "ein-gruner-wurfel"),
        ("../../etc/passwd", "etc-passwd"),
        ("球", "image"),
        ("", "image"),
        ("x" * 200, "x" * 48),
        ("a" * 47 + " b", "a" * 47),
    ],
)
def test_file_names_are_plain_short_ascii(prompt, slug):
    assert file_stem(3, prompt, 12) == f"0003-{slug}-s12"


def test_a_grid_is_as_square_as_possible_and_fills_row_by_row():
    sheet = make_grid([_picture(2, 2, value) for value in (10, 20, 30)])
    assert sheet.shape == (6, 6, 3)
    assert [sheet[0, 0, 0], sheet[0, 4, 0], sheet[4, 0, 0], sheet[4, 4, 0], sheet[2, 0, 0]] == [10, 20, 30, 255, 255]


def test_a_grid_has_the_columns_it_is_given_and_centres_small_pictures():
    sheet = make_grid([_picture(4, 4, 10), _picture(2, 2, 20)], columns=1)
    assert sheet.shape == (10, 4, 3)
    np.testing.assert_array_equal(sheet[6:, :, 0], np.pad(np.full((2, 2), 20), 1, constant_values=255))
    assert make_grid([_picture(4, 4, 10)], columns=5).shape == (4, 4, 3)


def test_a_grid_needs_pictures_and_columns():
    with pytest.raises(UserInputError, match="at least one image"):
        make_grid([])
    with pytest.raises(UserInputError, match="at least one column"):
        make_grid([_picture()], columns=0)
