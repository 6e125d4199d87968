"""Prompts to padded token ids, with any ``tokenizer.json``."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from toprovar_jax.errors import UserInputError
from toprovar_jax.shapes import Int

_END_ID, _PAD_ID = 1, 0


@dataclasses.dataclass(frozen=True, eq=False)
class TokenBatch:
    """Tokenized prompts.

    Args:
      ids: int32 token ids, padded at the end.
      lengths: int32 number of tokens per prompt, the end token included.
      truncated: per prompt None, or how many tokens (the end token included) it had before it was cut.
    """

    ids: Int[np.ndarray, "B P"]
    lengths: Int[np.ndarray, " B"]
    truncated: tuple[int | None, ...]


class TextTokenizer:
    """Turns prompts into the ids that a T5 encoder expects: text, then one end token, then padding.

    The end token is the vocabulary's ``</s>`` (id 1 in T5), the padding its ``<pad>`` (id 0). What the file itself
    says about adding tokens, truncating and padding is ignored.

    Args:
      tokenizer: a loaded ``tokenizers.Tokenizer``.
      name: how errors call it; a file name if it came from a file.

    Raises:
      UserInputError: the vocabulary has neither ``</s>`` nor a special token with id 1.
    """

    def __init__(self, tokenizer: Tokenizer, *, name: str = "tokenizer"):
        self.name = name
        # A private copy: truncation and padding are switched off below, which must not reach the caller's object.
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.end_id = self._find_end_id()
        pad_id = self._tokenizer.token_to_id("<pad>")
        self.pad_id = _PAD_ID if pad_id is None else pad_id

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> TextTokenizer:
        """Loads a ``tokenizer.json``.

        Raises:
          UserInputError: the file cannot be read, or is not a tokenizer in the JSON format.
        """
        remedy = "give the tokenizer.json that lies next to the text encoder's weights"
        try:
            text = pathlib.Path(path).read_text(encoding="utf-8")
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise UserInputError(f"tokenizer file {path}", f"cannot be read ({reason})", remedy) from error
        except ValueError as error:  # not UTF-8, or a path that no file system accepts
            raise UserInputError(f"tokenizer file {path!r}", "must be a JSON text file", remedy) from error
        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library has no exception class of its own
            raise UserInputError(f"tokenizer file {path}", "must hold a tokenizer in JSON form", remedy) from error
        return cls(tokenizer, name=str(path))

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included: every id of a batch is below it."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, prompts: Sequence[str], *, max_length: int, strict: bool = False) -> TokenBatch:
        """Token ids of a batch of prompts.

        Args:
          prompts: B texts.
          max_length: P; longer prompts lose their last words, never the end token.
          strict: refuse prompts that are too long instead of cutting them.

        Returns:
          ids ``[B, max_length]``, lengths ``[B]`` and which prompts were cut.

        Raises:
          UserInputError: no prompts; a prompt that is empty, blank, not a string, or without anything the tokenizer
            reads; with ``strict``, a prompt of more than ``max_length`` tokens; ``max_length`` below 2.

        Source: MODEL_SPEC 2.1, "Tokenizer".
        """
        if max_length < 2:
            raise UserInputError(
                f"max_length {max_length}", "must be at least 2 (one token of text and the end token)", "512 is usual"
            )
        _check_prompts(prompts)
        # The end token is appended here, not by the file's own rule: files differ on whether they have one.
        encodings = self._tokenizer.encode_batch(list(prompts), add_special_tokens=False)

        ids = np.full((len(prompts), max_length), self.pad_id, np.int32)
        lengths = np.zeros(len(prompts), np.int32)
        truncated: list[int | None] = []
        for row, (prompt, encoding) in enumerate(zip(prompts, encodings, strict=True)):
            text_ids = encoding.ids
            if not text_ids:
                raise UserInputError(
                    f"prompt {_quote(prompt)}", "must contain at least one word", "describe the picture in words"
                )
            count = len(text_ids) + 1
            if strict and count > max_length:
                raise UserInputError(
                    f"prompt {_quote(prompt)} of {count} tokens",
                    f"must have at most {max_length} tokens, the end token included",
                    "shorten it, or allow it to be cut",
                )
            kept = text_ids[: max_length - 1]
            ids[row, : len(kept)] = kept
            ids[row, len(kept)] = self.end_id
            lengths[row] = len(kept) + 1
            truncated.append(count if count > max_length else None)
        return TokenBatch(ids, lengths, tuple(truncated))

    def _find_end_id(self) -> int:
        end_id = self._tokenizer.token_to_id("</s>")
        if end_id is not None:
            return end_id
        added = self._tokenizer.get_added_tokens_decoder().get(_END_ID)
        if added is not None and added.special:
            return _END_ID
        raise UserInputError(
            self.name,
            "must have the end token </s>, as every T5 tokenizer does",
            "give the tokenizer.json of a T5 model",
        )


def _check_prompts(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str):
        raise UserInputError(f"prompts {_quote(prompts)}", "must be a list of strings", "put the prompt into a list")
    if len(prompts) == 0:
        raise UserInputError("an empty list of prompts", "must hold at least one prompt", "give a prompt")
    for number, prompt in enumerate(prompts, start=1):
        if not isinstance(prompt, str):
            raise UserInputError(f"prompt {number}, {prompt!r}", "must be a string", "describe the picture in words")
        if not prompt.strip():
            raise UserInputError(
                f"prompt {number}, {prompt!r}", "must not be empty or blank", "describe the picture in words"
            )
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserInputError(f"prompt {number}, {prompt!r}", "must be valid Unicode", "use UTF-8 text") from error


def _quote(prompt: str, limit: int = 60) -> str:
    """The prompt as an error shows it: quoted, and cut when it would bury the message."""
    return repr(prompt if len(prompt) <= limit else prompt[:limit] + "...")
