"""Trains the judge on renders, which are drawn as it learns::

    python -m toprovar_jax.scenes.judge_training --out judge.npz

68 thousand pictures: about a quarter of an hour on two CPU cores.

The package's weights were made in three runs, each from where the one before it ended (``--start``): 400 batches of 32
pictures, 1300 more whose last checkpoints were averaged, and ``--steps 400 --seed 1`` as it is here. Until then there
were half as many pictures of nothing, and no clouds among them.
"""

import argparse
import functools
import io
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from toprovar_jax.files import replace_file
from toprovar_jax.scenes import detector, world
from toprovar_jax.scenes.detector import CELL
from toprovar_jax.scenes.disturbance import DOUBTFUL, GONE, STANDS, Truth, disturb, nothing, spoil, truth_of
from toprovar_jax.scenes.judge import Judge
from toprovar_jax.scenes.renderer import STUDIO, Studio, render
from toprovar_jax.scenes.sampling import sample_scenes
from toprovar_jax.scenes.world import Scenes
from toprovar_jax.shapes import Array, Float, Key

#: Pictures drawn in one studio, such groups in a batch (the first is spoiled), and pictures of nothing beside them.
_GROUP, _GROUPS, _NOTHING = 6, 5, 4
#: Sizes of successive batches: most are square.
_FRAMES = ((64, 64),) * 8 + ((64, 96), (96, 64))
_USUAL_STUDIO = 0.35
#: How often a group shows single matt objects of these sizes on an endless floor under a hard light, as the
#: one-object models draw them.
_PLAIN, _PLAIN_SIZES, PLAIN_STUDIO = 0.15, (0.84, 1.06), Studio(STUDIO.light, 0.02, 0.0)
_EMPTY = 0.03
_PEAK_RATE, _WEIGHT_DECAY = 2e-3, 1e-3
_REPORT_EVERY = 100


def training_batch(key: Key[Array, ""], height: int, width: int) -> tuple[Float[Array, "B h w 3"], Truth]:
    """Pictures to learn from, with what is to be found in them. Traceable for static sizes."""
    render_key, spoil_key, nothing_key, disturb_key = jax.random.split(key, 4)
    groups = functools.partial(_group, height=height, width=width)
    images, truth = jax.lax.map(groups, jax.random.split(render_key, _GROUPS))
    spoiled, spoiled_truth = spoil(spoil_key, images[0], jax.tree.map(lambda field: field[0], truth))
    intact, truth = jax.tree.map(lambda field: field[1:].reshape(-1, *field.shape[2:]), (images, truth))
    others = nothing(nothing_key, _NOTHING, height, width)
    truths = [spoiled_truth, _without_neighbours(truth), jax.tree.map(_blank, spoiled_truth)]
    images = disturb(disturb_key, jnp.concatenate([spoiled, intact, others]))
    return images, jax.tree.map(lambda *fields: jnp.concatenate(fields), *truths)


def one_object_each(key: Key[Array, ""], scenes: Scenes, kinds: int = len(world.SHAPES)) -> Scenes:
    """``scenes`` with one matt object each, as the one-object models draw them: large, of the first ``kinds``
    shapes, anywhere in the picture. Traceable.
    """
    size_key, place_key, shape_key = jax.random.split(key, 3)
    low, high = _PLAIN_SIZES
    size = jax.random.uniform(size_key, scenes.size.shape[:1], minval=low, maxval=high)
    near, far = world.depth_range(size)
    across, along = jax.random.uniform(place_key, (2, *size.shape))
    z = near + along * (far - near)
    x = (2.0 * across - 1.0) * world.side_limit(size, z)
    return scenes._replace(
        present=jnp.zeros_like(scenes.present).at[:, 0].set(True),
        shape=jax.random.randint(shape_key, scenes.shape.shape, 0, kinds),
        material=jnp.zeros_like(scenes.material),
        position=scenes.position.at[:, 0].set(jnp.stack([x, z], axis=-1)),
        size=jnp.broadcast_to(size[:, None], scenes.size.shape),
    )


