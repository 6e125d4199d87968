"""A pickle reader for tensors and plain containers that runs no code from the file or for it.

A pickle is a program for a small stack machine, and the usual machine imports and calls whatever the program names.
This one knows the operations that pickles of tensors in plain containers use, and a short table of names, each with a
function from here that stands in for it; anything else is refused by name. It imports nothing and calls nothing else.
What it allocates is bounded by the length of the pickle and the number of its operations, both limited.
"""

from __future__ import annotations

import pickle
import pickletools
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from convert.pth.known import KNOWN, LONGEST_KEY, Known, MalformedError, Namespace, StorageType
from convert.pth.refusal import WEIGHTS_ONLY, RefusalError, shown
from convert.pth.tensors import Storage

LONGEST = 32 * 2**20
"""Bytes of a pickle. Those of released checkpoints have fewer than one million; the tensors' numbers lie elsewhere."""

_MOST_OPERATIONS = 1_000_000
_LONGEST_INTEGER = 32
_LONGEST_GLOBAL = 200
_MOST_ARGUMENTS = 8


def load(data: bytes, storage_of: Callable[[str, np.dtype | None, int], Storage]) -> Any:
    """The value that a pickle describes.

    Dictionaries of every kind, and namespaces, come as dict; ``torch.Size`` as tuple; types as numpy dtypes; devices as
    text; tensors as :class:`PthTensor`. The value may share parts and refer to itself: the caller looks out for that.

    Args:
      data: the pickle.
      storage_of: the storage for a key, a type (None: every tensor names its own) and a count of numbers; raises
        :class:`RefusalError` if there is none.

    Raises:
      RefusalError: something that is neither a tensor nor a plain value, or a pickle that is damaged or too large.
    """
    if len(data) > LONGEST:
        raise RefusalError(f"has a pickle of more than {LONGEST:,} bytes", WEIGHTS_ONLY)
    machine = _Machine(data, storage_of)
    try:
        return machine.run()
    except (MalformedError, struct.error, IndexError, UnicodeDecodeError):
        raise RefusalError(f"has a damaged pickle (at byte {machine.at:,} of {len(data):,})") from None


class _Machine:
    """The stack, the memo and the position of a pickle that is being read."""

    def __init__(self, data: bytes, storage_of: Callable[[str, np.dtype | None, int], Storage]):
        self.data, self.storage_of, self.at = data, storage_of, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def run(self) -> Any:
        """Every operation until the last, which leaves the value on the stack."""
        for _ in range(_MOST_OPERATIONS):
            code = self.take(1)[0]
            if code == pickle.STOP[0]:
                return self.pop()
            operation = _OPERATIONS.get(code)
            if operation is None:
                name = next((known.name for known in pickletools.opcodes if known.code == chr(code)), f"0x{code:02x}")
                raise RefusalError(f"uses the pickle operation {name}, which no plain value needs", WEIGHTS_ONLY)
            operation(self)
        rule = f"has a pickle of more than {_MOST_OPERATIONS:,} operations"
        raise RefusalError(rule, WEIGHTS_ONLY)

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise MalformedError
        return self.data[start : self.at]

    def number(self, layout: str) -> Any:
        """The number that comes next, in a layout of :mod:`struct`."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        """The text up to the end of the line."""
        stop = self.data.find(b"\n", self.at, self.at + _LONGEST_GLOBAL)
        if stop < 0:
            raise MalformedError
        return self.take(stop + 1 - self.at)[:-1].decode("utf-8")

    def push(self, value: Any) -> None:
        """Puts a value on the stack."""
        self.stack.append(value)

    def pop(self) -> Any:
        """The topmost value, which must lie above the last mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise MalformedError
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        """The values above the last mark, which is taken away."""
        if not self.marks:
            raise MalformedError
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values

    def top(self, kind: type) -> Any:
        """The topmost value, which must be of exactly this kind."""
        value = self.pop()
        if type(value) is not kind:
            raise MalformedError
        self.push(value)
        return value

    def remember(self, index: int) -> None:
        """Notes the topmost value under ``index``."""
        value = self.pop()
        self.memo[index] = value
        self.push(value)

    def recall(self, index: int) -> None:
        """Puts the value noted under ``index`` on the stack."""
        if index not in self.memo:
            raise MalformedError
        self.push(self.memo[index])

    def copy(self, amount: int) -> None:
        """Notes that something is about to be copied, which what is remembered could demand again and again."""
        self.copied += amount
        if self.copied > len(self.data):
            raise MalformedError

    def push_tuple(self, length: int) -> None:
        """Replaces the topmost values by a tuple of them."""
        values = [self.pop() for _ in range(length)]
        self.push(tuple(reversed(values)))

    def push_integer(self) -> None:
        """An integer of any length up to a few words; nothing that a checkpoint counts needs more."""
        length = self.number("<B")
        if length > _LONGEST_INTEGER:
            raise RefusalError(f"has an integer of {length} bytes", WEIGHTS_ONLY)
        self.push(int.from_bytes(self.take(length), "little", signed=True))

    def set_items(self, items: list[Any]) -> None:
        """Adds keys and values, in turn, to the dictionary on top."""
        target = self.top(dict)
        if len(items) % 2:
            raise MalformedError
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Only keys whose hashes are hard to make collide, and which can be part of a tensor's path.
            if type(key) not in (str, int):
                raise RefusalError(f"has a dictionary with a key of type {type(key).__name__}", WEIGHTS_ONLY)
            if len(key) > LONGEST_KEY if type(key) is str else key.bit_length() > 64:
                raise RefusalError("has a dictionary with a key that is too long", WEIGHTS_ONLY)
            if key in target:
                raise RefusalError(f"gives {shown(str(key))} twice in one dictionary")
            target[key] = value

    def extend(self, items: list[Any]) -> None:
        """Adds values to the list on top."""
        self.top(list).extend(items)

    def push_known(self, module: str, name: str) -> None:
        """What stands in for a name."""
        # Protocol 2 writes what is built in under the module that it had in Python 2.
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full not in KNOWN:
            rule = f"refers to {shown(full)[1:-1]}, which is not a plain tensor or container"
            raise RefusalError(rule, WEIGHTS_ONLY)
        self.push(KNOWN[full])

    def push_named(self) -> None:
        """What stands in for the name on the stack."""
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            raise MalformedError
        self.push_known(module, name)

    def reduce(self) -> None:
        """The call of a name: of what stands in for it."""
        arguments, function = self.pop(), self.pop()
        if type(arguments) is not tuple or len(arguments) > _MOST_ARGUMENTS or type(function) is not Known:
            raise MalformedError
        value = function.make(arguments)
        if type(value) is bytes:
            self.copy(len(value))
        self.push(value)

    def build(self) -> None:
        """Attributes for the topmost object: a namespace takes them, those of a dictionary carry no weights."""
        state = self.pop()
        target = self.pop()
        if type(target) not in (dict, Namespace) or type(state) is not dict:
            raise MalformedError
        if type(target) is Namespace:
            self.copy(len(state))
            target.update(state)
        self.push(target)

    def push_storage(self) -> None:
        """The storage that a persistent id names: ``("storage", class, key, device, count)``."""
        match self.pop():
            case ("storage", StorageType(dtype=dtype), str(key), str(), int(count)) if len(key) <= LONGEST_KEY:
                self.push(self.storage_of(key, dtype, count))
            case _:
                raise MalformedError


