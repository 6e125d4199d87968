"""What pictures look like, stated on pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toprovar_jax.errors import UserInputError
from toprovar_jax.scenes import world
from toprovar_jax.scenes.renderer import STUDIO, Studio, empty_scene_image, render
from toprovar_jax.scenes.world import COLOURS, MATERIALS, SHAPES, Scenes
from toprovar_jax.schedule import ASPECT_RATIOS, ScaleSchedule


def scene_of(*objects: dict) -> Scenes:
    """One scene; each object a dict of shape, colour, position, size, material, yaw."""
    count = len(objects)

    def column(name: str, default, dtype):
        return jnp.asarray([[thing.get(name, default) for thing in objects]], dtype)

    return Scenes(
        jnp.ones((1, count), bool),
        jnp.array([[SHAPES.index(thing["shape"]) for thing in objects]], jnp.int32),
        jnp.array([[list(COLOURS).index(thing["colour"]) for thing in objects]], jnp.int32),
        jnp.array([[MATERIALS.index(thing.get("material", "matt")) for thing in objects]], jnp.int32),
        column("position", (0.0, 0.0), jnp.float32),
        column("size", 0.82, jnp.float32),
        column("yaw", 0.5, jnp.float32),
    )


def picture(*objects: dict, height=64, width=64, **kwargs) -> np.ndarray:
    return np.asarray(render(scene_of(*objects), height=height, width=width, **kwargs)[0])


def changed(image: np.ndarray) -> np.ndarray:
    """Where colour differs from the empty studio's: objects, without their grey shadows."""
    difference = image - np.asarray(empty_scene_image(*image.shape[:2]))
    return np.ptp(difference, axis=-1) > 0.1


def box_of(image: np.ndarray) -> list[int]:
    mask = changed(image)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [rows[0], rows[-1] + 1, columns[0], columns[-1] + 1]


def test_values_are_finite_and_between_zero_and_one(images):
    assert images.dtype == jnp.float32
    assert np.isfinite(images).all()
    assert (images >= 0).all()
    assert (images <= 1).all()


def test_a_picture_does_not_depend_on_its_batch(scenes, images):
    alone = render(jax.tree.map(lambda field: field[5:6], scenes), height=64, width=64)
    np.testing.assert_allclose(alone[0], images[5], atol=2e-7)


def test_pictures_drawn_together_equal_those_drawn_one_by_one(scenes):
    from toprovar_jax.scenes import renderer

    some = jax.tree.map(lambda field: field[:6], scenes)
    one_by_one = render(some, height=32, width=32)
    rays = renderer._rays(32, 32, 2)
    studio = renderer._as_arrays(STUDIO)
    together = jax.jit(jax.vmap(lambda scene: renderer._draw(rays, studio, 2, scene)))(some)
    np.testing.assert_allclose(together, one_by_one, atol=2e-3)
    assert np.abs(np.asarray(together) - np.asarray(one_by_one)).mean() < 1e-6


def test_absent_objects_leave_no_trace():
    two = scene_of({"shape": "cube", "colour": "red"}, {"shape": "cone", "colour": "green", "position": (1.2, 1.0)})
    one = render(two._replace(present=jnp.array([[True, False]])), height=64, width=64)
    np.testing.assert_allclose(one[0], picture({"shape": "cube", "colour": "red"}), atol=2e-7)


def test_far_from_objects_every_picture_is_the_empty_studio(images):
    same = np.abs(np.asarray(images) - np.asarray(empty_scene_image(64, 64))[None]).max(axis=-1) < 1e-5
    assert same.mean() > 0.35
    assert same[:, 0, :].all()


def test_whole_objects_stay_inside_the_frame(images):
    masks = np.stack([changed(image) for image in np.asarray(images)])
    assert masks.any(axis=(1, 2)).mean() > 0.8  # black objects are as grey as shadows
    edges = np.concatenate([masks[:, 0], masks[:, -1], masks[:, :, 0], masks[:, :, -1]])
    assert not edges.any()


def test_the_floor_is_grey_and_the_backdrop_brighter_and_bluish():
    studio = np.asarray(empty_scene_image(64, 64))
    assert np.ptp(studio[24:], axis=-1).max() < 1e-6
    assert studio[40, 32, 0] > studio[14, 0, 0] + 0.08
    assert (studio[0, :, 2] > studio[0, :, 0] + 0.05).all()
    assert studio[0].mean() > studio[12].mean() + 0.05


@pytest.mark.parametrize("ratio", ASPECT_RATIOS)
def test_every_aspect_ratio_shows_the_same_square_and_more_around_it(ratio):
    height, width = ScaleSchedule.of(ratio, 5, token_stride=8).pixel_size
    cone = {"shape": "cone", "colour": "green"}
    side = min(height, width)
    down, right = (height - side) // 2, (width - side) // 2
    square = picture(cone, height=side, width=side, samples=1)
    image = picture(cone, height=height, width=width, samples=1)
    np.testing.assert_allclose(image[down : down + side, right : right + side], square, atol=2e-4)


@pytest.mark.parametrize("side", [64, 128, 512])
def test_objects_take_the_same_share_of_every_size(side):
    box = np.asarray(box_of(picture({"shape": "sphere", "colour": "red"}, height=side, width=side))) / side
    np.testing.assert_allclose(box, [0.249, 0.628, 0.310, 0.690], atol=0.02)