def detection_loss(weights: dict[str, Array], images: Float[Array, "B h w 3"], truth: Truth) -> Float[Array, ""]:
    """How wrong the cells are about ``images``, per object.

    Binary cross-entropy of "an object's middle is here" over all cells but those of doubtful objects; around each
    middle, cross-entropy of shape, colour and size and absolute errors of offset and floor position.
    """
    _, features = detector.feature_maps(weights, images)
    said = detector.heads(weights, features)
    down, right = said["object"].shape[1:]
    half = 0.5 * min(images.shape[1:3])
    cells = detector.cell_centres(down, right, images.shape[1], images.shape[2])
    ways = (truth.centre[:, :, None, None] - cells[None, None]) * (half / CELL)
    distance = jnp.linalg.norm(ways, axis=-1)
    stands = (truth.standing == STANDS)[:, :, None, None]
    distance = jnp.where(stands, distance, jnp.inf)
    owner = distance.argmin(axis=1)
    near = jnp.clip(1.75 - distance.min(axis=1), 0.0, 1.0)
    reach = (truth.radius * (half / CELL) + 1.0)[:, :, None, None]
    doubtful = (truth.standing == DOUBTFUL)[:, :, None, None] & (jnp.linalg.norm(ways, axis=-1) < reach)
    sure = (near > 0.0) | ~doubtful.any(axis=1)

    def own(values: Array) -> Array:
        """The owner's values ``[B, down, right, n]`` of ``[B, O, down, right, n]``."""
        spread = jnp.broadcast_to(values, (*ways.shape[:-1], values.shape[-1]))
        return jnp.take_along_axis(spread, owner[:, None, :, :, None], axis=1)[:, 0]

    def entropy(name: str, truths: Array) -> Array:
        labels = own(truths[:, :, None, None, None])[..., 0]
        return optax.softmax_cross_entropy_with_integer_labels(said[name], labels)

    offset = jnp.abs(said["offset"] - own(ways)).sum(axis=-1)
    residual = own(truth.position[:, :, None, None]) - detector.usual_position(cells)[None]
    floor = jnp.abs(said["floor"] - residual).sum(axis=-1)
    kind = entropy("shape", truth.shape) + entropy("colour", truth.colour) + 0.5 * entropy("size", truth.size)
    here = optax.sigmoid_binary_cross_entropy(said["object"], near)
    objects = jnp.maximum(stands.sum(), 1).astype(jnp.float32)
    described = jnp.sum(near * (kind + 0.5 * offset + floor)) / jnp.maximum(near.sum(), 1.0)
    return jnp.sum(jnp.where(sure, here, 0.0)) / objects + described


