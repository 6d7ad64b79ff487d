"""Text from outside, as it is shown: shortened, on one line, and without what a terminal would obey."""

import re
import reprlib
import unicodedata
from collections.abc import Sequence
from typing import Any

_TURNING = (
    "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # marks that reorder text
)
_FILE_ENDINGS = (
    *(".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".txt", ".yaml", ".yml"),
    *(".gguf", ".safetensors", ".bin", ".pt", ".pth", ".npz", ".zip", ".tar", ".gz"),
)
# `name` or `owner/name`, with `@revision` and `:config`.
DATASET_ID = re.compile(
    r"([\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?:@([\w./-]+))?(?::([\w.-]+))?"
)
_SPELL = reprlib.Repr()


def shown(value: Any) -> str:
    """Return a value of a file as text for a message, shortened."""
    return _SPELL.repr(value)


def some(names: Sequence[str]) -> str:
    """Return the first 20 of a file's names as text for a message."""
    first = [
        name if name.isprintable() and len(name) <= 120 else shown(name)
        for name in names[:20]
    ]
    return ", ".join(first) + (
        f" and {len(names) - 20} more" if len(names) > 20 else ""
    )


def is_file_name(source: str) -> bool:
    """Return whether a source ends as a file does, so that it is not a name on the hub."""
    return source.lower().endswith(_FILE_ENDINGS)


def printable(text: str) -> str:
    """Return a text with escapes for the characters that control a terminal or turn its direction."""

    def shows(c: str) -> bool:
        return (
            c in "\n\t"
            or unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp")
            and c not in _TURNING
        )

    return "".join(c if shows(c) else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """Return a text as `printable` does, with line breaks escaped too."""
    return printable(text).replace("\n", "\\n")
