"""Sizes of the pages of a Parquet file, from their headers: Arrow allocates these, also where the footer differs.

A header is a `PageHeader` (parquet-format's parquet.thrift) in Thrift's compact protocol.
"""

import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_BYTE, _INTEGERS, _BINARY, _STRUCT, _BOOLEANS = 3, (4, 5, 6), 8, 12, (1, 2)  # types of Thrift
_UNPACKED, _PACKED = 2, 3  # fields of a header: sizes of its page


def unpacked_bytes(path: Path, columns: Iterable[Any]) -> list[int]:
    """Return the bytes of all pages of each column chunk (pyarrow's metadata of it) once they are decompressed.

    Raises a ValueError or an IndexError for headers that are damaged.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return [_of_chunk(content, column) for column in columns]


def _of_chunk(content: mmap.mmap, column: Any) -> int:
    at = column.data_page_offset
    if column.has_dictionary_page and 0 < column.dictionary_page_offset < at:
        at = column.dictionary_page_offset
    end, unpacked = at + column.total_compressed_size, 0
    while at < end:
        header, at = _header(content, at)
        unpacked += header[_UNPACKED]
        at += header[_PACKED]
    return unpacked


def _header(content: mmap.mmap, at: int, levels: int = 4) -> tuple[dict[int, int], int]:
    """Return the integers of a struct by the numbers of their fields, at least 0, and the place behind the struct."""
    integers, number = {_UNPACKED: 0, _PACKED: 0}, 0
    while head := content[at]:
        kind, at = head & 15, at + 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _integer(content, at)
        if kind in _INTEGERS:
            value, at = _integer(content, at)
            integers[number] = 0 if value % 2 else value >> 1  # odd for an integer below 0
        elif kind == _BINARY:
            length, at = _integer(content, at)
            at += length
        elif kind == _STRUCT and levels:
            _, at = _header(content, at, levels - 1)
        elif kind == _BYTE:
            at += 1
        elif kind not in _BOOLEANS:
            raise ValueError(f"a page's header holds a value of type {kind}")
    return integers, at + 1


def _integer(content: mmap.mmap, at: int) -> tuple[int, int]:
    """Return an unsigned integer of seven bits a byte, the lowest first, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        value |= (content[at] & 127) << shift
        at += 1
        if content[at - 1] < 128:
            return value, at
    raise ValueError("a page's header holds an integer of more than 64 bits")
