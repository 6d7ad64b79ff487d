"""Files of tensors, read as NumPy views of the mapped file: safetensors, and PyTorch's `.bin` files without PyTorch.

The unpickler of `.bin` files can name nothing but storages and tensors.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (registers bfloat16 and float8 with NumPy)
import numpy as np
from jaxtyping import ArrayLike

from ..support.reading import FileError
from .source import map_file

_AGAIN = "fetch the file again"
_DTYPES = {
    f"{kind[0].upper()}{bits}": f"{kind}{bits}"
    for kind in ("uint", "int", "float")
    for bits in (8, 16, 32, 64)
}
_DTYPES |= {
    "BOOL": "bool",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_TORCH_DTYPES = {
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


def load_tensors(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors, of any shape, of a safetensors or `.bin` file as read-only views of the file.

    Raises a ValueError if the file is missing or damaged, or is a `.bin` of anything but a flat dict of tensors.
    """
    return _load_pickle(path) if path.suffix == ".bin" else _load_safetensors(path)


def _load_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file.

    The safetensors library checks that the tensors cover the file without gaps or overlaps. Sorted by offset, each
    tensor therefore starts where the one before it ends.
    """
    from safetensors import SafetensorError, safe_open

    data = map_file(path)
    tensors = {}
    try:
        with safe_open(path, framework="np") as file:
            offset = 8 + int.from_bytes(data[:8], "little")
            for key in file.offset_keys():
                header = file.get_slice(key)
                shape = header.get_shape()
                try:
                    dtype = _DTYPES[header.get_dtype()]
                    array = np.ndarray(shape, dtype, data, offset)
                except (KeyError, ValueError) as error:
                    raise FileError(
                        path,
                        field=repr(key),
                        got=f"{header.get_dtype()} {shape}, which NumPy lacks ({error})",
                        fix=_AGAIN,
                    ) from None
                offset += array.nbytes
                tensors[key] = array
    except SafetensorError as error:
        raise FileError(
            path, got=f"truncated or corrupt ({error})", fix=_AGAIN
        ) from error
    return tensors


def save_tensors(path: Path, arrays: Mapping[str, ArrayLike]) -> None:
    """Write arrays of any shape and device to a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path.touch()
    mode = (
        path.stat().st_mode
    )  # the library replaces the file by one that only its owner can read
    # It needs C order; PEFT and transformers reject a file without its format in the metadata.
    tensors = {name: np.asarray(a, order="C") for name, a in arrays.items()}
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # such as a full disk
        raise OSError(str(error)) from error
    path.chmod(mode)


def _load_pickle(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors that `torch.save` wrote from a flat dict.

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
        if module in ("torch", "torch.cuda") and name in _TORCH_DTYPES:
            return _TORCH_DTYPES[name]
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
    *others: Any,
) -> np.ndarray:
    """Return the view that PyTorch's function of these arguments rebuilds; NumPy refuses one that leaves its storage.

    Offset and strides are in elements; behind the requirement of a gradient and hooks, the last argument marks views.
    """
    if any(others[2:]):
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
