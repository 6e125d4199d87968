import pytest

from toprovar_jax.errors import UserInputError, unknown_name


def test_a_message_is_one_line_of_value_rule_and_remedy():
    error = UserInputError("tau 0", "must be\n  positive", "try   0.5")
    assert str(error) == "tau 0: must be positive; try 0.5"
    assert (error.value, error.remedy) == ("tau 0", "try   0.5")
    assert isinstance(error, ValueError)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "infinty-2b",
            "model 'infinty-2b': must be one of infinity-2b, infinity-8b, scenes; did you mean infinity-",
        ),
        ("scene", "did you mean scenes?"),
        ("gpt", "model 'gpt': must be one of infinity-2b, infinity-8b, scenes; choose one of them"),
        (None, "model 'None': must be one of"),
        ("", "model '': must be one of"),
    ],
)
def test_an_unknown_name_is_met_with_the_closest_ones(name, told):
    assert told in str(unknown_name("model", name, ["infinity-2b", "infinity-8b", "scenes"]))


def test_known_names_may_be_any_iterable():
    assert "one of a, b;" in str(unknown_name("policy", "c", (name for name in "ab")))
