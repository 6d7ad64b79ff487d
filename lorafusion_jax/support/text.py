"""Text from outside, as it is printed: on one line, and without what a terminal would obey."""

import re
from collections.abc import Sequence

# What a terminal obeys, halves of characters, and separators of lines and paragraphs; no line breaks and tabs.
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_FILE_ENDINGS = (
    *(".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".txt", ".yaml", ".yml"),
    *(".gguf", ".safetensors", ".bin", ".pt", ".pth", ".npz", ".zip", ".tar", ".gz"),
)
# `owner/name`, with `@revision`.
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(.+))?")
# `name` or `owner/name`, with `@revision` and `:config`.
DATASET_ID = re.compile(
    r"([\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?:@([\w./-]+))?(?::([\w.-]+))?"
)


def some(names: Sequence[str]) -> str:
    """Return the first 20 of a file's names as text for a message."""
    first = [name if name.isprintable() else repr(name) for name in names[:20]]
    return ", ".join(first) + (
        f" and {len(names) - 20} more" if len(names) > 20 else ""
    )


def is_file_name(source: str) -> bool:
    """Return whether a source ends as a file does, so that it is not a name on the hub."""
    return source.lower().endswith(_FILE_ENDINGS)


def printable(text: str) -> str:
    """Return a text with escapes for the characters that control a terminal."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """Return a text as `printable` does, with line breaks escaped too."""
    return printable(text).replace("\n", "\\n")
