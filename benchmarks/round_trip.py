"""The ceiling of the embedded model: real renders through its image tokenizer, scored by the scenes judge.

    python benchmarks/round_trip.py [--images 256]

Writes ``benchmarks/results/round_trip.json``.
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from toprovar_jax.hub import embedded_folder
from toprovar_jax.image_tokenizer import encode_scales
from toprovar_jax.loading import load_model
from toprovar_jax.scenes.judge import Judge
from toprovar_jax.scenes.renderer import render
from toprovar_jax.scenes.world import sample_scenes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    count = parser.parse_args().images
    model = load_model(embedded_folder(), precision="exact", with_encoder=True)
    schedule = model.card.schedule("1:1", None)
    scenes = sample_scenes(jax.random.key(4242), count)
    height, width = schedule.pixel_size
    images = render(scenes, height=height, width=width)

    @jax.jit
    def round_trip(tokenizer, batch):
        return tokenizer.decode(encode_scales(tokenizer.encode(batch), schedule.latent_grids).latents)

    decoded = jnp.concatenate([round_trip(model.networks.image_tokenizer, part) for part in jnp.split(images, 8)])
    verdicts = Judge.load()(decoded)
    found, shape, colour = (np.asarray(part) for part in (verdicts.found, verdicts.shape, verdicts.colour))
    error = jnp.mean(jnp.square(decoded - images), axis=(1, 2, 3))
    report = {
        "model": model.card.name,
        "images": count,
        "psnr": round(float(jnp.mean(-10 * jnp.log10(error))), 2),
        "found": int(found.sum()),
        "shape_right": int((found & (shape == np.asarray(scenes.shape))).sum()),
        "colour_right": int((found & (colour == np.asarray(scenes.colour))).sum()),
        "jax": jax.__version__,
    }
    path = pathlib.Path(__file__).parent / "results" / "round_trip.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
