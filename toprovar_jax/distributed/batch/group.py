"""Processes that run one program together: the leader decides what is next, the others learn it from him."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Group(Protocol):
    """The processes that share one model.

    Attributes:
      leader: whether this process claims work and commits it.
    """

    leader: bool

    def agree(self, message: bytes | None) -> bytes:
        """The leader's message, on every member; the others pass None. All members call it equally often."""
        ...


class SingleProcess:
    """A group of one."""

    leader = True

    def agree(self, message: bytes | None) -> bytes:
        """The message itself."""
        if message is None:
            raise ValueError("the leader of a group must have a message")
        return message
