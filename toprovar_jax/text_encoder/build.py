"""Makes a small T5-style tokenizer for a closed set of words."""

from __future__ import annotations

import string
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from toprovar_jax.errors import UserInputError

# Ids 0, 1, 2: what T5 reserves.
_SPECIAL = ("<pad>", "</s>", "<unk>")
_SPACE = "▁"
# Log probabilities. Spelling a word costs at least two characters, so a whole word always wins.
_WORD_SCORE, _CHARACTER_SCORE = -1.0, -10.0


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[\p{P}\s]+"), " "),
            normalizers.Strip(),
        ]
    )


def build_word_tokenizer(words: Sequence[str]) -> Tokenizer:
    """A unigram tokenizer in which each of ``words`` is one token, and anything else is spelled.

    Case, compatibility forms and punctuation are normalised away ("A Red Sphere." reads as "a red sphere"; a hyphen
    separates). Words outside the list become a word-start token and characters; characters other than a-z, 0-9 and
    those of ``words`` become ``<unk>``. Ids: ``<pad>`` 0, ``</s>`` 1 (appended to every text), ``<unk>`` 2, then the
    words in the given order, then the characters.

    Args:
      words: the closed vocabulary; capitals are lowered, repetitions count once.

    Returns:
      a ``tokenizers.Tokenizer``; its ``save(path)`` writes a ``tokenizer.json``.

    Raises:
      UserInputError: no words, or a word that is empty or that the normaliser would split.
    """
    if isinstance(words, str) or not words:
        raise UserInputError(f"words {words!r}", "must be a list of at least one word", 'for example ["red", "cube"]')
    normalizer = _normalizer()
    normal_words = []
    for word in words:
        normal = normalizer.normalize_str(word)
        if not normal or " " in normal:
            raise UserInputError(
                f"word {word!r}", "must be one word without spaces and punctuation", "split it or leave it out"
            )
        normal_words.append(normal)
    spelled = {_SPACE, *string.ascii_lowercase, *string.digits, *"".join(normal_words)}
    pieces = [(piece, 0.0) for piece in _SPECIAL]
    pieces += [(_SPACE + word, _WORD_SCORE) for word in dict.fromkeys(normal_words)]
    pieces += [(character, _CHARACTER_SCORE) for character in sorted(spelled)]

    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=_SPECIAL.index("<unk>"), byte_fallback=False))
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", _SPECIAL.index("</s>"))]
    )
    tokenizer.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")
    return tokenizer
