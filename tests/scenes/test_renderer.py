"""What pictures look like, stated on pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toprovar_jax.errors import UserInputError
from toprovar_jax.scenes.renderer import empty_scene_image, render
from toprovar_jax.scenes.segmentation import segment
from toprovar_jax.scenes.world import COLOURS, SHAPES, Scenes


def one_scene(shape: str, colour: str, position=(0.0, 0.0), size=1.0, yaw=0.5) -> Scenes:
    return Scenes(
        jnp.array([SHAPES.index(shape)], jnp.int32),
        jnp.array([list(COLOURS).index(colour)], jnp.int32),
        jnp.array([position], jnp.float32),
        jnp.array([size], jnp.float32),
        jnp.array([yaw], jnp.float32),
    )


def picture(*args, height=64, width=64, **kwargs) -> np.ndarray:
    return np.asarray(render(one_scene(*args, **kwargs), height=height, width=width)[0])


def box_of(image: np.ndarray) -> list[int]:
    return np.asarray(segment(jnp.asarray(image)[None]).box[0]).tolist()


def test_values_are_finite_and_between_zero_and_one(images):
    assert images.dtype == jnp.float32
    assert np.isfinite(images).all()
    assert (images >= 0).all()
    assert (images <= 1).all()


def test_a_picture_does_not_depend_on_its_batch(scenes, images):
    alone = render(jax.tree.map(lambda field: field[5:6], scenes), height=64, width=64)
    np.testing.assert_array_equal(alone[0], images[5])


def test_away_from_the_object_every_picture_is_the_empty_floor(images):
    same = np.abs(np.asarray(images) - np.asarray(empty_scene_image(64, 64))[None]).max(axis=-1) < 1e-5
    assert same.mean() > 0.6
    assert same[:, 0, :].all()
    assert same[:, :, :2].mean() > 0.9


def test_whole_objects_stay_inside_the_frame(images):
    mask = np.asarray(segment(images).mask)
    border = mask[:, 0].any(1) | mask[:, -1].any(1) | mask[:, :, 0].any(1) | mask[:, :, -1].any(1)
    assert not border.any()


def test_objects_are_large_in_the_picture(images):
    box = np.asarray(segment(images).box)
    widths = box[:, 3] - box[:, 2]
    assert widths.min() >= 17
    assert 22 <= np.median(widths) <= 34


def test_the_floor_is_grey_brightest_in_the_middle_and_without_objects():
    floor = np.asarray(empty_scene_image(64, 64))
    assert np.ptp(floor, axis=-1).max() == 0.0
    assert floor[32, 32, 0] > floor[0, 0, 0] + 0.1


@pytest.mark.parametrize(("height", "width"), [(48, 96), (96, 48), (40, 40)])
def test_other_aspect_ratios_show_the_same_square_and_more_floor(height, width):
    image = picture("cone", "green", height=height, width=width)
    side = min(height, width)
    down, right = (height - side) // 2, (width - side) // 2
    square = picture("cone", "green", height=side, width=side)
    np.testing.assert_allclose(image[down : down + side, right : right + side], square, atol=2e-5)


def test_moving_an_object_moves_its_picture():
    left, right = (box_of(picture("sphere", "red", position=(x, 0.0))) for x in (-0.8, 0.8))
    front, back = (box_of(picture("sphere", "red", position=(0.0, z))) for z in (-0.8, 0.8))
    assert left[3] <= right[2] + 8
    assert front[1] > back[1] + 8


def test_the_shadow_falls_to_the_right_of_the_object():
    darker = np.asarray(empty_scene_image(64, 64)) - picture("cylinder", "red")
    shadow = (darker.min(axis=-1) > 0.12) & (np.ptp(darker, axis=-1) < 0.02)
    middle = np.mean(box_of(picture("cylinder", "red"))[2:])
    assert shadow.any()
    assert np.nonzero(shadow)[1].mean() > middle + 5


def test_a_cube_shows_three_faces_of_clearly_different_brightness():
    image = picture("cube", "yellow", yaw=np.pi / 4, height=128, width=128)
    top, bottom, left, right = (2 * edge for edge in box_of(image[::2, ::2]))
    middle, height, width = (left + right) // 2, bottom - top, right - left
    faces = [
        image[top + height // 4, middle, 0],
        image[top + 2 * height // 3, left + width // 4, 0],
        image[top + 2 * height // 3, right - width // 4, 0],
    ]
    assert faces[0] > faces[1] + 0.15
    assert faces[1] > faces[2] + 0.15


def test_a_cone_is_pointed_and_a_cylinder_is_not():
    for shape, pointed in (("cone", True), ("cylinder", False)):
        mask = np.asarray(segment(jnp.asarray(picture(shape, "blue"))[None]).mask[0])
        rows = mask.sum(axis=1)[mask.any(axis=1)]
        assert (rows[len(rows) // 4] < 0.5 * rows.max()) == pointed


def test_the_top_of_a_cylinder_is_brighter_than_its_side():
    image = picture("cylinder", "green")
    top, bottom, left, right = box_of(image)
    column = image[top:bottom, (left + right) // 2, 1]
    assert column[len(column) // 5] > column[2 * len(column) // 3] + 0.15


def test_supersampling_approaches_the_finely_sampled_picture():
    scene = one_scene("cube", "cyan")
    fine, coarse, rough = (np.asarray(render(scene, height=64, width=64, samples=n)) for n in (6, 2, 1))
    assert np.square(coarse - fine).mean() < 0.5 * np.square(rough - fine).mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 4, "width": 64}, "size 4x64: each side must have at least 8 pixels"),
        ({"height": 64, "width": 64, "samples": 0}, "samples 0: must be at least 1"),
    ],
)
def test_impossible_sizes_are_refused(arguments, message):
    with pytest.raises(UserInputError, match=message):
        render(one_scene("cube", "red"), **arguments)
