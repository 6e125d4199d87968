"""What the package offers at its top."""

import pytest

from toprovar_jax import scenes


def test_every_public_name_resolves():
    assert all(getattr(scenes, name) is not None for name in scenes.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'pyramid'"):
        _ = scenes.pyramid
