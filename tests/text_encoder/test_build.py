import pytest
from tokenizers import Tokenizer

from toprovar_jax.errors import UserInputError
from toprovar_jax.text_encoder import build_word_tokenizer

WORDS = ["a", "red", "Sphere", "cube", "red", "3"]


@pytest.fixture(scope="module")
def tokenizer():
    return build_word_tokenizer(WORDS)


def _ids(tokenizer, text):
    return tokenizer.encode(text).ids


def test_reserved_ids_and_words_come_first(tokenizer):
    vocabulary = ["<pad>", "</s>", "<unk>", "▁a", "▁red", "▁sphere", "▁cube", "▁3"]
    assert [tokenizer.id_to_token(index) for index in range(8)] == vocabulary
    assert tokenizer.get_vocab_size() == 8 + 1 + 26 + 10


@pytest.mark.parametrize(
    "text", ["A Red Sphere.", "a red sphere", " a  red\tsphere ", "a red, sphere!", "Ａ ｒｅｄ-sphere"]
)
def test_case_space_and_punctuation_do_not_matter(tokenizer, text):
    assert _ids(tokenizer, text) == [3, 4, 5, 1]


def test_every_known_word_is_one_token(tokenizer):
    for word in WORDS:
        assert len(_ids(tokenizer, word)) == 2


def test_unknown_words_are_spelled(tokenizer):
    assert tokenizer.encode("a reddish cube").tokens == ["▁a", "▁red", "d", "i", "s", "h", "▁cube", "</s>"]
    assert tokenizer.encode("dog 42").tokens == ["▁", "d", "o", "g", "▁", "4", "2", "</s>"]


def test_unknown_characters_become_unknown_tokens(tokenizer):
    assert tokenizer.encode("red 球").ids[:1] + tokenizer.encode("red 球").ids[-2:] == [4, 2, 1]
    assert 2 not in _ids(build_word_tokenizer(["球"]), "球")


def test_the_saved_file_gives_the_same_ids(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    loaded = Tokenizer.from_file(str(path))
    for text in ("A Red Sphere.", "dog 42", "球"):
        assert _ids(loaded, text) == _ids(tokenizer, text)


def test_text_comes_back(tokenizer):
    assert tokenizer.decode(_ids(tokenizer, "A red Dog.")) == "a red dog"


@pytest.mark.parametrize("words", [[], "red cube", ["red cube"], ["red", ""], ["left-hand"], ["..."]])
def test_refuses_what_is_no_list_of_words(words):
    with pytest.raises(UserInputError):
        build_word_tokenizer(words)
