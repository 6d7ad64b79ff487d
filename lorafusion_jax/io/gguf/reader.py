"""The content of a GGUF file: metadata, and tensors that are dequantised when they are read.

Source: the format's description, ggml/docs/gguf.md. The header is read here because gguf's own reader makes an array of
every string: for 49,152 tokens it took 3.4 s instead of 0.05 s. It also gives no message about a truncated file.
"""

import contextlib
import math
import mmap
import struct
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

import ml_dtypes
import numpy as np
from msgspec import Meta

from ...models.architecture import GGUFTensor
from ...support.reading import decode_as
from ..source import map_file

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING = 8
_ARRAY = 9
_SHORT = 2048  # numbers of a row
_AGAIN = "fetch the file again"
_PLAIN = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


_Count = Annotated[int, Meta(ge=0)]
# The keys that are read here and by the tokenizer; those of an architecture are checked where its model is known.
_Known = TypedDict(
    "_Known",
    {
        "general.architecture": str,
        "general.alignment": Annotated[int, Meta(ge=1)],
        "split.count": int,
        "tokenizer.chat_template": str,
        "tokenizer.ggml.model": str,
        "tokenizer.ggml.pre": str,
        "tokenizer.ggml.tokens": list[str],
        "tokenizer.ggml.token_type": list[int],
        "tokenizer.ggml.scores": list[float],
        "tokenizer.ggml.merges": list[str],
        "tokenizer.ggml.add_bos_token": bool,
        "tokenizer.ggml.add_eos_token": bool,
        "tokenizer.ggml.add_space_prefix": bool,
        "tokenizer.ggml.bos_token_id": _Count,
        "tokenizer.ggml.eos_token_id": _Count,
        "tokenizer.ggml.eot_token_id": _Count,
        "tokenizer.ggml.eom_token_id": _Count,
        "tokenizer.ggml.padding_token_id": _Count,
        "tokenizer.ggml.unknown_token_id": _Count,
    },
    total=False,
)


