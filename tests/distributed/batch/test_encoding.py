"""PNG files: any reader gives back the pixels and the recipe."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from toprovar_jax.distributed.batch.encoding import encode_picture, encode_png

RECIPE = {"prompt": "a röd sphere \u2028 球", "seed": 7, "pixels": None, "guidance": [1.0, 2.5]}


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))))
def test_a_reader_gets_back_every_pixel_and_the_recipe(image):
    with Image.open(io.BytesIO(encode_png(image, RECIPE))) as read:
        np.testing.assert_array_equal(np.asarray(read), image)
        assert json.loads(read.info["toprovar"]) == RECIPE
        assert (read.mode, read.info["prompt"]) == ("RGB", RECIPE["prompt"])


def test_smooth_pictures_are_compressed():
    ramp = np.broadcast_to(np.linspace(0, 1, 64, dtype=np.float32)[:, None, None], (64, 64, 3))
    assert len(encode_picture(ramp, {})) < 64 * 64 * 3 / 10
    assert len(encode_picture(ramp.swapaxes(0, 1), {})) < 64 * 64 * 3 / 10


def test_bytes_depend_on_pixels_and_recipe_alone():
    image = np.random.default_rng(0).random((8, 8, 3), np.float32)
    assert encode_picture(image, RECIPE) == encode_picture(image.copy(), dict(RECIPE))
    assert encode_picture(image, RECIPE) != encode_picture(image, RECIPE | {"seed": 8})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_picture_that_is_not_finite_is_refused(value):
    image = np.zeros((4, 4, 3), np.float32)
    image[1, 2] = value
    with pytest.raises(ValueError, match="3 of 48 values of the picture are not finite"):
        encode_picture(image, RECIPE)
