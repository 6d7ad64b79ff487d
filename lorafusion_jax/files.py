"""Files in and out: JSON is read as the type that it must have, and written files are complete or absent.

The types are dataclasses and TypedDicts. msgspec decodes them: it is imported in 5 ms, pydantic in 47.
"""

import contextlib
import dataclasses
import errno
import json
import os
import re
import reprlib
import secrets
import types
import typing
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, TypeVar

import msgspec

from . import __version__

T = TypeVar("T")

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_LARGEST = 1 << 28  # bytes of a file that is read whole
_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # marks that reorder text
_MISSING = object()
_SPELL = reprlib.Repr()
_SPELL.maxlevel, _SPELL.maxstring, _SPELL.maxlong, _SPELL.maxother = 3, 120, 120, 120
_KINDS = {
    int: "an integer",
    float: "a number",
    str: "a text",
    bool: "true or false",
    type(None): "null",
    Path: "a path",
    dict: "an object",
    list: "a list",
}


class FileError(ValueError):
    """A file cannot be used.

    Attributes:
      file: path, with the number of the line in a file of lines; empty until the caller adds it with `at`.
      field: a field such as `options.recipe.epochs`; empty for the whole file.
      got: the field's value, or the fault of the whole file.
      expected: description of valid values; may be empty.
      fix: remedy.
      version: the version that wrote the file, if it is another one; else empty.
    """

    def __init__(self, file: str | Path, *, got: str, fix: str, field: str = "", expected: str = "", version: str = ""):
        self.file, self.field, self.got, self.expected, self.fix = str(file), field, got, expected, fix
        self.version = version
        place = f"{self.file}: " if self.file else ""
        found = f"{field} is {got}" if field else got
        needed = f"expected {expected}; " if expected else ""
        other = f" (written by version {version}, this is {__version__})" if version else ""
        super().__init__(f"{place}{found}: {needed}{fix}{other}")

    def at(self, file: str | Path) -> "FileError":
        """Return the same fault of this file."""
        return FileError(file, **{name: value for name, value in vars(self).items() if name != "file"})


class WriteError(OSError):
    """A folder cannot be written to; its files are unchanged."""

    def __init__(self, folder: Path, number: int):
        super().__init__(number, os.strerror(number))
        self.folder = folder

    def __str__(self) -> str:
        assert self.errno is not None
        why, fix = (_OF_WRITING | _OF_READING_TOO)[self.errno]
        return (
            f"{self.folder} cannot be written: {why} ({self.strerror}): {fix}, or give another folder. "
            "Files that were saved before are unchanged"
        )


_NO_LOCKS = "its file system has no locks, which keep two processes apart", "mount it with locks"
_FORBIDDEN = "that is not permitted", "change its owner or mode"
_GONE = "it is gone", "make or mount it again"
# Cause and remedy of the operating system's errors. Reading does not raise these ...
_OF_WRITING = {
    errno.ENOSPC: ("the disk is full", "free some of it"),
    errno.EDQUOT: ("the quota is used up", "remove files there, or raise the quota"),
    errno.EROFS: ("its file system is read-only", "mount it for writing"),
    errno.EFBIG: ("a file would be larger than allowed", "raise the limit (ulimit -f)"),
    errno.ENOLCK: _NO_LOCKS,
}
# ... but it raises these, perhaps for another folder.
_OF_READING_TOO = {
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.ENOENT: _GONE,
    errno.ENOTDIR: ("a part of its path is a file", "move that file"),
    errno.ESTALE: _GONE,
    errno.EIO: ("its disk fails", "check the disk"),
}


def read_json(path: Path, kind: type[T] | Any, what: str, *, own: bool = True) -> T:
    """Read a JSON file as an object of a type, which is made of dataclasses and TypedDicts.

    `what` is the kind of its folder, such as "a converted pool". If `own` is true, this package wrote the file, and a
    field that `kind` lacks is an error.

    Raises:
      FileError: the file is missing, not JSON, too large, nested too deeply, a Git LFS pointer, or of another type.
    """
    if not path.is_file():
        raise FileError(path.parent, got=f"not {what}", fix=f"it has no {path.name}")
    check_regular(path)
    if (size := path.stat().st_size) > _LARGEST:
        raise FileError(path, got=f"has {size:,} bytes", expected=f"at most {_LARGEST:,}", fix="restore it from a copy")
    return decode(path.read_bytes(), kind, path, own=own)


def read_lines(path: Path, kind: type[T] | Any, *, own: bool = True) -> list[T]:
    """Read a file of JSON lines, without a last line that a killed process left incomplete; `read_json`'s errors."""
    check_regular(path)
    *lines, last = path.read_bytes().split(b"\n")
    if is_object(last):
        lines.append(last)
    fix = "fix or remove the line"
    return [decode(line, kind, f"{path}, line {n}", own=own, fix=fix) for n, line in enumerate(lines, start=1)]


