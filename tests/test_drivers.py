"""Drivers: one executable per piece, plan and batch size; buffers are handed on, not copied."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toprovar_jax.acceleration import Dense
from toprovar_jax.drivers import Drivers, TokenArrays
from toprovar_jax.generation import make_plan
from toprovar_jax.sampling import Sampling

from .tiny_model import CARD, SCALES, TEXT_LENGTH, networks


@pytest.fixture(scope="module")
def drivers():
    return Drivers(networks())


def plan(guidance: float = 2.0, stop_after: int | None = None):
    return make_plan(
        CARD.schedule("1:1", None),
        Sampling(guidance),
        Dense(),
        num_layers=CARD.transformer.num_layers,
        stop_after=stop_after,
    )


def tokens(batch: int) -> TokenArrays:
    ids = np.arange(batch * TEXT_LENGTH, dtype=np.int32).reshape(batch, TEXT_LENGTH) % 40
    return TokenArrays(ids, np.arange(2, 2 + batch, dtype=np.int32))


def keys(batch: int) -> jax.Array:
    return jax.random.split(jax.random.key(0), batch)


NUMBERS = Sampling(2.0, 1.0, 0, 1.0)


def test_pieces_are_compiled_once_and_reused(drivers):
    numbers = NUMBERS.for_scales(SCALES)
    (first,) = drivers.stepwise(tokens(1), keys(1), numbers, plan())
    pieces = SCALES + 3  # the text, the empty state and the decoder
    assert drivers.num_executables == pieces
    spent = dict(drivers.seconds)
    (again,) = drivers.stepwise(tokens(1), keys(1), numbers, plan())
    assert drivers.num_executables == pieces
    assert drivers.seconds["compile"] == spent["compile"] > 0
    assert all(drivers.seconds[part] > spent[part] for part in ("text", "transformer", "decoder"))
    assert all(np.array_equal(a, b) for a, b in zip(first.bits, again.bits, strict=True))
    # All scales in one is one more; text and decoder serve both ways.
    drivers.fused(tokens(1), keys(1), numbers, plan())
    assert drivers.num_executables == pieces + 1
    # Another plan shares the text and the decoder, not the scales.
    drivers.stepwise(tokens(1), keys(1), numbers, plan(stop_after=1))
    assert drivers.num_executables == pieces + 1 + 2


def test_another_batch_size_is_another_program(drivers):
    before = drivers.num_executables
    (drawn,) = drivers.stepwise(tokens(2), keys(2), NUMBERS.for_scales(SCALES), plan(stop_after=1))
    assert drivers.num_executables == before + 4
    assert drawn.certainty.shape == (2, 1)
    assert np.all((np.asarray(drawn.certainty) >= 0.5) & (np.asarray(drawn.certainty) <= 1))


def test_one_program_and_one_program_per_scale_draw_the_same(drivers):
    arguments = (tokens(1), keys(1), NUMBERS.for_scales(SCALES), plan())
    (stepwise,), fused = drivers.stepwise(*arguments), drivers.fused(*arguments)
    assert all(np.array_equal(a, b) for a, b in zip(stepwise.bits, fused.bits, strict=True))
    np.testing.assert_allclose(stepwise.images, fused.images, atol=1e-5)
    np.testing.assert_allclose(stepwise.certainty, fused.certainty, rtol=1e-5)


def test_the_cache_is_handed_on_in_place(drivers, monkeypatch):
    received = []
    run = Drivers._run

    def spy(self, part, key, function, arguments, **options):
        state = arguments[2] if options.get("donate") else None
        if state is not None:
            received.append((state.memory[0].cache.keys, state.memory[0].cache.keys.unsafe_buffer_pointer()))
        return run(self, part, key, function, arguments, **options)

    monkeypatch.setattr(Drivers, "_run", spy)
    drivers.stepwise(tokens(1), keys(1), NUMBERS.for_scales(SCALES), plan())
    assert len(received) == SCALES
    assert all(cache.is_deleted() for cache, _ in received)
    assert len({pointer for _, pointer in received}) == 1


def test_a_failed_step_leaves_the_drivers_usable(drivers):
    arguments = (tokens(1), keys(1), NUMBERS.for_scales(SCALES), plan())
    (whole,) = drivers.stepwise(*arguments)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drivers.stepwise(*arguments, stop)
    assert jnp.array_equal(drivers.stepwise(*arguments)[0].images, whole.images)


def test_rows_of_chosen_images_keep_their_order():
    some = tokens(3)._replace(negative_ids=tokens(3).ids + 1, negative_lengths=tokens(3).lengths).images([2, 0])
    assert some.lengths.tolist() == [4, 2]
    assert some.negative_ids is not None
    assert np.array_equal(some.negative_ids, tokens(3).ids[[2, 0]] + 1)
    assert tokens(3).images([1]).negative_ids is None
