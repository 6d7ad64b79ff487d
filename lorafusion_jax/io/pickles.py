"""Read pickles as plain data: nothing that a pickle names is imported, called or changed.

Python's own unpickler cannot be bounded: a few bytes can make it allocate gigabytes or hash without end. This one
supports the opcodes that protocols 2 to 5 use for tensors. Every opcode takes bounded time and memory. Nested values of
a file are never hashed, compared or printed. The results are strings, numbers, tuples, lists, `Dict`, `Global`, and the
return values of the two callbacks.
"""

import pickle
import struct
from collections.abc import Callable, Collection
from mmap import mmap
from typing import Any, NoReturn

# A tensor takes about 30 opcodes, so this allows 35,000 tensors.
_MAX_OPCODES = 1 << 20
_MAX_STRING = 1 << 16
_MAX_NAME = 200
_ORDERED_DICT = "collections.OrderedDict"


class Refused(Exception):
    """A file is intact but cannot be read, or must not be."""


class Global:
    """The name of a class or function, `module.name`."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name


class Dict:
    """The entries of a dict or OrderedDict, in the order of the file; keys may be anything, and may repeat."""

    __slots__ = ("items",)

    def __init__(self, items: list[tuple[Any, Any]]):
        self.items = items


def read(
    data: bytes | mmap,
    start: int,
    *,
    names: Collection[str],
    call: Callable[[str, tuple], Any],
    persistent: Callable[[Any], Any],
) -> tuple[Any, int]:
    """Return the content of the pickle that starts at a given byte, and the position of its end.

    Args:
        data: The bytes.
        start: The first byte of the pickle.
        names: The globals that it may name, as `module.name`; collections.OrderedDict is always allowed.
        call: Called in place of a global that the pickle calls, with the global's name and the arguments.
        persistent: Called in place of loading a persistent id.

    Raises:
        Refused: It names another global, makes a call or a change that is not allowed, or is too large.
        EOFError, LookupError, TypeError, ValueError, struct.error: The bytes are not a pickle of tensors.
    """
    reader = _Reader(data, start, names, call, persistent)
    for _ in range(_MAX_OPCODES):
        opcode = reader.take(1)
        if opcode == pickle.STOP:
            return reader.stack.pop(), reader.at
        action = _ACTIONS.get(opcode)
        if action is None:
            raise ValueError(f"the opcode {opcode!r}, which no tensor needs")
        action(reader)
    raise Refused(f"its pickle has more than {_MAX_OPCODES:,} opcodes: save fewer tensors in one file")


class _Reader:
    def __init__(
        self,
        data: bytes | mmap,
        start: int,
        names: Collection[str],
        call: Callable[[str, tuple], Any],
        persistent: Callable[[Any], Any],
    ):
        self.data, self.at = data, start
        self.names, self.on_call, self.on_persistent = names, call, persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under the marks
        self.memo: dict[int, Any] = {}

    def take(self, count: int) -> bytes:
        if not 0 <= count <= _MAX_STRING:
            raise Refused(f"its pickle has a string of {count:,} bytes: expected at most {_MAX_STRING:,}")
        part = self.data[self.at : self.at + count]
        if len(part) < count:
            raise EOFError("it ends in the middle of its pickle")
        self.at += count
        return part

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def text(self, layout: str) -> None:
        self.stack.append(self.take(self.number(layout)).decode())

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + _MAX_NAME)
        if end < 0:
            raise ValueError("a name without an end")
        line = self.take(end - self.at)
        self.at += 1
        return line.decode()

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def tuple_since_mark(self) -> None:
        items = tuple(self.since_mark())
        self.stack.append(items)

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise LookupError("a tuple of values that are missing")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise TypeError(f"appends to a {type(target).__name__}")
        target += items

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not Dict:
            raise TypeError(f"sets items of a {type(target).__name__}")
        target.items += zip(items[::2], items[1::2], strict=True)

    def refer(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str or len(module) + len(name) > 2 * _MAX_NAME:
            raise TypeError("a global's name is not a string")
        full = f"{module}.{name}"
        if full not in self.names and full != _ORDERED_DICT:
            raise Refused(
                f"its pickle asks for {full}, which no tensor needs: refused, nothing was executed; "
                "if you trust the file, re-save its tensors as safetensors"
            )
        self.stack.append(Global(full))

    def refer_on_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.refer(module, name)

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not Global or type(arguments) is not tuple:
            _no(function, "called")
        if function.name != _ORDERED_DICT:
            self.stack.append(self.on_call(function.name, arguments))
            return
        pairs = arguments[0] if arguments else []
        if len(arguments) > 1 or type(pairs) is not list or not all(type(p) in (list, tuple) for p in pairs):
            raise TypeError("an OrderedDict from something other than pairs")
        # Python 2 passes all pairs at once. They are moved, so that a file cannot make us copy them again and again.
        self.stack.append(Dict([(key, value) for key, value in pairs]))
        pairs.clear()

    def build(self) -> None:
        """Drop an OrderedDict's attributes (torch's `_metadata`), which tensors do not need."""
        self.stack.pop()
        if type(self.stack[-1]) is not Dict:
            _no(self.stack[-1], "changed")

    def persist(self) -> None:
        self.stack.append(self.on_persistent(self.stack.pop()))

    def put(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def get(self, key: int) -> None:
        self.stack.append(self.memo[key])


def _no(value: Any, what: str) -> NoReturn:
    name = value.name if type(value) is Global else f"a {type(value).__name__}"
    raise Refused(f"its pickle wants {name} {what}, which no tensor needs: refused, nothing was executed")


_ACTIONS: dict[bytes, Callable[[_Reader], Any]] = {
    pickle.PROTO: lambda r: r.take(1),
    pickle.FRAME: lambda r: r.take(8),
    pickle.MARK: _Reader.mark,
    pickle.NONE: lambda r: r.stack.append(None),
    pickle.NEWTRUE: lambda r: r.stack.append(True),
    pickle.NEWFALSE: lambda r: r.stack.append(False),
    pickle.BININT: lambda r: r.stack.append(r.number("<i")),
    pickle.BININT1: lambda r: r.stack.append(r.number("B")),
    pickle.BININT2: lambda r: r.stack.append(r.number("<H")),
    pickle.LONG1: lambda r: r.stack.append(int.from_bytes(r.take(r.number("B")), "little", signed=True)),
    pickle.BINFLOAT: lambda r: r.stack.append(r.number(">d")),
    pickle.BINUNICODE: lambda r: r.text("<I"),
    pickle.SHORT_BINUNICODE: lambda r: r.text("B"),
    pickle.BINSTRING: lambda r: r.text("<i"),
    pickle.SHORT_BINSTRING: lambda r: r.text("B"),
    pickle.EMPTY_TUPLE: lambda r: r.stack.append(()),
    pickle.TUPLE1: lambda r: r.tuple_of(1),
    pickle.TUPLE2: lambda r: r.tuple_of(2),
    pickle.TUPLE3: lambda r: r.tuple_of(3),
    pickle.TUPLE: _Reader.tuple_since_mark,
    pickle.EMPTY_LIST: lambda r: r.stack.append([]),
    pickle.APPEND: lambda r: r.append([r.stack.pop()]),
    pickle.APPENDS: lambda r: r.append(r.since_mark()),
    pickle.EMPTY_DICT: lambda r: r.stack.append(Dict([])),
    pickle.SETITEM: lambda r: r.set_items([r.stack.pop(-2), r.stack.pop()]),
    pickle.SETITEMS: lambda r: r.set_items(r.since_mark()),
    pickle.GLOBAL: lambda r: r.refer(r.line(), r.line()),
    pickle.STACK_GLOBAL: _Reader.refer_on_stack,
    pickle.REDUCE: _Reader.reduce,
    pickle.BUILD: _Reader.build,
    pickle.BINPERSID: _Reader.persist,
    pickle.BINPUT: lambda r: r.put(r.number("B")),
    pickle.LONG_BINPUT: lambda r: r.put(r.number("<I")),
    pickle.MEMOIZE: lambda r: r.put(len(r.memo)),
    pickle.BINGET: lambda r: r.get(r.number("B")),
    pickle.LONG_BINGET: lambda r: r.get(r.number("<I")),
}
