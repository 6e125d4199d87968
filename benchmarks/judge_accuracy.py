"""How right the scenes judge is about renders that it has not seen, in all kinds of condition.

    python benchmarks/judge_accuracy.py [--images 1000] [--weights judge.npz]

Scenes show every kind of object, also those held out from the generators. Objects are matched with detections by their
middles; shape, colour, size and position are counted among the matched. A position is right when it is off by less than
half of ``RELATION_MARGIN``; relations are those of pairs that differ by at least that margin, and right when both
objects are matched and the relation holds as in scoring. Writes ``benchmarks/results/judge_accuracy.json``.
"""

import argparse
import json
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from toprovar_jax.scenes import world
from toprovar_jax.scenes.detector import Detections
from toprovar_jax.scenes.disturbance import DOUBTFUL, GONE, STANDS, Truth, clouds, disturb, nothing, spoil, truth_of
from toprovar_jax.scenes.judge import Judge
from toprovar_jax.scenes.judge_training import PLAIN_STUDIO, one_object_each
from toprovar_jax.scenes.renderer import STUDIO, empty_scene_image, render
from toprovar_jax.scenes.sampling import sample_scenes

TOGETHER = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--weights", help="judge these weights instead of the package's")
    parser.add_argument("--out", type=pathlib.Path, help="write elsewhere")
    options = parser.parse_args()
    judge, count = Judge.load(options.weights), options.images
    noise = lambda key, images: images + 0.05 * jax.random.normal(key, images.shape)
    conditions = {
        "64x64": accuracy(judge, count),
        "64x64, blur of 1 pixel": accuracy(judge, count, change=lambda _, images: blurred(images, 1.0)),
        "64x64, noise of 0.05": accuracy(judge, count, change=noise),
        "64x64, disturbed as in training": accuracy(judge, count, change=disturb),
        "128x128": accuracy(judge, count, 128, 128),
        "256x256": accuracy(judge, count // 2, 256, 256),
        "64x96": accuracy(judge, count, 64, 96),
        "96x64": accuracy(judge, count, 96, 64),
        "72x128": accuracy(judge, count, 72, 128),
        "64x64, plain world of one object": accuracy(judge, count, plain=True),
        "128x128, plain world of one object": accuracy(judge, count // 2, 128, 128, plain=True),
    }
    report = {
        "images": count,
        "conditions": conditions,
        "false_objects": false_objects(judge, count),
        "spoiled": refusal(judge, count),
        "jax": jax.__version__,
    }
    print(json.dumps(report["false_objects"]), json.dumps(report["spoiled"]))
    path = options.out or pathlib.Path(__file__).parent / "results" / "judge_accuracy.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    table(conditions)


def accuracy(
    judge: Judge, count: int, height: int = 64, width: int = 64, *, change: Callable | None = None, plain: bool = False
) -> dict:
    """Shares of objects found and described rightly, and of pictures with the right count."""
    tallies = []
    for key in jax.random.split(jax.random.key(1_000_003), max(1, count // TOGETHER)):
        scene_key, change_key = jax.random.split(key)
        scenes = sample_scenes(scene_key, TOGETHER, held_out=True)
        # The one-object models' world has no rings, which are the last shape.
        scenes = one_object_each(change_key, scenes, len(world.SHAPES) - 1) if plain else scenes
        images = render(scenes, height=height, width=width, studio=PLAIN_STUDIO if plain else STUDIO)
        images = images if change is None else jnp.clip(change(change_key, images), 0.0, 1.0)
        tallies.append(tally(truth_of(scenes), judge(images)))
    totals = {name: np.concatenate([each[name] for each in tallies]) for name in tallies[0]}
    objects, found = totals["objects"], totals["matched"].sum()
    exact = totals["objects"] == totals["detections"]
    share = {"found": found / objects.sum()}
    share |= {name: totals[name].sum() / found for name in ("shape", "colour", "size", "position")}
    relations = totals["relations"].sum()
    share |= {"relations": totals["related"].sum() / relations} if relations else {}
    share |= {"count": exact.mean(), "everything": totals["everything"].mean()}
    by_count = {str(n): exact[objects == n].mean() for n in range(1, world.MAX_OBJECTS + 1) if (objects == n).any()}
    return {
        **{name: round(float(value), 4) for name, value in share.items()},
        "count_by_objects": {name: round(float(value), 4) for name, value in by_count.items()},
        "floor_error": round(float(totals["floor"].sum() / found), 4),
        "centre_error": round(float(totals["centre"].sum() / found), 4),
        "pictures": len(objects),
    }


def tally(truth: Truth, seen: Detections) -> dict[str, np.ndarray]:
    """Counts for each picture: a detection and an object match that are each other's nearest, within its radius."""
    truth = jax.tree.map(np.asarray, truth)
    seen = jax.tree.map(np.asarray, seen)
    present, found = np.asarray(truth.standing) == STANDS, np.asarray(seen.found)
    far = np.linalg.norm(truth.centre[:, :, None] - seen.centre[:, None], axis=-1)
    far = np.where(present[:, :, None] & found[:, None], far, np.inf)
    nearest = far.argmin(axis=2)
    mutual = np.take_along_axis(far.argmin(axis=1), nearest, axis=1) == np.arange(far.shape[1])
    matched = present & mutual & (far.min(axis=2) < truth.radius)

    def own(field: np.ndarray) -> np.ndarray:
        return np.take_along_axis(field, nearest, axis=1)

    right = {name: matched & (own(getattr(seen, name)) == getattr(truth, name)) for name in ("shape", "colour", "size")}
    position = np.take_along_axis(np.asarray(seen.position), nearest[..., None], axis=1)
    floor = np.where(matched, np.linalg.norm(position - truth.position, axis=-1), 0.0)
    right["position"] = matched & (floor < 0.5 * world.RELATION_MARGIN)
    # Of two objects [first, second], whether the first is to the right or behind, along each axis.
    apart = truth.position[:, :, None] - truth.position[:, None]
    plain = (apart >= world.RELATION_MARGIN) & (present[:, :, None] & present[:, None])[..., None]
    shown = position[:, :, None] - position[:, None] >= world.SHOWN_MARGIN
    related = plain & shown & (matched[:, :, None] & matched[:, None])[..., None]
    complete = (present == (right["shape"] & right["colour"] & right["size"])).all(axis=1)
    return {
        "objects": present.sum(axis=1),
        "detections": found.sum(axis=1),
        "matched": matched.sum(axis=1),
        **{name: values.sum(axis=1) for name, values in right.items()},
        "everything": complete & (present.sum(axis=1) == found.sum(axis=1)),
        "relations": plain.sum(axis=(1, 2, 3)),
        "related": related.sum(axis=(1, 2, 3)),
        "floor": floor.sum(axis=1),
        "centre": np.where(matched, far.min(axis=2), 0.0).sum(axis=1),
    }


def false_objects(judge: Judge, count: int) -> dict[str, int]:
    """Objects found where there are none."""
    keys = jax.random.split(jax.random.key(1_000_033), 4)
    floor, grey = empty_scene_image(64, 64), jnp.linspace(0.0, 1.0, count)[:, None, None, None]
    noise = jax.random.normal(keys[0], (count, 64, 64, 3)) * jnp.linspace(0.0, 0.1, count)[:, None, None, None]
    pictures = {
        "floors with noise up to 0.1": jnp.clip(floor[None] + noise, 0.0, 1.0),
        "uniform noise": jax.random.uniform(keys[1], (count, 64, 64, 3)),
        "grey pictures": jnp.broadcast_to(grey, (count, 64, 64, 3)),
        "noise, mosaics, stripes, gradients and clouds": nothing(keys[2], count, 64, 64),
    }
    for name, fall in {"white": 0.0, "1/f": 1.0, "1/f^2": 2.0}.items():
        fields = clouds(keys[3], jnp.full(count, fall), 64, 64)
        for kind, field in {"grey": fields[..., :1], "coloured": fields}.items():
            pictures[f"{kind} {name} clouds"] = jnp.clip(0.5 + 0.2 * jnp.broadcast_to(field, fields.shape), 0.0, 1.0)
    return {name: int(judge(images).found.sum()) for name, images in pictures.items()}


def refusal(judge: Judge, count: int) -> dict[str, float]:
    """Of spoiled pictures: spoiled objects where something is found, intact ones that are found, and where both lie."""
    spoiled, refused, intact, found = 0, 0, 0, 0
    for key in jax.random.split(jax.random.key(1_000_037), max(1, count // TOGETHER)):
        scene_key, spoil_key = jax.random.split(key)
        scenes = sample_scenes(scene_key, TOGETHER, held_out=True)
        images, truth = jax.jit(spoil)(spoil_key, render(scenes, height=64, width=64), truth_of(scenes))
        truth, seen = jax.tree.map(np.asarray, (truth, judge(images)))
        far = np.linalg.norm(truth.centre[:, :, None] - seen.centre[:, None], axis=-1)
        here = (np.where(seen.found[:, None], far, np.inf) < 0.6 * truth.radius[:, :, None]).any(axis=2)
        stands = truth.standing == STANDS
        # Where another object lies near, that one may be what is found.
        gaps = np.linalg.norm(truth.centre[:, :, None] - truth.centre[:, None], axis=-1)
        other = ((stands | (truth.standing == DOUBTFUL))[:, None] & (gaps < truth.radius[:, None])).any(axis=2)
        real = np.concatenate([np.asarray(scenes.present), np.roll(np.asarray(scenes.present), 1, axis=0)], axis=1)
        gone = (truth.standing == GONE) & real & ~other
        spoiled, refused = spoiled + gone.sum(), refused + (gone & ~here).sum()
        intact, found = intact + stands.sum(), found + (stands & here).sum()
    return {
        "refused": round(float(refused / spoiled), 4),
        "spoiled_objects": int(spoiled),
        "intact_found": round(float(found / intact), 4),
        "intact_objects": int(intact),
    }


def blurred(images: jax.Array, sigma: float) -> jax.Array:
    """Blurred by a Gaussian of ``sigma`` pixels; borders keep their brightness."""
    place = np.arange(images.shape[1])
    kernel = np.exp(-0.5 * ((place[:, None] - place[None]) / sigma) ** 2)
    kernel = jnp.asarray(kernel / kernel.sum(axis=1, keepdims=True), jnp.float32)
    return jnp.einsum("ij,bjkc,lk->bilc", kernel, images, kernel)


def table(conditions: dict[str, dict]) -> None:
    """Prints the conditions line by line."""
    columns = ("found", "shape", "colour", "size", "position", "count", "everything")
    print(f"{'':36}" + "".join(f"{name:>11}" for name in columns) + "  count right for 1, 2, ... objects; floor error")
    for name, row in conditions.items():
        by_count = " ".join(f"{value:.3f}" for value in row["count_by_objects"].values())
        print(f"{name:36}" + "".join(f"{row[column]:11.4f}" for column in columns), by_count, row["floor_error"])


if __name__ == "__main__":
    main()
