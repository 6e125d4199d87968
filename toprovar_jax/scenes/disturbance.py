"""What befalls pictures while the judge learns: disturbed, spoiled, or showing nothing of the world at all."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from toprovar_jax.scenes.detector import LARGE_FROM, MIDDLE
from toprovar_jax.scenes.world import COLOURS, Scenes, projected
from toprovar_jax.shapes import Array, Float, Int, Key

#: ``Truth.standing``: an object that must be found, one that must not, and one of which either may be said.
STANDS, GONE, DOUBTFUL = 1, 0, -1

_BLACK = list(COLOURS).index("black")
_SLIGHT_BEND = 0.8
_STRONG_BEND = (3.5, 7.0)
#: An object is melted where the picture around its middle is bent unevenly by this much (pixels of 64, rms).
_MELTED = 2.0
_GRAIN = (32, 16, 8, 4)
#: How many of the pictures of nothing are clouds, how steeply their amplitudes fall with frequency, and their contrast.
_CLOUDS, _STEEPEST, _CONTRAST = 0.4, 2.5, (0.05, 0.35)


class Truth(NamedTuple):
    """The objects of pictures. Lengths are in half shorter sides.

    Attributes:
      standing: ``STANDS``, ``GONE`` or ``DOUBTFUL``.
      shape, colour, size: indices into ``SHAPES``, ``COLOURS``, ``SIZES``.
      position: on the floor, (x, z) in world units.
      centre: where its middle is in the picture, (right, down) from the picture's middle.
      radius: how far it reaches from there.
    """

    standing: Int[Array, "B O"]
    shape: Int[Array, "B O"]
    colour: Int[Array, "B O"]
    size: Int[Array, "B O"]
    position: Float[Array, "B O 2"]
    centre: Float[Array, "B O 2"]
    radius: Float[Array, "B O"]


def truth_of(scenes: Scenes) -> Truth:
    """What is to be seen in the pictures of ``scenes``."""
    centre, unit = projected(scenes.position, MIDDLE * scenes.size)
    standing = jnp.where(scenes.present, STANDS, GONE).astype(jnp.int32)
    size = (scenes.size >= LARGE_FROM).astype(jnp.int32)
    return Truth(standing, scenes.shape, scenes.colour, size, scenes.position, centre, unit * scenes.size)


def disturb(key: Key[Array, ""], images: Float[Array, "B h w 3"]) -> Float[Array, "B h w 3"]:
    """Pictures as a lossy process would leave them; traceable.

    They are bent (up to 0.8 pixels rms), blurred (up to 1.3 pixels), partly replaced by half the resolution, made
    brighter or darker (up to 15 %, each channel up to 4 %), and overlaid with coarse and fine noise; every fourth
    picture by next to nothing of all this.
    """
    batch, height, width, channels = images.shape
    keys = jax.random.split(key, 9)
    amount = (jax.random.uniform(keys[8], (batch, 1, 1, 1)) > 0.25).astype(jnp.float32)

    def uniform(key: Array, low: float, high: float) -> Array:
        return amount * jax.random.uniform(key, (batch, 1, 1, 1), minval=low, maxval=high)

    bent, _ = _bend(keys[0], images, 0.0, _SLIGHT_BEND)
    bent = images + amount * (bent - images)
    sigma = 0.2 + uniform(keys[1], 0.0, 1.1)[:, :, :, 0]
    blurred = jnp.einsum("bij,bjkc,blk->bilc", _gaussian(height, sigma), bent, _gaussian(width, sigma))
    coarse = jax.image.resize(blurred, (batch, height // 2, width // 2, channels), "linear")
    softness = uniform(keys[2], 0.0, 1.0)
    soft = blurred + softness * (jax.image.resize(coarse, images.shape, "linear") - blurred)
    patches = jax.random.normal(keys[3], (batch, height // 8, width // 8, channels))
    stains = jax.image.resize(patches, images.shape, "linear") * uniform(keys[4], 0.0, 0.05)
    noise_key, level_key, tint_key = jax.random.split(keys[5], 3)
    noise = jax.random.normal(noise_key, images.shape) * uniform(level_key, 0.0, 0.06)
    tint = 1.0 + 0.04 * amount * jax.random.uniform(tint_key, (batch, 1, 1, channels), minval=-1.0, maxval=1.0)
    return jnp.clip(soft * (1.0 + uniform(keys[6], -0.15, 0.15)) * tint + stains + noise, 0.0, 1.0)


def spoil(key: Key[Array, ""], images: Float[Array, "B h w 3"], truth: Truth) -> tuple[Float[Array, "B h w 3"], Truth]:
    """Pictures with objects of no known kind, and what still stands in them (``2 O`` places); traceable.

    Each picture is bent by 3.5 to 7 pixels rms of 64, which melts its objects, or is made of itself and its neighbour
    in the batch: joined at a vertical or a horizontal line, which cuts objects, or laid over each other.
    """
    bend_key, kind_key, cut_key = jax.random.split(key, 3)
    batch, height, width, _ = images.shape
    half = 0.5 * min(height, width)
    others, their_truth = jax.tree.map(lambda field: jnp.roll(field, 1, axis=0), (images, truth))
    cut = jax.random.uniform(cut_key, (batch, 1), minval=-0.5, maxval=0.5)
    right = ((jnp.arange(width, dtype=jnp.float32) + 0.5 - 0.5 * width) / half)[None, None, :, None]
    down = ((jnp.arange(height, dtype=jnp.float32) + 0.5 - 0.5 * height) / half)[None, :, None, None]
    bent, field = _bend(bend_key, images, *_STRONG_BEND)
    line = cut[:, :, None, None]
    pictures = [
        bent,
        jnp.where(right < line, images, others),
        jnp.where(down < line, images, others),
        jnp.minimum(images, others),
    ]

    def beside(axis: int) -> tuple[Array, Array]:
        own, theirs = (cut - truth.centre[..., axis]), (their_truth.centre[..., axis] - cut)
        return _cut(own / truth.radius), _cut(theirs / their_truth.radius)

    melted = _melted(truth, field, half)
    standings = [
        (melted, jnp.full_like(melted, GONE)),
        beside(0),
        beside(1),
        (_mixed(truth, their_truth), _mixed(their_truth, truth)),
    ]
    kind = jax.random.choice(kind_key, len(pictures), (batch,), p=jnp.array([0.4, 0.2, 0.2, 0.2]))
    is_kind = [kind == index for index in range(len(pictures))]
    mixed = jnp.select([mask[:, None, None, None] for mask in is_kind], pictures)
    sides = []
    for side, whole in enumerate((truth, their_truth)):
        standing = jnp.select([mask[:, None] for mask in is_kind], [pair[side] for pair in standings])
        sides.append(whole._replace(standing=jnp.where(whole.standing == STANDS, standing, whole.standing)))
    return mixed, jax.tree.map(lambda *fields: jnp.concatenate(fields, axis=1), *sides)


def nothing(key: Key[Array, ""], batch: int, height: int, width: int) -> Float[Array, "B h w 3"]:
    """Pictures of no world: noise of several grains, mosaics, stripes, gradients and clouds; traceable."""
    keys = jax.random.split(key, 8)
    first, last = jax.random.uniform(keys[0], (2, batch, 1, 1, 3))
    angle = jax.random.uniform(keys[1], (batch, 1, 1, 1), maxval=2.0 * jnp.pi)
    right, down = (
        jnp.linspace(-1.0, 1.0, width)[None, None, :, None],
        jnp.linspace(-1.0, 1.0, height)[None, :, None, None],
    )
    along = jnp.cos(angle) * right + jnp.sin(angle) * down
    ramp = 0.5 + 0.35 * along
    frequency = jnp.exp(jax.random.uniform(keys[2], (batch, 1, 1, 1), minval=1.0, maxval=4.0))
    stripes = 0.5 + 0.5 * jnp.sin(frequency * along)
    gradient, striped = (first + share * (last - first) for share in (ramp, stripes))
    shape = (batch, height, width, 3)
    grains = [jax.random.uniform(keys[3], shape)]
    for index, cells in enumerate(_GRAIN):
        coarse = jax.random.uniform(jax.random.fold_in(keys[4], index), (batch, cells, cells, 3))
        grains += [jax.image.resize(coarse, shape, method) for method in ("linear", "nearest")]
    strength = jax.random.uniform(keys[5], (batch, 1, 1, 1))
    textures = [gradient, striped] + [first + strength * (grain - first) for grain in grains]
    kind_key, share_key, fall_key, grey_key, level_key, cloud_key = jax.random.split(keys[6], 6)
    kind = jax.random.randint(kind_key, (batch, 1, 1, 1), 0, len(textures))
    texture = jnp.select([kind == index for index in range(len(textures))], textures)
    fall = jax.random.uniform(fall_key, (batch,), maxval=_STEEPEST)
    fields = clouds(cloud_key, fall, height, width)
    fields = jnp.where(jax.random.bernoulli(grey_key, shape=(batch, 1, 1, 1)), fields[..., :1], fields)
    least, most = _CONTRAST
    level, contrast = jax.random.uniform(level_key, (2, batch, 1, 1, 1))
    cloudy = 0.2 + 0.6 * level + (least + (most - least) * contrast) * fields
    is_cloud = jax.random.bernoulli(share_key, _CLOUDS, (batch, 1, 1, 1))
    return jnp.clip(jnp.where(is_cloud, cloudy, texture), 0.0, 1.0)


def clouds(key: Key[Array, ""], fall: Float[Array, " B"], height: int, width: int) -> Float[Array, "B h w 3"]:
    """Gaussian fields whose amplitudes fall as ``1 / frequency ** fall``, each channel by itself; traceable.

    Their mean is nought and their variance one in each picture and channel; zero is white noise.
    """
    white = jax.random.normal(key, (len(fall), 3, height, width))
    down, right = jnp.fft.fftfreq(height, dtype=jnp.float32), jnp.fft.rfftfreq(width, dtype=jnp.float32)
    frequency = jnp.hypot(down[:, None], right[None])
    # The mean has no frequency; it is taken out.
    weight = jnp.where(frequency > 0.0, jnp.maximum(frequency, 1e-6)[None] ** -fall[:, None, None], 0.0)
    fields = jnp.fft.irfft2(jnp.fft.rfft2(white) * weight[:, None].astype(jnp.complex64), (height, width))
    fields = fields * jax.lax.rsqrt(jnp.mean(fields * fields, axis=(2, 3), keepdims=True))
    return fields.transpose(0, 2, 3, 1)


def _gaussian(side: int, sigma: Float[Array, "B 1 1"]) -> Float[Array, "B side side"]:
    place = jnp.arange(side, dtype=jnp.float32)
    kernel = jnp.exp(-0.5 * ((place[None, :, None] - place[None, None, :]) / sigma) ** 2)
    return kernel / kernel.sum(axis=-1, keepdims=True)


def _bend(
    key: Key[Array, ""], images: Float[Array, "B h w 3"], least: float, most: float
) -> tuple[Float[Array, "B h w 3"], Float[Array, "B h w 2"]]:
    """Moves pixels along a smooth random field of the given strength (pixels rms); also gives the field."""
    field_key, strength_key = jax.random.split(key)
    batch, height, width, _ = images.shape
    knots = [max(2, round(7 * side / min(height, width))) for side in (height, width)]
    field = jax.image.resize(jax.random.normal(field_key, (batch, *knots, 2)), (batch, height, width, 2), "cubic")
    strength = jax.random.uniform(strength_key, (batch, 1, 1, 1), minval=least, maxval=most)
    field = field * (strength / jnp.sqrt(jnp.mean(field * field, axis=(1, 2, 3), keepdims=True)))
    rows, columns = jnp.arange(height, dtype=jnp.float32), jnp.arange(width, dtype=jnp.float32)

    def move(image: Array, shift: Array) -> Array:
        where = [shift[..., 0] + rows[:, None], shift[..., 1] + columns[None, :]]
        planes = [jax.scipy.ndimage.map_coordinates(image[..., c], where, order=1, mode="nearest") for c in range(3)]
        return jnp.stack(planes, axis=-1)

    return jax.vmap(move)(images, field), field


def _melted(truth: Truth, field: Float[Array, "B h w 2"], half: float) -> Int[Array, "B O"]:
    """The standing of objects in a picture bent along ``field``: where it is even, they only moved."""
    batch, height, width, _ = field.shape
    window = 2 * round(0.12 * half) + 1

    def mean(values: Array) -> Array:
        total = jax.lax.reduce_window(values, 0.0, jax.lax.add, (1, window, window, 1), (1, 1, 1, 1), "SAME")
        return total * (1.0 / window**2)

    spread = jnp.maximum(mean(field * field) - jnp.square(mean(field)), 0.0).sum(axis=-1)
    places = truth.centre * half + jnp.array([0.5 * width, 0.5 * height])[None, None]
    columns = jnp.clip(places[..., 0].astype(jnp.int32), 0, width - 1)
    rows = jnp.clip(places[..., 1].astype(jnp.int32), 0, height - 1)
    around = jnp.take_along_axis(spread.reshape(batch, -1), rows * width + columns, axis=1)
    return jnp.where(around > _MELTED**2, GONE, DOUBTFUL).astype(jnp.int32)


def _cut(inside: Float[Array, "B O"]) -> Int[Array, "B O"]:
    """The standing of objects whose middles are this many radii on the shown side of a cut."""
    doubtful = (inside > 0.5) & (inside <= 1.2)
    return jnp.where(inside > 1.2, STANDS, jnp.where(doubtful, DOUBTFUL, GONE)).astype(jnp.int32)


def _mixed(truth: Truth, other: Truth) -> Int[Array, "B O"]:
    """The standing of objects over which another picture is laid: clear of its objects, half covered, or in doubt."""
    gap = jnp.linalg.norm(truth.centre[:, :, None] - other.centre[:, None], axis=-1)
    gap = gap / (truth.radius[:, :, None] + other.radius[:, None])
    gap = jnp.where(other.standing[:, None] == STANDS, gap, jnp.inf)
    # Black hides what it lies over, and one object straight upon another may look like one.
    plain = (truth.colour != _BLACK)[:, :, None] & (other.colour != _BLACK)[:, None] & (gap > 0.25) & (gap < 0.6)
    clear = jnp.all(gap > 1.2, axis=-1)
    return jnp.where(clear, STANDS, jnp.where(plain.any(axis=-1), GONE, DOUBTFUL)).astype(jnp.int32)
