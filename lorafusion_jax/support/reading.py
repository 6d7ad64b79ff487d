"""Files in: JSON is read as the type that it must have.

The types are dataclasses and TypedDicts. msgspec decodes them: it is imported in 5 ms, pydantic in 47.
"""

import contextlib
import dataclasses
import json
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from .text import _SPELL, printable, shown
from .version import __version__

T = TypeVar("T")

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_LARGEST = 1 << 28  # bytes of a file that is read whole
_MISSING = object()
_SPELL.maxlevel = 3
_SPELL.maxstring = 120
_SPELL.maxlong = 120
_SPELL.maxother = 120
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

    def __init__(
        self,
        file: str | Path,
        *,
        got: str,
        fix: str,
        field: str = "",
        expected: str = "",
        version: str = "",
    ):
        self.file = str(file)
        self.field = field
        self.got = got
        self.expected = expected
        self.fix = fix
        self.version = version
        place = f"{self.file}: " if self.file else ""
        fault = f"{field} is {got}" if field else got
        needed = f"expected {expected}; " if expected else ""
        other = (
            f" (written by version {version}, this is {__version__})" if version else ""
        )
        super().__init__(f"{place}{fault}: {needed}{fix}{other}")

    def at(self, file: str | Path) -> "FileError":
        """Return the same fault of this file."""
        return FileError(
            file,
            **{name: value for name, value in vars(self).items() if name != "file"},
        )


def read_json(path: Path, kind: type[T] | Any, what: str, *, own: bool = True) -> T:
    """Read a JSON file as an object of a type, which is made of dataclasses and TypedDicts.

    `what` is the kind of its folder, such as "a converted pool". If `own` is true, this package wrote the file, and a
    field that `kind` lacks is an error.

    Raises:
      FileError: the file is missing, not JSON, too large, nested too deeply, a Git LFS pointer, or of another type.
    """
    if not path.parent.exists():
        raise FileError(
            path.parent, got="does not exist", fix=f"give the folder of {what}"
        )
    if not path.is_file():
        raise FileError(path.parent, got=f"not {what}", fix=f"it has no {path.name}")
    check_regular(path)
    if (size := path.stat().st_size) > _LARGEST:
        raise FileError(
            path,
            got=f"has {size:,} bytes",
            expected=f"at most {_LARGEST:,}",
            fix="restore it from a copy",
        )
    return decode(path.read_bytes(), kind, path, own=own)


def read_lines(path: Path, kind: type[T] | Any, *, own: bool = True) -> list[T]:
    """Read a file of JSON lines, without a last line that a killed process left incomplete; `read_json`'s errors."""
    if not path.exists():
        raise FileError(path, got="missing", fix="restore it from a copy")
    fix = "fix or remove the line"
    return [
        decode(line, kind, where, own=own, fix=fix) for where, line in whole_lines(path)
    ]


def whole_lines(path: Path) -> list[tuple[str, bytes]]:
    """Return the lines of a file of JSON lines with their places, without a last line that was cut off."""
    check_regular(path)
    *lines, last = path.read_bytes().split(b"\n")
    if is_object(last):
        lines.append(last)
    return [(f"{path}, line {n}", line) for n, line in enumerate(lines, start=1)]


def decode(
    content: bytes,
    kind: type[T] | Any,
    where: str | Path,
    *,
    own: bool = True,
    fix: str = "restore it from a copy",
) -> T:
    """Return the JSON in some bytes as an object of a type; raises `read_json`'s errors."""
    if content.startswith(_LFS_POINTER):
        raise _pointer(where)
    try:
        raw = msgspec.json.decode(content)
        parse_json(content)  # msgspec takes the last of equal keys
    except (
        ValueError,
        RecursionError,
    ) as error:  # msgspec's own errors are ValueErrors
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
        made = msgspec.convert(raw, kind, dec_hook=_from_text)
        unknown = (
            next(_beyond(raw, msgspec.to_builtins(made, enc_hook=str)), None)
            if own
            else None
        )
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
        raise FileError(
            where,
            field=field,
            got=got,
            expected=_described(hint),
            fix=fix,
            version=version,
        ) from None
    if unknown is not None:
        fix = f"remove it, or {fix}"
        raise FileError(
            where,
            field=unknown,
            got="unknown",
            fix=fix,
            version=_other_version(whole or raw),
        )
    return made


