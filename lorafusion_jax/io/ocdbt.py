"""A bound on what the keys of an OCDBT store take in memory: tensorstore's format, in which orbax keeps arrays.

Keys, small values and references to large ones are in nodes, which tensorstore decompresses whole: 30 kB become 1 GB.

Sources: tensorstore's "OCDBT on-disk format" for the nodes, RFC 8878 for the frames of zstd in them.
"""

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .source import map_file

# A manifest, a node of the tree of versions, and a node of the tree of keys.
_MAGICS = (b"\x0c\xdb\x3a\x2a", b"\x0c\xdb\x12\x34", b"\x0c\xdb\x20\xde")
_FIRST = np.frombuffer(_MAGICS[0], "<u2")[0]
_PIECE = 1 << 18  # bytes that are searched at once, which stay in the cache
_ZSTD, _FRAME, _SKIPPED = 1, 0xFD2FB528, range(0x184D2A50, 0x184D2A60)
_RAW, _REPEATED, _COMPRESSED = range(3)  # kinds of block
_LARGEST_BLOCK = 1 << 17  # bytes, decompressed


def most_decoded(path: Path) -> int:
    """Return an upper bound on the size, in bytes, that all nodes in a file of a store have when decompressed."""
    if not path.stat().st_size:
        return 0
    data = map_file(path)
    return sum(_of_node(data, at) for at in _starts(data) if data[at : at + 4] in _MAGICS)


def _starts(data: mmap.mmap) -> Iterator[int]:
    """Yield the places where the first two bytes of a node may be."""
    numbers = np.frombuffer(data, np.uint8)
    for start in range(0, len(numbers), _PIECE):
        for first in (start, start + 1):
            piece = numbers[first : first + _PIECE]
            pairs = piece[: len(piece) // 2 * 2].view("<u2")
            yield from (first + 2 * np.flatnonzero(pairs == _FIRST)).tolist()


def _of_node(data: mmap.mmap, at: int) -> int:
    try:
        (length,) = struct.unpack_from("<Q", data, at + 4)
        content = data[at + 12 : at + length]
        version_end = _end_of_number(content, 0)
        if content[version_end] != _ZSTD:
            return 0
        return _of_frames(content, _end_of_number(content, version_end))
    except (struct.error, IndexError, OverflowError):  # it is cut off, or no node
        return 0


def _end_of_number(content: bytes, at: int) -> int:
    """Return the end of a number in LEB128, of which all bytes but the last have their highest bit set."""
    while content[at] >= 0x80:
        at += 1
    return at + 1


def _of_frames(content: bytes, at: int) -> int:
    total = 0
    while at + 8 <= len(content):
        magic, size = struct.unpack_from("<II", content, at)
        if magic in _SKIPPED:
            at += 8 + size
            continue
        if magic != _FRAME:
            break
        descriptor = content[at + 4]
        single = descriptor >> 5 & 1  # the window is the frame's size, and not given
        dictionary, sized = (0, 1, 2, 4)[descriptor & 3], (single, 2, 4, 8)[descriptor >> 6]
        at += 5 + (not single) + dictionary + sized
        window = int.from_bytes(content[at - sized : at], "little") + 256 * (sized == 2) if single else _LARGEST_BLOCK
        largest = min(window, _LARGEST_BLOCK)
        last = False
        while not last and at + 3 <= len(content):
            header = int.from_bytes(content[at : at + 3], "little")
            last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
            total += largest if kind == _COMPRESSED else size
            at += 3 + (1 if kind == _REPEATED else size)
        at += 4 * (descriptor >> 2 & 1)  # a checksum
    return total
