"""A run that takes a while, for tests that end it from outside: ``python counting_run.py DIRECTORY STEPS PAUSE``."""

import sys
import time

import jax
import jax.numpy as jnp

from toprovar_jax.training.loop import LoopConfig, run


@jax.jit
def update(state, number):
    drawn = jax.random.normal(jax.random.fold_in(jax.random.key(0), number), (4,))
    loss = jnp.mean(jnp.square(state["weights"] - drawn))
    return {"weights": 0.9 * state["weights"] + 0.1 * drawn, "step": state["step"] + 1}, {"loss": loss}


def main(directory, steps, pause):
    def step(state, number):
        time.sleep(pause)
        return update(state, number)

    start = {"weights": jnp.zeros(4), "step": jnp.zeros((), jnp.int32)}
    config = LoopConfig(directory, steps, checkpoint_minutes=0.1 / 60, log_every=1, evaluate_every=10_000)
    run(start, step, config)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
