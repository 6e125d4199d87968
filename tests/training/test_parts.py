"""A run's folder in small files, and put together again."""

import pytest

from toprovar_jax.errors import UserInputError
from toprovar_jax.training.parts import join, split


@pytest.fixture
def packed(tmp_path):
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/model/weights").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "run/metrics.csv").write_text("step,loss\n10,0.5\n")
    written = split(tmp_path / "run", ["model", "metrics.csv", "not there"], tmp_path / "parts", 0.004)
    assert len(written) > 4
    assert max(path.stat().st_size for path in written[:-1]) <= 4000
    return tmp_path / "parts"


def test_what_was_split_is_joined_again(packed, tmp_path):
    assert join(packed, tmp_path / "there")
    assert (tmp_path / "there/model/weights").read_bytes() == bytes(range(256)) * 40
    assert (tmp_path / "there/metrics.csv").read_text() == "step,loss\n10,0.5\n"


def test_the_same_parts_never_replace_what_was_made_since(packed, tmp_path):
    join(packed, tmp_path / "there")
    (tmp_path / "there/metrics.csv").write_text("step,loss\n10,0.5\n20,0.4\n")
    assert not join(packed, tmp_path / "there")
    assert "20,0.4" in (tmp_path / "there/metrics.csv").read_text()
    (tmp_path / "run/metrics.csv").write_text("step,loss\n10,0.5\n20,0.3\n")
    split(tmp_path / "run", ["metrics.csv"], packed, 0.004)
    assert join(packed, tmp_path / "there")
    assert "20,0.3" in (tmp_path / "there/metrics.csv").read_text()


def test_damaged_and_missing_parts_are_refused_before_anything_is_written(packed, tmp_path):
    (packed / "part01.bin").write_bytes(b"cut")
    with pytest.raises(UserInputError, match="is not what was written"):
        join(packed, tmp_path / "there")
    (packed / "part01.bin").unlink()
    with pytest.raises(UserInputError, match="cannot be read"):
        join(packed, tmp_path / "there")
    assert not (tmp_path / "there").exists()
