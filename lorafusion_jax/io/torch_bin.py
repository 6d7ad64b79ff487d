"""PyTorch's `.bin` files without PyTorch: tensors only, nothing in the file is executed.

`torch.save` has written three containers: a zip archive (since 1.6), a sequence of pickles followed by the
raw storages (before), and in the beginning a tar archive. In each, a pickle rebuilds tensors as strided views
of storages. The unpickler here knows the few names that this takes and refuses any other by name.
"""

import io
import mmap
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from .source import map_file

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

_STORAGES = {
    "BoolStorage": np.dtype(bool),
    "ByteStorage": np.dtype("<u1"),
    "CharStorage": np.dtype("<i1"),
    "ShortStorage": np.dtype("<i2"),
    "IntStorage": np.dtype("<i4"),
    "LongStorage": np.dtype("<i8"),
    "HalfStorage": np.dtype("<f2"),
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
}
_DTYPES = {
    "bool": np.dtype(bool),
    "uint8": np.dtype("<u1"),
    "int8": np.dtype("<i1"),
    "uint16": np.dtype("<u2"),
    "int16": np.dtype("<i2"),
    "uint32": np.dtype("<u4"),
    "int32": np.dtype("<i4"),
    "uint64": np.dtype("<u8"),
    "int64": np.dtype("<i8"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "float64": np.dtype("<f8"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
# What reading damaged pickles, archives and storages raises.
_DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    tarfile.TarError,
    struct.error,
    EOFError,
    OSError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    OverflowError,
    RuntimeError,
    MemoryError,
    zlib.error,
)


def load(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a file that `torch.save` wrote from a flat dict, as read-only views of the file.

    Strides, shared storages and offsets are kept; devices are ignored; dtypes are NumPy's and ml_dtypes'.
    Members of the archive that the tensors do not ask for are ignored, as are CRC sums (as in `torch.load`).

    Raises:
        ValueError: The file is missing, empty, truncated, corrupt or a Git LFS pointer; it holds something
            else than a dict of tensors; or its pickle asks for a global that no tensor needs.
    """
    data = map_file(path)
    try:
        if data[:2] == b"PK":
            content, storages = _read_zip(path, data)
        elif data[257:262] == b"ustar":
            content, storages = _read_tar(data)
        else:
            content, storages = _read_legacy(data)
        return {key: _array(view, storages) for key, view in _flat(content)}
    except _Refused as error:
        raise ValueError(f"{path}: {error}") from None
    except _DAMAGE as error:
        raise ValueError(
            f"{path}: truncated or corrupt, not a file that torch.save wrote ({error}): fetch the file again"
        ) from error


class _Refused(Exception):
    """A file that is whole, but that must not or cannot be read."""


class _Storage(NamedTuple):
    """A run of elements: `numel` of them from element `start` of the root storage `key`."""

    key: str
    dtype: np.dtype
    start: int
    numel: int


class _View(NamedTuple):
    """A tensor: a strided view of a storage, in elements of `dtype`."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: np.dtype


class _Unpickler(pickle.Unpickler):
    """Knows tensors and dicts alone. It lets pickles call only bound methods, which no pickle can alter."""

    def __init__(self, file: Any, tensors: Mapping[str, _View] | None = None):
        super().__init__(file, encoding="utf-8")
        self._tensors = tensors
        self.dtypes: dict[str, np.dtype] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module in ("torch", "torch.cuda"):
            # The tar container names the class of each tensor, torch.FloatTensor.
            dtype = _DTYPES.get(name, _STORAGES.get(name.replace("Tensor", "Storage")))
            if dtype is not None:
                return dtype
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v3"): self._typed_tensor,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
            ("torch.storage", "UntypedStorage"): _DTYPES["uint8"],
        }
        if (module, name) not in known:
            raise _Refused(
                f"its pickle asks for {module}.{name}, which no tensor needs: refused, nothing was executed; "
                "if you trust the file, re-save its tensors as safetensors"
            )
        return known[module, name]

    def persistent_load(self, pid: Any) -> _Storage | _View:
        if self._tensors is not None:
            return self._tensors[str(pid)]
        tag, dtype, key, _location, numel, *view = pid
        if tag != "storage" or not isinstance(dtype, np.dtype):
            raise _Refused(f"its pickle refers to a {tag!r}, which no tensor needs")
        self.dtypes[str(key)] = dtype
        if view and view[0] is not None:
            _key, start, numel = view[0]
            return _Storage(str(key), dtype, start, numel)
        return _Storage(str(key), dtype, 0, numel)

    def _tensor(self, storage: _Storage, offset: int, size: tuple, stride: tuple, *extra: Any) -> _View:
        if len(extra) > 2 and extra[2]:
            raise _Refused(f"a tensor is saved with {extra[2]}: save it after resolve_neg(), resolve_conj()")
        return _View(storage, offset, tuple(size), tuple(stride), storage.dtype)

    def _typed_tensor(self, *args: Any) -> _View:
        *plain, dtype = args[:7]
        return self._tensor(*plain, *args[7:])._replace(dtype=dtype)

    def _parameter(self, tensor: _View, *_extra: Any) -> _View:
        return tensor


def _flat(content: Any) -> Iterable[tuple[str, _View]]:
    if not isinstance(content, dict):
        raise _Refused(f"holds a {type(content).__name__}: wanted a dict of tensors")
    for key, value in dict.items(content):
        if not isinstance(key, str) or not isinstance(value, _View):
            got = "a tensor" if isinstance(value, _View) else f"a {type(value).__name__}"
            raise _Refused(f"entry {key!r} holds {got}: wanted a flat dict of tensors by name")
        yield key, value


def _array(view: _View, storages: Mapping[str, memoryview]) -> np.ndarray:
    # NumPy itself refuses a view that would reach outside its buffer.
    item = view.dtype.itemsize
    key, dtype, start, numel = view.storage
    buffer = storages[key][start * dtype.itemsize : (start + numel) * dtype.itemsize]
    strides = [step * item for step in view.stride]
    return np.ndarray(view.size, view.dtype, buffer, view.offset * item, strides)


def _read_zip(path: Path, data: mmap.mmap) -> tuple[Any, dict[str, memoryview]]:
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _Refused(f"a zip archive with {len(pickles)} members data.pkl: torch.save writes one")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise _Refused("written on a big-endian machine: re-save its tensors as safetensors there")
        storages = {
            entry.filename.removeprefix(f"{root}data/"): _member(archive, entry, data)
            for entry in archive.infolist()
            if entry.filename.startswith(f"{root}data/")
        }
        return _Unpickler(io.BytesIO(archive.read(pickles[0]))).load(), storages


def _member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, data: mmap.mmap) -> memoryview:
    if entry.compress_type != zipfile.ZIP_STORED:
        return memoryview(archive.read(entry))
    # The name and the extra field of the local header pad the content to its alignment.
    name, extra = struct.unpack_from("<HH", data, entry.header_offset + 26)
    start = entry.header_offset + 30 + name + extra
    return memoryview(data)[start : start + entry.file_size]


def _read_legacy(data: mmap.mmap) -> tuple[Any, dict[str, memoryview]]:
    if _Unpickler(data).load() != _LEGACY_MAGIC or _Unpickler(data).load() != _LEGACY_PROTOCOL:
        raise ValueError("no magic number")
    if not _Unpickler(data).load()["little_endian"]:
        raise _Refused("written on a big-endian machine: re-save its tensors as safetensors there")
    unpickler = _Unpickler(data)
    content = unpickler.load()
    keys = _Unpickler(data).load()
    return content, {str(key): _run(data, unpickler.dtypes[str(key)]) for key in keys}


def _read_tar(data: mmap.mmap) -> tuple[Any, dict[str, memoryview]]:
    with tarfile.open(fileobj=data, mode="r:") as archive:
        starts = {name: archive.getmember(name).offset_data for name in ("storages", "tensors", "pickle")}
    data.seek(starts["storages"])
    dtypes, storages = {}, {}
    for _ in range(_Unpickler(data).load()):
        key, _location, dtype = _Unpickler(data).load()
        dtypes[key], storages[str(key)] = dtype, _run(data, dtype)
    for key, root, start, numel in _Unpickler(data).load():
        dtypes[key], item = dtypes[root], dtypes[root].itemsize
        storages[str(key)] = storages[str(root)][start * item : (start + numel) * item]

    data.seek(starts["tensors"])
    tensors = {}
    for _ in range(_Unpickler(data).load()):
        key, storage, _type = _Unpickler(data).load()
        (ndim,) = struct.unpack("<i4x", data.read(8))
        *shape, offset = struct.unpack(f"<{2 * ndim + 1}q", data.read(16 * ndim + 8))
        numel = len(storages[str(storage)]) // dtypes[storage].itemsize
        view = _Storage(str(storage), dtypes[storage], 0, numel)
        tensors[str(key)] = _View(view, offset, tuple(shape[:ndim]), tuple(shape[ndim:]), dtypes[storage])

    data.seek(starts["pickle"])
    return _Unpickler(data, tensors).load(), storages


def _run(data: mmap.mmap, dtype: np.dtype) -> memoryview:
    """Return the storage that starts here: its number of elements, then the elements."""
    (numel,) = struct.unpack("<q", data.read(8))
    start = data.tell()
    data.seek(start + numel * dtype.itemsize)
    return memoryview(data)[start : data.tell()]
