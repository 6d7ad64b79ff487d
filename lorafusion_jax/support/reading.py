"""Files in: JSON is read as the type that it must have.

The types are dataclasses and TypedDicts. msgspec decodes them: it is imported in 5 ms, pydantic in 47.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from .text import printable
from .version import __version__

T = TypeVar("T")

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclasses.dataclass(eq=False)
class FileError(ValueError):
    """A file cannot be used.

    Attributes:
      file: path, with the number of the line in a file of lines; empty until `error_context` adds it.
      field: a field such as `options.recipe.epochs`; empty for the whole file.
      got: the field's value, or the fault of the whole file.
      expected: description of valid values; may be empty.
      fix: remedy.
      version: the version that wrote the file, if it is another one; else empty.
    """

    file: str | Path
    _: dataclasses.KW_ONLY
    got: str
    fix: str
    field: str = ""
    expected: str = ""
    version: str = ""

    def __str__(self) -> str:
        place = f"{self.file}: " if self.file else ""
        fault = f"{self.field} is {self.got}" if self.field else self.got
        needed = f"expected {self.expected}; " if self.expected else ""
        message = f"{place}{fault}: {needed}{self.fix}"
        if not self.version:
            return message
        return f"{message} (written by version {self.version}, this is {__version__})"


def expand_user(source: str | Path) -> Path:
    """Return a path with `~` replaced by the home folder; unknown users are left unchanged."""
    return Path(os.path.expanduser(source))


def read_json(
    path: Path, kind: type[T] | Any, what: str, *, allow_unknown: bool = False
) -> T:
    """Read a JSON file as an object of a type, which is made of dataclasses and TypedDicts.

    `what` is the kind of its folder, such as "a converted pool". Fields that `kind` lacks are an error, unless
    `allow_unknown` is true because another program wrote the file.

    Raises:
      FileError: the file is missing, not JSON, a Git LFS pointer, or of another type.
    """
    if not path.parent.exists():
        raise FileError(
            path.parent, got="does not exist", fix=f"give the folder of {what}"
        )
    if not path.is_file():
        raise FileError(path.parent, got=f"not {what}", fix=f"it has no {path.name}")
    return decode(path.read_bytes(), kind, path, allow_unknown=allow_unknown)


def read_lines(
    path: Path,
    kind: type[T] | Any = dict[str, Any],
    *,
    allow_unknown: bool = False,
) -> list[T]:
    """Read a file of JSON lines, none if it does not exist; raises `read_json`'s errors.

    A last line that a killed process left incomplete is left out, and so are blank lines.
    """
    if not path.exists():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    if is_object(last):
        lines.append(last)
    return [
        decode(
            line,
            kind,
            f"{path}, line {number}",
            allow_unknown=allow_unknown,
            fix="fix or remove the line",
        )
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def decode(
    content: bytes,
    kind: type[T] | Any,
    where: str | Path,
    *,
    allow_unknown: bool = False,
    fix: str = "restore it from a copy",
) -> T:
    """Return JSON, also with NaN and infinity, as an object of a type; raises `read_json`'s errors."""
    if content.startswith(_LFS_POINTER):
        raise _pointer(where)
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FileError(where, got=f"not JSON ({error})", fix=fix) from None
    return decode_as(raw, kind, where, allow_unknown=allow_unknown, fix=fix)


def decode_as(
    raw: Any,
    kind: type[T] | Any,
    where: str | Path,
    *,
    allow_unknown: bool = False,
    fix: str = "restore it from a copy",
) -> T:
    """Return decoded JSON as an object of a type; raises `read_json`'s errors."""
    version = other_version(raw)
    try:
        value = msgspec.convert(raw, kind, dec_hook=_path)
        plain = raw if allow_unknown else msgspec.to_builtins(value, enc_hook=str)
        unknown = next(_beyond(raw, plain), None)
    except (ValueError, RecursionError) as error:
        raise FileError(where, got=str(error), fix=fix, version=version) from None
    if unknown is not None:
        fix = f"remove it, or {fix}"
        raise FileError(where, field=unknown, got="unknown", fix=fix, version=version)
    return value


def is_object(line: bytes) -> bool:
    """Return whether a line is a JSON object; one that was cut off is not."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def show(text: str, *, end: str = "\n", file: Any = None) -> None:
    """Print text that may hold names from files as `printable` returns it, by default on standard output."""
    print(printable(text), end=end, file=file)


@contextlib.contextmanager
def utf8(where: str | Path) -> Iterator[None]:
    """Raise a FileError of `where` if text in the block is not UTF-8."""
    try:
        yield
    except UnicodeError as error:
        raise FileError(
            where, got=f"not UTF-8 text ({error})", fix="save it as UTF-8"
        ) from None


@contextlib.contextmanager
def error_context(where: str | Path) -> Iterator[None]:
    """Add the name of a file to ValueErrors in the block that have none."""
    try:
        yield
    except FileError as error:
        raise error if error.file else dataclasses.replace(error, file=where) from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def check_name(name: str) -> None:
    """Raise a FileError for a file name that is not UTF-8, because JSON cannot hold it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise FileError(
            repr(name), got="a name that is not UTF-8 text", fix="rename it"
        ) from None


def _path(kind: type, value: Any) -> Path:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise ValueError


def _beyond(raw: Any, value: Any, field: str = "") -> Iterator[str]:
    """Yield the fields of JSON that the object made from it lacks."""
    if isinstance(raw, dict) and isinstance(value, dict):
        for name, inner in raw.items():
            path = f"{field}.{name}".lstrip(".")
            if name in value:
                yield from _beyond(inner, value[name], path)
            else:
                yield path
    elif isinstance(raw, list):
        for n, (inner, other) in enumerate(zip(raw, value, strict=False)):
            yield from _beyond(inner, other, f"{field}[{n}]")


def other_version(raw: Any) -> str:
    """Return the version that wrote a file if it is recorded and is another one; else an empty text."""
    for place in ("versions", "environment"):
        raw = raw.get(place, raw) if isinstance(raw, dict) else {}
        raw = raw.get("versions", raw) if isinstance(raw, dict) else {}
    written = (
        raw.get("lorafusion-jax", __version__) if isinstance(raw, dict) else __version__
    )
    return "" if written == __version__ else repr(written)


def check_lfs(path: Path) -> None:
    """Raise a FileError if the file is a Git LFS pointer."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise _pointer(path)


def _pointer(path: str | Path) -> FileError:
    return FileError(
        path,
        got="this is a Git LFS pointer, not the file itself",
        fix="fetch the file (git lfs install, then git lfs pull)",
    )
