"""Safetensors files, read as NumPy views of the mapped file, without a copy."""

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import ArrayLike

from ..files import FileError, shown
from .source import map_file

_AGAIN = "fetch the file again"
_DTYPES = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype("<u1"),
    "I8": np.dtype("<i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}


def load(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file as read-only views of the mapped file.

    The safetensors library checks the header, and that the tensors cover the file without gaps or overlaps. Sorted by
    offset, each tensor therefore starts where the one before it ends.

    Raises:
        ValueError: The file is missing, empty, truncated, corrupt, a Git LFS pointer, or of an unknown dtype.
    """
    from safetensors import SafetensorError, safe_open

    data = map_file(path)
    tensors = {}
    try:
        with safe_open(path, framework="np") as file:
            offset = 8 + int.from_bytes(data[:8], "little")
            for key in file.offset_keys():
                header = file.get_slice(key)
                dtype = _DTYPES.get(header.get_dtype())
                if dtype is None:
                    raise FileError(path, field=shown(key), got=f"{header.get_dtype()}, unknown to NumPy", fix=_AGAIN)
                shape = header.get_shape()
                try:
                    array = np.ndarray(shape, dtype, data, offset)
                except ValueError as error:
                    raise FileError(path, field=shown(key), got=f"of shape {shape} ({error})", fix=_AGAIN) from None
                offset += array.nbytes
                tensors[key] = array
    except SafetensorError as error:
        raise FileError(path, got=f"truncated or corrupt ({error})", fix=_AGAIN) from error
    return tensors


def save(path: Path, arrays: Mapping[str, ArrayLike]) -> None:
    """Write arrays of any device to a safetensors file."""
    from safetensors.numpy import save_file

    # The library needs C order; PEFT and transformers reject a file without its format in the metadata.
    save_file({name: np.asarray(a, order="C") for name, a in arrays.items()}, path, metadata={"format": "pt"})
