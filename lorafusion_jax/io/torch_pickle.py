"""Read PyTorch's `.bin` files without PyTorch: tensors only, nothing in the file is executed.

`torch.save` has written a zip archive since 1.6; older files are refused. A pickle in it rebuilds tensors as strided
views of storages. The whole pickle is first read as plain descriptions; views of the file are made afterwards.

Python's unpickler cannot be bounded: a few bytes can make it allocate gigabytes or hash without end. Here nothing that
a pickle names is imported or called. Each opcode takes bounded time and memory, and nested values are never hashed,
compared or printed.
"""

import math
import mmap
import pickletools
import reprlib
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 (registers bfloat16 with NumPy)
import numpy as np

from .source import map_file

_STORAGES = {
    "Bool": "bool",
    "Byte": "uint8",
    "Char": "int8",
    "Short": "int16",
    "Int": "int32",
    "Long": "int64",
    "Half": "float16",
    "Float": "float32",
    "Double": "float64",
    "BFloat16": "bfloat16",
}
# Names that a pickle may contain, those of storages with the type of their numbers.
_TYPES = {
    f"{module}.{name}Storage": np.dtype(of)
    for module in ("torch", "torch.cuda")
    for name, of in _STORAGES.items()
}
_TENSOR = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
_PARAMETER = "torch._utils._rebuild_parameter"
_ORDERED_DICT = "collections.OrderedDict"
_NAMES = {*_TYPES, *_TENSOR, _PARAMETER, _ORDERED_DICT}
_MAX_OPCODES = 1 << 20  # a tensor takes about 30, so this allows 35,000 tensors
_MAX_PICKLE = 1 << 26
_MAX_DIMENSIONS = 8
_MAX_NAME = 300
# Limits on repeated elements. Tied weights share a storage under up to four names, and a stride of 0 repeats elements.
# Small files may repeat them more often.
_MAX_REPEATS = 8
_SMALL = 1 << 20


