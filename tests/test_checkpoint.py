import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from toprovar_jax.checkpoint import Checkpoints
from toprovar_jax.errors import UserInputError


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path / "run" / "checkpoints")
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def mesh():
    return jax.make_mesh((4, 2), ("data", "model"))


def tree(offset: float = 0.0):
    return {
        "weights": jnp.arange(32, dtype=jnp.float32).reshape(8, 4) + offset,
        "half": {"scale": jnp.full((4,), 1.5 + offset, jnp.bfloat16)},
        "step": jnp.array(7, jnp.int32),
    }


def blank(source):
    return jax.tree.map(jnp.zeros_like, source)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_what_was_saved_is_restored(checkpoints):
    checkpoints.save(3, tree())
    assert_same(checkpoints.restore(blank(tree())), tree())


def test_a_new_folder_has_no_checkpoint(checkpoints):
    assert checkpoints.latest_step is None
    with pytest.raises(UserInputError, match=r"must be one that is there \(there is none\)"):
        checkpoints.restore(tree())


def test_the_newest_few_are_kept_and_the_newest_is_the_default(checkpoints):
    for step in (1, 2, 10):
        checkpoints.save(step, tree(step))
    assert checkpoints.latest_step == 10
    assert_same(checkpoints.restore(blank(tree())), tree(10))
    assert_same(checkpoints.restore(blank(tree()), 2), tree(2))
    with pytest.raises(UserInputError, match=r"checkpoint 1 in .*: must be one that is there \(2, 10\)"):
        checkpoints.restore(tree(), 1)


def test_how_many_are_kept_is_the_callers_choice(tmp_path):
    opened = Checkpoints(tmp_path, keep=1)
    for step in (1, 2):
        opened.save(step, tree(step))
    opened.close()
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_another_process_finds_them_again(checkpoints, tmp_path):
    checkpoints.save(4, tree(4))
    again = Checkpoints(tmp_path / "run" / "checkpoints")
    assert again.latest_step == 4
    assert_same(again.restore(blank(tree())), tree(4))
    again.close()


def test_shardings_and_dtypes_are_those_of_the_tree_that_asks(checkpoints, mesh):
    rows = NamedSharding(mesh, PartitionSpec("data"))
    both = NamedSharding(mesh, PartitionSpec("data", "model"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    saved = {"weights": jax.device_put(tree()["weights"], rows), "half": jax.device_put(tree()["half"], everywhere)}
    checkpoints.save(1, saved)

    wanted = {
        "weights": jax.device_put(jnp.zeros((8, 4), jnp.bfloat16), both),
        "half": {"scale": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=everywhere)},
    }
    restored = checkpoints.restore(wanted)
    assert restored["weights"].sharding == both
    assert restored["weights"].dtype == jnp.bfloat16
    assert {shard.data.shape for shard in restored["weights"].addressable_shards} == {(2, 2)}
    assert len(restored["weights"].sharding.device_set) == 8
    np.testing.assert_array_equal(restored["weights"].astype(jnp.float32), tree()["weights"])
    assert restored["half"]["scale"].sharding == everywhere
    assert restored["half"]["scale"].dtype == jnp.float32
    np.testing.assert_array_equal(restored["half"]["scale"], 1.5)


def test_parameters_of_modules_are_trees_too(checkpoints):
    def parameters(seed):
        return nnx.to_pure_dict(nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(seed))))

    checkpoints.save(1, parameters(0))
    assert_same(checkpoints.restore(parameters(1)), parameters(0))


def test_a_checkpoint_that_was_not_finished_does_not_count(checkpoints, tmp_path):
    checkpoints.save(1, tree(1))
    checkpoints.close()
    folder = tmp_path / "run" / "checkpoints"
    (folder / "2.orbax-checkpoint-tmp").mkdir()
    again = Checkpoints(folder)
    assert again.latest_step == 1
    again.close()