def is_object(line: bytes) -> bool:
    """Return whether a line is a JSON object; one that was cut off is not."""
    try:
        return isinstance(msgspec.json.decode(line), dict)
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
        raise FileError(
            shown(name), got="a name that is not UTF-8 text", fix="rename it"
        ) from None


def _from_text(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str) and "\0" not in value:
        return Path(value)
    raise ValueError


def _beyond(raw: Any, made: Any, field: str = "") -> Iterator[str]:
    """Yield the fields of JSON that the object made from it lacks."""
    if isinstance(raw, dict) and isinstance(made, dict):
        for name, value in raw.items():
            inner = f"{field}.{name}".lstrip(".")
            yield from _beyond(value, made[name], inner) if name in made else [inner]
    elif isinstance(raw, list):
        for n, (value, other) in enumerate(zip(raw, made, strict=False)):
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
        origin = typing.get_origin(option)
        inner = typing.get_args(option)
        if isinstance(value, dict) and (
            dataclasses.is_dataclass(option) or typing.is_typeddict(option)
        ):
            needed = getattr(option, "__required_keys__", None)
            if needed is None:
                fields = dataclasses.fields(option)
                needed = {
                    f.name
                    for f in fields
                    if f.default is f.default_factory is dataclasses.MISSING
                }
            for name, of_field in typing.get_type_hints(
                option, include_extras=True
            ).items():
                if typing.get_origin(of_field) in (typing.Required, typing.NotRequired):
                    of_field = typing.get_args(of_field)[0]
                if name in value or name in needed:
                    yield f".{name}", value.get(name, _MISSING), of_field
        elif isinstance(value, dict) and origin is dict:
            yield from ((f".{name}", each, inner[1]) for name, each in value.items())
        elif isinstance(value, list) and origin in (list, tuple):
            yield from ((f"[{n}]", each, inner[0]) for n, each in enumerate(value))


def _options(hint: Any) -> tuple[Any, ...]:
    return (
        typing.get_args(hint)
        if typing.get_origin(hint) in (typing.Union, types.UnionType)
        else (hint,)
    )


def _described(hint: Any) -> str:
    """Return the description of a type for a message."""
    options = _options(hint)
    if len(options) > 1:
        return " or ".join(map(_described, options))
    origin = typing.get_origin(hint)
    inner = typing.get_args(hint)
    if origin is Annotated:
        meta = next(
            (each for each in inner[1:] if isinstance(each, msgspec.Meta)),
            msgspec.Meta(),
        )
        bounds = ""
        if meta.ge is not None:
            bounds = f" of {meta.ge} or more"
            if meta.le:
                bounds = f" from {meta.ge:,} to {meta.le:,}"
        return meta.description or f"{_described(inner[0])}{bounds}"
    if origin is Literal:
        return " or ".join(map(repr, inner))
    return _KINDS.get(hint) or ("a list" if origin in (list, tuple) else "an object")


def _other_version(raw: Any) -> str:
    """Return the version that wrote a file if it is recorded and is another one; else an empty text."""
    for place in ("versions", "environment"):
        raw = raw.get(place, raw) if isinstance(raw, dict) else {}
        raw = raw.get("versions", raw) if isinstance(raw, dict) else {}
    written = (
        raw.get("lorafusion-jax", __version__) if isinstance(raw, dict) else __version__
    )
    return "" if written == __version__ else shown(written)


def check_regular(path: Path) -> None:
    """Raise a FileError for a pipe, a device, a folder or a file of the kernel, because reading one may never end."""
    if path.exists() and not path.is_file():
        raise FileError(
            path, got="a pipe, a device or a folder, not a file", fix="give a file"
        )
    if path.is_file() and path.stat().st_size == 0:
        with path.open("rb") as file:
            if file.read(1):
                raise FileError(
                    path,
                    got="a file of the kernel, which has no size",
                    fix="give a file on a disk",
                )


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