class StoredTensor:
    """A tensor of a mapped file, whose type there is `kind`, such as Q4_K; indexing dequantises rows to float32.

    The shape is in Hugging Face's order, [d_out, d_in] for a matrix, and `base` is the mapped file.
    """

    dtype = np.dtype(np.float32)

    def __init__(
        self,
        data: mmap.mmap,
        start: int,
        shape: tuple[int, ...],
        kind: str,
        row_bytes: int,
    ):
        self.base = data
        self.shape = shape
        self.kind = kind
        self._blocks = np.ndarray((*shape[:-1], row_bytes), np.uint8, data, start)
        self._order: np.ndarray | None = None
        self._columns: np.ndarray | None = None
        self._place = GGUFTensor("")

    @property
    def stored_dtype(self) -> str:
        """The dtype of `as_stored`, or the name of a quantised type."""
        return str(
            self.dtype if self._place.offset else _PLAIN.get(self.kind, self.kind)
        )

    def as_stored(self, rows: slice) -> np.ndarray:
        """Return rows [n, d_in] in the file's dtype, or the bytes [n, ...] of their blocks (of a vector all)."""
        if self.kind in _PLAIN:
            return self[rows].astype(self.stored_dtype)
        return self._stored(rows) if len(self.shape) > 1 else self._blocks

    @property
    def in_int8(self) -> bool:
        """Return whether codes and scales can be kept: of Q8_0, if no block has its columns apart."""
        if self.kind != "Q8_0" or self._columns is None:
            return self.kind == "Q8_0"
        return bool((np.diff(self._columns.reshape(-1, 32)) == 1).all())

    def changed(self, place: GGUFTensor) -> "StoredTensor":
        """Return the tensor as Hugging Face has it."""
        copy = StoredTensor.__new__(StoredTensor)
        copy.__dict__.update(self.__dict__, _place=place)
        if place.order is not None and place.axis < len(self.shape):
            with contextlib.suppress(
                ValueError
            ):  # a wrong shape is reported where the model's is known
                order = np.argsort(place.order(self.shape[place.axis]))
                copy._order, copy._columns = (
                    (None, order) if place.axis else (order, None)
                )
        if place.change == "taps" and len(self.shape) > 1:
            copy.shape = (self.shape[0], 1, *self.shape[1:])
        return copy

    # The loader of a model refuses numbers that are not finite.
    @np.errstate(invalid="ignore", over="ignore", divide="ignore")
    def __getitem__(self, rows: slice) -> np.ndarray:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        if self._blocks.ndim == 1:
            numbers = dequantize(self._blocks, GGMLQuantizationType[self.kind])
            numbers = numbers[rows if self._order is None else self._order[rows]]
        else:
            blocks = self._stored(rows)
            # gguf takes 16 rows at a time, and for short rows up to twice as long: join four to one.
            joined = math.gcd(len(blocks), 4) if self.shape[-1] <= _SHORT else 1
            wide = blocks.reshape(-1, joined * blocks.shape[-1])
            numbers = dequantize(wide, GGMLQuantizationType[self.kind]).reshape(
                -1, self.shape[-1]
            )
        if self._columns is not None:
            numbers = numbers[..., self._columns]
        if self._place.change == "decay":
            numbers = np.log(-numbers, dtype=np.float64).astype(np.float32)
        numbers = numbers.reshape(-1, *self.shape[1:])
        return (
            numbers - np.float32(self._place.offset) if self._place.offset else numbers
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)

    def codes(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the codes [d_out, d_in] (int8) and the scales [d_out, d_in / 32] (float16) of a matrix in Q8_0."""
        blocks = self._stored(slice(None)).reshape(self.shape[0], -1, 34)
        if self._columns is not None:
            blocks = blocks[:, self._columns[::32] // 32]
        scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
        return np.ascontiguousarray(blocks[..., 2:]).view(np.int8).reshape(
            self.shape
        ), scales

    def _stored(self, rows: slice) -> np.ndarray:
        return self._blocks[rows if self._order is None else self._order[rows]]


class Content(NamedTuple):
    """Content of a GGUF file: values by key, and tensors by their names in the file."""

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_gguf(path: Path) -> Content:
    """Read the header of a GGUF file.

    Raises:
      ValueError: the file is missing, not GGUF, damaged, one of several parts, or has a tensor of an unsupported type.
    """
    header = _Header(path)
    if (magic := header.data[:4]) != _MAGIC:
        raise ValueError(
            f"{path} is not a GGUF file: it begins with {magic!r}, not with {_MAGIC!r}: {_AGAIN}"
        )
    header.at = 4
    (version,) = header.numbers("I")
    if version not in _VERSIONS:
        kind = "big-endian" if version & 0xFFFF == 0 else f"of version {version}"
        raise ValueError(
            f"{path} is a GGUF file that is {kind}: expected version 2 or 3, little-endian"
        )
    tensors, keys = header.numbers("Q", 2)
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = header.text()
        metadata[key] = header.value(*header.numbers("I"))
    decode_as(metadata, _Known, path, allow_unknown=True, fix=_AGAIN)
    if metadata.get("split.count", 1) > 1:
        raise ValueError(
            f"{path} is one of {metadata['split.count']} parts: merge them by `llama-gguf-split --merge`"
        )
    places = [header.place() for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    start = -(-header.at // alignment) * alignment
    by_name = {
        name: _tensor(header, name, shape, kind, start + at)
        for name, shape, kind, at in places
    }
    return Content(metadata, by_name)


def _tensor(
    header: "_Header", name: str, shape: tuple[int, ...], kind: int, start: int
) -> StoredTensor:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kinds = {kind.value: kind for kind in GGMLQuantizationType}
    title = kinds[kind].name if kind in kinds else f"type {kind}"
    try:
        block, size = GGML_QUANT_SIZES[kinds[kind]]
        dequantize(np.zeros(size, np.uint8), kinds[kind])
    except (KeyError, NotImplementedError):
        raise ValueError(
            f"{header.path}: {name} is stored as {title}, which the gguf package cannot dequantise: quantise the model "
            "again with llama.cpp's `llama-quantize`, or install a newer gguf"
        ) from None
    if not shape or shape[-1] % block or not all(shape):
        raise ValueError(
            f"{header.path}: {name} has shape {list(shape)}, and rows of {title} hold blocks of {block}: fetch it again"
        )
    row = shape[-1] // block * size
    if start + row * math.prod(shape[:-1]) > len(header.data):
        raise header.truncated(f"{name} ends behind the file's last byte")
    return StoredTensor(header.data, start, shape, title, row)


class _Header:
    """A mapped file and the place that is read next."""

    def __init__(self, path: Path):
        self.path = path
        self.data = map_file(path)
        self.at = 0

    def truncated(self, reason: str) -> ValueError:
        return ValueError(
            f"{self.path}: truncated or damaged, {reason} ({len(self.data):,}): fetch the file again"
        )

    def numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        """Read numbers of one of `struct`'s types."""
        size = count * struct.calcsize(f"<{code}")
        if self.at + size > len(self.data):
            raise self.truncated("the header ends behind the file's last byte")
        self.at += size
        return struct.unpack_from(f"<{count}{code}", self.data, self.at - size)

    def text(self) -> str:
        return self.texts(1)[0]

    def texts(self, count: int) -> list[str]:
        unpack = struct.Struct("<Q").unpack_from
        data = self.data
        at = self.at
        read = []
        try:
            for _ in range(count):
                (size,) = unpack(data, at)
                at += 8 + size
                read.append(data[at - size : at].decode())
        except (struct.error, OverflowError, UnicodeDecodeError) as error:
            raise self.truncated(f"a text cannot be read: {error}") from None
        if at > len(data):
            raise self.truncated("the header ends behind the file's last byte")
        self.at = at
        return read

    def value(self, kind: int) -> Any:
        """Read a value of one of GGUF's types."""
        if kind != _ARRAY:
            return self.values(kind, 1)[0]
        return self.values(*self.numbers("I"), *self.numbers("Q"))

    def values(self, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            return self.texts(count)
        if kind not in _SCALARS:
            raise self.truncated(f"a value is of type {kind}, which GGUF lacks")
        return list(self.numbers(_SCALARS[kind], count))

    def place(self) -> tuple[str, tuple[int, ...], int, int]:
        """Read a tensor's name, shape, type and offset after the header."""
        name = self.text()
        (axes,) = self.numbers("I")
        shape = self.numbers("Q", axes)
        return name, shape[::-1], *self.numbers("I"), *self.numbers("Q")
