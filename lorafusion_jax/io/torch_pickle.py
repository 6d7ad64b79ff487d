"""Read PyTorch's `.bin` files without PyTorch: an unpickler that can name nothing but storages and tensors."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (registers bfloat16 with NumPy)
import numpy as np

from .source import map_file

_DTYPES = {
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "BFloat16Storage": "bfloat16",
}


def load(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors, of any shape, that `torch.save` wrote from a flat dict, as read-only views of the file.

    Strides, shared storages and offsets are kept; devices are ignored; dtypes are NumPy's and bfloat16. Members of
    the archive that no tensor uses are ignored, and so are CRC sums (as in `torch.load`).

    Raises:
      ValueError: the file is missing, damaged or compressed, holds something other than a dict of tensors, or its
        pickle names anything that tensors do not need.
    """
    data = map_file(path)
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path}: truncated or corrupt, or older than PyTorch 1.6, whose torch.save writes a zip archive: fetch "
            "the file again, or load it in PyTorch and save it as safetensors"
        )
    try:
        members = _members(path, memoryview(data))
        (root,) = (name[:-8] for name in members if name.endswith("/data.pkl"))
        if members.get(f"{root}byteorder", b"little") != b"little":
            raise ValueError("written on a big-endian machine")
        storages = {
            name.removeprefix(f"{root}data/"): content
            for name, content in members.items()
        }
        pickled = io.BytesIO(members[f"{root}data.pkl"])
        tensors = _TensorUnpickler(pickled, storages).load()
        if not isinstance(tensors, dict):
            raise ValueError(f"it holds a {type(tensors).__name__}")
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, np.ndarray):
                kind = type(tensor).__name__
                raise ValueError(f"entry {name!r:.40} holds a {kind}")
        return dict(tensors)
    except Exception as error:  # damaged pickles and archives raise a dozen others
        raise ValueError(
            f"{path}: not a flat dict of tensors as torch.save writes it ({str(error)[:200]}): fetch the file again, "
            "or save it in PyTorch as safetensors"
        ) from error


class _TensorUnpickler(pickle.Unpickler):
    """Makes views of `storages`, and finds no other names than those that tensors need.

    Everything that it returns for a name is immutable or new, because a pickle may set attributes.
    """

    def __init__(self, pickled: io.BytesIO, storages: Mapping[str, memoryview]):
        super().__init__(pickled)
        self.storages = storages

    def find_class(self, module: str, name: str) -> str | Callable[..., Any]:
        if module in ("torch", "torch.cuda") and name in _DTYPES:
            return _DTYPES[name]
        match f"{module}.{name}":
            case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2":
                return lambda *arguments: _rebuilt(*arguments)
            case "torch._utils._rebuild_parameter":
                return lambda tensor, *_: tensor
            case "collections.OrderedDict":
                return OrderedDict
        raise ValueError(
            f"its pickle names {module}.{name}, which no plain tensor needs: nothing was executed"
        )

    def persistent_load(self, pid: Any) -> tuple[memoryview, str]:
        kind, dtype, key, _location, numel = pid
        if kind != "storage":
            raise ValueError(f"its pickle refers to a {kind!r:.40}")
        return self.storages[key][: numel * np.dtype(dtype).itemsize], dtype


def _rebuilt(
    storage: tuple[memoryview, str],
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    _requires_grad: bool = False,
    _hooks: Any = None,
    metadata: Any = None,
) -> np.ndarray:
    """Return the view that PyTorch's function of these arguments rebuilds; NumPy refuses one that leaves its storage.

    Offset and strides are in elements.
    """
    if metadata:
        raise ValueError(
            "a tensor is negated or conjugated lazily: save it after resolve_neg() and resolve_conj()"
        )
    content, dtype = storage
    itemsize = np.dtype(dtype).itemsize
    strides = [step * itemsize for step in stride]
    return np.ndarray(size, dtype, content, offset * itemsize, strides)


def _members(path: Path, data: memoryview) -> dict[str, memoryview]:
    """Return the bytes of every member of a zip archive without compression."""
    members = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise ValueError(f"{entry.filename!r:.80} is compressed or encrypted")
            # The name and the extra field of the local header pad the content to its alignment.
            lengths = struct.unpack_from("<HH", data, entry.header_offset + 26)
            start = entry.header_offset + 30 + sum(lengths)
            members[entry.filename] = data[start : start + entry.file_size]
    return members