def load(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors, of any shape, that `torch.save` wrote from a flat dict, as read-only views of the file.

    Strides, shared storages and offsets are kept; devices are ignored; dtypes are NumPy's and bfloat16. Members of
    the archive that no tensor uses are ignored, and so are CRC sums (as in `torch.load`). The size of the file bounds
    the time and memory of reading, and the total size of the tensors.

    Raises:
        ValueError: The file is missing, damaged or compressed, holds something other than a dict of tensors, or names a
            global that tensors do not need.
    """
    data = map_file(path)
    try:
        # A pickle, or a tar archive, as before 0.1.10.
        if data[:1] == b"\x80" or data[257:262] == b"ustar":
            raise _Refused(
                "not a zip archive, which torch.save has written since PyTorch 1.6: load it in PyTorch, and save it "
                "again with torch >= 1.6 or as safetensors"
            )
        content, storages = _read_zip(path, data)
        if type(content) is not _Dict:
            raise _Refused(f"holds a {_kind(content)}: expected a dict of tensors")
        for key, value in content:
            if type(key) is not str or type(value) is not _View:
                raise _Refused(
                    f"entry {_shown(key)} holds a {_kind(value)}: expected a flat dict of tensors by name"
                )
        views: dict[str, _View] = dict(content)
        total = sum(
            math.prod(view.size) * view.storage.dtype.itemsize
            for view in views.values()
        )
        if total > max(_MAX_REPEATS * len(data), _SMALL):
            raise _Refused(
                f"its {len(data):,} bytes claim to be tensors of {total:,} bytes, by strides that repeat elements: "
                "save contiguous tensors"
            )
        return {key: _array(view, storages) for key, view in views.items()}
    except _Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except (
        Exception
    ) as error:  # damaged pickles, archives and storages raise a dozen others
        raise ValueError(
            f"{path}: truncated or corrupt, not a file that torch.save wrote ({str(error)[:200]}): fetch the file again"
        ) from error


class _Refused(Exception):
    """A file is intact but cannot be read, or must not be."""


class _Global(NamedTuple):
    """The name of a class or function, `module.name`."""

    name: str


class _Dict(list[tuple[Any, Any]]):
    """The entries of a dict or OrderedDict, in the order of the file; keys may be anything, and may repeat."""


class _Storage(NamedTuple):
    """A run of `numel` numbers of the archive's member `key`."""

    key: str
    dtype: np.dtype
    numel: int


class _View(NamedTuple):
    """A tensor: a strided view of a storage, in elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _read_pickle(data: bytes) -> Any:
    """Return the content of a pickle of tensors: descriptions, texts, integers, tuples and `_Dict`s."""
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks under the marks
    memo: dict[Any, Any] = {}
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if number == _MAX_OPCODES:
            raise _Refused(
                f"its pickle has more than {_MAX_OPCODES:,} opcodes: save fewer tensors in one file"
            )
        match opcode.name:
            case "PROTO":
                pass
            case (
                "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE" | "NONE"
            ):  # with the argument None
                stack.append(argument)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_DICT":
                stack.append(_Dict())
            case "MARK":
                below.append(stack)
                stack = []
            case "TUPLE":
                items = stack
                stack = below.pop()
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(opcode.name[-1]))]
                stack.append(tuple(reversed(items)))
            case "SETITEM" | "SETITEMS":
                if opcode.name == "SETITEM":
                    items = [stack.pop(-2), stack.pop()]
                else:
                    items = stack
                    stack = below.pop()
                _check(stack[-1], "changes")
                stack[-1].extend(zip(items[::2], items[1::2], strict=True))
            case "GLOBAL":
                if (name := str(argument).replace(" ", ".", 1)) not in _NAMES:
                    raise _Refused(
                        f"its pickle names {name[:_MAX_NAME]}, which no plain tensor needs: refused, nothing was "
                        "executed; if you trust the file, re-save its tensors as safetensors"
                    )
                stack.append(_Global(name))
            case "REDUCE":
                arguments = stack.pop()
                function = stack.pop()
                stack.append(_called(function, arguments))
            case "BUILD":  # an OrderedDict's attributes (torch's `_metadata`), which tensors do not need
                stack.pop()
                _check(stack[-1], "changes")
            case "BINPERSID":
                stack.append(_persistent(stack.pop()))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "STOP":
                break
            case name:
                raise _Refused(
                    f"its pickle has the opcode {name}, which no flat dict of tensors needs: save one"
                )
    return stack.pop()


def _check(value: Any, does: str, kind: type = _Dict) -> None:
    if type(value) is not kind:
        name = value.name if type(value) is _Global else f"a {type(value).__name__}"
        raise _Refused(
            f"its pickle {does} {name}, which no tensor needs: refused, nothing was executed"
        )


def _called(function: Any, arguments: tuple) -> _View | _Dict:
    """Return a description of what a call would make."""
    _check(function, "calls", _Global)
    name = function.name
    if name == _ORDERED_DICT and not arguments:
        return _Dict()
    if name == _PARAMETER and arguments and type(arguments[0]) is _View:
        return arguments[0]
    if name not in _TENSOR or len(arguments) < 4 or type(arguments[0]) is not _Storage:
        raise TypeError(f"a call of {name} that does not rebuild a tensor")
    storage, offset, size, stride = arguments[:4]
    if any(arguments[6:7]):  # metadata
        raise _Refused(
            "a tensor is a lazy negative or conjugate: save it after resolve_neg(), resolve_conj()"
        )
    if len(size) > _MAX_DIMENSIONS:
        raise _Refused(
            f"a tensor has {len(size)} dimensions: expected at most {_MAX_DIMENSIONS}"
        )
    return _View(
        storage, _size(offset), tuple(map(_size, size)), tuple(map(_size, stride))
    )


def _persistent(pid: Any) -> _Storage:
    if type(pid) is not tuple or len(pid) != 5:
        raise TypeError("a storage is described by 5 values")
    tag, kind, key, _location, numel = pid
    if tag != "storage":
        raise _Refused(f"its pickle refers to a {_shown(tag)}, which no tensor needs")
    if type(key) is not str:
        raise TypeError(f"a {type(key).__name__} instead of a storage's key")
    return _Storage(key, _TYPES[kind.name], _size(numel))


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{_shown(value)} is not a number of elements")
    return value


def _shown(value: Any) -> str:
    """Return a value as text for a message; of tuples only the type, because they may nest to 2 ** 90 elements."""
    return reprlib.repr(value) if type(value) in (int, str) else f"<{_kind(value)}>"


def _kind(value: Any) -> str:
    return {_View: "tensor", _Dict: "dict"}.get(type(value), type(value).__name__)


def _array(view: _View, storages: Mapping[str, memoryview]) -> np.ndarray:
    # NumPy itself raises an error for a view that would reach outside its buffer.
    key, dtype, numel = view.storage
    item = dtype.itemsize
    buffer = storages[key][: numel * item]
    return np.ndarray(
        view.size,
        dtype,
        buffer,
        view.offset * item,
        [step * item for step in view.stride],
    )


def _read_zip(path: Path, data: mmap.mmap) -> tuple[Any, dict[str, memoryview]]:
    with zipfile.ZipFile(path) as archive:
        members = {entry.filename: entry for entry in archive.infolist()}
    names = [name for name in members if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise _Refused(
            f"a zip archive with {len(names)} members data.pkl: torch.save writes one"
        )
    root = names[0].removesuffix("data.pkl")
    order = members.get(f"{root}byteorder")
    if order and _member(order, data) != b"little":
        raise _Refused(
            "written on a big-endian machine: re-save its tensors as safetensors there"
        )
    storages = {
        name.removeprefix(f"{root}data/"): _member(entry, data)
        for name, entry in members.items()
        if name.startswith(f"{root}data/")
    }
    content = _member(members[names[0]], data)
    if len(content) > _MAX_PICKLE:
        raise _Refused(
            f"its pickle has {len(content):,} bytes: expected at most {_MAX_PICKLE:,}"
        )
    return _read_pickle(bytes(content)), storages


def _member(entry: zipfile.ZipInfo, data: mmap.mmap) -> memoryview:
    """Return a member's bytes in the mapped file."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise _Refused(
            f"{_shown(entry.filename)} is compressed or encrypted, unlike torch.save's: zip it again, plain"
        )
    # The name and the extra field of the local header pad the content to its alignment.
    name, extra = struct.unpack_from("<HH", data, entry.header_offset + 26)
    start = entry.header_offset + 30 + name + extra
    if start + entry.file_size > len(data):
        raise EOFError(f"it ends in the middle of {_shown(entry.filename)}")
    return memoryview(data)[start : start + entry.file_size]