def _nothing(machine: _Machine) -> None:
    """An operation that changes nothing here."""


_OPERATIONS: dict[int, Callable[[_Machine], Any]] = {
    code[0]: operation
    for code, operation in {
        pickle.PROTO: lambda m: m.take(1),
        pickle.FRAME: lambda m: m.take(8),
        pickle.MARK: lambda m: m.marks.append(len(m.stack)),
        pickle.NONE: lambda m: m.push(None),
        pickle.NEWTRUE: lambda m: m.push(True),
        pickle.NEWFALSE: lambda m: m.push(False),
        pickle.BININT: lambda m: m.push(m.number("<i")),
        pickle.BININT1: lambda m: m.push(m.number("<B")),
        pickle.BININT2: lambda m: m.push(m.number("<H")),
        pickle.LONG1: _Machine.push_integer,
        pickle.BINFLOAT: lambda m: m.push(m.number(">d")),
        pickle.SHORT_BINUNICODE: lambda m: m.push(m.take(m.number("<B")).decode("utf-8")),
        pickle.BINUNICODE: lambda m: m.push(m.take(m.number("<I")).decode("utf-8")),
        pickle.SHORT_BINBYTES: lambda m: m.push(m.take(m.number("<B"))),
        pickle.BINBYTES: lambda m: m.push(m.take(m.number("<I"))),
        pickle.EMPTY_DICT: lambda m: m.push({}),
        pickle.EMPTY_LIST: lambda m: m.push([]),
        pickle.EMPTY_TUPLE: lambda m: m.push(()),
        pickle.TUPLE1: lambda m: m.push_tuple(1),
        pickle.TUPLE2: lambda m: m.push_tuple(2),
        pickle.TUPLE3: lambda m: m.push_tuple(3),
        pickle.TUPLE: lambda m: m.push(tuple(m.pop_to_mark())),
        pickle.APPEND: lambda m: m.extend([m.pop()]),
        pickle.APPENDS: lambda m: m.extend(m.pop_to_mark()),
        pickle.SETITEM: lambda m: m.set_items([m.pop(), m.pop()][::-1]),
        pickle.SETITEMS: lambda m: m.set_items(m.pop_to_mark()),
        pickle.BINPUT: lambda m: m.remember(m.number("<B")),
        pickle.LONG_BINPUT: lambda m: m.remember(m.number("<I")),
        pickle.MEMOIZE: lambda m: m.remember(len(m.memo)),
        pickle.BINGET: lambda m: m.recall(m.number("<B")),
        pickle.LONG_BINGET: lambda m: m.recall(m.number("<I")),
        pickle.GLOBAL: lambda m: m.push_known(m.line(), m.line()),
        pickle.STACK_GLOBAL: _Machine.push_named,
        pickle.REDUCE: _Machine.reduce,
        pickle.NEWOBJ: _Machine.reduce,
        pickle.BUILD: _Machine.build,
        pickle.BINPERSID: _Machine.push_storage,
    }.items()
}
