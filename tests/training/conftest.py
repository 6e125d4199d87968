import jax
import jax.numpy as jnp
import optax
import pytest

from toprovar_jax.config import InfinityConfig
from toprovar_jax.schedule import ScaleSchedule
from toprovar_jax.text_encoder import T5Config
from toprovar_jax.training.transformer import Captions, TransformerTrainer, TransformerTraining


@pytest.fixture(scope="package", autouse=True)
def optax_may_promote():
    """Optax mixes counts and floats; everything of ours stays under strict promotion."""
    original = optax.chain

    def chain(*parts):
        inner = original(*parts)

        def update(*arguments):
            with jax.numpy_dtype_promotion("standard"):
                return inner.update(*arguments)

        return optax.GradientTransformation(inner.init, update)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(optax, "chain", chain)
        yield


@pytest.fixture(scope="session")
def schedule():
    """Grids 1, 2 and 4 across."""
    return ScaleSchedule.of("1:1", 3, token_stride=8)


@pytest.fixture(scope="session")
def tiny_config():
    return InfinityConfig(
        num_layers=2, width=64, num_heads=2, text_width=128, text_length=8, latent_channels=8, block_chunks=1
    )


@pytest.fixture(scope="session")
def tiny_text():
    return T5Config(16, 128, head_dim=8, feed_forward_width=32, num_layers=1, num_heads=2)


@pytest.fixture(scope="session")
def make_trainer(tiny_config, tiny_text, schedule):
    def make(training: TransformerTraining) -> TransformerTrainer:
        return TransformerTrainer(tiny_config, tiny_text, training, schedule)

    return make


@pytest.fixture(scope="session")
def batch():
    """Latents and captions of four samples; prompts of 2 to 5 tokens, padded to 6."""
    latents = jax.random.normal(jax.random.key(3), (4, 4, 4, 8))
    tokens = jax.random.randint(jax.random.key(4), (4, 6), 2, 16)
    return latents, Captions(tokens, jnp.array([2, 3, 4, 5], jnp.int32))