def decode(
    content: bytes, kind: type[T] | Any, where: str | Path, *, own: bool = True, fix: str = "restore it from a copy"
) -> T:
    """Return the JSON in some bytes as an object of a type; raises `read_json`'s errors."""
    if content.startswith(_LFS_POINTER):
        raise _pointer(where)
    try:
        raw = msgspec.json.decode(content)
        parse_json(content)  # msgspec takes the last of equal keys
    except (ValueError, RecursionError) as error:  # msgspec's own errors are ValueErrors
        raise FileError(where, got=f"not JSON ({error})", fix=fix) from None
    return structured(raw, kind, where, own=own, fix=fix)


def parse_json(content: bytes | str, *, parse_int: Callable[[str], Any] = int) -> Any:
    """Return any JSON, also with NaN and infinity; raises a ValueError or RecursionError.

    A key that an object has twice is an error too: other programs may take the value that this one would ignore.
    """

    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        check_once([key for key, _ in pairs])
        return dict(pairs)

    return json.loads(content, parse_int=parse_int, object_pairs_hook=fields)


def check_once(keys: Sequence[str]) -> None:
    """Raise a ValueError for a key that is given twice."""
    if len(set(keys)) < len(keys):
        ((twice, _),) = Counter(keys).most_common(1)
        raise ValueError(f"{shown(twice)} is given twice: keep one")


def structured(
    raw: Any,
    kind: type[T] | Any,
    where: str | Path,
    *,
    own: bool = True,
    fix: str = "restore it from a copy",
    whole: Any = None,
) -> T:
    """Return decoded JSON as an object of a type; raises `read_json`'s errors.

    `whole` is the JSON that contains `raw` and the version that wrote the file; by default `raw`.
    """
    try:
        found = msgspec.convert(raw, kind, dec_hook=_from_text)
        unknown = next(_beyond(raw, msgspec.to_builtins(found, enc_hook=str)), None) if own else None
    except RecursionError:
        raise FileError(where, got="nested too deeply", fix=fix) from None
    except UnicodeEncodeError as error:  # half a character
        raise FileError(where, got=f"not UTF-8 text ({error})", fix=fix) from None
    except msgspec.ValidationError:
        field, value, hint = _fault(raw, kind)
        version = _other_version(whole or raw)
        got = "missing" if value is _MISSING else shown(value)
        if not field:
            got = f"holds {_KINDS[type(raw)]}, not {_described(hint)}"
            raise FileError(where, got=got, fix=fix, version=version) from None
        raise FileError(where, field=field, got=got, expected=_described(hint), fix=fix, version=version) from None
    if unknown is not None:
        fix = f"remove it, or {fix}"
        raise FileError(where, field=unknown, got="unknown", fix=fix, version=_other_version(whole or raw))
    return found


def is_object(line: bytes) -> bool:
    """Return whether a line is a JSON object; one that was cut off is not."""
    try:
        return isinstance(msgspec.json.decode(line), dict)
    except (ValueError, RecursionError):
        return False


def shown(value: Any) -> str:
    """Return a value of a file as text for a message, shortened."""
    return _SPELL.repr(value)


