"""Read PyTorch's `.bin` files without PyTorch: tensors only, nothing in the file is executed.

`torch.save` has written a zip archive since 1.6; older files are refused. A pickle in it rebuilds tensors as strided
views of storages. The whole pickle is first read as plain descriptions (see `pickles`); views of the file are made
afterwards.
"""

import math
import mmap
import reprlib
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 (registers bfloat16 and float8 with NumPy)
import numpy as np

from .pickles import Dict, Global, Reader, Refused
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
_DTYPES = (*_STORAGES.values(), "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")
# Names that a pickle may contain, and the number type of each.
_TYPES = {
    f"{module}.{name}Storage": np.dtype(of) for module in ("torch", "torch.cuda") for name, of in _STORAGES.items()
}
_TYPES |= {f"torch.{name}": np.dtype(name) for name in _DTYPES}
_TYPES["torch.storage.UntypedStorage"] = np.dtype("uint8")
_TENSOR = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
_TYPED_TENSOR = "torch._utils._rebuild_tensor_v3"
_PARAMETER = "torch._utils._rebuild_parameter"
_NAMES = {*_TYPES, *_TENSOR, _TYPED_TENSOR, _PARAMETER}
_MAX_PICKLE = 1 << 26
_MAX_DIMENSIONS = 8
# Limits on repeated elements. Tied weights share a storage under up to four names, and a stride of 0 repeats elements.
# Small files may repeat them more often.
_MAX_REPEATS, _SMALL = 8, 1 << 20


def load(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors, of any shape, that `torch.save` wrote from a flat dict, as read-only views of the file.

    Strides, shared storages and offsets are kept; devices are ignored; dtypes are NumPy's and ml_dtypes'. Members of
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
            raise Refused(
                "not a zip archive, which torch.save has written since PyTorch 1.6: load it in PyTorch, and save it "
                "again with torch >= 1.6 or as safetensors"
            )
        content, storages = _read_zip(path, data)
        if type(content) is not Dict:
            raise Refused(f"holds a {_kind(content)}: expected a dict of tensors")
        for key, value in content:
            if type(key) is not str or type(value) is not _View:
                raise Refused(f"entry {_shown(key)} holds a {_kind(value)}: expected a flat dict of tensors by name")
        views: dict[str, _View] = dict(content)
        total = sum(math.prod(view.size) * view.dtype.itemsize for view in views.values())
        if total > max(_MAX_REPEATS * len(data), _SMALL):
            raise Refused(
                f"its {len(data):,} bytes claim to be tensors of {total:,} bytes, by strides that repeat elements: "
                "save contiguous tensors"
            )
        return {key: _array(view, storages) for key, view in views.items()}
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # damaged pickles, archives and storages raise a dozen others
        raise ValueError(
            f"{path}: truncated or corrupt, not a file that torch.save wrote ({str(error)[:200]}): fetch the file again"
        ) from error


class _Storage(NamedTuple):
    """A run of `numel` numbers of the archive's member `key`."""

    key: str
    dtype: np.dtype
    numel: int


class _View(NamedTuple):
    """A tensor: a strided view of a storage, in elements of `dtype`."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: np.dtype


def _call(name: str, arguments: tuple) -> _View:
    """Return a description of the tensor that a call would rebuild."""
    if name == _PARAMETER and arguments and type(arguments[0]) is _View:
        return arguments[0]
    if name == _TYPED_TENSOR and len(arguments) > 6:
        return _call(_TENSOR[0], (*arguments[:6], *arguments[7:8]))._replace(dtype=_dtype(arguments[6]))
    if name not in _TENSOR or len(arguments) < 4 or type(arguments[0]) is not _Storage:
        raise TypeError(f"a call of {name} that does not rebuild a tensor")
    storage, offset, size, stride = arguments[:4]
    if any(arguments[6:7]):  # metadata
        raise Refused("a tensor is a lazy negative or conjugate: save it after resolve_neg(), resolve_conj()")
    if len(size) > _MAX_DIMENSIONS:
        raise Refused(f"a tensor has {len(size)} dimensions: expected at most {_MAX_DIMENSIONS}")
    return _View(storage, _size(offset), tuple(map(_size, size)), tuple(map(_size, stride)), storage.dtype)


def _persistent(pid: Any) -> _Storage:
    if type(pid) is not tuple or len(pid) != 5:
        raise TypeError("a storage is described by 5 values")
    tag, kind, key, _location, numel = pid
    if tag != "storage":
        raise Refused(f"its pickle refers to a {_shown(tag)}, which no tensor needs")
    if type(key) is not str:
        raise TypeError(f"a {type(key).__name__} instead of a storage's key")
    return _Storage(key, _dtype(kind), _size(numel))


def _dtype(kind: Any) -> np.dtype:
    if type(kind) is not Global:
        raise TypeError(f"a {type(kind).__name__} instead of a type of numbers")
    return _TYPES[kind.name]


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{_shown(value)} is not a number of elements")
    return value


def _shown(value: Any) -> str:
    """Return a value as text for a message; of tuples only the type, because they may nest to 2 ** 90 elements."""
    return reprlib.repr(value) if type(value) in (int, str) else f"<{_kind(value)}>"


def _kind(value: Any) -> str:
    return {_View: "tensor", Dict: "dict"}.get(type(value), type(value).__name__)


def _array(view: _View, storages: Mapping[str, memoryview]) -> np.ndarray:
    # NumPy itself raises an error for a view that would reach outside its buffer.
    item = view.dtype.itemsize
    storage, width = view.storage, view.storage.dtype.itemsize
    buffer = storages[storage.key][: storage.numel * width]
    return np.ndarray(view.size, view.dtype, buffer, view.offset * item, [step * item for step in view.stride])


def _read_zip(path: Path, data: mmap.mmap) -> tuple[Any, dict[str, memoryview]]:
    with zipfile.ZipFile(path) as archive:
        members = {entry.filename: entry for entry in archive.infolist()}
    names = [name for name in members if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise Refused(f"a zip archive with {len(names)} members data.pkl: torch.save writes one")
    root = names[0].removesuffix("data.pkl")
    order = members.get(f"{root}byteorder")
    if order and _member(order, data) != b"little":
        raise Refused("written on a big-endian machine: re-save its tensors as safetensors there")
    storages = {
        name.removeprefix(f"{root}data/"): _member(entry, data)
        for name, entry in members.items()
        if name.startswith(f"{root}data/")
    }
    content = _member(members[names[0]], data)
    if len(content) > _MAX_PICKLE:
        raise Refused(f"its pickle has {len(content):,} bytes: expected at most {_MAX_PICKLE:,}")
    return Reader(_NAMES, _call, _persistent).read(bytes(content)), storages


def _member(entry: zipfile.ZipInfo, data: mmap.mmap) -> memoryview:
    """Return a member's bytes in the mapped file."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise Refused(f"{_shown(entry.filename)} is compressed or encrypted, unlike torch.save's: zip it again, plain")
    # The name and the extra field of the local header pad the content to its alignment.
    name, extra = struct.unpack_from("<HH", data, entry.header_offset + 26)
    start = entry.header_offset + 30 + name + extra
    if start + entry.file_size > len(data):
        raise EOFError(f"it ends in the middle of {_shown(entry.filename)}")
    return memoryview(data)[start : start + entry.file_size]