def test_moving_an_object_moves_its_picture():
    left, right = (box_of(picture({"shape": "sphere", "colour": "red", "position": (x, 0.0)})) for x in (-0.8, 0.8))
    front, back = (box_of(picture({"shape": "sphere", "colour": "red", "position": (0.0, z)})) for z in (-0.8, 0.8))
    assert right[2] - left[2] > 20
    assert front[1] > back[1] + 8


def test_the_nearer_object_hides_the_farther_one():
    far = {"shape": "cube", "colour": "yellow", "position": (0.0, 1.2)}
    near = {"shape": "cube", "colour": "blue", "position": (0.0, -0.6)}
    both = picture(far, near)
    np.testing.assert_array_equal(both, picture(near, far))
    blue = changed(picture(near)) & (picture(near)[..., 2] > picture(near)[..., 0] + 0.15)
    hidden = np.isclose(both[blue], picture(near)[blue], atol=1e-5).all(axis=-1)
    assert hidden.mean() > 0.9  # the cube's outermost pixels are partly yellow
    assert (both[~blue][:, 0] > both[~blue][:, 2] + 0.3).any()


def test_the_shadow_falls_to_the_right_on_the_floor_and_on_other_objects():
    red = {"shape": "cylinder", "colour": "red", "position": (-0.9, 0.0)}
    darker = np.asarray(empty_scene_image(64, 64)) - picture(red)
    shadow = (darker.min(axis=-1) > 0.12) & (np.ptp(darker, axis=-1) < 0.02)
    assert shadow.any()
    assert np.nonzero(shadow)[1].mean() > np.mean(box_of(picture(red))[2:]) + 5
    right = {"shape": "cube", "colour": "yellow", "position": (0.75, 0.35), "yaw": 0.8}
    yellow = changed(picture(right)) & ~changed(picture(red))
    fall = picture(right)[yellow].max(axis=-1) - picture(red, right)[yellow].max(axis=-1)
    assert fall.max() > 0.1


def test_shadows_grow_softer_with_the_light():
    def edges(light_size: float) -> float:
        image = picture(
            {"shape": "cylinder", "colour": "red", "position": (-0.6, 0.0)},
            height=128,
            width=128,
            studio=Studio(STUDIO.light, light_size, 0.0),
        )
        grey = np.where(np.ptp(image, axis=-1) < 0.02, image[..., 0], np.nan)
        return float(np.nanmax(np.abs(np.diff(grey, axis=1))))

    assert edges(0.02) > 1.5 * edges(0.4)


def test_without_backdrop_the_floor_goes_on():
    image = picture({"shape": "cube", "colour": "red"}, studio=Studio(STUDIO.light, 0.1, 0.0))
    assert np.ptp(image[0], axis=-1).max() < 1e-6


def test_a_cube_shows_three_faces_of_clearly_different_brightness():
    image = picture({"shape": "cube", "colour": "yellow", "yaw": np.pi / 4}, height=128, width=128)
    top, bottom, left, right = box_of(image)
    middle, height, width = (left + right) // 2, bottom - top, right - left
    faces = [
        image[top + height // 4, middle, 0],
        image[top + 2 * height // 3, left + width // 4, 0],
        image[top + 2 * height // 3, right - width // 4, 0],
    ]
    assert faces[0] > faces[1] + 0.15
    assert faces[1] > faces[2] + 0.15


def test_a_cone_is_pointed_a_cylinder_is_not_and_a_ring_has_a_hole():
    for shape, pointed in (("cone", True), ("cylinder", False)):
        mask = changed(picture({"shape": shape, "colour": "blue"}, height=128, width=128))
        rows = mask.sum(axis=1)[mask.any(axis=1)]
        assert (rows[len(rows) // 4] < 0.6 * rows.max()) == pointed
    image = picture({"shape": "torus", "colour": "red"}, height=128, width=128)
    top, bottom, left, right = box_of(image)
    hole = ~changed(image)[top:bottom, (left + right) // 2]
    assert hole[len(hole) // 4 : -len(hole) // 4].sum() >= 4


def test_metal_has_highlights_and_contrast_that_matt_has_not():
    matt, metal = (
        picture({"shape": "sphere", "colour": "green", "material": material}, height=128, width=128)
        for material in MATERIALS
    )
    ball = changed(matt)
    assert metal[ball].min(axis=-1).max() > matt[ball].min(axis=-1).max() + 0.2  # a white spot
    assert metal[ball][:, 1].std() > 1.2 * matt[ball][:, 1].std()
    floor = ~ball & ~changed(metal)
    assert np.abs(metal[floor] - matt[floor]).mean() < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_projected_positions_are_where_objects_are(shape):
    for place in ((-0.9, 1.5), (0.7, -0.6)):
        box = np.asarray(box_of(picture({"shape": shape, "colour": "red", "position": place}, height=128, width=128)))
        seen, unit = world.projected(jnp.array([place]), jnp.array([0.5 * 0.82]))
        middle = 64 * (1 + np.asarray(seen[0]))
        assert abs(middle[0] - (box[2] + box[3]) / 2) < 3
        assert box[0] < middle[1] < box[1]
        assert abs((box[3] - box[2]) - 128 * float(unit[0]) * 0.82) < 0.25 * 128 * float(unit[0]) * 0.82


def test_supersampling_approaches_the_finely_sampled_picture():
    scene = scene_of({"shape": "cube", "colour": "cyan"}, {"shape": "torus", "colour": "red", "position": (-1.5, -0.5)})
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
        render(scene_of({"shape": "cube", "colour": "red"}), **arguments)
