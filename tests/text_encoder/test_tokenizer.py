import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from toprovar_jax.errors import UserInputError
from toprovar_jax.text_encoder import TextTokenizer, build_word_tokenizer

WORDS = ["a", "red", "blue", "sphere", "cube", "on", "the", "left"]


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer(build_word_tokenizer(WORDS))


def _word_level(vocabulary: list[str], **parts) -> Tokenizer:
    """A tokenizer of another kind than ours, as a stand-in for files that others made."""
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    for name, part in parts.items():
        setattr(made, name, part)
    return made


T5_LIKE = ["<pad>", "</s>", "<unk>", "a", "cube"]


def test_ids_end_with_one_end_token_and_are_padded(tokenizer):
    batch = tokenizer.encode(["a red cube", "a"], max_length=6)
    assert batch.ids.dtype == batch.lengths.dtype == np.int32
    assert batch.ids.tolist() == [[3, 4, 7, 1, 0, 0], [3, 1, 0, 0, 0, 0]]
    assert batch.lengths.tolist() == [4, 2]
    assert batch.truncated == (None, None)


@pytest.mark.parametrize("with_rule", [True, False])
def test_there_is_one_end_token_whether_or_not_the_file_adds_it(with_rule):
    made = _word_level(T5_LIKE)
    if with_rule:
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    assert TextTokenizer(made).encode(["a cube"], max_length=5).ids.tolist() == [[3, 4, 1, 0, 0]]


def test_a_cut_prompt_keeps_its_end_token_and_says_how_long_it_was(tokenizer):
    batch = tokenizer.encode(["a red cube on the left", "a red cube"], max_length=4)
    assert batch.ids.tolist() == [[3, 4, 7, 1], [3, 4, 7, 1]]
    assert batch.lengths.tolist() == [4, 4]
    assert batch.truncated == (7, None)


def test_strict_refuses_what_would_be_cut(tokenizer):
    with pytest.raises(UserInputError, match=r"of 7 tokens: must have at most 4 tokens") as caught:
        tokenizer.encode(["a", "a red cube on the left"], max_length=4, strict=True)
    assert "\n" not in str(caught.value)
    assert tokenizer.encode(["a red cube on the left"], max_length=7, strict=True).lengths.tolist() == [7]


def test_truncation_and_padding_settings_of_the_file_are_ignored():
    made = _word_level(T5_LIKE)
    made.enable_truncation(2)
    made.enable_padding(length=9, pad_id=2, pad_token="<unk>")
    assert TextTokenizer(made).encode(["a a cube"], max_length=6).ids.tolist() == [[3, 3, 4, 1, 0, 0]]
    assert made.truncation is not None, "the caller's tokenizer must stay as it was"


def test_end_and_pad_ids_come_from_the_file():
    made = _word_level(["<unk>", "a", "</s>", "<pad>"])
    assert TextTokenizer(made).encode(["a b"], max_length=5).ids.tolist() == [[1, 0, 2, 3, 3]]


def test_a_special_token_with_id_one_is_the_end_token():
    made = _word_level(["[PAD]", "[END]", "<unk>", "a"])
    made.add_special_tokens(["[PAD]", "[END]"])
    assert TextTokenizer(made).encode(["a"], max_length=3).ids.tolist() == [[3, 1, 0]]


def test_a_vocabulary_without_an_end_token_is_refused():
    with pytest.raises(UserInputError, match=r"tokenizer: must have the end token </s>"):
        TextTokenizer(_word_level(["<unk>", "a", "b"]))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([""], "prompt 1, '': must not be empty or blank"),
        (["a cube", " \t\n"], r"prompt 2, ' \\t\\n': must not be empty or blank"),
        (["..."], r"prompt '\.\.\.': must contain at least one word"),
        (["cube \ud800"], "must be valid Unicode"),
        ([], "must hold at least one prompt"),
        ("a cube", "must be a list of strings"),
    ],
)
def test_refuses_prompts_that_say_nothing(tokenizer, prompts, message):
    with pytest.raises(UserInputError, match=message) as caught:
        tokenizer.encode(prompts, max_length=8)
    assert "\n" not in str(caught.value)


def test_refuses_a_length_without_room_for_text(tokenizer):
    with pytest.raises(UserInputError, match="max_length 1: must be at least 2"):
        tokenizer.encode(["a"], max_length=1)


def test_long_prompts_do_not_flood_the_error(tokenizer):
    with pytest.raises(UserInputError) as caught:
        tokenizer.encode(["cube " * 5000], max_length=8, strict=True)
    assert len(str(caught.value)) < 250


def test_loads_a_saved_file(tmp_path, tokenizer):
    path = tmp_path / "tokenizer.json"
    build_word_tokenizer(WORDS).save(str(path))
    loaded = TextTokenizer.from_file(path)
    prompts = ["A blue sphere!", "zebra 7 ü"]
    np.testing.assert_array_equal(
        loaded.encode(prompts, max_length=12).ids, tokenizer.encode(prompts, max_length=12).ids
    )
    assert loaded.vocab_size == tokenizer.vocab_size


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"\xff\xfe\x00", "must be a JSON text file"),
        (b"not json", "must hold a tokenizer in JSON form"),
        (b'{"model_type": "t5"}', "must hold a tokenizer in JSON form"),
    ],
)
def test_refuses_files_that_are_no_tokenizer(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserInputError, match=message) as caught:
        TextTokenizer.from_file(path)
    assert str(path) in str(caught.value)


def test_refuses_a_folder_and_an_impossible_path(tmp_path):
    with pytest.raises(UserInputError, match="cannot be read"):
        TextTokenizer.from_file(tmp_path)
    with pytest.raises(UserInputError, match="must be a JSON text file"):
        TextTokenizer.from_file("bad\0name")
