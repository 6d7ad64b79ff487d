"""Safetensors files, read as NumPy views of the mapped file, without a copy."""

from collections.abc import Mapping
from pathlib import Path

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


def load(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file in any shapes, as read-only views.

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


def save(path: Path, arrays: Mapping[str, ArrayLike]) -> None:
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
