"""Read pickles as plain data: nothing that a pickle names is imported, called or changed.

`pickletools` splits a pickle into opcodes. Python's unpickler cannot be bounded: a few bytes can make it allocate
gigabytes or hash without end. Here each opcode takes bounded time and memory, and nested values of a file are never
hashed, compared or printed. The results are strings, numbers, tuples, lists, `Dict`, `Global`, and the results of
`Reader.call` and `Reader.persistent`.
"""

import pickletools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, NoReturn

# A tensor takes about 30 opcodes, so this allows 35,000 tensors.
_MAX_OPCODES = 1 << 20
_MAX_NAME = 400
_ORDERED_DICT = "collections.OrderedDict"


class Refused(Exception):
    """A file is intact but cannot be read, or must not be."""


class Global(NamedTuple):
    """The name of a class or function, `module.name`."""

    name: str


class Dict(list[tuple[Any, Any]]):
    """The entries of a dict or OrderedDict, in the order of the file; keys may be anything, and may repeat."""


class Reader:
    """Reader of one pickle.

    `names` are the allowed globals, as `module.name` (collections.OrderedDict always is one); `call` and `persistent`
    describe the results of calling them and of loading persistent ids.
    """

    def __init__(self, names: Collection[str], call: Callable[[str, tuple], Any], persistent: Callable[[Any], Any]):
        self.names, self.call, self.persistent = names, call, persistent

    def read(self, data: bytes) -> Any:
        """Return the content of a pickle.

        Raises:
            Refused: It names another global, makes a call or a change that is not allowed, or is too large.
            LookupError, TypeError, ValueError: The bytes are not a pickle of tensors.
        """
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under the marks
        self.memo: dict[int, Any] = {}
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if opcode.name == "STOP":
                break
            if number == _MAX_OPCODES:
                raise Refused(f"its pickle has more than {_MAX_OPCODES:,} opcodes: save fewer tensors in one file")
            if opcode.name not in _ACTIONS:
                raise ValueError(f"the opcode {opcode.name}, which no tensor needs")
            _ACTIONS[opcode.name](self, argument)
        return self.stack.pop()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _: None) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

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
        target += zip(items[::2], items[1::2], strict=True)

    def refer(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str or len(module) + len(name) > _MAX_NAME:
            raise TypeError("a global's name is not a string")
        full = f"{module}.{name}"
        if full not in self.names and full != _ORDERED_DICT:
            raise Refused(
                f"its pickle names {full}, which no tensor needs: refused, nothing was executed; "
                "if you trust the file, re-save its tensors as safetensors"
            )
        self.push(Global(full))

    def reduce(self, _: None) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not Global or type(arguments) is not tuple:
            _refuse(function, "calls")
        if function.name != _ORDERED_DICT:
            self.push(self.call(function.name, arguments))
        elif arguments:
            raise TypeError("an OrderedDict with arguments")
        else:
            self.push(Dict())

    def build(self, _: None) -> None:
        """Drop an OrderedDict's attributes (torch's `_metadata`), which tensors do not need."""
        self.stack.pop()
        if type(self.stack[-1]) is not Dict:
            _refuse(self.stack[-1], "changes")

    def put(self, key: int) -> None:
        self.memo[key] = self.stack[-1]


def _refuse(value: Any, does: str) -> NoReturn:
    name = value.name if type(value) is Global else f"a {type(value).__name__}"
    raise Refused(f"its pickle {does} {name}, which no tensor needs: refused, nothing was executed")


# What each opcode does with its argument, by pickletools' names.
_ACTIONS: dict[str, Callable[[Reader, Any], Any]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda r, _: None),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"), Reader.push),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING"), Reader.push),
    "NONE": Reader.push,  # its argument is None
    "NEWTRUE": lambda r, _: r.push(True),
    "NEWFALSE": lambda r, _: r.push(False),
    "MARK": Reader.mark,
    "EMPTY_TUPLE": lambda r, _: r.push(()),
    "TUPLE1": lambda r, _: r.tuple_of(1),
    "TUPLE2": lambda r, _: r.tuple_of(2),
    "TUPLE3": lambda r, _: r.tuple_of(3),
    "TUPLE": lambda r, _: r.push(tuple(r.since_mark())),
    "EMPTY_LIST": lambda r, _: r.push([]),
    "APPEND": lambda r, _: r.append([r.stack.pop()]),
    "APPENDS": lambda r, _: r.append(r.since_mark()),
    "EMPTY_DICT": lambda r, _: r.push(Dict()),
    "SETITEM": lambda r, _: r.set_items([r.stack.pop(-2), r.stack.pop()]),
    "SETITEMS": lambda r, _: r.set_items(r.since_mark()),
    "GLOBAL": lambda r, names: r.refer(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda r, _: r.refer(r.stack.pop(-2), r.stack.pop()),
    "REDUCE": Reader.reduce,
    "BUILD": Reader.build,
    "BINPERSID": lambda r, _: r.push(r.persistent(r.stack.pop())),
    "MEMOIZE": lambda r, _: r.put(len(r.memo)),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), Reader.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda r, key: r.push(r.memo[key])),
}