def train_judge(seed: int, steps: int, out: pathlib.Path, start: pathlib.Path | None = None) -> None:
    """Trains for ``steps`` batches, from the weights in ``start`` if given, and keeps the latest weights in ``out``."""
    optimizer = optax.adamw(
        optax.warmup_cosine_decay_schedule(0.0, _PEAK_RATE, max(1, steps // 40), steps), weight_decay=_WEIGHT_DECAY
    )

    @functools.partial(jax.jit, static_argnames="frame", donate_argnums=0)
    def step(carry: tuple, key: Array, frame: tuple[int, int]) -> tuple[tuple, Array]:
        weights, state = carry
        images, truth = training_batch(key, *frame)
        loss, gradient = jax.value_and_grad(detection_loss)(weights, images, truth)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its integer step count with floats
            gradient, _ = optax.clip_by_global_norm(5.0).update(gradient, optax.EmptyState())
            updates, state = optimizer.update(gradient, state, weights)
        return (optax.apply_updates(weights, updates), state), loss

    first = detector.initial_weights(seed) if start is None else dict(Judge.load(start).weights)
    weights = jax.tree.map(jnp.asarray, first)
    carry = (weights, optimizer.init(weights))
    began, losses = time.monotonic(), []
    for index in range(steps):
        key = jax.random.fold_in(jax.random.key(seed), index)
        carry, loss = step(carry, key, _FRAMES[index % len(_FRAMES)])
        losses.append(loss)
        if (index + 1) % _REPORT_EVERY == 0 or index + 1 == steps:
            save_weights(out, carry[0])
            mean = float(jnp.stack(losses).mean())
            print(f"{index + 1} batches, {time.monotonic() - began:.0f} s, loss {mean:.4f}", flush=True)
            losses = []


def save_weights(path: pathlib.Path, weights: dict[str, Array]) -> None:
    """Writes weights in half precision; a reader never sees half a file."""
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **{k: np.asarray(v, np.float16) for k, v in weights.items()})
    replace_file(path, content.getbuffer())


def _group(key: Array, *, height: int, width: int) -> tuple[Array, Truth]:
    """``_GROUP`` pictures from one studio, and what is in them; all kinds of objects, of any material."""
    kind_key, scene_key, studio_key = jax.random.split(key, 3)
    plain = jax.random.uniform(kind_key) < _PLAIN
    scenes = _scenes(scene_key, plain)
    return render(scenes, height=height, width=width, studio=_studio(studio_key, plain)), truth_of(scenes)


def _scenes(key: Array, plain: Array) -> Scenes:
    """Scenes whose objects vary more in size than the world's, some of them empty, or with one object each."""
    scene_key, size_key, alone_key, empty_key = jax.random.split(key, 4)
    scenes = sample_scenes(scene_key, _GROUP, held_out=True)
    size = scenes.size * jax.random.uniform(size_key, scenes.size.shape, minval=0.9, maxval=1.1)
    empty = jax.random.uniform(empty_key, (_GROUP, 1)) < _EMPTY
    several = scenes._replace(size=size, present=scenes.present & ~empty)
    return jax.tree.map(lambda one, many: jnp.where(plain, one, many), one_object_each(alone_key, scenes), several)


def _studio(key: Array, plain: Array) -> Studio:
    """The usual studio, another one, or the plain one."""
    usual_key, light_key, size_key, backdrop_key = jax.random.split(key, 4)
    usual = jax.random.uniform(usual_key) < _USUAL_STUDIO
    turned = jnp.asarray(STUDIO.light) + 0.1 * jax.random.normal(light_key, (3,))
    light = jnp.where(usual | plain, jnp.asarray(STUDIO.light), turned)
    light_size = jax.random.uniform(size_key, minval=0.02, maxval=0.3)
    backdrop = jax.random.uniform(backdrop_key)
    return Studio(
        light,
        jnp.where(plain, PLAIN_STUDIO.light_size, jnp.where(usual, STUDIO.light_size, light_size)),
        jnp.where(plain, PLAIN_STUDIO.backdrop, jnp.where(usual, STUDIO.backdrop, backdrop)),
    )


def _without_neighbours(truth: Truth) -> Truth:
    """``truth`` with as many places again for a neighbour's objects, of which there are none."""
    blank = jax.tree.map(jnp.zeros_like, truth)._replace(standing=jnp.full_like(truth.standing, GONE))
    return jax.tree.map(lambda *fields: jnp.concatenate(fields, axis=1), truth, blank)


def _blank(field: Array) -> Array:
    return jnp.zeros((_NOTHING, *field.shape[1:]), field.dtype)


def main() -> None:
    """Trains the judge and writes its weights, also on the way."""
    parser = argparse.ArgumentParser(description="Train the judge of the scenes world on renders.")
    parser.add_argument("--out", metavar="FILE", type=pathlib.Path, required=True, help="where to write the weights")
    parser.add_argument("--start", metavar="FILE", type=pathlib.Path, help="weights to go on from")
    parser.add_argument("--steps", type=int, default=2000, help="batches of 34 pictures")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    train_judge(options.seed, options.steps, options.out, options.start)


if __name__ == "__main__":
    main()
