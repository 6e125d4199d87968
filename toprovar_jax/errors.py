"""The one error that a user's mistake raises, and the words it is made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserInputError(ValueError):
    """Something the user gave that cannot be used; raised before any device work.

    Args:
      value: what was given, as the user would recognise it (``"aspect ratio 5:1"``).
      rule: what was expected (``"must be one of the 15 templates"``).
      remedy: what to do instead (``"nearest: 3:1, 5:2"``).

    The message is a single line ``value: rule; remedy``. Commands print it and exit with status 2.
    """

    def __init__(self, value: str, rule: str, remedy: str):
        self.value, self.rule, self.remedy = value, rule, remedy
        super().__init__(" ".join(f"{value}: {rule}; {remedy}".split()))


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UserInputError:
    """The error for a ``name`` that is not among ``known``; suggests the closest ones first."""
    names = list(known)
    close = difflib.get_close_matches(str(name), names, n=2, cutoff=0.6)
    remedy = f"did you mean {' or '.join(close)}?" if close else "choose one of them"
    return UserInputError(f"{kind} {str(name)!r}", f"must be one of {', '.join(names)}", remedy)