def some(names: Sequence[str]) -> str:
    """Return the first 20 of a file's names as text for a message."""
    first = [name if name.isprintable() and len(name) <= 120 else shown(name) for name in names[:20]]
    return ", ".join(first) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def printable(text: str) -> str:
    """Return a text with escapes for the characters that control a terminal or turn its direction."""

    def shows(c: str) -> bool:
        return c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") and c not in _TURNING

    return "".join(c if shows(c) else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """Return a text as `printable` does, with line breaks escaped too."""
    return printable(text).replace("\n", "\\n")


def show(text: str, *, end: str = "\n", file: Any = None) -> None:
    """Print text that may hold names from files as `printable` returns it, by default on standard output."""
    print(printable(text), end=end, file=file)


@contextlib.contextmanager
def utf8(where: str | Path) -> Iterator[None]:
    """Raise a FileError of `where` if text in the block is not UTF-8."""
    try:
        yield
    except UnicodeError as error:
        raise FileError(where, got=f"not UTF-8 text ({error})", fix="save it as UTF-8") from None


@contextlib.contextmanager
def named(where: str | Path) -> Iterator[None]:
    """Add the name of a file to ValueErrors in the block that have none."""
    try:
        yield
    except FileError as error:
        raise error if error.file else error.at(where) from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def check_name(name: str) -> None:
    """Raise a FileError for a file name that is not UTF-8, because JSON cannot hold it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise FileError(shown(name), got="a name that is not UTF-8 text", fix="rename it") from None


def _from_text(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str) and "\0" not in value:
        return Path(value)
    raise ValueError


def _beyond(raw: Any, found: Any, field: str = "") -> Iterator[str]:
    """Yield the fields of JSON that the object made from it lacks."""
    if isinstance(raw, dict) and isinstance(found, dict):
        for name, value in raw.items():
            inner = f"{field}.{name}".lstrip(".")
            yield from _beyond(value, found[name], inner) if name in found else [inner]
    elif isinstance(raw, list):
        for n, (value, other) in enumerate(zip(raw, found, strict=False)):
            yield from _beyond(value, other, f"{field}[{n}]")


def _fault(value: Any, hint: Any, field: str = "") -> tuple[str, Any, Any]:
    """Return the first field with a value of another type, the value and the type."""
    for name, inner, of_inner in _parts(value, hint):
        if inner is _MISSING:
            return f"{field}{name}".lstrip("."), inner, of_inner
        try:
            msgspec.convert(inner, of_inner, dec_hook=_from_text)
        except msgspec.ValidationError:
            return _fault(inner, of_inner, f"{field}{name}")
    return field.lstrip("."), value, hint


def _parts(value: Any, hint: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, value and type of each field or item that a value of a type should have."""
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    for option in _options(hint):
        origin, inner = typing.get_origin(option), typing.get_args(option)
        if isinstance(value, dict) and (dataclasses.is_dataclass(option) or typing.is_typeddict(option)):
            needed = getattr(option, "__required_keys__", None)
            if needed is None:
                fields = dataclasses.fields(option)
                needed = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
            for name, of_field in typing.get_type_hints(option, include_extras=True).items():
                if typing.get_origin(of_field) in (typing.Required, typing.NotRequired):
                    of_field = typing.get_args(of_field)[0]
                if name in value or name in needed:
                    yield f".{name}", value.get(name, _MISSING), of_field
        elif isinstance(value, dict) and origin is dict:
            yield from ((f".{name}", each, inner[1]) for name, each in value.items())
        elif isinstance(value, list) and origin in (list, tuple):
            yield from ((f"[{n}]", each, inner[0]) for n, each in enumerate(value))


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _described(hint: Any) -> str:
    """Return the description of a type for a message."""
    options = _options(hint)
    if len(options) > 1:
        return " or ".join(map(_described, options))
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        meta = next((each for each in inner[1:] if isinstance(each, msgspec.Meta)), msgspec.Meta())
        bounds = "" if meta.ge is None else f" from {meta.ge:,} to {meta.le:,}" if meta.le else f" of {meta.ge} or more"
        return meta.description or f"{_described(inner[0])}{bounds}"
    if origin is Literal:
        return " or ".join(map(repr, inner))
    return _KINDS.get(hint) or ("a list" if origin in (list, tuple) else "an object")


def _other_version(raw: Any) -> str:
    """Return the version that wrote a file if it is recorded and is another one; else an empty text."""
    for place in ("versions", "environment"):
        raw = raw.get(place, raw) if isinstance(raw, dict) else {}
        raw = raw.get("versions", raw) if isinstance(raw, dict) else {}
    written = raw.get("lorafusion-jax", __version__) if isinstance(raw, dict) else __version__
    return "" if written == __version__ else shown(written)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raise faults of the disk, while a block writes into a folder, as a WriteError.

    tensorstore and safetensors raise other errors, whose messages contain the system's code.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        found = re.search(r"os_error_code='(\d+)'|\(os error (\d+)\)", str(error))
        code = getattr(error, "errno", None) or (int(found[1] or found[2]) if found else None)
        name = getattr(error, "filename", None)
        here = not folder.exists() or (
            name is not None and Path(os.fsdecode(name)).absolute().is_relative_to(folder.absolute())
        )
        if code in _OF_WRITING or (code in _OF_READING_TOO and here):
            raise WriteError(folder, code) from error
        raise


def check_regular(path: Path) -> None:
    """Raise a FileError for a pipe, a device, a folder or a file of the kernel, because reading one may never end."""
    if path.exists() and not path.is_file():
        raise FileError(path, got="a pipe, a device or a folder, not a file", fix="give a file")
    if path.is_file() and path.stat().st_size == 0:
        with path.open("rb") as file:
            if file.read(1):
                raise FileError(path, got="a file of the kernel, which has no size", fix="give a file on a disk")


def check_no_link(path: Path) -> None:
    """Raise a FileError for a link or a special file where a file is written in place."""
    if os.path.lexists(path) and (path.is_symlink() or not (path.is_file() or path.is_dir())):
        raise FileError(path, got="a link, which could lead out of its folder, or a special file", fix="remove it")
    if path.is_file() and path.stat().st_nlink > 1:
        got = "a hard link, so writing to it would change a file elsewhere"
        raise FileError(path, got=got, fix="copy it to a new file, and give that its name")


def write(path: Path, writer: Callable[[BinaryIO], Any]) -> None:
    """Let a function write a file under a fresh name, and rename the file once it is complete.

    Raises a FileError for a folder, and a WriteError if the disk is full, read-only or gone; the file is unchanged.
    """
    with _fresh(path) as file:
        writer(file)
        file.flush()
        Path(file.name).replace(path)


def check_writable(path: Path) -> None:
    """Make a file's folder, and raise what `write` would raise there, before anything is computed for the file."""
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _fresh(path):
        pass


@contextlib.contextmanager
def _fresh(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file next to a path, which is removed at the end of the block unless it was renamed."""
    if path.is_dir():
        raise FileError(path, got="a folder", fix="give a file")
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    with writing(path.parent):
        try:
            with partial.open("xb") as file:  # not an existing link or pipe, which others may have put there
                yield file
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, in UTF-8, that is complete or absent."""
    content = text.encode()
    write(path, lambda file: file.write(content))


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
